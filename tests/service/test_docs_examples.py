"""The examples of docs/serving.md, run unchanged against the service."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from playwright.sync_api import Browser

from models.artifacts.bundle import open_bundle
from service.settings import Settings
from tests.helpers.browser import open_pages
from tests.helpers.server import Server, multipart, serve

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
SERVING = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "localhost:8000"


def example(language: str, section: str) -> str:
    """Return the only block of ``language`` in a section of the page."""
    text = SERVING.split(f"\n## {section}\n")[1].split("\n## ")[0]
    (block,) = re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.DOTALL | re.MULTILINE)
    return textwrap.dedent(block)


@pytest.fixture(scope="module")
def server(tiny_bundle: SimpleNamespace) -> Iterator[Server]:
    with serve(tiny_bundle.path) as running:
        yield running


@pytest.fixture
def folder(tiny_bundle: SimpleNamespace, tmp_path: Path) -> Path:
    """A folder with a photo.jpg of the class red."""
    (tmp_path / "photo.jpg").write_bytes(next(iter(sorted((tiny_bundle.photos / "red").iterdir()))).read_bytes())
    return tmp_path


def run_python(code: str, folder: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True).stdout


def test_curl(server: Server, folder: Path) -> None:
    command = example("sh", "Classify an image").replace(ADDRESS, f"127.0.0.1:{server.port}")
    done = subprocess.run(["bash", "-c", command], cwd=folder, capture_output=True, text=True, check=True)
    response = json.loads(done.stdout)
    assert response["predictions"][0]["label"] == "red"
    documented = json.loads(example("json", "Classify an image"))
    assert response.keys() == documented.keys()
    assert response["model"].keys() == documented["model"].keys()
    assert response["predictions"][0].keys() == documented["predictions"][0].keys()


def test_the_documents_show_what_the_included_classifier_returns() -> None:
    """The precision depends on the processor, and the numbers on the precision. serving.md names the same photo photo.jpg."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8").split("\n## Use a trained model\n")[1].split("\n## ")[0]
    (block,) = re.findall(r"```json\n(.*?)```", readme, flags=re.DOTALL)
    (photo,) = re.findall(r"curl -F file=@(\S+) localhost:8000/predict", readme)
    (bundle,) = re.findall(r"finetune predict --bundle (\S+) ", readme)
    with serve(ROOT / bundle, precision="fp32") as running:
        body, content_type = multipart(("file", Path(photo).name, (ROOT / photo).read_bytes()))
        response = running.post(body, content_type).json()
    model, (returned,) = response["model"], response["predictions"]
    for documented in (json.loads(block), json.loads(example("json", "Classify an image"))):
        assert documented.keys() == response.keys()
        shown_model, (shown,) = documented["model"], documented["predictions"]
        assert shown_model.pop("precision") in {"fp32", "bf16", "int8"}
        assert model["preprocessing_sha256"].startswith(shown_model.pop("preprocessing_sha256").removesuffix("..."))
        assert shown_model == {"name": model["name"], "version": model["version"]}
        assert shown.pop("file") in {Path(photo).name, "photo.jpg"}
        expected = {name: value for name, value in returned.items() if name != "file"}
        assert expected.pop("ood_score") == pytest.approx(shown.pop("ood_score"), abs=0.05)
        for name in ("confidence", "probabilities"):
            assert expected.pop(name) == pytest.approx(shown.pop(name), abs=1e-3)
        assert shown == expected


def test_python(server: Server, folder: Path) -> None:
    code = example("python", "Classify an image").replace(ADDRESS, f"127.0.0.1:{server.port}")
    assert run_python(code, folder).startswith("red 0.")


def test_javascript(browser: Browser, server: Server, folder: Path) -> None:
    code = example("js", "Classify an image").replace(f"http://{ADDRESS}", server.url)
    photo = list((folder / "photo.jpg").read_bytes())
    with open_pages(browser, server.url) as open_page:
        predictions = open_page("/health/live").evaluate(
            "async ([code, bytes]) => {"
            " const classify = (0, eval)(`(${code})`);"
            " return classify([new File([new Uint8Array(bytes)], 'photo.jpg')]); }",
            [code, photo],
        )
    assert [row["label"] for row in predictions] == ["red"]


def test_open_inference_client(server: Server, folder: Path, tiny_bundle: SimpleNamespace) -> None:
    code = example("python", "Open Inference Protocol").replace(ADDRESS, f"127.0.0.1:{server.port}")
    code = code.replace('"dogs-vs-cats"', json.dumps(open_bundle(tiny_bundle.path).name))
    (probabilities,) = re.findall(r"\[\[(.*?)\]\]", run_python(code, folder), flags=re.DOTALL)
    assert sum(map(float, probabilities.split())) == pytest.approx(1.0, abs=1e-4)


def test_the_nginx_example_agrees_with_the_defaults() -> None:
    nginx, defaults = example("nginx", "Behind a proxy"), Settings()
    assert f"client_max_body_size {defaults.max_body_mb:g}m;" in nginx
    (timeout_s,) = re.findall(r"proxy_read_timeout (\d+)s;", nginx)
    assert int(timeout_s) * 1000 > defaults.deadline_ms
    assert f":{defaults.port};" in nginx
