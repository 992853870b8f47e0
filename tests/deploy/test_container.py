"""The Dockerfile, compose.yaml and the make targets agree, and the scripts that build the images work."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from service.settings import Settings
from tests.helpers.server import ROOT, poll, serve

if sys.version_info >= (3, 11):
    import tomllib

pytestmark = pytest.mark.slow

SETTINGS = {row.name.upper() for row in dataclasses.fields(Settings)}
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text(encoding="utf-8"))
PROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def stage(name: str) -> str:
    """Return a stage of the Dockerfile without comments and line continuations."""
    stages = re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)
    (matches,) = [text for text in stages if re.match(rf"\S+ AS {name}\n", text)]
    lines = [line for line in matches.splitlines() if not line.startswith("#")]
    return "\n".join(lines).replace("\\\n", " ")


def environment(name: str) -> dict[str, str]:
    return dict(re.findall(r"(?:ENV|\s)\s*([A-Z_]+)=(\S+)", "\n".join(re.findall(r"^ENV .*", stage(name), re.MULTILINE))))


# The images


def test_serve_is_the_default_target() -> None:
    assert re.findall(r"^FROM .* AS (\w+)$", DOCKERFILE, flags=re.MULTILINE)[-1] == "serve"


def test_the_serve_image_contains_nothing_of_training() -> None:
    assert re.findall(r"^COPY --from=(\w+) .*", stage("serve"), flags=re.MULTILINE) == ["packages"]
    copied = re.findall(r"^COPY (?!--from)(?:--chown=\S+ )?(\S+)", stage("serve"), flags=re.MULTILINE)
    assert copied == ["models/shipped/dogs-vs-cats", "models", "service"]
    assert "serve.txt" in stage("packages")
    assert "finetune.txt" not in stage("packages")


@pytest.mark.parametrize("name", ["serve", "finetune"])
def test_a_process_is_unprivileged_and_receives_signals(name: str) -> None:
    text = stage(name)
    assert re.search(r"^USER ([1-9]\d+):\1$", text, flags=re.MULTILINE)
    for start in re.findall(r"^(?:CMD|ENTRYPOINT|HEALTHCHECK .*?CMD) (.*)", text, flags=re.MULTILINE):
        assert all(isinstance(word, str) for word in json.loads(start))


def test_the_variables_of_the_image_are_settings() -> None:
    variables = environment("serve")
    known = {name: value for name, value in variables.items() if name in SETTINGS}
    assert set(variables) - SETTINGS == {"PATH", "PYTHONPATH", "PYTHONUNBUFFERED", "HOME", "XDG_CACHE_HOME"}
    settings = Settings.from_environment(known)
    assert (settings.host, str(settings.bundle)) == ("0.0.0.0", "/bundles/current")
    assert f"EXPOSE {settings.port}\n" in stage("serve")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_label_and_the_project_have_one_version() -> None:
    versions = re.findall(r'image\.version="(.*?)"', DOCKERFILE)
    assert versions == [tomllib.loads(PROJECT)["project"]["version"]] * 2


# Compose


def test_the_variables_of_compose_are_settings() -> None:
    variables = COMPOSE["services"]["service"]["environment"]
    assert set(variables) <= SETTINGS
    defaults = {name: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", str(value)) for name, value in variables.items()}
    settings = Settings.from_environment(defaults)
    assert COMPOSE["services"]["service"]["stop_grace_period"] == f"{settings.shutdown_timeout_s + 10}s"


def test_compose_mounts_declared_volumes_on_folders_of_the_image() -> None:
    named = {row for service in COMPOSE["services"].values() for row in service["volumes"]}
    assert {row.partition(":")[0] for row in named} == set(COMPOSE["volumes"])
    made = re.search(r"install -d .*", stage("serve"))
    assert made
    for row in COMPOSE["services"]["service"]["volumes"]:
        assert row.partition(":")[2] in made[0].split()


def test_the_service_and_its_database_agree() -> None:
    services = COMPOSE["services"]
    database = services["database"]["environment"]
    url = services["service"]["environment"]["DATABASE_URL"]
    user, password, name = (database[f"POSTGRES_{word}"] for word in ("USER", "PASSWORD", "DB"))
    assert url == f"postgresql+psycopg://{user}:{password}@database/{name}"
    assert services["service"]["depends_on"]["database"]["condition"] == "service_healthy"
    assert "healthcheck" in services["database"]
    assert "ports" not in services["database"]


def test_the_published_port_is_the_one_that_the_image_listens_on() -> None:
    (published,) = COMPOSE["services"]["service"]["ports"]
    assert published.rpartition(":")[2] == environment("serve")["PORT"]


@pytest.mark.parametrize("engine", ["docker", "podman"])
def test_make_image_uses_the_installed_engine(engine: str, tmp_path: Path) -> None:
    done = fake_engine(engine, tmp_path, "image")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("called ")]
    assert line.startswith(f"called {engine} build ")
    assert "-t dogs-vs-cats " in line


def test_make_image_reports_a_missing_engine(tmp_path: Path) -> None:
    done = fake_engine("", tmp_path, "image")
    assert done.returncode == 2
    assert "Docker or Podman is required" in done.stderr


def fake_engine(engine: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run ``make`` with only ``engine`` on the PATH, which prints its arguments."""
    for tool in ("make", "sh", "git", "env"):
        (folder / tool).symlink_to(subprocess.check_output(["sh", "-c", f"command -v {tool}"], text=True).strip())
    if engine:
        (folder / engine).write_text(f'#!/bin/sh\necho "called {engine} $*"\n', encoding="utf-8")
        (folder / engine).chmod(0o755)
    return subprocess.run(
        [folder / "make", "--no-print-directory", *arguments],
        cwd=ROOT,
        env={"PATH": str(folder)},
        capture_output=True,
        text=True,
    )


# The health check


def probe(**env: object) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, **{name: str(value) for name, value in env.items()}}
    return subprocess.run([sys.executable, "-m", "service.healthcheck"], cwd=ROOT, env=environ, capture_output=True, text=True)


def test_the_health_check_passes_if_the_service_is_ready_and_reports_why_if_not(tiny_bundle: SimpleNamespace) -> None:
    with serve(tiny_bundle.path) as server:
        poll(lambda: probe(PORT=server.port).returncode == 0)  # each probe waits 4 s at most
        assert server.stop() == 0
        with socket.socket() as blocker:  # keep other programs from using the port
            blocker.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            blocker.bind(("127.0.0.1", server.port))
            gone = probe(PORT=server.port)
    assert gone.returncode == 1
    assert f"no response from port {server.port}" in gone.stderr


def test_the_health_check_imports_no_heavy_package() -> None:
    heavy = ("flask", "numpy", "openvino", "ssl")
    code = f"import sys, service.healthcheck; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() in ("[]", "['ssl']")


# The scripts of the build


@pytest.mark.skipif(sys.version_info < (3, 11), reason="tomllib")
def test_the_requirements_are_those_of_the_extras() -> None:
    tool: dict[str, Any] = runpy.run_path(str(ROOT / "tools" / "requirements.py"))
    serving, training = (tool["requirements"](PROJECT, [extra]) for extra in ("serve", "finetune"))
    assert any(row.startswith("flask") for row in serving)
    assert not any(row.startswith("torch") for row in serving)
    assert any(row.startswith("torch") for row in training)
    assert set(tool["requirements"](PROJECT, ["serve", "finetune"])) == {*serving, *training}
    with pytest.raises(KeyError):
        tool["requirements"](PROJECT, ["serv"])


def test_slim_removes_matches_and_returns_patterns_without_a_match(tmp_path: Path) -> None:
    tool: dict[str, Any] = runpy.run_path(str(ROOT / "tools" / "slim.py"))
    for name in ("onnx", "ir", "paddle", "tensorflow_lite"):
        file = tmp_path / "openvino" / "libs" / f"libopenvino_{name}_frontend.so.2641"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.touch()
    (tmp_path / "numpy" / "lib" / "tests").mkdir(parents=True)
    (tmp_path / "numpy" / "lib" / "tests" / "test_x.py").touch()
    unmatched = tool["slim"](tmp_path)
    kept = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert kept == ["libopenvino_ir_frontend.so.2641", "libopenvino_onnx_frontend.so.2641"]
    assert "openvino/libs/cache.json" in unmatched
    assert "numpy/**/tests" not in unmatched
