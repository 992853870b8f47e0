"""Data sets by name, through torchvision or scikit-learn, as the pipeline's own folders of PNG files.

``train`` is the data set's own training part less a tenth of each class, which is ``valid``: it chooses the best epoch, stops
early and calibrates. ``test`` is the data set's own and has no part in training, so its figure is the one to compare.
"""

from __future__ import annotations

import dataclasses
import hashlib
import http.client
import json
import pickle
import random
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from finetune.config import Config
from finetune.io.output_folder import atomic_folder, require_empty_folder
from finetune.io.threaded_map import threaded_map
from models.artifacts.atomic_io import atomic_write_text
from models.errors import DataError

RECORD, RAW, TEST = "DATASET.json", "raw", "test"
VALID_FRACTION = 0.1
DIGITS_TEST = 0.2
ImageArray = NDArray[np.uint8]


@dataclass(frozen=True)
class ArraySplit:
    """One part of a data set: ``images`` (N, h, w) grey or (N, h, w, 3), and the class of each (N,)."""

    images: ImageArray
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class BuiltinDataset:
    """A data set: what it is called, how its classes and parts are read, and which files by hand stand in for a download."""

    title: str
    read: Callable[[Path], tuple[Sequence[str], ArraySplit, ArraySplit]]
    manual_files: str = ""


def with_data_dir(config: Config) -> Config:
    """The settings with the folder where ``config.dataset`` is to be: ``--data-dir``, or data/NAME where none is given."""
    if config.dataset is None or config.data_dir != Path("data"):
        return config
    return dataclasses.replace(config, data_dir=config.data_dir / config.dataset)


def make_dataset(name: str, folder: Path) -> None:
    """Make ``folder`` of the data set ``name``, whole or not at all, where it is not there yet; the raw files lie beside it.

    Raises DataError for a folder that holds something else, and where the files cannot be had.
    """
    record = folder / RECORD
    if record.is_file():
        held = json.loads(record.read_text(encoding="utf-8"))["dataset"]
        if held != name:
            raise DataError(f"{folder} holds the data set {held}, not {name}; name another folder with --data-dir.")
        return
    require_empty_folder(folder)
    known = BUILTIN_DATASETS[name]
    classes, train, test = _read(known, folder.parent / RAW)
    held_out = _draw_valid(name, train)
    parts = {
        "train": (train, np.flatnonzero(~held_out)),
        "valid": (train, np.flatnonzero(held_out)),
        TEST: (test, np.arange(len(test.labels))),
    }
    with atomic_folder(folder) as new:
        for split, (part, chosen) in parts.items():
            _write(new / split, classes, part, chosen)
        counts = {split: len(chosen) for split, (_, chosen) in parts.items()}
        repeated = len(set(map(_digest, train.images)) & set(map(_digest, test.images)))
        facts = {"dataset": name, "title": known.title, "images": counts, "in_train_and_test": repeated}
        atomic_write_text(new / RECORD, json.dumps(facts, indent=2) + "\n")
    print(
        f"{known.title} is in {folder}: {counts['train']:,} pictures for training, {counts['valid']:,} of its training part "
        f"held out for validation, and {counts[TEST]:,} for the test, which have no part in training"
        + (f" ({repeated:,} of them are in the training part too, as published)." if repeated else ".")
    )
    print("Pictures this small are searched for exact repeats alone: to a perceptual hash many of a kind look the same.")


def _read(known: BuiltinDataset, raw: Path) -> tuple[Sequence[str], ArraySplit, ArraySplit]:
    try:
        return known.read(raw)
    except (OSError, http.client.HTTPException, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(
            f"{known.title} could not be fetched ({reason}); try again, or fetch {known.manual_files} elsewhere and put it "
            f"into {shlex.quote(str(raw))}."
        ) from None


def _mnist(raw: Path) -> tuple[Sequence[str], ArraySplit, ArraySplit]:
    from torchvision.datasets import MNIST

    return [str(digit) for digit in range(10)], *_parts(MNIST, raw)


def _fashion_mnist(raw: Path) -> tuple[Sequence[str], ArraySplit, ArraySplit]:
    from torchvision.datasets import FashionMNIST

    return [_folder_name(name) for name in FashionMNIST.classes], *_parts(FashionMNIST, raw)


def _cifar10(raw: Path) -> tuple[Sequence[str], ArraySplit, ArraySplit]:
    from torchvision.datasets import CIFAR10

    train, test = _parts(CIFAR10, raw)
    return CIFAR10(str(raw)).classes, train, test


def _digits(raw: Path) -> tuple[Sequence[str], ArraySplit, ArraySplit]:
    """Scikit-learn's 1,797 digits of 8 x 8 px (UCI's, Alpaydin and Kaynak 1998), scaled to 28 px; a fifth is the test."""
    from sklearn.datasets import load_digits

    found = load_digits()
    small = (found.images * 255 / 16).round().astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(p).resize((28, 28), Image.Resampling.BICUBIC)) for p in small])
    test = _draw("digits/test", found.target, np.ones(len(small), dtype=bool), DIGITS_TEST)
    labels = found.target.astype(np.int64)
    return [str(digit) for digit in range(10)], ArraySplit(large[~test], labels[~test]), ArraySplit(large[test], labels[test])


def _parts(kind: Any, raw: Path) -> tuple[ArraySplit, ArraySplit]:
    """A torchvision data set's training and test part; its files are downloaded where they are not, and checked."""
    train, test = (kind(str(raw), train=is_train, download=is_train) for is_train in (True, False))
    images = [np.asarray(part.data, dtype=np.uint8) for part in (train, test)]
    labels = [np.asarray(part.targets, dtype=np.int64) for part in (train, test)]
    return ArraySplit(images[0], labels[0]), ArraySplit(images[1], labels[1])


def _draw_valid(name: str, train: ArraySplit) -> NDArray[np.bool_]:
    """Which training pictures are for validation: a tenth of each class, none that is there twice."""
    digests = [_digest(picture) for picture in train.images]
    counts = Counter(digests)
    single = np.array([counts[digest] == 1 for digest in digests])
    return _draw(f"{name}/valid", train.labels, single, VALID_FRACTION)


def _draw(seed: str, labels: NDArray[np.int64], allowed: NDArray[np.bool_], share: float) -> NDArray[np.bool_]:
    """A ``share`` of each class (one at least), of those ``allowed``, always the same for a ``seed``: (N,) True where drawn."""
    drawn = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        candidates = np.flatnonzero((labels == label) & allowed).tolist()
        random.Random(f"{seed}/{label}").shuffle(candidates)
        drawn[candidates[: max(1, round(share * int((labels == label).sum())))]] = True
    return drawn


def _write(folder: Path, classes: Sequence[str], part: ArraySplit, chosen: NDArray[np.intp]) -> None:
    """Write the pictures ``chosen`` as PNG files in their class's folder, named by their number in the data set."""
    for name in classes:
        (folder / name).mkdir(parents=True)

    def save(index: int) -> None:
        place = folder / classes[part.labels[index]] / f"{index:05d}.png"
        Image.fromarray(part.images[index]).save(place, compress_level=1)

    written = threaded_map(save, chosen.tolist(), workers=0)
    for _ in tqdm(written, total=len(chosen), desc=f"writing {folder.name}", unit="picture", disable=None):
        pass


def _digest(picture: ImageArray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(picture).tobytes()).digest()


def _folder_name(name: str) -> str:
    return name.lower().replace("/", "-").replace(" ", "-")


_MNIST_FILES = "{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz (as %s/raw/)"
BUILTIN_DATASETS = {
    "mnist": BuiltinDataset("MNIST", _mnist, _MNIST_FILES % "MNIST"),
    "fashion-mnist": BuiltinDataset("Fashion-MNIST", _fashion_mnist, _MNIST_FILES % "FashionMNIST"),
    "cifar10": BuiltinDataset("CIFAR-10", _cifar10, "cifar-10-python.tar.gz"),
    "digits": BuiltinDataset("scikit-learn's digits", _digits),
}
