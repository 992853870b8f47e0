"""Take the screenshots of the documentation: the gallery and the studio, with generated pictures, some of them mislabeled.

    python tools/screenshots.py [--out docs/images]

Requires the extra `finetune`, Playwright and Debian's chromium. The screenshots contain no photo of a dataset.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
MISLABELED = 5  # photos of each class
WIDTH_PX, HEIGHT_PX = 1280, 860


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        finetune("synthesize", work / "pictures")
        mislabel(work / "pictures" / "valid")
        finetune("train", "--data-dir", work / "pictures", "--backbone", "efficientnet_lite0", "--output-dir", work / "run")
        take(work, out)
    return 0


def mislabel(split: Path) -> None:
    """Move the first few pictures of each class into the other class's folder."""
    one, other = sorted(path for path in split.iterdir() if path.is_dir())
    moves = [(file, other / file.name) for file in sorted(one.iterdir())[:MISLABELED]]
    moves += [(file, one / file.name) for file in sorted(other.iterdir())[:MISLABELED]]
    for file, to in moves:
        file.rename(to)


def take(work: Path, out: Path) -> None:
    """Take screenshots of the gallery with the run's mistakes, and of the studio with a training of the same pictures."""
    with serve(
        BUNDLE=work / "run" / "bundle", DATA_DIR=work / "pictures", DATABASE_URL=f"sqlite:///{work / 'reviews.db'}"
    ) as base:
        wait_for(f"{base}/gallery/photos.json")
        with open_page() as page:
            page.goto(f"{base}/gallery/incorrect")
            shoot(page, out / "gallery.png")
            page.locator('a[href*="/gallery/photo?"]').first.click()
            shoot(page, out / "photo.png")
    studio = work / "studio"
    shutil.copytree(work / "pictures", studio / "datasets" / "pets")
    with serve(STUDIO=1, STUDIO_NICENESS=0, STUDIO_DIR=studio, DATABASE_URL=f"sqlite:///{work / 'studio.db'}") as base:
        wait_for(f"{base}/gallery/photos.json")
        form = {"data": "dataset:pets", "backbone": "efficientnet_lite0", "head": "linear", "epochs": "20", "name": "first"}
        request = urllib.request.Request(
            f"{base}/studio/jobs", json.dumps(form).encode(), {"Content-Type": "application/json", "Accept": "application/json"}
        )
        with urllib.request.urlopen(request) as response:
            job = base + json.load(response)["page"]
        with urllib.request.urlopen(f"{job}/events", timeout=600) as events:
            events.read()  # the stream ends with the training
        with open_page() as page:
            for name, address in (("start", f"{base}/studio"), ("dataset", f"{base}/studio/datasets/pets"), ("training", job)):
                page.goto(address)
                shoot(page, out / f"studio-{name}.png")


@contextlib.contextmanager
def serve(**settings: object) -> Iterator[str]:
    """Yield the address of a service with these settings, and end it afterwards."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    environ = os.environ | {name: str(value) for name, value in settings.items()} | {"PORT": str(port)}
    server = subprocess.Popen([sys.executable, "-m", "service"], cwd=ROOT, env=environ, stderr=subprocess.DEVNULL)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(30)


@contextlib.contextmanager
def open_page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
        yield browser.new_page(viewport={"width": WIDTH_PX, "height": HEIGHT_PX}, color_scheme="light")
        browser.close()


def shoot(page: Page, file: Path) -> None:
    page.wait_for_load_state("networkidle")
    page.screenshot(path=file)
    print(file)


def wait_for(url: str) -> None:
    until = time.monotonic() + 120
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(url, timeout=5)
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"{url} did not respond. Start the service to see why: python -m service")


def finetune(*words: object) -> None:
    subprocess.run([sys.executable, "-m", "finetune", *map(str, words)], cwd=ROOT, check=True)


if __name__ == "__main__":
    sys.exit(main())
