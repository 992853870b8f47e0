"""Classify photos with a bundle: its graph, its preprocessing, its classes."""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.data import is_photo
from finetune.features import batched
from finetune.join import open_full
from finetune.prefetch import prefetch
from models.bundle import GRAPH, Bundle
from models.engine import OnnxEngine
from models.errors import DataError, PhotoError

BATCH = 16


@dataclass(frozen=True)
class Answer:
    """A photo's probabilities (classes,) and embedding (d,), or the reason why there are none."""

    path: Path
    probabilities: NDArray[np.float32] | None
    error: str | None = None
    embedding: NDArray[np.float32] | None = None


def classify(bundle: Bundle, paths: Sequence[Path], *, precision: str = "fp32", workers: int = 0) -> Iterator[Answer]:
    """Calibrated probabilities for each photo, in order; a photo that cannot be read gets its error, the others go on."""
    engine = OnnxEngine(bundle.path / GRAPH, outputs=["probabilities", "embedding"], precision=precision)

    def pixels(path: Path) -> NDArray[np.uint8] | str:
        try:
            return bundle.preprocessing.pixels(path.read_bytes())
        except (PhotoError, OSError) as error:
            return str(error)

    for batch in batched(zip(paths, prefetch(pixels, paths, workers=workers), strict=True), BATCH):
        good = [picture for _, picture in batch if not isinstance(picture, str)]
        rows = zip(*engine.run(np.stack(good)), strict=True) if good else iter(())
        for path, picture in batch:
            if isinstance(picture, str):
                yield Answer(path, None, picture)
            else:
                probabilities, embedding = next(rows)
                yield Answer(path, probabilities, embedding=embedding)


def find_photos(paths: Sequence[Path]) -> list[Path]:
    """Files as they are named, and the photos in folders below, in the order of their names. Raises DataError."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and is_photo(p, path)]
            if not inside:
                raise DataError(f"The folder {path} has no photos in it; name photos, or a folder that has some.")
            found += inside
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"There is no photo or folder {path}; name photos, or a folder that has some.")
    return found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--bundle", type=Path, required=True, metavar="DIR", help="the bundle that answers")
    parser.add_argument("photos", type=Path, nargs="+", metavar="PHOTO_OR_FOLDER", help="what to classify")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads that decode photos")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--csv", action="store_true", help="a table with a column for each class")


def run(args: argparse.Namespace) -> int:
    """``finetune predict``: print an answer for each photo. The exit code is 1 where a photo could not be read."""
    bundle = open_full(args.bundle)
    answers = classify(bundle, find_photos(args.photos), workers=args.workers)
    failed = False
    table = csv.writer(sys.stdout, lineterminator="\n")
    if args.csv:
        table.writerow(["photo", "predicted", *(f"p_{name}" for name in bundle.classes), "error"])
    for answer in answers:
        failed = failed or answer.error is not None
        if args.json:
            print(json.dumps(_as_dict(answer, bundle), ensure_ascii=False))
        elif args.csv:
            table.writerow(_as_row(answer, bundle))
        else:
            print(_as_line(answer, bundle))
    return 1 if failed else 0


def _as_dict(answer: Answer, bundle: Bundle) -> dict[str, object]:
    if answer.probabilities is None:
        return {"photo": str(answer.path), "error": answer.error}
    best = int(answer.probabilities.argmax())
    return {
        "photo": str(answer.path),
        "label": bundle.classes[best],
        "confidence": float(answer.probabilities[best]),
        "probabilities": {name: float(p) for name, p in zip(bundle.classes, answer.probabilities, strict=True)},
        "model": bundle.name,
        "version": bundle.version,
    }


def _as_row(answer: Answer, bundle: Bundle) -> list[str]:
    if answer.probabilities is None:
        return [str(answer.path), "", *("" for _ in bundle.classes), answer.error or ""]
    best = bundle.classes[int(answer.probabilities.argmax())]
    return [str(answer.path), best, *(f"{p:.9g}" for p in answer.probabilities), ""]


def _as_line(answer: Answer, bundle: Bundle) -> str:
    if answer.probabilities is None:
        return f"{answer.path}: {answer.error}"
    best = int(answer.probabilities.argmax())
    return f"{answer.path}: {bundle.classes[best]} ({100 * answer.probabilities[best]:.2f} %)"
