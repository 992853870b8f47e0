"""How long the gallery takes: to import predictions, and to answer a page of a grid on that many.

    python benchmarks/gallery_speed.py [--photos 25000 1000000] [--classes 2] [--database URL] [--limit-ms 50 200]

Rows are generated: of two classes or more, 4 % of them wrong, as sure as a good classifier is. A page is all that the server
does for it, from the request to the HTML: counts of every facet, the confusion matrix, the histogram, and 48 photos. Each kind
of page is asked for five times, and its median is printed. With ``--limit-ms`` the program ends with 1 where a median is over
it. With ``--database``, sqlite:///FILE or postgresql://USER@HOST/NAME, the rows are kept and serve the next run too.
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
AT_ONCE = 100_000


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=int, nargs="+", default=[25_000, 1_000_000])
    parser.add_argument("--classes", type=int, default=2, choices=range(2, 201), metavar="N")
    parser.add_argument("--limit-ms", type=float, nargs="+", default=[])
    parser.add_argument("--database", help="empty, or filled by this program (default: SQLite in a temporary folder)")
    args = parser.parse_args()
    late = 0
    with tempfile.TemporaryDirectory() as folder:
        for number, photos in enumerate(args.photos):
            url = args.database or f"sqlite:///{Path(folder) / f'{photos}.db'}"
            database = Database(url)
            began = time.perf_counter()
            imported = fill(database, photos, CLASSES[: args.classes])
            seconds = time.perf_counter() - began
            print(f"{photos:,} predictions" + (f", {imported:,} imported in {seconds:.1f} s" if imported else ""), flush=True)
            database.close()
            client = start(url)
            for name, filters, page in pages(photos, args.classes):
                ms = statistics.median(time_page(client, filters, page) for _ in range(5))
                limit = args.limit_ms[number] if number < len(args.limit_ms) else None
                late += limit is not None and ms > limit
                print(f"  {name:<44}{ms:8.1f} ms{'  over the limit' if limit is not None and ms > limit else ''}", flush=True)
    return int(late > 0)


def start(url: str) -> FlaskClient:
    """The application on that database, once its gallery is there."""
    app = create_app(Settings(database_url=url))
    services_of(app).model_manager.wait(None)
    client = app.test_client()
    while client.get("/gallery").status_code == 503:
        time.sleep(0.1)
    return client


def fill(database: Database, photos: int, classes: Sequence[str]) -> int:
    """Generate and import what is not there yet; the version names the number. Returns how many came in."""
    version, imported = f"v{photos}", 0
    for start in range(0, photos, AT_ONCE):
        many, digest = min(AT_ONCE, photos - start), f"{start:064d}"
        with database.write() as connection:
            if is_imported(connection, version, digest):
                continue
            model = get_or_create_model(connection, version=version, name="generated", classes=classes)
            none = np.zeros(many, dtype=np.bool_)
            imported += import_predictions(
                connection, model, EvaluationTable("evaluation", digest, generate(start, many, classes), none, none)
            )
    if imported:
        database.refresh_statistics()
    return imported


def generate(start: int, photos: int, classes: Sequence[str]) -> Predictions:
    rng = np.random.default_rng(start)
    labels = rng.integers(0, len(classes), photos)
    wrong = rng.random(photos) < 0.04
    sure = np.where(wrong, rng.beta(4, 2, photos), rng.beta(30, 1, photos)) / 2 + 0.5
    guess = np.where(wrong, (labels + rng.integers(1, len(classes), photos)) % len(classes), labels)
    rest = rng.gamma(0.1, size=(photos, len(classes))) + 1e-9
    rest[np.arange(photos), guess] = 0
    probabilities = rest / rest.sum(axis=1, keepdims=True) * (1 - sure)[:, None]
    probabilities[np.arange(photos), guess] = sure
    names = tuple(f"valid/{classes[label]}/{start + i:08d}.jpg" for i, label in enumerate(labels))
    sha256s = tuple(rng.bytes(32).hex() for _ in range(photos))
    return Predictions(tuple(classes), names, labels, probabilities, ("valid",) * photos, sha256s)


def pages(photos: int, classes: int) -> Iterator[tuple[str, Filter, int]]:
    everything = Filter(model=f"v{photos}")
    wrong = everything.replace(outcomes=("incorrect",))
    last = photos // everything.per_page
    yield "highest loss first", everything, 1
    yield "highest loss first, page in the middle", everything, last // 2
    yield "highest loss first, last page", everything, last
    yield "wrong, highest loss first", wrong, 1
    wrong_cats = int(photos * 0.03) // classes
    yield "wrong cats, by name", wrong.replace(labels=("cats",), sort="name"), min(3, 1 + wrong_cats // 48)
    yield "right dogs, least certain first", everything.replace(outcomes=("correct",), labels=("dogs",), sort="margin"), 1
    yield "right, random", everything.replace(outcomes=("correct",), sort="random", seed=7), 1
    yield "wrong, random, last page", wrong.replace(sort="random", seed=7), max(1, int(photos * 0.04) // 48 - 20)
    yield "confidence 60 to 80 %, by confidence", everything.replace(confidence=(60, 80), sort="confidence"), 1
    yield "confidence 99 % up, lowest loss last", everything.replace(confidence=(99, 100)), photos // 400
    yield "reviewed (none), by name", everything.replace(reviews=("relabeled",), sort="name"), 1


def time_page(client: FlaskClient, filters: Filter, page: int) -> float:
    """Milliseconds."""
    began = time.perf_counter()
    answer = client.get(f"/gallery/photos?{filters.query(page=page)}")
    ms = (time.perf_counter() - began) * 1e3
    assert answer.status_code == 200, answer.status
    return ms


if __name__ == "__main__":
    sys.exit(main())
