"""Compare the recipes' training from random weights with a plain PyTorch loop, in one run on this machine.

    python benchmarks/recipe_speed.py [docs/recipes/NAME.yaml ...] [--seconds 5] [--rounds 3] [--images 4000]

Each recipe is timed in steady state for some seconds: ours, and two plain loops with a DataLoader of two workers and the same
network, optimizer and batch size. "Folder" reads image files (ImageFolder), "arrays" keeps the images in memory and converts
each one from Pillow, as torchvision's MNIST and CIFAR10 do. Three measurements alternate, and the median of the ratios is
printed. Images are random, because their content does not affect the speed. "Preparation" is what ours does once per image
before the first epoch: hashing, audit and decoding.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from tqdm import tqdm

from finetune.compute.device import Compute, select_compute
from finetune.config import Config, from_mapping, read_yaml
from finetune.data.image_folder import read_dataset
from finetune.training.data_loaders import Batches
from finetune.training.setup import TrainingNetwork, make_batches, prepare_dataset, prepare_network
from finetune.training.trainer import make_optimizer, prepare_module, train_one_epoch
from models.networks.classifier import build_classifier
from models.networks.registry import get_spec
from models.networks.spec import ModelSpec

RECIPES = Path(__file__).resolve().parents[1] / "docs" / "recipes"
CLASSES = 10
SIDES = {"cifar10": 32}
DEFAULT_SIDE = 28
WORKERS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", type=Path, help="recipe files (default: all without permuted pixels)")
    parser.add_argument("--seconds", type=float, default=5, help="duration of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=4000, help="images of the dataset")
    parser.add_argument("--precision", default="auto", help="precision of ours; the plain loops use float32")
    args = parser.parse_args()
    recipes = args.recipes or [file for file in sorted(RECIPES.glob("*.yaml")) if "permuted" not in file.stem]
    print("Images per second:")
    print(f"{'recipe':30}{'ours':>9}{'folder':>9}{'ratio':>8}{'arrays':>9}{'ratio':>8}{'preparation':>13}")
    for file in recipes:
        with tempfile.TemporaryDirectory() as folder:
            print(compare(file, Path(folder), args), flush=True)


def compare(file: Path, folder: Path, args: argparse.Namespace) -> str:
    """Time one recipe and return its row of the table."""
    config = replace(from_mapping(read_yaml(file)), dataset=None, weights="none", precision=args.precision)
    spec = get_spec(config.backbone)
    side, channels = SIDES.get(str(read_yaml(file)["dataset"]), DEFAULT_SIDE), spec.preprocessing.channels
    images, labels = draw_images(args.images, side, channels)
    write_images(folder / "data", images, labels)
    config = replace(config, data_dir=folder / "data", cache_dir=folder / "cache", allow_leakage=True).with_recipe(spec.recipe)
    ours, preparation = prepare_ours(config, spec)
    plain = {
        "folder": ImageFolder(str(config.data_dir / "train"), transform(spec, from_rgb=True)),
        "arrays": ArrayDataset(images, labels, transform(spec, from_rgb=False)),
    }
    loops: dict[str, Callable[[], float]] = {"ours": lambda: time_ours(ours, config, args.seconds)}
    for name, dataset in plain.items():
        loops[name] = lambda dataset=dataset: time_plain(dataset, config, spec, args.seconds)  # type: ignore[misc]
    speeds = {name: [] for name in loops}  # type: dict[str, list[float]]
    for _, (name, loop) in itertools.product(range(args.rounds), loops.items()):
        speeds[name].append(loop())
    median = {name: statistics.median(values) for name, values in speeds.items()}
    ratio = {name: statistics.median(a / b for a, b in zip(speeds["ours"], speeds[name], strict=True)) for name in plain}
    return (
        f"{file.stem:30}{median['ours']:9,.0f}{median['folder']:9,.0f}{ratio['folder']:8.2f}{median['arrays']:9,.0f}"
        f"{ratio['arrays']:8.2f}{args.images / preparation:13,.0f}"
    )


def draw_images(count: int, side: int, channels: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Draw random images that compress about as well as photos: (N, H, W) or (N, H, W, 3), and their labels."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (count, side // 4, side // 4, channels), dtype=np.uint8)
    images = coarse.repeat(4, axis=1).repeat(4, axis=2)
    return (images[..., 0] if channels == 1 else images), np.arange(count) % CLASSES


def write_images(folder: Path, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> None:
    """Write all images to ``train/CLASS`` and two of each class to ``valid/CLASS``."""
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        for split in ("train", "valid") if index < 2 * CLASSES else ("train",):
            file = folder / split / str(label) / f"{index:05d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(file, compress_level=1)


class ArrayDataset(Dataset[tuple[Tensor, int]]):
    """Images in memory, converted one by one as in torchvision's MNIST and CIFAR10."""

    def __init__(
        self, images: NDArray[np.uint8], labels: NDArray[np.int64], transform: Callable[[Image.Image], Tensor]
    ) -> None:
        self._images = images
        self._labels = labels.tolist()
        self._transform = transform

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self._transform(Image.fromarray(self._images[index])), self._labels[index]


def transform(spec: ModelSpec, *, from_rgb: bool) -> Callable[[Image.Image], Tensor]:
    """Return the transform of a plain loop. ImageFolder opens all images as RGB."""
    preprocessing = spec.preprocessing
    steps: list[object] = [transforms.Grayscale()] if from_rgb and preprocessing.channels == 1 else []
    if preprocessing.resize_px > max(SIDES.values()):
        steps.append(transforms.Resize(preprocessing.resize_px))
    steps += [transforms.ToTensor(), transforms.Normalize(preprocessing.mean, preprocessing.std)]
    return transforms.Compose(steps)


def time_plain(dataset: Dataset[tuple[Tensor, int]], config: Config, spec: ModelSpec, seconds: float) -> float:
    """Return the images per second of a plain loop, from its second batch on."""
    classifier = build_classifier(spec, num_classes=CLASSES, base=None)
    net = nn.Sequential(classifier.net, classifier.log_softmax).train()
    optimizer: torch.optim.Optimizer
    if config.optimizer == "adam":
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
    else:
        optimizer = torch.optim.SGD(net.parameters(), lr=1e-3, momentum=config.momentum or 0.0)
    loss_of = nn.NLLLoss()
    loader = DataLoader(dataset, batch_size=config.batch_size, shuffle=True, num_workers=WORKERS)
    count, started = 0, 0.0
    for images, labels in itertools.chain.from_iterable(itertools.repeat(loader)):
        loss = loss_of(net(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if not started:
            started = time.perf_counter()
            continue
        count += len(labels)
        if time.perf_counter() - started > seconds:
            break
    return count / (time.perf_counter() - started)


class UntilDeadline:
    """Batches of a split, epoch after epoch, until some seconds after the first batch have passed."""

    def __init__(self, batches: Batches, seconds: float) -> None:
        self._batches = batches
        self._seconds = seconds
        self.count = 0
        self.elapsed = 0.0

    def __len__(self) -> int:
        return len(self._batches)

    def shuffled(self, epoch: int, *, min_batch: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
        started = 0.0
        for number in itertools.count(epoch):
            for features, labels in self._batches.shuffled(number, min_batch=min_batch):
                yield features, labels
                now = time.perf_counter()
                if not started:
                    started = now
                    continue
                self.count += len(labels)
                self.elapsed = now - started
                if self.elapsed > self._seconds:
                    return

    def ordered(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._batches.ordered()


def prepare_ours(config: Config, spec: ModelSpec) -> tuple[tuple[TrainingNetwork, Compute, Batches], float]:
    """Return what ``finetune train`` prepares before the first epoch, and the seconds that the images took."""
    compute = select_compute("cpu", config.precision, from_scratch=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        network = prepare_network(spec, CLASSES, config, compute)
        started = time.perf_counter()
        prepared = prepare_dataset(config, read_dataset(config.data_dir), network, None)
        batches = make_batches(config, network, None, prepared, "train")
        return (network, compute, batches), time.perf_counter() - started


def time_ours(ours: tuple[TrainingNetwork, Compute, Batches], config: Config, seconds: float) -> float:
    """Return the images per second of the training loop, from its second batch on."""
    network, compute, batches = ours
    module = prepare_module(network.split_model.trainable, config, compute)
    optimizer = make_optimizer(module, config, head=[])
    timed = UntilDeadline(batches, seconds)
    train_one_epoch(module, timed, optimizer, 0, compute=compute, bar=tqdm(disable=True))
    return timed.count / timed.elapsed


if __name__ == "__main__":
    main()
