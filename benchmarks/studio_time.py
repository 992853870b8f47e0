"""Measure how long a scripted user of the studio takes from folders of photos to a live model.

    python -m benchmarks.studio_time DATA [--photos 200]

Copies ``--photos`` photos of each class folder of DATA, starts the service with the studio in an empty folder, drops the class
folders onto its start page in Chromium, checks the photos, trains with the settings that the form offers, puts the model live
and classifies a photo with it. The user takes no time to read, so the figures are the time that the studio takes.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

from playwright.sync_api import Page

from benchmarks.serve_speed import run_service
from models.artifacts.data_folder import is_image_name
from service.settings import SHIPPED_BUNDLE
from tests.helpers.browser import drop, run_browser

TIMEOUT_MS = 600_000.0


def copy_photos(data: Path, root: Path, *, count: int) -> list[Path]:
    """Copy the first ``count`` photos of each class. Returns the folders of the classes."""
    folders = []
    for source in sorted(path for path in data.iterdir() if path.is_dir()):
        photos = sorted(path for path in source.iterdir() if is_image_name(path.name))[:count]
        folder = root / source.name
        folder.mkdir()
        for photo in photos:
            shutil.copyfile(photo, folder / photo.name)
        folders.append(folder)
    return folders


def use_studio(page: Page, url: str, folders: list[Path]) -> dict[str, float]:
    """Go from the start page to a live model. Returns the seconds of each step."""
    seconds = {}
    began = time.perf_counter()

    def finish(step: str) -> None:
        nonlocal began
        now = time.perf_counter()
        seconds[step], began = now - began, now

    page.goto(f"{url}/studio")
    finish("open the start page")
    drop(page, *folders)
    page.get_by_role("link", name="Check the photos").click()
    finish("add the photos")
    page.get_by_role("button", name="Check the photos").click()
    page.get_by_role("link", name="Train", exact=True).click()
    finish("check the photos")
    page.get_by_role("button", name="Start training").click()
    page.get_by_role("button", name="Put live").wait_for()
    finish("train")
    page.get_by_role("button", name="Put live").click()
    page.get_by_role("heading", name="This model is live").wait_for()
    version = page.locator("dt:text-is('Version') + dd").inner_text()
    photo, headers = next(folders[0].iterdir()).read_bytes(), {"Content-Type": "image/jpeg"}
    while page.request.post(f"{url}/predict", data=photo, headers=headers).json()["model"]["version"] != version:
        time.sleep(0.1)
    finish("put the model live")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with a folder of photos for each class")
    parser.add_argument("--photos", type=int, default=200, help="photos of each class")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="studio-time-") as folder:
        root = Path(folder)
        (root / "photos").mkdir()
        folders = copy_photos(args.data, root / "photos", count=args.photos)
        settings = {"STUDIO": "1", "STUDIO_DIR": str(root / "studio"), "DATABASE_URL": f"sqlite:///{root / 'reviews.db'}"}
        with run_browser() as browser, run_service(SHIPPED_BUNDLE, **settings) as port:
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.set_default_timeout(TIMEOUT_MS)
            seconds = use_studio(page, f"http://127.0.0.1:{port}", folders)
    for step, value in seconds.items():
        print(f"{step:<24}{value:8.1f} s")
    print(f"{'total':<24}{sum(seconds.values()):8.1f} s")


if __name__ == "__main__":
    main()
