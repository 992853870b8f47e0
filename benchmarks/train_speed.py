"""Compare training on cached features with the textbook loop, in one run on this machine.

    python benchmarks/train_speed.py DATA --backbone efficientnet_lite0 [--photos 1000] [--weights FILE] [--precision bf16]

The textbook loop runs every photo through the complete network in every epoch: ImageFolder, a DataLoader with two workers,
frozen parameters, a new last layer, NLLLoss, SGD. All its epochs take the same time, so only some are timed (--plain-epochs)
and their mean is multiplied. Our training is timed completely, from the list of files to the trained head: hashing, audit,
decoding, conversion and the frozen layers with an empty cache, then ten epochs of the rest. It is timed again with the filled
cache. Loading the weights and the final evaluation are not timed on either side. The rounds alternate, and the medians are
printed.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import onnxscript  # noqa: F401  (import it now, so that this is not timed)
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms
from torchvision.datasets import ImageFolder

from finetune.compute.device import select_compute
from finetune.config import Config
from finetune.data.image_folder import read_dataset
from finetune.pipeline import fit_head, hash_inputs
from finetune.training.setup import build_feature_cache, make_batches, prepare_dataset, prepare_network
from models.networks.classifier import build_classifier
from models.networks.registry import get_spec
from models.networks.spec import ModelSpec
from models.networks.weights import load_weights

EPOCHS = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--backbone", default="efficientnet_lite0")
    parser.add_argument("--photos", type=int, default=1000, help="training photos, half of each class")
    parser.add_argument("--weights", help="as for finetune train; `random`: random numbers")
    parser.add_argument("--precision", default="fp32", help="precision of our frozen layers; the textbook loop uses float32")
    parser.add_argument("--plain-epochs", type=int, default=1, help="timed epochs of the textbook loop per round")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        weights = random_weights(args.backbone, Path(folder)) if args.weights == "random" else args.weights
        data = subset(args.data, args.photos, Path(folder) / "data")
        rows = []
        for i in range(args.rounds):
            config = Config(
                data_dir=data,
                backbone=args.backbone,
                weights=weights,
                precision=args.precision,
                epochs=EPOCHS,
                cache_dir=Path(folder) / f"cache{i}",
                allow_leakage=True,
            )
            plain = time_textbook(config, args.plain_epochs) * EPOCHS
            cold = time_ours(config, Path(folder) / f"cold{i}")
            warm = time_ours(config, Path(folder) / f"warm{i}")
            rows.append((plain, cold, warm))
            print(f"round {i + 1}: textbook {plain:.1f} s, ours {cold:.1f} s, again {warm:.2f} s", flush=True)
    plain, cold, warm = (statistics.median(column) for column in zip(*rows, strict=True))
    print(f"{args.backbone}, {args.photos} photos, {EPOCHS} epochs, {args.precision}, median of {args.rounds}:")
    print(f"  textbook loop     {plain:9.1f} s   {1000 * plain / args.photos / EPOCHS:7.1f} ms per photo and epoch")
    print(f"  ours, cache empty {cold:9.1f} s   {statistics.median(p / c for p, c, _ in rows):7.1f} times as fast")
    print(f"  ours, cache full  {warm:9.2f} s   {statistics.median(p / w for p, _, w in rows):7.0f} times as fast")


def time_textbook(config: Config, epochs: int) -> float:
    """Return the mean seconds per epoch of the textbook loop."""
    spec = get_spec(config.backbone)
    net, head = textbook_network(config, spec)
    preprocessing = spec.preprocessing
    transform = transforms.Compose(
        [
            transforms.Resize(preprocessing.resize_px),
            transforms.CenterCrop(preprocessing.input_px),
            transforms.ToTensor(),
            transforms.Normalize(preprocessing.mean, preprocessing.std),
        ]
    )
    photos: Dataset[tuple[torch.Tensor, int]] = ImageFolder(str(config.data_dir / "train"), transform)
    loader = DataLoader(photos, batch_size=64, shuffle=True, num_workers=2)
    nll_loss, optimizer = nn.NLLLoss(), torch.optim.SGD(head.parameters(), lr=1e-3, momentum=0.9)
    started = time.perf_counter()
    for _ in range(epochs):
        net.train()
        for images, labels in loader:
            loss = nll_loss(net(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return (time.perf_counter() - started) / epochs


def textbook_network(config: Config, spec: ModelSpec) -> tuple[nn.Module, nn.Module]:
    """Return the network without its normalization, which the loader does, and its trainable head."""
    base = load_weights(spec, file=Path(config.weights) if config.weights else None)
    classifier = build_classifier(spec, num_classes=2, base=base.tensors)
    return nn.Sequential(classifier.net, classifier.log_softmax), classifier.net.get_submodule(spec.head)


def time_ours(config: Config, folder: Path) -> float:
    """Return the seconds from the list of files to the trained head."""
    spec = get_spec(config.backbone)
    config = config.with_recipe(spec.recipe)
    compute = select_compute("cpu", config.precision)
    with without_output():
        network = prepare_network(spec, 2, config, compute)
        started = time.perf_counter()
        dataset = read_dataset(config.data_dir)
        cache = build_feature_cache(config, network, compute)
        prepared = prepare_dataset(config, dataset, network, cache)
        batches = {split: make_batches(config, network, cache, prepared, split) for split in ("train", "valid")}
        fit_head(config, folder, network, compute, batches, prepared, inputs=hash_inputs(prepared, network))
    return time.perf_counter() - started


def subset(data: Path, photos: int, out: Path) -> Path:
    """Link the first photos of each class for training, and two of each class for validation."""
    for split, count in (("train", photos // 2), ("valid", 2)):
        source = next(p for p in (data / split, data / "train") if p.is_dir())
        for folder in sorted(p for p in source.iterdir() if p.is_dir()):
            (out / split / folder.name).mkdir(parents=True)
            for photo in sorted(folder.iterdir())[:count]:
                (out / split / folder.name / photo.name).symlink_to(photo.resolve())
    return out


def random_weights(backbone: str, folder: Path) -> str:
    """Write a file of random weights. They do not affect the speed."""
    from models.networks.registry import create_model

    torch.manual_seed(0)
    torch.save(create_model(backbone).state_dict(), folder / "random.pth")
    return str(folder / "random.pth")


@contextlib.contextmanager
def without_output() -> Iterator[None]:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


if __name__ == "__main__":
    main()
