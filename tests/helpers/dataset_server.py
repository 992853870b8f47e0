"""Small files in the real formats of MNIST, Fashion-MNIST and CIFAR-10, on a local HTTP server for torchvision."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import io
import pickle
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST

CLASSES = 10
TRAIN, TEST = 6, 2  # images per class
CIFAR_NAMES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass


def pictures(count: int, shape: tuple[int, ...], *, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Return ``count`` random images of each class, brighter from class to class; the classes alternate."""
    labels = np.tile(np.arange(CLASSES, dtype=np.uint8), count)
    noise = np.random.default_rng(seed).integers(0, 60, (len(labels), *shape))
    return (noise + 19 * labels.reshape(-1, *[1] * len(shape))).astype(np.uint8), labels


def write_idx(folder: Path, *, seed: int) -> list[tuple[str, str]]:
    """Write the four idx-ubyte .gz files. Returns their names and MD5s in the format of torchvision's ``resources``."""
    folder.mkdir(parents=True)
    resources = []
    for name, count in (("train", TRAIN), ("t10k", TEST)):
        pixels, labels = pictures(count, (28, 28), seed=seed + count)
        for kind, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            head = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
            file = folder / f"{name}-{kind}-ubyte.gz"
            file.write_bytes(gzip.compress(head + array.tobytes()))
            resources.append((file.name, _md5(file.read_bytes())))
    return resources


def write_class_folders(folder: Path) -> None:
    """Write CIFAR-10's classes as JPEG files in ``train/CLASS`` and ``test/CLASS``."""
    for split, count in (("train", TRAIN), ("test", TEST)):
        pixels, labels = pictures(count, (32, 32, 3), seed=count)
        for index, (image, label) in enumerate(zip(pixels, labels, strict=True)):
            file = folder / split / CIFAR_NAMES[label] / f"{index:04d}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file)


def write_cifar(folder: Path) -> dict[str, object]:
    """Write cifar-10-python.tar.gz with its pickles. Returns the class attributes of torchvision's CIFAR10."""
    folder.mkdir(parents=True)
    files: dict[str, bytes] = {"batches.meta": pickle.dumps({"label_names": CIFAR_NAMES, "num_vis": 3072})}
    pixels, labels = pictures(TRAIN, (32, 32, 3), seed=3)
    batches = {f"data_batch_{i + 1}": (pixels[i::5], labels[i::5]) for i in range(5)}
    batches["test_batch"] = pictures(TEST, (32, 32, 3), seed=4)
    for name, (some, of) in batches.items():
        flat = some.transpose(0, 3, 1, 2).reshape(len(some), 3072)
        files[name] = pickle.dumps({"data": flat, "labels": of.tolist()})
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, data in files.items():
            entry = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    md5s = {name: _md5(data) for name, data in files.items()}
    return {
        "tgz_md5": _md5(archive.read_bytes()),
        "train_list": [[name, md5s[name]] for name in batches if name != "test_batch"],
        "test_list": [["test_batch", md5s["test_batch"]]],
        "meta": {"filename": "batches.meta", "key": "label_names", "md5": md5s["batches.meta"]},
    }


@pytest.fixture(scope="module")
def mirror(tmp_path_factory: pytest.TempPathFactory) -> Iterator[http.server.ThreadingHTTPServer]:
    """Make torchvision download the small files from a local server and expect their MD5s."""
    root = tmp_path_factory.mktemp("mirror")

    def handler(*args: object) -> _Quiet:
        return _Quiet(*args, directory=str(root))  # type: ignore[arg-type]

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, pytest.MonkeyPatch.context() as patch:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_address[1]}"
        for seed, kind in enumerate((MNIST, FashionMNIST)):
            resources = write_idx(root / kind.__name__, seed=10 * seed)
            patch.setattr(kind, "mirrors", [f"{here}/{kind.__name__}/"])
            patch.setattr(kind, "resources", resources)
        for name, value in write_cifar(root / "cifar").items():
            patch.setattr(CIFAR10, name, value)
        patch.setattr(CIFAR10, "url", f"{here}/cifar/cifar-10-python.tar.gz")
        patch.setattr("finetune.data.builtin_datasets.DEBIAN", root / "no-package")
        yield server
        server.shutdown()


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()
