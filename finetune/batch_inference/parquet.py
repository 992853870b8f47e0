"""Score any number of images into a folder of Parquet files: ``finetune predict --output``. Never imports torch.

The list of images is divided into chunks, and each chunk's file is written atomically. To resume, chunks that have a file are
skipped. Chunk ``n`` is scored by rank ``n % world_size``, so processes do not communicate and their number may change between
runs. The layout is that of Spark and Hive, which pyarrow, pandas, DuckDB and Polars read as one table: names that start with
``_`` or ``.`` are not data.
"""

from __future__ import annotations

import errno
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

from finetune.data.image_files import read_image_file
from finetune.data.label_table import LabelRow, LabelTable
from finetune.io.threaded_map import available_cpus, batched, threaded_map
from models.artifacts.atomic_io import atomic_write, atomic_write_text
from models.artifacts.bundle import Bundle
from models.artifacts.decision_rule import Decision
from models.artifacts.predictions import FACET_PREFIX
from models.errors import DataError, ImageError, RunError
from models.runtime.openvino_engine import OpenVINOEngine

BATCH = 16
SETTINGS_FILE, SUCCESS_FILE = "_settings.json", "_SUCCESS"
INPUT_SHA256 = b"input_sha256"
# Errors of a single file. Any other OSError is a failure of the storage and would affect the next image as well.
PER_FILE_ERRORS = (
    errno.ENOENT,
    errno.EACCES,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,  # links that lead to each other
    errno.ENAMETOOLONG,
    errno.ENXIO,  # a socket
)


@dataclass
class ScoreCounts:
    """What one process did.

    Attributes:
        scored: Number of scored images, including unreadable ones.
        unreadable: Number of images that could not be read.
        skipped: Number of images that were already scored.
        seconds: Duration in seconds.
        complete: Whether every chunk is scored, by any process.
    """

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
    abstain: bool = True,
    labels: LabelTable | None = None,
    workers: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> ScoreCounts:
    """Score this rank's chunks of ``photos`` that are not in ``out`` yet.

    A row has the columns file, label, confidence, p_<class>..., in_distribution, ood_score, because, because_code, error. An
    unreadable image has only its error, and an image without a label the reason. With a table of labels the columns
    true_label, split, group and facet_<name>... follow. The last rank to finish writes ``_SUCCESS``.

    Args:
        bundle: The bundle to predict with.
        photos: All images, the same for every rank.
        out: The folder for the Parquet files.
        images_per_file: Number of images per chunk.
        precision: Numeric precision of the engine.
        abstain: False to give every image its most probable class as its label.
        labels: The table that lists the images, if there is one.
        workers: Number of threads. 0: one per CPU.
        rank: Number of this process, from 0.
        world_size: Number of processes.

    Raises:
        RunError: ``out`` was started with other settings or is not a folder of scores.
        DataError: ``out`` was started with other images, there are no images, or the storage fails.
    """
    settings = {
        "bundle": bundle.name,
        "version": bundle.version,
        "precision": precision,
        "images_per_file": images_per_file,
        "abstain": abstain,
    }
    _start_or_resume(out, settings | ({"labels": labels.sha256} if labels else {}))
    rows = {row.image: row for row in labels.rows} if labels else {}
    scorer = _Scorer(bundle, precision, workers or available_cpus(), abstain=abstain)
    counts, chunks, total = ScoreCounts(), 0, 0
    started = time.perf_counter()
    with tqdm(desc="scoring", unit="photo", disable=None) as bar:
        for number, chunk in enumerate(batched(photos, images_per_file)):
            chunks, total = number + 1, total + len(chunk)
            if number % world_size != rank:
                continue
            file, digest = out / f"part-{number:08d}.parquet", _digest(chunk)
            if file.exists():
                _check_chunk(file, digest, scorer.schema.names)
                counts.skipped += len(chunk)
                continue
            table = scorer.table(chunk, bar)
            table = _add_columns(table, [rows[labels.name_of(path)] for path in chunk], labels) if labels else table
            table = table.replace_schema_metadata({INPUT_SHA256: digest})
            with atomic_write(file) as temporary:
                pq.write_table(table, temporary, compression="zstd")
            counts.scored += len(chunk)
            counts.unreadable += len(chunk) - table["error"].null_count
    counts.seconds = time.perf_counter() - started
    if not total:
        raise DataError("No photos found. Pass photos, a folder of photos, or a list of them with --list.")
    counts.complete = _finish(out, chunks, total)
    return counts


@dataclass(frozen=True)
class Score:
    """The results of one image: probabilities (classes,), and the OOD score, which is None if the bundle has none."""

    probabilities: NDArray[np.float32]
    ood_score: float | None


_FAILED = Decision(None)  # decision for an image that could not be read


class _Scorer:
    """Scores chunks in one thread per CPU. Each thread decodes and predicts its own batches."""

    def __init__(self, bundle: Bundle, precision: str, threads: int, *, abstain: bool) -> None:
        self._bundle, self._threads, self._abstain = bundle, threads, abstain
        self._rule = bundle.decision_rule
        self._engine = OpenVINOEngine(
            bundle.graph(precision),
            outputs=bundle.engine_outputs,
            precision=precision,
            threads=threads,
            streams=threads,
            batch_sizes=(BATCH,),  # fixed, so that a result does not depend on the other images in the batch
        )
        names = [("file", pa.string()), ("label", pa.string()), ("confidence", pa.float32())]
        scores = [("in_distribution", pa.bool_()), ("ood_score", pa.float32())]
        texts = [(name, pa.string()) for name in ("because", "because_code", "error")]
        probabilities = [(f"p_{name}", pa.float32()) for name in bundle.classes]
        self.schema = pa.schema([*names, *probabilities, *scores, *texts])

    def table(self, photos: Sequence[Path], bar: Any) -> pa.Table:
        rows: list[Score | str] = []
        for batch in threaded_map(self._predict, batched(photos, BATCH), workers=self._threads, buffer_size=2 * self._threads):
            rows += batch
            bar.update(len(batch))
        classes = self._bundle.classes
        empty = np.full(len(classes), np.nan, np.float32)
        probabilities = np.stack([empty if isinstance(row, str) else row.probabilities for row in rows])
        failed = np.array([isinstance(row, str) for row in rows])
        decisions = [_FAILED if isinstance(row, str) else self._decide(row) for row in rows]
        columns = [
            pa.array([_path_text(photo) for photo in photos]),
            pa.array([decision.label for decision in decisions], pa.string()),
            pa.array(probabilities.max(axis=1), mask=failed),
            *(pa.array(column.copy(), mask=failed) for column in probabilities.T),
            pa.array([decision.in_distribution for decision in decisions], pa.bool_()),
            pa.array([None if isinstance(row, str) else row.ood_score for row in rows], pa.float32()),
            pa.array([decision.because for decision in decisions], pa.string()),
            pa.array([decision.because_code for decision in decisions], pa.string()),
            pa.array([row if isinstance(row, str) else None for row in rows], pa.string()),
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)

    def _decide(self, score: Score) -> Decision:
        return self._rule.decide(self._bundle.classes, score.probabilities, score.ood_score, abstain=self._abstain)

    def _predict(self, photos: Sequence[Path]) -> list[Score | str]:
        """Return each image's results, or the reason why it could not be read."""
        decoded = [self._pixels(photo) for photo in photos]
        readable = [pixels for pixels in decoded if not isinstance(pixels, str)]
        rows = zip(*self._engine.run(np.stack(readable)), strict=True) if readable else iter(())
        scores = (Score(probabilities, float(score[0]) if score else None) for probabilities, *score in rows)
        return [pixels if isinstance(pixels, str) else next(scores) for pixels in decoded]

    def _pixels(self, photo: Path) -> NDArray[np.uint8] | str:
        try:
            return self._bundle.preprocessing.pixels(read_image_file(photo))
        except ImageError as error:
            return str(error)
        except OSError as error:
            if error.errno in PER_FILE_ERRORS:
                return str(error.strerror)
            raise DataError(
                f"{photo} could not be read ({error.strerror}). Fix the storage and re-run the same command to resume."
            ) from None


def _add_columns(scores: pa.Table, rows: Sequence[LabelRow], labels: LabelTable) -> pa.Table:
    """Add the columns of a table of labels."""
    columns: dict[str, list[str | None]] = {"true_label": [row.label for row in rows]}
    columns |= {"split": [row.split for row in rows], "group": [row.group or None for row in rows]}
    columns |= {f"{FACET_PREFIX}{name}": [row.facets.get(name) for row in rows] for name in labels.facets}
    for name, values in columns.items():
        scores = scores.append_column(name, pa.array(values, pa.string()))
    return scores


def _start_or_resume(out: Path, settings: dict[str, Any]) -> None:
    """Save the settings of a new scoring run, or check that ``out`` was started with the same settings."""
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file, but --output needs a folder. Choose another --output.")
    try:
        saved = json.loads((out / SETTINGS_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        if out.is_dir() and any(not path.name.startswith((".", "_")) for path in out.iterdir()):
            raise RunError(f"{out} is not empty and does not contain scores. Choose another --output.") from None
        atomic_write_text(out / SETTINGS_FILE, json.dumps(settings) + "\n")
        return
    for name, value in settings.items():
        if saved.get(name) != value:
            raise RunError(
                f"{out} was started with {name.replace('_', ' ')} {saved.get(name)}, not {value}. "
                "Use the same value to resume, or choose another --output."
            )


def _finish(out: Path, chunks: int, total: int) -> bool:
    """If every chunk is scored, write ``_SUCCESS``, remove temporary files of killed processes and return True."""
    existing = {path.name for path in out.glob("part-*.parquet")}
    expected = {f"part-{number:08d}.parquet" for number in range(chunks)}
    if existing - expected:
        raise _other_photos(out)
    if existing < expected:
        return False
    if not (out / SUCCESS_FILE).exists():
        for leftover in out.glob(".part-*.part"):
            leftover.unlink(missing_ok=True)
        atomic_write_text(out / SUCCESS_FILE, json.dumps({"photos": total, "parts": chunks}) + "\n")
    return True


def _check_chunk(file: Path, digest: str, columns: Sequence[str]) -> None:
    """Check that the file contains these images and columns. Reads only the Parquet footer.

    Raises:
        DataError: It contains other images.
        RunError: It was written by a version with other columns.
    """
    schema = pq.read_schema(file)
    if (schema.metadata or {}).get(INPUT_SHA256, b"").decode() != digest:
        raise _other_photos(file.parent)
    if schema.names[: len(columns)] != columns:
        raise RunError(f"{file.parent} was started by another version, which wrote other columns. Choose another --output.")


def _other_photos(out: Path) -> DataError:
    return DataError(
        f"{out} was started with another list of photos. Some have been added, removed or renamed since. Save the list once "
        "and pass it with --list, or choose another --output."
    )


def _digest(photos: Sequence[Path]) -> str:
    return hashlib.sha256("\n".join(map(_path_text, photos)).encode()).hexdigest()


def _path_text(path: Path) -> str:
    """Return a path as text, with bytes that are not UTF-8 escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")
