"""Measure how long the gallery takes to import predictions and to render a page of the grid.

    python benchmarks/gallery_speed.py [--photos 25000 1000000] [--classes 2] [--database URL] [--limit-ms 50 200]

The rows are generated: two or more classes, 4% of them incorrect, with the confidence of a good classifier. The time of a
page covers everything from the request to the HTML: counts of every facet, the confusion matrix, the histogram and 48 images.
Each kind of page is requested five times and its median is printed. With ``--limit-ms`` the exit code is 1 if a median
exceeds the limit. With ``--database``, sqlite:///FILE or postgresql://USER@HOST/NAME, the rows are kept for the next run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from flask.testing import FlaskClient

from models.artifacts.predictions import Predictions
from service import create_app
from service.context import services_of
from service.db.connection import Database
from service.db.filter import Filter
from service.db.ingest import EvaluationTable, get_or_create_model, import_predictions, is_imported
from service.settings import Settings

CLASSES = ("cats", "dogs", *(f"animals {number}" for number in range(3, 201)))
ROWS_PER_IMPORT = 100_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="+", default=[25_000, 1_000_000])
    parser.add_argument("--classes", type=int, default=2, choices=range(2, 201), metavar="N")
    parser.add_argument("--limit-ms", type=float, nargs="+", default=[])
    parser.add_argument(
        "--database", help="an empty database or one filled by this program (default: SQLite in a temporary folder)"
    )
    args = parser.parse_args()
    too_slow = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, photos in enumerate(args.photos):
            url = args.database or f"sqlite:///{Path(folder) / f'{photos}.db'}"
            database = Database(url)
            start_time = time.perf_counter()
            imported = fill(database, photos, CLASSES[: args.classes])
            seconds = time.perf_counter() - start_time
            print(f"{photos:,} predictions" + (f", {imported:,} imported in {seconds:.1f} s" if imported else ""), flush=True)
            database.close()
            client = start_client(url)
            for name, filters, page in pages(photos, args.classes):
                ms = statistics.median(time_page(client, filters, page) for _ in range(5))
                limit = args.limit_ms[number] if number < len(args.limit_ms) else None
                too_slow += limit is not None and ms > limit
                print(
                    f"  {name:<44}{ms:8.1f} ms{'  exceeds the limit' if limit is not None and ms > limit else ''}", flush=True
                )
    return int(too_slow > 0)


def start_client(url: str) -> FlaskClient:
    """Create a client of the application with that database, and wait for its gallery."""
    app = create_app(Settings(database_url=url))
    services_of(app).model_manager.wait(None)
    client = app.test_client()
    while client.get("/gallery").status_code == 503:
        time.sleep(0.1)
    return client


def fill(database: Database, photos: int, classes: Sequence[str]) -> int:
    """Generate and import missing rows. The model version contains the number. Returns how many were imported."""
    version, imported = f"v{photos}", 0
    for start in range(0, photos, ROWS_PER_IMPORT):
        count, digest = min(ROWS_PER_IMPORT, photos - start), f"{start:064d}"
        with database.write() as connection:
            if is_imported(connection, version, digest):
                continue
            model = get_or_create_model(connection, version=version, name="generated", classes=classes)
            none = np.zeros(count, dtype=np.bool_)
            imported += import_predictions(
                connection, model, EvaluationTable("evaluation", digest, generate(start, count, classes), none, none, none)
            )
    if imported:
        database.refresh_statistics()
    return imported


def generate(start: int, photos: int, classes: Sequence[str]) -> Predictions:
    rng = np.random.default_rng(start)
    labels = rng.integers(0, len(classes), photos)
    incorrect = rng.random(photos) < 0.04
    confidence = np.where(incorrect, rng.beta(4, 2, photos), rng.beta(30, 1, photos)) / 2 + 0.5
    predicted = np.where(incorrect, (labels + rng.integers(1, len(classes), photos)) % len(classes), labels)
    others = rng.gamma(0.1, size=(photos, len(classes))) + 1e-9
    others[np.arange(photos), predicted] = 0
    probabilities = others / others.sum(axis=1, keepdims=True) * (1 - confidence)[:, None]
    probabilities[np.arange(photos), predicted] = confidence
    names = tuple(f"valid/{classes[label]}/{start + i:08d}.jpg" for i, label in enumerate(labels))
    sha256s = tuple(rng.bytes(32).hex() for _ in range(photos))
    return Predictions(tuple(classes), names, labels, probabilities, ("valid",) * photos, sha256s)


def pages(photos: int, classes: int) -> Iterator[tuple[str, Filter, int]]:
    all_images = Filter(model=f"v{photos}")
    incorrect = all_images.replace(outcomes=("incorrect",))
    last = photos // all_images.per_page
    yield "highest loss first", all_images, 1
    yield "highest loss first, page in the middle", all_images, last // 2
    yield "highest loss first, last page", all_images, last
    yield "incorrect, highest loss first", incorrect, 1
    incorrect_cats = int(photos * 0.03) // classes
    yield "incorrect cats, by name", incorrect.replace(labels=("cats",), sort="name"), min(3, 1 + incorrect_cats // 48)
    yield "correct dogs, least certain first", all_images.replace(outcomes=("correct",), labels=("dogs",), sort="margin"), 1
    yield "correct, random", all_images.replace(outcomes=("correct",), sort="random", seed=7), 1
    yield "incorrect, random, last page", incorrect.replace(sort="random", seed=7), max(1, int(photos * 0.04) // 48 - 20)
    yield "confidence 60 to 80%, by confidence", all_images.replace(confidence=(60, 80), sort="confidence"), 1
    yield "confidence 99% and more, lowest loss last", all_images.replace(confidence=(99, 100)), photos // 400
    yield "reviewed (none), by name", all_images.replace(reviews=("relabeled",), sort="name"), 1


def time_page(client: FlaskClient, filters: Filter, page: int) -> float:
    """Request one page. Returns milliseconds."""
    start_time = time.perf_counter()
    response = client.get(f"/gallery/photos?{filters.query(page=page)}")
    ms = (time.perf_counter() - start_time) * 1e3
    assert response.status_code == 200, response.status
    return ms


if __name__ == "__main__":
    sys.exit(main())
