"""Classify image files or images in memory with a bundle, and list the files to classify. Never imports torch."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from finetune.data.image_files import ImageSearch, find_images, read_image_file
from finetune.data.path_list import read_path_list
from finetune.io.threaded_map import batched, threaded_map
from models.artifacts.bundle import Bundle
from models.errors import DataError, ImageError
from models.preprocess import to_rgb
from models.runtime.openvino_engine import OpenVINOEngine

BATCH = 16


@dataclass(frozen=True)
class ImagePrediction:
    """An image's probabilities (classes,), embedding (d,) and OOD score, or the error if it could not be read.

    ``image`` is the file, or the image in memory. The OOD score is None if the bundle has none.
    """

    image: Path | Image.Image
    probabilities: NDArray[np.float32] | None
    error: str | None = None
    embedding: NDArray[np.float32] | None = None
    ood_score: float | None = None


def open_engine(bundle: Bundle, *, precision: str = "fp32") -> OpenVINOEngine:
    """Compile the bundle's graph for ``classify``."""
    return OpenVINOEngine(bundle.graph(precision), outputs=["embedding", *bundle.engine_outputs], precision=precision)


def classify(
    bundle: Bundle,
    images: Sequence[Path | Image.Image],
    *,
    precision: str = "fp32",
    workers: int = 0,
    engine: OpenVINOEngine | None = None,
) -> Iterator[ImagePrediction]:
    """Yield calibrated probabilities for each image, in order. An unreadable image yields its error instead.

    Args:
        bundle: The bundle to predict with.
        images: Image files, or images in memory.
        precision: Numeric precision of the engine.
        workers: Number of decoding threads. 0: one per CPU.
        engine: The result of ``open_engine``, to compile the graph only once for several calls.
    """
    engine = engine or open_engine(bundle, precision=precision)

    def pixels(image: Path | Image.Image) -> NDArray[np.uint8] | str:
        try:
            if isinstance(image, Image.Image):
                return bundle.preprocessing.crop(to_rgb(ImageOps.exif_transpose(image)))
            return bundle.preprocessing.pixels(read_image_file(image))
        except ImageError as error:
            return str(error)
        except OSError as error:
            return error.strerror or str(error)

    for batch in batched(zip(images, threaded_map(pixels, images, workers=workers), strict=True), BATCH):
        readable = [decoded for _, decoded in batch if not isinstance(decoded, str)]
        rows = zip(*engine.run(np.stack(readable)), strict=True) if readable else iter(())
        for image, decoded in batch:
            if isinstance(decoded, str):
                yield ImagePrediction(image, None, decoded)
            else:
                embedding, probabilities, *score = next(rows)
                ood_score = float(score[0]) if score else None
                yield ImagePrediction(image, probabilities, embedding=embedding, ood_score=ood_score)


def list_images(paths: Sequence[Path], listed: Path | None, search: ImageSearch) -> Iterator[Path]:
    """Yield the images of a list, or the given files and the images in the given folders.

    Raises:
        DataError: The list or a path does not exist.
    """
    if listed == Path("-"):
        yield from read_path_list(cast(io.BufferedReader, sys.stdin.buffer))
    elif listed is not None:
        if not listed.is_file():
            raise DataError(f"No such list: {listed}. --list takes a file with one path per line.")
        with listed.open("rb") as stream:
            yield from read_path_list(stream)
    yield from find_images(paths, search)
