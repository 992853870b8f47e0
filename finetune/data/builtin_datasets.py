"""Prepare built-in datasets (MNIST, CIFAR-10, ...) as image folders.

Their files are read from this machine if they are there, else downloaded by torchvision. A tenth of each class of the official
training split becomes ``valid``, which selects the best epoch and calibrates. The official test split becomes ``test`` and is
not used for training, so results on it are comparable with published ones.
"""

from __future__ import annotations

import dataclasses
import http.client
import json
import pickle
import random
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
from finetune.data.published_files import (
    TEST,
    TRAIN,
    ArraySplit,
    Labels,
    Published,
    Split,
    has_class_folders,
    has_idx_files,
    read_class_folders,
    read_idx_files,
)
from finetune.io.output_folder import atomic_folder, require_empty_folder
from finetune.io.threaded_map import threaded_map
from models.artifacts.atomic_io import atomic_write_text, sha256_of
from models.errors import DataError

RECORD, RAW = "DATASET.json", "raw"
DEFAULT_ROOT = Path("data")
DEBIAN = Path("/usr/share/datasets")  # each dataset is in the folder of its package
VALID_FRACTION = 0.1
DIGITS_TEST = 0.2


@dataclass(frozen=True)
class BuiltinDataset:
    """A built-in dataset.

    Attributes:
        title: Name for messages.
        classes: The names of the class folders, in the order of the labels.
        read: Takes the folder for downloaded files. Finds or downloads the dataset and reads it.
        manual: How to provide the files by hand.
    """

    title: str
    classes: Sequence[str]
    read: Callable[[Path], Published]
    manual: str = ""


def with_data_dir(config: Config) -> Config:
    """Set ``data_dir`` to data/NAME if ``--dataset`` is used without ``--data-dir``, or with a folder of published files."""
    if config.dataset is None or (config.data_dir != DEFAULT_ROOT and source_folder(config) is None):
        return config
    return dataclasses.replace(config, data_dir=DEFAULT_ROOT / config.dataset)


def source_folder(config: Config) -> Path | None:
    """Return ``data_dir`` if it contains the published files of ``--dataset``, else None."""
    folder = config.data_dir
    if config.dataset is None or folder == DEFAULT_ROOT or (folder / RECORD).exists():
        return None
    return folder if has_idx_files(folder) or has_class_folders(folder) else None


def make_dataset(name: str, folder: Path, *, source: Path | None = None) -> None:
    """Write a built-in dataset to ``folder`` atomically, unless it is already there.

    Args:
        name: A key of ``BUILTIN_DATASETS``.
        folder: The folder to write. Downloaded files go to ``raw`` next to it.
        source: A folder with the published files. None: search this machine, then download.

    Raises:
        DataError: The folder contains something else, or the files cannot be read or downloaded.
    """
    record = folder / RECORD
    dataset = BUILTIN_DATASETS[name]
    if record.is_file():
        existing = json.loads(record.read_text(encoding="utf-8"))
        if existing["dataset"] != name:
            raise DataError(
                f"{folder} contains the dataset {existing['dataset']}, not {name}. Set --data-dir to another folder."
            )
        if source and read_source(dataset, source).sha256s != existing.get("sha256s"):
            raise DataError(f"{folder} was made from other files than those in {source}. Delete it to make it again.")
        return
    require_empty_folder(folder)
    published = read_source(dataset, source) if source else _find_or_download(dataset, folder.parent / RAW)
    print(f"Reading {dataset.title} from {published.origin}.")
    train, test = published.train, published.test
    digests = train.digests()
    held_out = _select_valid(name, train.labels, digests)
    splits = {
        TRAIN: (train, np.flatnonzero(~held_out)),
        "valid": (train, np.flatnonzero(held_out)),
        TEST: (test, np.arange(len(test.labels))),
    }
    with atomic_folder(folder) as new:
        for split, (images, indices) in splits.items():
            _write(new / split, dataset.classes, images, indices)
        counts = {split: len(indices) for split, (_, indices) in splits.items()}
        repeated = len(set(digests) & set(test.digests()))
        facts = {
            "dataset": name,
            "title": dataset.title,
            "images": counts,
            "in_train_and_test": repeated,
            "origin": published.origin,
            "sha256s": published.sha256s,
        }
        atomic_write_text(new / RECORD, json.dumps(facts, indent=2) + "\n")
    print(
        f"Saved {dataset.title} to {folder}: {counts[TRAIN]:,} training images, {counts['valid']:,} validation images (held "
        f"out from training) and {counts[TEST]:,} test images"
        + (f" ({repeated:,} are also in the published training split)." if repeated else ".")
    )
    print("Note: images this small are checked for exact duplicates only, as perceptual hashes cannot tell them apart.")


def read_source(dataset: BuiltinDataset, folder: Path) -> Published:
    """Read the published files in ``folder``. Raises DataError if they are damaged or incomplete."""
    return (read_idx_files if has_idx_files(folder) else read_class_folders)(folder, dataset.classes)


def _find_or_download(dataset: BuiltinDataset, raw: Path) -> Published:
    try:
        return dataset.read(raw)
    except (OSError, http.client.HTTPException, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise DataError(
            f"{dataset.title} is not on this machine and could not be downloaded ({reason}). {dataset.manual}"
        ) from None


def _idx_dataset(title: str, classes: Sequence[str], *, torchvision_name: str, package: str = "") -> BuiltinDataset:
    """Describe a dataset of idx files, which torchvision downloads and Debian may have as a package."""

    def read(raw: Path) -> Published:
        torchvision_folder = Path(torchvision_name, "raw")
        folders = [raw / torchvision_folder, raw.parent / torchvision_folder]
        if package:
            folders.append(DEBIAN / package.removeprefix("dataset-"))
        for folder in folders:
            if has_idx_files(folder):
                return read_idx_files(folder, classes)
        import torchvision.datasets

        getattr(torchvision.datasets, torchvision_name)(str(raw), download=True)  # checks the files' MD5s
        return read_idx_files(raw / torchvision_folder, classes)

    install = f"On Debian, run `apt-get install {package}`. Otherwise set" if package else "Set"
    manual = f"{install} --data-dir to a folder with {{train,t10k}}-{{images-idx3,labels-idx1}}-ubyte.gz."
    return BuiltinDataset(title, classes, read, manual)


def _cifar10(raw: Path) -> Published:
    from torchvision.datasets import CIFAR10

    root = next((folder for folder in (raw, raw.parent) if (folder / CIFAR10.base_folder).is_dir()), raw)
    # Checks the MD5s also of files on disk, because reading a pickle can run code
    train, test = (CIFAR10(str(root), train=is_train, download=is_train) for is_train in (True, False))
    folder = root / CIFAR10.base_folder
    names = [name for name, _ in (*CIFAR10.train_list, *CIFAR10.test_list)]
    sha256s = {name: sha256_of(folder / name) for name in names}
    return Published(_arrays(train.data, train.targets), _arrays(test.data, test.targets), str(folder), sha256s)


def _digits(raw: Path) -> Published:
    """Read scikit-learn's 1,797 digits (UCI, 8 x 8 px), upscale them to 28 px and use a fifth as the test split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small = (digits.images * 255 / 16).round().astype(np.uint8)
    large = np.stack([np.asarray(Image.fromarray(p).resize((28, 28), Image.Resampling.BICUBIC)) for p in small])
    test = _sample("digits/test", digits.target, np.ones(len(small), dtype=bool), DIGITS_TEST)
    labels = digits.target.astype(np.int64)
    return Published(_arrays(large[~test], labels[~test]), _arrays(large[test], labels[test]), "scikit-learn", {})


def _arrays(images: Any, labels: Any) -> ArraySplit:
    return ArraySplit(np.asarray(images, dtype=np.uint8), np.asarray(labels, dtype=np.int64))


def _select_valid(name: str, labels: Labels, digests: Sequence[bytes]) -> NDArray[np.bool_]:
    """Select a tenth of each training class for validation, without images that occur more than once: mask (N,)."""
    counts = Counter(digests)
    unique = np.array([counts[digest] == 1 for digest in digests])
    return _sample(f"{name}/valid", labels, unique, VALID_FRACTION)


def _sample(seed: str, labels: Labels, allowed: NDArray[np.bool_], fraction: float) -> NDArray[np.bool_]:
    """Sample a fraction of each class (at least one image) from the ``allowed`` images, reproducibly: mask (N,)."""
    selected = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        candidates = np.flatnonzero((labels == label) & allowed).tolist()
        random.Random(f"{seed}/{label}").shuffle(candidates)
        selected[candidates[: max(1, round(fraction * int((labels == label).sum())))]] = True
    return selected


def _write(folder: Path, classes: Sequence[str], split: Split, indices: NDArray[np.intp]) -> None:
    """Write the images at ``indices`` into their class folders."""
    for name in classes:
        (folder / name).mkdir(parents=True)
    saved = threaded_map(lambda i: split.save(i, folder / classes[split.labels[i]]), indices.tolist(), workers=0)
    for _ in tqdm(saved, total=len(indices), desc=f"writing {folder.name}", unit="image", disable=None):
        pass


DIGITS = tuple(map(str, range(10)))
CLOTHES = ("t-shirt-top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")
OBJECTS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
BUILTIN_DATASETS = {
    "mnist": _idx_dataset("MNIST", DIGITS, torchvision_name="MNIST"),
    "fashion-mnist": _idx_dataset("Fashion-MNIST", CLOTHES, torchvision_name="FashionMNIST", package="dataset-fashion-mnist"),
    "cifar10": BuiltinDataset(
        "CIFAR-10",
        OBJECTS,
        _cifar10,
        "Set --data-dir to a folder with images in train/CLASS and test/CLASS, or put cifar-10-python.tar.gz into data/raw.",
    ),
    "digits": BuiltinDataset("scikit-learn's digits", DIGITS, _digits),
}
