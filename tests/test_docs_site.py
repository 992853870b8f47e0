"""The documentation site builds without warnings and loads nothing from other hosts."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("mkdocs") is None, reason="MkDocs is missing: pip install -e '.[docs]'"),
]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site. A proxy that does not exist makes any attempt to fetch something fail."""
    out = tmp_path_factory.mktemp("site")
    no_network = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", out],
        cwd=ROOT,
        env={**os.environ, **no_network, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert build.returncode == 0, build.stderr
    return out


def test_every_page_of_the_navigation_is_built(site: Path) -> None:
    pages = re.findall(r": ([\w/-]+)\.md$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert len(pages) > 10
    for page in pages:
        assert (site / page.replace("README", "index")).with_suffix(".html").is_file(), page


def test_nothing_is_loaded_from_another_host(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert pages
    for page in pages:
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=\"?(https?:[^\s\">]+)", text)
        loaded += re.findall(r"<link\b(?![^>]*rel=\"?canonical)[^>]*\bhref=\"?(https?:[^\s\">]+)", text)
        assert loaded == [], page.name
    for sheet in site.rglob("*.css"):
        assert re.findall(r"(?:url\(|@import )\s*[\"']?https?:", sheet.read_text(encoding="utf-8")) == [], sheet.name


def test_the_python_reference_lists_the_public_names(site: Path) -> None:
    text = (site / "python.html").read_text(encoding="utf-8")
    for name in ("open_bundle", "OpenVINOEngine", "create_model", "ModelSpec", "Config", "create_app", "Settings"):
        assert re.search(rf'<h[2-4] id="[\w.]*\b{name}"', text), name


def test_the_settings_are_filled_in(site: Path) -> None:
    text = (site / "settings.html").read_text(encoding="utf-8")
    assert "<code>PORT</code>" in text
    assert "<code>--batch-size</code>" in text
