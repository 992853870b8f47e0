"""Score millions of photos: streamed through a bundle's engine into a folder of Parquet files. No torch.

The list of photos is divided into parts of some thousand, and each part's file is there whole or not at all. That is all
there is to starting again: what has its file is done. Part ``n`` is scored by rank ``n % world_size``, so that processes need
not know of each other, and their number may change from one start to the next. The layout is the one that Spark and Hive
write, which pyarrow, pandas, DuckDB and Polars read as one table: names that start with ``_`` or ``.`` are not data.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from tqdm import tqdm

from finetune.io.threaded_map import available_cpus, batched, threaded_map
from models.artifacts.atomic_io import atomic_write, atomic_write_text
from models.artifacts.bundle import GRAPH, Bundle
from models.errors import DataError, ImageError, RunError
from models.runtime.openvino_engine import OpenVINOEngine

BATCH = 16
SETTINGS_FILE, SUCCESS_FILE = "_settings.json", "_SUCCESS"
INPUT_SHA256 = b"input_sha256"
# What is wrong with one file; any other refusal is the storage's, and the next photo would meet it too.
PER_FILE_ERRORS = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


@dataclass
class ScoreCounts:
    """What one process did: photos scored, those of them that could not be read, those that were there already."""

    scored: int = 0
    unreadable: int = 0
    skipped: int = 0
    seconds: float = 0.0
    complete: bool = False


def score_to_parquet(
    bundle: Bundle,
    photos: Iterable[Path],
    out: Path,
    *,
    images_per_file: int,
    precision: str = "fp32",
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> ScoreCounts:
    """Write the rows of this rank's parts of ``photos`` that are not in ``out`` yet; every rank is given all photos.

    A row is photo, label, confidence, p_<class>..., error; a photo that cannot be read has its error and nothing else. The
    last rank to end puts ``_SUCCESS`` there. Raises RunError where ``out`` was begun with other settings, DataError where the
    list of photos is not the one that it was begun with, or the storage fails.
    """
    settings = {"bundle": bundle.name, "version": bundle.version, "precision": precision, "images_per_file": images_per_file}
    _enter(out, settings)
    scorer = _Scorer(bundle, precision, workers or available_cpus())
    counts, parts, total = ScoreCounts(), 0, 0
    started = time.perf_counter()
    with tqdm(desc="scoring", unit="photo", disable=None) as bar:
        for number, part in enumerate(batched(photos, images_per_file)):
            parts, total = number + 1, total + len(part)
            if number % world_size != rank:
                continue
            file, digest = out / f"part-{number:08d}.parquet", _digest(part)
            if file.exists():
                _check_part(file, digest)
                counts.skipped += len(part)
                continue
            table = scorer.table(part, bar).replace_schema_metadata({INPUT_SHA256: digest})
            with atomic_write(file) as unfinished:
                pq.write_table(table, unfinished, compression="zstd")
            counts.scored += len(part)
            counts.unreadable += len(part) - table["error"].null_count
    counts.seconds = time.perf_counter() - started
    if not total:
        raise DataError("There are no photos in what was named; name photos, a folder that has some, or a list of them.")
    counts.complete = _finish(out, parts, total)
    return counts


class _Scorer:
    """As many threads as processors; each decodes a batch of photos and has it computed, so none waits for another."""

    def __init__(self, bundle: Bundle, precision: str, threads: int) -> None:
        self._bundle, self._threads = bundle, threads
        self._engine = OpenVINOEngine(
            bundle.path / GRAPH,
            outputs=["probabilities"],
            precision=precision,
            threads=threads,
            streams=threads,
            batch_sizes=(BATCH,),  # so that a photo's numbers do not depend on which others stand beside it
        )
        names = [("photo", pa.string()), ("label", pa.string()), ("confidence", pa.float32())]
        self._schema = pa.schema([*names, *((f"p_{name}", pa.float32()) for name in bundle.classes), ("error", pa.string())])

    def table(self, photos: Sequence[Path], bar: Any) -> pa.Table:
        rows: list[NDArray[np.float32] | str] = []
        for answers in threaded_map(
            self._answers, batched(photos, BATCH), workers=self._threads, buffer_size=2 * self._threads
        ):
            rows += answers
            bar.update(len(answers))
        classes = self._bundle.classes
        nothing = np.full(len(classes), np.nan, np.float32)
        probabilities = np.stack([nothing if isinstance(row, str) else row for row in rows])
        bad = np.array([isinstance(row, str) for row in rows])
        best = np.where(bad, 0, probabilities.argmax(axis=1))
        columns = [
            pa.array([_text(photo) for photo in photos]),
            pa.array([classes[i] for i in best], mask=bad),
            pa.array(probabilities.max(axis=1), mask=bad),
            *(pa.array(column.copy(), mask=bad) for column in probabilities.T),
            pa.array([row if isinstance(row, str) else None for row in rows], pa.string()),
        ]
        return pa.Table.from_arrays(columns, schema=self._schema)

    def _answers(self, photos: Sequence[Path]) -> list[NDArray[np.float32] | str]:
        pictures = [self._pixels(photo) for photo in photos]
        good = [picture for picture in pictures if not isinstance(picture, str)]
        answers = iter(self._engine.run(np.stack(good))[0]) if good else iter(())
        return [picture if isinstance(picture, str) else next(answers) for picture in pictures]

    def _pixels(self, photo: Path) -> NDArray[np.uint8] | str:
        try:
            return self._bundle.preprocessing.pixels(photo.read_bytes())
        except ImageError as error:
            return str(error)
        except PER_FILE_ERRORS as error:
            return error.strerror or type(error).__name__
        except OSError as error:
            raise DataError(
                f"{photo} cannot be read ({error.strerror}); mend the storage and say the same again, to go on from here."
            ) from None


def _enter(out: Path, settings: dict[str, Any]) -> None:
    """Begin, or go on where the same was begun."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file, and scores are a folder of Parquet files; name another with --output.")
    try:
        saved = json.loads((out / SETTINGS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if out.is_dir() and any(not path.name.startswith((".", "_")) for path in out.iterdir()):
            raise RunError(f"{out} is not empty and holds no scores; name another folder with --output.") from None
        atomic_write_text(out / SETTINGS_FILE, json.dumps(settings) + "\n")
        return
    for name, value in settings.items():
        if saved.get(name) != value:
            raise RunError(
                f"{out} was begun with the {name.replace('_', ' ')} {saved.get(name)}, not {value}; use the same to go on, or "
                "name another folder with --output."
            )


def _finish(out: Path, parts: int, total: int) -> bool:
    """Whether every part is there; then say so in a file, and remove what killed processes left."""
    there = {path.name for path in out.glob("part-*.parquet")}
    wanted = {f"part-{number:08d}.parquet" for number in range(parts)}
    if there - wanted:
        raise _other_photos(out)
    if there < wanted:
        return False
    if not (out / SUCCESS_FILE).exists():
        for left in out.glob(".part-*.part"):
            left.unlink(missing_ok=True)
        atomic_write_text(out / SUCCESS_FILE, json.dumps({"photos": total, "parts": parts}) + "\n")
    return True


def _check_part(file: Path, digest: str) -> None:
    """Raise DataError unless the part holds these photos; only the file's end is read."""
    held = (pq.read_schema(file).metadata or {}).get(INPUT_SHA256, b"").decode()
    if held != digest:
        raise _other_photos(file.parent)


def _other_photos(out: Path) -> DataError:
    return DataError(
        f"{out} was begun with another list of photos: some were added, removed or renamed since; make a list once and give it "
        "with --list, or name another folder with --output."
    )


def _digest(photos: Sequence[Path]) -> str:
    return hashlib.sha256("\n".join(map(_text, photos)).encode()).hexdigest()


def _text(path: Path) -> str:
    """A name as text; bytes that are no UTF-8 are written out."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
