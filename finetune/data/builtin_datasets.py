"""Download built-in data sets (MNIST, CIFAR-10, ...) with torchvision or scikit-learn and save them as PNG folders.

A tenth of each class of the official training split becomes ``valid``, which selects the best epoch and calibrates. The
official test split becomes ``test`` and is not used for training, so results on it are comparable with published ones.
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
    """One split: uint8 ``images`` (N, H, W) grayscale or (N, H, W, 3) RGB, and ``labels`` (N,)."""

    images: ImageArray
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class BuiltinDataset:
    """A built-in data set.

    Attributes:
        title: Name for messages.
        read: Takes the folder of raw files; returns the classes, the training split and the test split.
        manual_files: Files that can be placed into the raw folder by hand instead of being downloaded.
    """

    title: str
    read: Callable[[Path], tuple[Sequence[str], ArraySplit, ArraySplit]]
    manual_files: str = ""


def with_data_dir(config: Config) -> Config:
    """Set ``data_dir`` to data/NAME if ``--dataset`` is used without ``--data-dir``."""
    if config.dataset is None or config.data_dir != Path("data"):
        return config
    return dataclasses.replace(config, data_dir=config.data_dir / config.dataset)


def make_dataset(name: str, folder: Path) -> None:
    """Write a built-in data set to ``folder`` atomically, unless it is already there. Raw files go to ``../raw``.

    Raises:
        DataError: The folder contains something else, or the files cannot be downloaded.
    """
    record = folder / RECORD
    if record.is_file():
        existing = json.loads(record.read_text(encoding="utf-8"))["dataset"]
        if existing != name:
            raise DataError(f"{folder} contains the data set {existing}, not {name}. Set --data-dir to another folder.")
        return
    require_empty_folder(folder)
    dataset = BUILTIN_DATASETS[name]
    classes, train, test = _read(dataset, folder.parent / RAW)
    held_out = _select_valid(name, train)
    splits = {
        "train": (train, np.flatnonzero(~held_out)),
        "valid": (train, np.flatnonzero(held_out)),
        TEST: (test, np.arange(len(test.labels))),
    }
    with atomic_folder(folder) as new:
        for split, (source, indices) in splits.items():
            _write(new / split, classes, source, indices)
        counts = {split: len(indices) for split, (_, indices) in splits.items()}
        repeated = len(set(map(_digest, train.images)) & set(map(_digest, test.images)))
        facts = {"dataset": name, "title": dataset.title, "images": counts, "in_train_and_test": repeated}
        atomic_write_text(new / RECORD, json.dumps(facts, indent=2) + "\n")
    print(
        f"Saved {dataset.title} to {folder}: {counts['train']:,} training images, {counts['valid']:,} validation images (held "
        f"out from training) and {counts[TEST]:,} test images"
        + (f" ({repeated:,} are also in the published training split)." if repeated else ".")
    )
    print("Note: images this small are checked for exact duplicates only, as perceptual hashes cannot tell them apart.")


def _read(dataset: BuiltinDataset, raw: Path) -> tuple[Sequence[str], ArraySplit, ArraySplit]:
    try:
        return dataset.read(raw)
    except (OSError, http.client.HTTPException, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(
            f"Could not download {dataset.title} ({reason}). Try again, or put {dataset.manual_files} into "
            f"{shlex.quote(str(raw))} yourself."
        ) from None


def _mnist(raw: Path) -> tuple[Sequence[str], ArraySplit, ArraySplit]:
    from torchvision.datasets import MNIST

    return [str(digit) for digit in range(10)], *_read_torchvision(MNIST, raw)


def _fashion_mnist(raw: Path) -> tuple[Sequence[str], ArraySplit, ArraySplit]:
    from torchvision.datasets import FashionMNIST

    return [_folder_name(name) for name in FashionMNIST.classes], *_read_torchvision(FashionMNIST, raw)


def _cifar10(raw: Path) -> tuple[Sequence[str], ArraySplit, ArraySplit]:
    from torchvision.datasets import CIFAR10

    train, test = _read_torchvision(CIFAR10, raw)
    return CIFAR10(str(raw)).classes, train, test


def _digits(raw: Path) -> tuple[Sequence[str], ArraySplit, ArraySplit]:
    """Read scikit-learn's 1,797 digits (UCI, 8 x 8 px), upscale them to 28 px and use a fifth as the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = (digits.images * 255 / 16).round().astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(p).resize((28, 28), Image.Resampling.BICUBIC)) for p in small])
    test = _sample("digits/test", digits.target, np.ones(len(small), dtype=bool), DIGITS_TEST)
    labels = digits.target.astype(np.int64)
    return [str(digit) for digit in range(10)], ArraySplit(large[~test], labels[~test]), ArraySplit(large[test], labels[test])


def _read_torchvision(dataset_class: Any, raw: Path) -> tuple[ArraySplit, ArraySplit]:
    """Read the training and test splits of a torchvision data set, which downloads missing files and checks them."""
    train, test = (dataset_class(str(raw), train=is_train, download=is_train) for is_train in (True, False))
    images = [np.asarray(split.data, dtype=np.uint8) for split in (train, test)]
    labels = [np.asarray(split.targets, dtype=np.int64) for split in (train, test)]
    return ArraySplit(images[0], labels[0]), ArraySplit(images[1], labels[1])


def _select_valid(name: str, train: ArraySplit) -> NDArray[np.bool_]:
    """Select a tenth of each training class for validation, without images that occur more than once: mask (N,)."""
    digests = [_digest(image) for image in train.images]
    counts = Counter(digests)
    unique = np.array([counts[digest] == 1 for digest in digests])
    return _sample(f"{name}/valid", train.labels, unique, VALID_FRACTION)


def _sample(seed: str, labels: NDArray[np.int64], allowed: NDArray[np.bool_], fraction: float) -> NDArray[np.bool_]:
    """Sample a fraction of each class (at least one image) from the ``allowed`` images, reproducibly: mask (N,)."""
    selected = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        candidates = np.flatnonzero((labels == label) & allowed).tolist()
        random.Random(f"{seed}/{label}").shuffle(candidates)
        selected[candidates[: max(1, round(fraction * int((labels == label).sum())))]] = True
    return selected


def _write(folder: Path, classes: Sequence[str], source: ArraySplit, indices: NDArray[np.intp]) -> None:
    """Write the images at ``indices`` as CLASS/INDEX.png."""
    for name in classes:
        (folder / name).mkdir(parents=True)

    def save(index: int) -> None:
        path = folder / classes[source.labels[index]] / f"{index:05d}.png"
        Image.fromarray(source.images[index]).save(path, compress_level=1)

    saved = threaded_map(save, indices.tolist(), workers=0)
    for _ in tqdm(saved, total=len(indices), desc=f"writing {folder.name}", unit="image", disable=None):
        pass


def _digest(image: ImageArray) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).digest()


def _folder_name(name: str) -> str:
    return name.lower().replace("/", "-").replace(" ", "-")


_MNIST_FILES = "{train,t10k}-{images-idx3,labels-idx1}-ubyte.gz (as %s/raw/)"
BUILTIN_DATASETS = {
    "mnist": BuiltinDataset("MNIST", _mnist, _MNIST_FILES % "MNIST"),
    "fashion-mnist": BuiltinDataset("Fashion-MNIST", _fashion_mnist, _MNIST_FILES % "FashionMNIST"),
    "cifar10": BuiltinDataset("CIFAR-10", _cifar10, "cifar-10-python.tar.gz"),
    "digits": BuiltinDataset("scikit-learn's digits", _digits),
}
