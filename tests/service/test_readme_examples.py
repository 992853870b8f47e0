"""What the README says of the service: its settings, and its examples as they stand, run against it."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright.sync_api import Browser

from service.settings import Settings
from tests.helpers.browser import visitor
from tests.helpers.server import Server, serve

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
SERVING = README.split("\n## Serving\n")[1].split("\n## ")[0]
HERE = "localhost:8000"


def example(language: str) -> str:
    """The one block of ``language`` in the README's chapter on serving."""
    (block,) = re.findall(rf"```{language}\n(.*?)```", SERVING, flags=re.DOTALL)
    return str(block)


@pytest.fixture(scope="module")
def server(tiny_bundle: SimpleNamespace) -> Iterator[Server]:
    with serve(tiny_bundle.path) as running:
        yield running


@pytest.fixture
def folder(tiny_bundle: SimpleNamespace, tmp_path: Path) -> Path:
    """A folder with a photo.jpg of the class red."""
    (tmp_path / "photo.jpg").write_bytes(next(iter(sorted((tiny_bundle.photos / "red").iterdir()))).read_bytes())
    return tmp_path


def test_every_setting_is_in_the_table_with_its_default() -> None:
    table = dict(re.findall(r"^\| `([A-Z_]+)` \| (.*?) \|", SERVING, flags=re.MULTILINE))
    for row in dataclasses.fields(Settings):
        said = table.pop(row.name.upper())
        if row.name == "bundle":
            assert row.default == ROOT / said
        elif row.default is None or row.default == ():
            assert said == ""
        else:
            assert type(row.default)(int(said) if isinstance(row.default, bool) else said) == row.default
    assert table == {}


def test_curl(server: Server, folder: Path) -> None:
    command = example("sh").replace(HERE, f"127.0.0.1:{server.port}")
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=True)
    answer = json.loads(done.stdout)
    assert answer["predictions"][0]["label"] == "red"
    shown = json.loads(example("json"))
    assert answer.keys() == shown.keys()
    assert answer["model"].keys() == shown["model"].keys()
    assert answer["predictions"][0].keys() == shown["predictions"][0].keys()


def test_python(server: Server, folder: Path) -> None:
    code = example("python").replace(HERE, f"127.0.0.1:{server.port}")
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("red 0.")


def test_javascript(browser: Browser, server: Server, folder: Path) -> None:
    code = example("js").replace(f"http://{HERE}", server.url)
    photo = list((folder / "photo.jpg").read_bytes())
    with visitor(browser, server.url) as open_page:
        answer = open_page("/health/live").evaluate(
            "async ([code, bytes]) => {"
            " const classify = (0, eval)(`(${code})`);"
            " return classify([new File([new Uint8Array(bytes)], 'photo.jpg')]); }",
            [code, photo],
        )
    assert [row["label"] for row in answer] == ["red"]


def test_the_nginx_example_agrees_with_the_defaults() -> None:
    nginx, defaults = example("nginx"), Settings()
    assert f"client_max_body_size {defaults.max_body_mb:g}m;" in nginx
    (timeout_s,) = re.findall(r"proxy_read_timeout (\d+)s;", nginx)
    assert int(timeout_s) * 1000 > defaults.deadline_ms
    assert f":{defaults.port};" in nginx
