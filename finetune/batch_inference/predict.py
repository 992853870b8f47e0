"""Classify images with a bundle. Never imports torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.data.image_files import is_image_file, walk_images
from finetune.io.threaded_map import batched, threaded_map
from models.artifacts.bundle import GRAPH, Bundle
from models.errors import DataError, ImageError
from models.runtime.openvino_engine import OpenVINOEngine

BATCH = 16


@dataclass(frozen=True)
class ImagePrediction:
    """An image's probabilities (classes,) and embedding (d,), or the error if it could not be read."""

    path: Path
    probabilities: NDArray[np.float32] | None
    error: str | None = None
    embedding: NDArray[np.float32] | None = None


def classify(bundle: Bundle, paths: Sequence[Path], *, precision: str = "fp32", workers: int = 0) -> Iterator[ImagePrediction]:
    """Yield calibrated probabilities for each image, in order. An unreadable image yields its error instead.

    Args:
        bundle: The bundle to predict with.
        paths: The image files.
        precision: Numeric precision of the engine.
        workers: Number of decoding threads. 0: one per CPU.
    """
    engine = OpenVINOEngine(bundle.path / GRAPH, outputs=["probabilities", "embedding"], precision=precision)

    def pixels(path: Path) -> NDArray[np.uint8] | str:
        try:
            return bundle.preprocessing.pixels(path.read_bytes())
        except (ImageError, OSError) as error:
            return str(error)

    for batch in batched(zip(paths, threaded_map(pixels, paths, workers=workers), strict=True), BATCH):
        readable = [decoded for _, decoded in batch if not isinstance(decoded, str)]
        rows = zip(*engine.run(np.stack(readable)), strict=True) if readable else iter(())
        for path, decoded in batch:
            if isinstance(decoded, str):
                yield ImagePrediction(path, None, decoded)
            else:
                probabilities, embedding = next(rows)
                yield ImagePrediction(path, probabilities, embedding=embedding)


def find_images(paths: Sequence[Path]) -> list[Path]:
    """List the given files and the images in the given folders, sorted within each folder.

    Raises:
        DataError: A path does not exist, or a folder contains no images.
    """
    images: list[Path] = []
    for path in paths:
        if path.is_dir():
            in_folder = [p for p in sorted(path.rglob("*")) if p.is_file() and is_image_file(p, path)]
            if not in_folder:
                raise DataError(f"No photos found in {path}. Pass photos, or a folder that contains some.")
            images += in_folder
        elif path.is_file():
            images.append(path)
        else:
            raise _missing_path(path)
    return images


def _missing_path(path: Path) -> DataError:
    return DataError(f"No such photo or folder: {path}. Pass photos, or a folder that contains some.")


def iter_images(paths: Sequence[Path], listed: Path | None) -> Iterator[Path]:
    """Yield the images of a list, or the given files and the images in the given folders.

    Raises:
        DataError: The list or a path does not exist.
    """
    if listed == Path("-"):
        yield from iter_list(sys.stdin.buffer)
    elif listed is not None:
        if not listed.is_file():
            raise DataError(f"No such list: {listed}. --list takes a file with one path per line.")
        with listed.open("rb") as lines:
            yield from iter_list(lines)
    for path in paths:
        if path.is_dir():
            yield from walk_images(path)
        elif path.is_file():
            yield path
        else:
            raise _missing_path(path)


def iter_list(lines: Iterable[bytes]) -> Iterator[Path]:
    """Yield the paths of a list with one path per line, as printed by ``find``."""
    for line in lines:
        if name := line.rstrip(b"\r\n"):
            yield Path(os.fsdecode(name))
