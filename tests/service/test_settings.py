"""What an operator can set, what is refused, and what follows from the machine."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from models.artifacts.bundle import GOLDEN, MANIFEST, open_bundle, write_bundle
from models.errors import ConfigError
from service.resources import allocate_resources, available_cpus
from service.settings import RENAMED, SHIPPED_BUNDLE, Settings
from tests.helpers.server import run_service


def read(**environ: str) -> Settings:
    return Settings.from_environment(environ)


def refused(**environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        read(**environ)
    return str(caught.value)


# The table


def test_without_variables_it_serves_the_shipped_bundle_to_this_machine_only() -> None:
    settings = read()
    assert settings == Settings()
    assert (settings.bundle, settings.host, settings.port) == (SHIPPED_BUNDLE, "127.0.0.1", 8000)
    assert (SHIPPED_BUNDLE / MANIFEST).is_file()


def test_every_setting_has_a_variable_a_help_and_a_default_that_its_own_limits_let_pass() -> None:
    for row in dataclasses.fields(Settings):
        assert row.metadata["help"]
        default = row.default
        if isinstance(default, bool):
            assert getattr(read(**{row.name.upper(): str(int(default))}), row.name) == default
        elif isinstance(default, (int, float)):
            assert getattr(read(**{row.name.upper(): str(default)}), row.name) == default
            assert row.metadata["least"] <= default <= row.metadata["most"]


def test_an_evaluation_that_is_none_is_refused(tmp_path: Path) -> None:
    said = refused(EVALUATIONS=str(tmp_path))
    assert str(tmp_path) in said
    assert "finetune evaluate" in said


def test_variables_are_read_by_their_kind() -> None:
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
    ("name", "text", "words"),
    [
        ("PORT", "eighty", "must be a whole number"),
        ("PORT", "80.5", "must be a whole number"),
        ("PORT", "65536", "from 0 to 65535"),
        ("PORT", "-1", "from 0 to 65535"),
        ("MAX_IN_FLIGHT", "0", "from 1 to 10000"),
        ("BATCH_TIMEOUT_MS", "soon", "must be a number"),
        ("BATCH_TIMEOUT_MS", "nan", "from 0 to 1000"),
        ("BODY_TIMEOUT_S", "inf", "from 0.1 to 600"),
        ("MAX_MEGAPIXELS", "100", "from 0.01 to 85"),
        ("WEB_CONCURRENCY", "0", "from 1 to 64"),
        ("ENGINE", "gpu", "openvino"),
        ("PRECISION", "FP32", "auto, fp32, bf16"),
        ("GUNICORN_WORKER", "gevent", "tuned, stock"),
        ("SEND_TIMEOUT_S", "0", "from 0.1 to 600"),
        ("LOG_LEVEL", "loud", "debug, info, warning, error"),
        ("DATA_DIR", "/nowhere/at/all", "no folder"),
        ("THUMBNAIL_CACHE_MB", "-1", "from 0 to 1000000"),
    ],
)
def test_a_wrong_value_is_refused_by_name(name: str, text: str, words: str) -> None:
    said = refused(**{name: text})
    assert said.startswith(f"{name} is ")
    assert text in said
    assert words in said


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_name_is_rejected_with_the_new_one(old: str, new: str) -> None:
    names = {row.name.upper() for row in dataclasses.fields(Settings)}
    assert new in names
    assert old not in names
    assert refused(**{old: "1"}) == f"{old} is now {new}; rename it in the environment."
    assert read(**{old: " "}) == read()


def test_a_server_with_an_old_name_ends_with_the_new_one(tmp_path: Path) -> None:
    ended = run_service(bundle=tmp_path, QUEUE="64")
    assert ended.returncode == 2
    assert ended.stderr == "service: QUEUE is now MAX_IN_FLIGHT; rename it in the environment.\n"


def test_a_request_that_could_never_fit_is_refused() -> None:
    assert "MAX_IMAGES is 16 and MAX_IN_FLIGHT is 8" in refused(MAX_IN_FLIGHT="8")
    assert read(MAX_IN_FLIGHT="8", MAX_IMAGES="8").max_in_flight == 8


def test_a_body_that_could_never_be_buffered_is_refused() -> None:
    assert "MAX_BUFFERED_MB is 10 and MAX_BODY_MB 20" in refused(MAX_BUFFERED_MB="10")
    assert read(MAX_BUFFERED_MB="10", MAX_BODY_MB="10").max_buffered_mb == 10


@pytest.mark.parametrize("text", [",", "ann:", "ann:secret,bob:", "secret, ,bob:", "schlüssel", "ann:secret\u200b", "a\tb"])
def test_a_key_that_is_none_is_refused_and_not_shown(text: str) -> None:
    """``API_KEYS=ann:$KEY`` with KEY unset must not open the door to all, as an empty key would."""
    said = refused(API_KEYS=text)
    assert said.startswith("API_KEYS has a key that is empty")
    assert "secret" not in said


# The plan


def cgroup(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_max", ".max").replace("cpu_cfs", "cpu.cfs")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.fixture
def eight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


@pytest.mark.usefixtures("eight")
def test_the_processors_are_those_of_the_quota(tmp_path: Path) -> None:
    for number, (files, wanted) in enumerate(
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
        assert available_cpus(cgroup(tmp_path / str(number), **files)) == wanted, files


@pytest.mark.usefixtures("eight")
def test_the_plan_shares_the_processors_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.resources.available_cpus", lambda: 8)
    plan = allocate_resources(Settings())
    assert (plan.cpus, plan.workers, plan.threads, plan.cpus_per_worker, plan.inference_threads, plan.streams) == (
        8,
        1,
        80,
        8,
        9,
        8,
    )
    plan = allocate_resources(Settings(web_concurrency=3, max_in_flight=32))
    assert (plan.workers, plan.threads, plan.cpus_per_worker, plan.inference_threads, plan.streams) == (3, 48, 2, 3, 2)
    plan = allocate_resources(Settings(web_concurrency=16))
    assert (plan.cpus_per_worker, plan.inference_threads, plan.streams) == (1, 2, 1)
    plan = allocate_resources(Settings(cpus=4, threads=9, streams=2))
    assert (plan.cpus, plan.threads, plan.cpus_per_worker, plan.inference_threads, plan.streams) == (4, 9, 4, 5, 2)
    assert "4 processors" in str(plan)


# `python -m service` where it cannot go on


def gives_up(code: int = 2, **env: object) -> str:
    """Run it; it has to end by itself, with ``code`` and without a traceback. Gives what it said."""
    done = run_service(**env)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    return done.stderr


def test_a_wrong_setting_ends_it_with_one_sentence(tiny_bundle: SimpleNamespace) -> None:
    assert gives_up(bundle=tiny_bundle.path, port="eighty") == "service: PORT is 'eighty'; it must be a whole number.\n"


def taken_port(host: str) -> socket.socket:
    try:
        return socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        pytest.skip(f"{host}: {error}")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_port_in_use_ends_it_with_one_sentence(tiny_bundle: SimpleNamespace, host: str) -> None:
    with taken_port(host) as taken:
        port = taken.getsockname()[1]
        said = gives_up(bundle=tiny_bundle.path, host=host, port=port)
    assert said.startswith(f"service: The port {port} of {host} is in use; stop what listens there, or name another with PORT")
    assert said.count("\n") == 1


def test_an_address_of_another_machine_ends_it(tiny_bundle: SimpleNamespace) -> None:
    said = gives_up(bundle=tiny_bundle.path, host="192.0.2.1", port=8000)
    assert "Nothing can listen on the port 8000 of 192.0.2.1 (" in said
    assert said.count("\n") == 1


def test_a_bundle_that_is_not_there_ends_it(tmp_path: Path) -> None:
    said = gives_up(bundle=tmp_path / "nowhere")
    assert said.startswith(f"service: {tmp_path / 'nowhere'} is not a bundle")
    assert said.count("\n") == 1


def test_a_head_that_cannot_be_merged_ends_it(tiny_bundle: SimpleNamespace) -> None:
    """Nobody but these tests knows the network ``tiny``, so that its pretrained weights are not to be had."""
    said = gives_up(bundle=tiny_bundle.head)
    assert "'tiny'" in said
    assert "Listening" not in said


def logged(said: str) -> str:
    """The messages of its log."""
    return "\n".join(json.loads(line)["message"] for line in said.splitlines())


@pytest.fixture
def spoilt(tiny_bundle: SimpleNamespace, tmp_path: Path) -> Path:
    """A copy of the whole bundle, to be spoilt."""
    return Path(shutil.copytree(tiny_bundle.path, tmp_path / "spoilt"))


def test_a_changed_graph_is_never_served(spoilt: Path) -> None:
    graph = bytearray((spoilt / "model.onnx").read_bytes())
    graph[len(graph) // 2] ^= 1
    (spoilt / "model.onnx").write_bytes(graph)
    said = logged(gives_up(3, bundle=spoilt))
    assert f"{spoilt / 'model.onnx'} was changed or damaged" in said
    assert "ready" not in said.splitlines()


def test_an_edited_manifest_is_never_served(spoilt: Path) -> None:
    manifest = json.loads((spoilt / MANIFEST).read_text(encoding="utf-8"))
    manifest["classes"].reverse()
    (spoilt / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    assert "was changed after it was written" in gives_up(bundle=spoilt)


def test_a_model_that_does_not_give_its_golden_answers_is_never_served(spoilt: Path) -> None:
    """As where a library computes otherwise than the one that the bundle was exported with."""
    bundle = open_bundle(spoilt)
    pixels, probabilities, _ = bundle.golden()

    def write_files(folder: Path) -> None:
        for name in bundle.manifest["files"]:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(spoilt / name, folder / name)
        np.savez_compressed(folder / GOLDEN, pixels=pixels, probabilities=probabilities[:, ::-1])

    manifest = {key: value for key, value in bundle.manifest.items() if key not in ("format", "files", "sha256")}
    write_bundle(spoilt.parent / "other", manifest, write_files=write_files)
    said = logged(gives_up(3, bundle=spoilt.parent / "other"))
    assert "does not reproduce its golden outputs" in said
    assert "ready" not in said.splitlines()
