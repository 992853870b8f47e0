"""Take the screenshots of the documentation, with generated pictures, a few of them mislabeled on purpose.

    python tools/screenshots.py [--out docs/images]

Requires the extra `finetune`, Playwright and Debian's chromium. The screenshots contain no photo of a data set.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

ROOT = Path(__file__).resolve().parents[1]
MISLABELED = 5  # of each class
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
    """Serve the run and take a screenshot of its mistakes and of one photo's page."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    settings = {
        "BUNDLE": work / "run" / "bundle",
        "DATA_DIR": work / "pictures",
        "DATABASE_URL": f"sqlite:///{work / 'reviews.db'}",
        "PORT": port,
    }
    environ = os.environ | {name: str(value) for name, value in settings.items()}
    server = subprocess.Popen([sys.executable, "-m", "service"], cwd=ROOT, env=environ, stderr=subprocess.DEVNULL)
    try:
        base = f"http://127.0.0.1:{port}"
        wait_for(f"{base}/gallery/photos.json")
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": WIDTH_PX, "height": HEIGHT_PX}, color_scheme="light")
            page.goto(f"{base}/gallery/incorrect")
            shoot(page, out / "gallery.png")
            page.locator('a[href*="/gallery/photo?"]').first.click()
            shoot(page, out / "photo.png")
            browser.close()
    finally:
        server.terminate()
        server.wait(30)


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
