"""Measure the seconds per correct decision of a scripted reviewer: one photo at a time, and many at once.

    python -m benchmarks.review_speed DATA [--flips 30]

Links the photos of DATA into a temporary folder, with ``--flips`` training photos in the folder of another class, and
evaluates the included classifier on them. A script then reviews the mistakes in Chromium with the true labels: on the page of
each photo with its buttons, and in the grid, where it selects the photos with a wrong label and accepts their predictions, and
then confirms the labels of the others. It takes no time to look at a photo, so the figures are the time that the pages cost.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import tempfile
import time
import urllib.request
from pathlib import Path
from urllib.parse import urlencode

from playwright.sync_api import Page, sync_playwright

from benchmarks.label_errors import flip_labels
from benchmarks.serve_speed import run_service
from finetune.evaluation.evaluate import evaluate_bundle
from service.settings import SHIPPED_BUNDLE

MISTAKES = {"outcome": "incorrect", "split": "train", "review": "unreviewed"}
START_S = 60.0


def one_by_one(page: Page, url: str, flipped: set[str]) -> int:
    """Review the mistakes on their pages. Returns the number of correct decisions."""
    page.goto(f"{url}/gallery/photos?{urlencode(MISTAKES)}")
    page.locator(".tile-link").first.click()
    decisions = 0
    while True:
        name = page.locator("h1").get_attribute("title") or ""
        page.get_by_role("button", name="Change to" if name in flipped else "Keep label").click()
        decisions += 1
        page.wait_for_function(
            "name => document.querySelector('h1').title !== name || document.querySelector('#status strong')", arg=name
        )
        if page.locator("#status strong").count():
            return decisions


def many_at_once(page: Page, url: str, flipped: set[str]) -> int:
    """Review the mistakes in the grid, page by page. Returns the number of correct decisions."""
    decisions = 0
    page.goto(f"{url}/gallery/photos?{urlencode(MISTAKES | {'per_page': '96'})}")
    while page.locator(".tile").count():
        names = page.locator(".tile-name").evaluate_all("names => names.map((name) => name.title)")
        decisions += len(names)
        wrong = [index for index, name in enumerate(names) if name in flipped]
        for index in wrong:
            page.locator(".tile-select input").nth(index).check()
        if wrong:
            page.get_by_role("button", name="As predicted").click()
            page.wait_for_function("count => document.querySelectorAll('.tile').length === count", arg=len(names) - len(wrong))
        if len(wrong) < len(names):
            page.get_by_role("link", name="Select page").click()
            page.get_by_role("button", name="Label correct").click()
            page.wait_for_function("!document.querySelector('.tile-select input:checked')")
    return decisions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--flips", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="review-speed-") as folder:
        root = Path(folder)
        flipped = flip_labels(args.data, root / "data", flips=args.flips, seed=args.seed)
        evaluate_bundle(SHIPPED_BUNDLE, root / "data", split="train", out=root / "evaluation")
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
            for review in (one_by_one, many_at_once):
                settings = {
                    "DATA_DIR": str(root / "data"),
                    "EVALUATIONS": str(root / "evaluation"),
                    "DATABASE_URL": f"sqlite:///{root / review.__name__}.db",
                }
                with run_service(SHIPPED_BUNDLE, **settings) as port:
                    url = f"http://127.0.0.1:{port}"
                    _wait(f"{url}/gallery/photos.json?{urlencode(MISTAKES)}")
                    page = browser.new_page(viewport={"width": 1280, "height": 900})
                    page.goto(f"{url}/gallery/photos?{urlencode(MISTAKES)}")
                    page.wait_for_load_state("networkidle")  # the first thumbnails are cached from here on
                    start = time.perf_counter()
                    decisions = review(page, url, flipped)
                    seconds = time.perf_counter() - start
                    print(f"{review.__name__}: {decisions} decisions, {seconds / decisions:.3f} s per correct decision")
                    page.close()
            browser.close()


def _wait(address: str) -> None:
    """Wait until the evaluation is imported."""
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(address) as reply:
            if b'"sha256"' in reply.read():
                return
        if time.monotonic() > deadline:
            raise SystemExit(f"{address} has no mistakes after {START_S:g} s.")
        time.sleep(0.2)


if __name__ == "__main__":
    main()
