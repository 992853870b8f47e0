"""Classify photos with a bundle: its graph, its preprocessing, its classes."""

from __future__ import annotations

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.data.image_files import is_image_file, walk_images
from finetune.export.merge_head import open_full_bundle
from finetune.io.threaded_map import batched, threaded_map
from models.artifacts.bundle import GRAPH, Bundle, open_bundle
from models.artifacts.paths import resolve_bundle
from models.errors import ConfigError, DataError, ImageError
from models.runtime.openvino_engine import OpenVINOEngine, supports_bf16
from models.runtime.precision import select_precision

BATCH = 16


@dataclass(frozen=True)
class ImagePrediction:
    """A photo's probabilities (classes,) and embedding (d,), or the reason why there are none."""

    path: Path
    probabilities: NDArray[np.float32] | None
    error: str | None = None
    embedding: NDArray[np.float32] | None = None


def classify(bundle: Bundle, paths: Sequence[Path], *, precision: str = "fp32", workers: int = 0) -> Iterator[ImagePrediction]:
    """Calibrated probabilities for each photo, in order; a photo that cannot be read gets its error, the others go on."""
    engine = OpenVINOEngine(bundle.path / GRAPH, outputs=["probabilities", "embedding"], precision=precision)

    def pixels(path: Path) -> NDArray[np.uint8] | str:
        try:
            return bundle.preprocessing.pixels(path.read_bytes())
        except (ImageError, OSError) as error:
            return str(error)

    for batch in batched(zip(paths, threaded_map(pixels, paths, workers=workers), strict=True), BATCH):
        good = [picture for _, picture in batch if not isinstance(picture, str)]
        rows = zip(*engine.run(np.stack(good)), strict=True) if good else iter(())
        for path, picture in batch:
            if isinstance(picture, str):
                yield ImagePrediction(path, None, picture)
            else:
                probabilities, embedding = next(rows)
                yield ImagePrediction(path, probabilities, embedding=embedding)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Files as they are named, and the photos in folders below, in the order of their names. Raises DataError."""
    found: list[Path] = []
    for path in paths:
        if path.is_dir():
            inside = [p for p in sorted(path.rglob("*")) if p.is_file() and is_image_file(p, path)]
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
    parser.add_argument("photos", type=Path, nargs="*", metavar="PHOTO_OR_FOLDER", help="what to classify")
    parser.add_argument("--workers", type=int, default=0, metavar="N", help="threads that decode photos")
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="one JSON object a line")
    form.add_argument("--csv", action="store_true", help="a table with a column for each class")
    form.add_argument(
        "--output",
        type=Path,
        metavar="SCORES.parquet",
        help="a folder of Parquet files, for any number of photos: what is there already is not done again",
    )
    parser.add_argument(
        "--list", type=Path, metavar="FILE", help="with --output: a file that names the photos, one a line; - is standard input"
    )
    parser.add_argument(
        "--images-per-file", type=int, default=4096, metavar="N", help="photos in one file of --output (default: 4096)"
    )
    parser.add_argument(
        "--precision",
        choices=("fp32", "bf16", "auto"),
        default="fp32",
        help="numbers of the network (default: fp32)",
    )


def run(args: argparse.Namespace) -> int:
    """``finetune predict``: print an answer for each photo. The exit code is 1 where a photo could not be read."""
    if args.output:
        return run_scoring(args)
    if not args.photos or args.list or int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("Name photos or folders to classify; a --list, or several processes, need --output SCORES.parquet.")
    bundle = open_full_bundle(args.bundle)
    answers = classify(bundle, find_images(args.photos), precision=_precision(args, bundle), workers=args.workers)
    failed = False
    table = csv.writer(sys.stdout, lineterminator="\n")
    if args.csv:
        table.writerow(["photo", "label", *(f"p_{name}" for name in bundle.classes), "error"])
    for answer in answers:
        failed = failed or answer.error is not None
        if args.json:
            print(json.dumps(_as_dict(answer, bundle), ensure_ascii=False))
        elif args.csv:
            table.writerow(_as_row(answer, bundle))
        else:
            print(_as_line(answer, bundle))
    return 1 if failed else 0


def run_scoring(args: argparse.Namespace) -> int:
    """``--output``: this process's part of the photos, in RANK and WORLD_SIZE's world, into Parquet files."""
    from finetune.batch_inference.parquet import score_to_parquet

    rank, world_size = (int(os.environ.get(name, default)) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if bool(args.photos) == bool(args.list):
        raise ConfigError("--output takes photos and folders, or a --list of photos; name the one or the other.")
    if args.images_per_file < 1:
        raise ConfigError(f"--images-per-file is {args.images_per_file}, and takes 1 or more.")
    if world_size > 1 and args.list == Path("-"):
        raise ConfigError("Only one process can read standard input; write the list to a file that all can read.")
    bundle = open_full_bundle(args.bundle) if world_size == 1 else open_bundle(resolve_bundle(args.bundle))
    counts = score_to_parquet(
        bundle,
        iter_images(args.photos, args.list),
        args.output,
        images_per_file=args.images_per_file,
        precision=_precision(args, bundle),
        workers=args.workers,
        rank=rank,
        world_size=world_size,
    )
    who = f"process {rank + 1} of {world_size}: " if world_size > 1 else ""
    rate = counts.scored / counts.seconds
    print(f"{who}{counts.scored:,} photos scored, {rate:,.1f} a second; {counts.skipped:,} were there already")
    if counts.unreadable:
        print(f"{who}{counts.unreadable:,} of them could not be read; column `error` says why")
    if counts.complete:
        print(f"{args.output} is complete.")
    return 0


def _precision(args: argparse.Namespace, bundle: Bundle) -> str:
    if args.precision == "bf16" and not supports_bf16():
        raise ConfigError("--precision is bf16, which this processor does not have; say fp32, or leave it out.")
    return select_precision(bundle, args.precision).name


def iter_images(paths: Sequence[Path], listed: Path | None) -> Iterator[Path]:
    """The photos of a list, or those named and below folders, one after another. Raises DataError for what is not there."""
    if listed == Path("-"):
        yield from iter_list(sys.stdin.buffer)
    elif listed is not None:
        if not listed.is_file():
            raise DataError(f"There is no list {listed}; give a file that names a photo on each line.")
        with listed.open("rb") as lines:
            yield from iter_list(lines)
    for path in paths:
        if path.is_dir():
            yield from walk_images(path)
        elif path.is_file():
            yield path
        else:
            raise DataError(f"There is no photo or folder {path}; name photos, or a folder that has some.")


def iter_list(lines: Iterable[bytes]) -> Iterator[Path]:
    """What `find` prints: a name a line."""
    for line in lines:
        if name := line.rstrip(b"\r\n"):
            yield Path(os.fsdecode(name))


def _as_dict(answer: ImagePrediction, bundle: Bundle) -> dict[str, object]:
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


def _as_row(answer: ImagePrediction, bundle: Bundle) -> list[str]:
    if answer.probabilities is None:
        return [str(answer.path), "", *("" for _ in bundle.classes), answer.error or ""]
    best = bundle.classes[int(answer.probabilities.argmax())]
    return [str(answer.path), best, *(f"{p:.9g}" for p in answer.probabilities), ""]


def _as_line(answer: ImagePrediction, bundle: Bundle) -> str:
    if answer.probabilities is None:
        return f"{answer.path}: {answer.error}"
    best = int(answer.probabilities.argmax())
    return f"{answer.path}: {bundle.classes[best]} ({100 * answer.probabilities[best]:.2f} %)"
