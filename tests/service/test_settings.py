"""Settings: which values are accepted, and which resources follow from them and the machine."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.artifacts.bundle import MANIFEST
from models.errors import ConfigError
from service.cpu_allocation import ResourceAllocation, allocate_resources, available_cpus
from service.settings import RENAMED, SHIPPED_BUNDLE, Settings
from tests.helpers.rollout_bundles import rewritten
from tests.helpers.server import run_service


def read(**environ: str) -> Settings:
    return Settings.from_environment(environ)


def error_of(**environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(**environ)
    return str(caught.value)


# The table


def test_the_default_is_the_shipped_bundle_on_a_loopback_address() -> None:
    settings = read()
    assert settings == Settings()
    assert (settings.bundle, settings.host, settings.port) == (SHIPPED_BUNDLE, "127.0.0.1", 8000)
    assert (SHIPPED_BUNDLE / MANIFEST).is_file()


def test_every_setting_has_a_help_and_a_default_within_its_limits() -> None:
    for row in dataclasses.fields(Settings):
        assert row.metadata["help"]
        default = row.default
        if isinstance(default, bool):
            assert getattr(read(**{row.name.upper(): str(int(default))}), row.name) == default
        elif isinstance(default, (int, float)):
            assert getattr(read(**{row.name.upper(): str(default)}), row.name) == default
            assert row.metadata["low"] <= default <= row.metadata["high"]


def test_a_folder_that_is_no_evaluation_is_rejected(tmp_path: Path) -> None:
    assert error_of(EVALUATIONS=str(tmp_path)) == (
        f'EVALUATIONS: "{tmp_path}" is neither a bundle nor a folder written by `finetune evaluate`.'
    )


def test_variables_are_converted_to_the_types_of_the_settings() -> None:
    settings = read(
        BUNDLE="~/mine", HOST="::", PORT=" 0 ", THREADS="7", BATCH_TIMEOUT_MS="0.5", MAX_BODY_MB="0.5", MAX_MEGAPIXELS="2.5",
        API_KEYS="ann:k1, k2 ,", CORS_ORIGINS="https://a.example,https://b.example", LOG_LEVEL="debug", PRECISION="",
    )  # fmt: skip
    assert settings.bundle == Path.home() / "mine"
    assert (settings.host, settings.port, settings.threads, settings.batch_timeout_ms) == ("::", 0, 7, 0.5)
    assert (settings.max_body_bytes, settings.max_pixels) == (2**19, 2_500_000)
    assert settings.api_keys == ("ann:k1", "k2")
    assert settings.cors_origins == ("https://a.example", "https://b.example")
    assert (settings.log_level, settings.precision) == ("debug", "auto")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("PORT", "eighty", "an integer"),
        ("PORT", "80.5", "an integer"),
        ("PORT", "65536", "0 to 65535"),
        ("PORT", "-1", "0 to 65535"),
        ("MAX_IN_FLIGHT", "0", "1 to 10000"),
        ("BATCH_TIMEOUT_MS", "soon", "a number"),
        ("BATCH_TIMEOUT_MS", "nan", "0 to 1000"),
        ("BODY_TIMEOUT_S", "inf", "0.1 to 600"),
        ("MAX_MEGAPIXELS", "100", "0.01 to 85"),
        ("WEB_CONCURRENCY", "0", "1 to 64"),
        ("ENGINE", "gpu", "auto, openvino, torch"),
        ("PRECISION", "FP32", "auto, fp32, bf16, int8"),
        ("GUNICORN_WORKER", "gevent", "tuned, stock"),
        ("SEND_TIMEOUT_S", "0", "0.1 to 600"),
        ("LOG_LEVEL", "loud", "debug, info, warning, error"),
        ("THUMBNAIL_CACHE_MB", "-1", "0 to 1000000"),
    ],
)
def test_an_invalid_value_is_rejected_with_what_was_expected(name: str, text: str, expected: str) -> None:
    error = error_of(**{name: text})
    assert error in (f"{name}: expected {expected}, got {text}.", f'{name}: expected {expected}, got "{text}".')


def test_a_missing_folder_is_rejected() -> None:
    assert error_of(DATA_DIR="/nowhere") == 'DATA_DIR: no such folder "/nowhere".'


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_rejected_with_the_new_one(old: str, new: str) -> None:
    names = {row.name.upper() for row in dataclasses.fields(Settings)}
    assert new in names
    assert old not in names
    assert error_of(**{old: "1"}) == f"{old} was renamed to {new}. Rename it in the environment."
    assert read(**{old: " "}) == read()


def test_a_server_with_an_old_name_ends_with_the_new_one(tmp_path: Path) -> None:
    ended = run_service(bundle=tmp_path, QUEUE="64")
    assert ended.returncode == 2
    assert ended.stderr == "service: QUEUE was renamed to MAX_IN_FLIGHT. Rename it in the environment.\n"


def test_limits_under_which_a_full_request_never_fits_are_rejected() -> None:
    assert "MAX_IN_FLIGHT: 8 is less than MAX_IMAGES (16)" in error_of(MAX_IN_FLIGHT="8")
    assert read(MAX_IN_FLIGHT="8", MAX_IMAGES="8").max_in_flight == 8


def test_limits_under_which_a_full_body_never_fits_are_rejected() -> None:
    assert "MAX_BUFFERED_MB: 10 is less than MAX_BODY_MB (20)" in error_of(MAX_BUFFERED_MB="10")
    assert read(MAX_BUFFERED_MB="10", MAX_BODY_MB="10").max_buffered_mb == 10


@pytest.mark.parametrize("text", [",", "ann:", "ann:secret,bob:", "secret, ,bob:", "schlüssel", "ann:secret\u200b", "a\tb"])
def test_an_empty_key_is_rejected_and_keys_are_not_shown(text: str) -> None:
    """``API_KEYS=ann:$KEY`` with KEY unset must not allow requests without a key."""
    assert error_of(API_KEYS=text) == (
        "API_KEYS: a key is empty or not printable ASCII. Write NAME:KEY or KEY, separated by commas."
    )


# Resources


def cgroup(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_max", ".max").replace("cpu_cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight_cpus")
def test_cpus_are_limited_by_the_quota_of_the_container(tmp_path: Path) -> None:
    for number, (files, expected) in enumerate(
        [
            ({}, 8),
            ({"cpu_max": "max 100000\n"}, 8),
            ({"cpu_max": "200000 100000\n"}, 2),
            ({"cpu_max": "150000 100000\n"}, 2),
            ({"cpu_max": "10000 100000\n"}, 1),
            ({"cpu_max": "1600000 100000\n"}, 8),
            ({"cpu_max": "nonsense\n"}, 8),
            ({"cpu__cpu_cfs_quota_us": "-1\n", "cpu__cpu_cfs_period_us": "100000\n"}, 8),
            ({"cpu__cpu_cfs_quota_us": "350000\n", "cpu__cpu_cfs_period_us": "100000\n"}, 4),
            ({"cpu__cpu_cfs_quota_us": "350000\n"}, 8),
        ]
    ):
        assert available_cpus(cgroup(tmp_path / str(number), **files)) == expected, files


def test_resources_follow_from_the_cpus_and_the_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.cpu_allocation.available_cpus", lambda: 8)
    assert allocate_resources(Settings()) == ResourceAllocation(
        cpus=8, workers=1, threads=80, cpus_per_worker=8, inference_threads=9, streams=8
    )
    assert allocate_resources(Settings(web_concurrency=3, max_in_flight=32)) == ResourceAllocation(
        cpus=8, workers=3, threads=48, cpus_per_worker=2, inference_threads=3, streams=2
    )
    assert allocate_resources(Settings(web_concurrency=16)) == ResourceAllocation(
        cpus=8, workers=16, threads=80, cpus_per_worker=1, inference_threads=2, streams=1
    )
    resources = allocate_resources(Settings(cpus=4, threads=9, streams=2))
    assert resources == ResourceAllocation(cpus=4, workers=1, threads=9, cpus_per_worker=4, inference_threads=5, streams=2)
    assert str(resources) == (
        "4 CPUs: 1 worker(s), each with 9 request threads, 5 threads that decode and compute, and 2 batches at a time"
    )


# `python -m service` that cannot start


def fails_to_start(code: int = 2, **env: object) -> str:
    """Run the service, which must end with ``code`` and without a traceback. Returns its standard error."""
    done = run_service(**env)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_an_invalid_setting_is_explained_in_one_line(tiny_bundle: SimpleNamespace) -> None:
    assert fails_to_start(bundle=tiny_bundle.path, port="eighty") == 'service: PORT: expected an integer, got "eighty".\n'


def taken_port(host: str) -> socket.socket:
    try:
        return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        pytest.skip(f"{host}: {error}")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_explained_in_one_line(tiny_bundle: SimpleNamespace, host: str) -> None:
    with taken_port(host) as taken:
        port = taken.getsockname()[1]
        error = fails_to_start(bundle=tiny_bundle.path, host=host, port=port)
    assert error == (
        f"service: PORT: {port} of {host} is in use. Stop the program that uses it, or set another PORT (0: any free one).\n"
    )


def test_an_address_of_another_machine_is_explained_in_one_line(tiny_bundle: SimpleNamespace) -> None:
    error = fails_to_start(bundle=tiny_bundle.path, host="192.0.2.1", port=8000)
    assert error.startswith("service: HOST: cannot listen on port 8000 of 192.0.2.1 (")
    assert error.count("\n") == 1


def test_a_missing_bundle_is_explained_in_one_line(tmp_path: Path) -> None:
    error = fails_to_start(bundle=tmp_path / "nowhere")
    assert error.startswith(f"service: {tmp_path / 'nowhere'} is not a bundle")
    assert error.count("\n") == 1


def messages_of(output: str) -> str:
    """Return the messages of a log."""
    return "\n".join(json.loads(line)["message"] for line in output.splitlines())


@pytest.fixture
def copy(tiny_bundle: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the bundle, to be modified."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "copy"))


def test_a_modified_graph_is_not_served(copy: Path) -> None:
    graph = bytearray((copy / "model.onnx").read_bytes())
    graph[len(graph) // 2] ^= 1
    (copy / "model.onnx").write_bytes(graph)
    error = messages_of(fails_to_start(3, bundle=copy))
    assert f"{copy / 'model.onnx'} was changed or damaged" in error
    assert "ready" not in error.splitlines()


def test_an_edited_manifest_is_not_served(copy: Path) -> None:
    manifest = json.loads((copy / MANIFEST).read_text(encoding="utf-8"))
    manifest["classes"].reverse()
    (copy / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert "was changed after it was written" in fails_to_start(bundle=copy)


def test_a_model_that_does_not_reproduce_its_golden_outputs_is_not_served(copy: Path) -> None:
    """For example because a library computes differently from the one that exported the bundle."""
    rewritten(copy, copy.parent / "other", wrong_golden=True)
    error = messages_of(fails_to_start(3, bundle=copy.parent / "other"))
    assert "does not reproduce its golden outputs" in error
    assert "ready" not in error.splitlines()
