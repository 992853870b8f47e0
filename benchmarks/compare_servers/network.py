"""Prepare the network of a comparison: the bundle that the service runs, and the same network for PyTorch."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from benchmarks.train_speed import random_weights
from finetune.export.full_bundle import open_full_bundle
from models.artifacts.bundle import Bundle, open_bundle
from models.networks.batchnorm_fusion import fuse_batchnorm
from models.networks.classifier import load_classifier
from models.networks.split_point import trace
from models.runtime.openvino_engine import OpenVINOEngine, supports_bf16

BATCH = 4
PENALTY = 1e-6  # so weak that the head separates the photos, and other rounding changes no label


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, values: Tensor) -> Tensor:
        return values.to(self.dtype)


class _Probabilities(nn.Module):
    """Map (N, H, W, C) uint8 pixels to (N, classes) calibrated probabilities, with the layers in ``dtype``."""

    def __init__(self, bundle: Bundle, dtype: torch.dtype) -> None:
        super().__init__()
        classifier = load_classifier(bundle)
        network = fuse_batchnorm(GraphModule(classifier, trace(classifier)))
        normalize, log_softmax = network.get_submodule("normalize"), network.get_submodule("log_softmax")
        network.to(dtype)
        normalize.float()
        network.set_submodule("normalize", nn.Sequential(normalize, _Cast(dtype)))
        network.set_submodule("log_softmax", nn.Sequential(_Cast(torch.float32), log_softmax))
        self.network = network
        self.temperature = float(bundle.manifest["temperature"])

    def forward(self, pixels: Tensor) -> Tensor:
        return torch.softmax(self.network(pixels) / self.temperature, dim=1)


def export_network(bundle: Bundle, folder: Path) -> None:
    """Write the network of a bundle for PyTorch, in bfloat16 if this processor supports it, and its preprocessing.

    BatchNorm is fused into the convolutions. The other servers thus run the fewest layers that they can.
    """
    folder.mkdir(parents=True)
    dtype = torch.bfloat16 if supports_bf16() else torch.float32
    module = _Probabilities(open_full_bundle(bundle.path, needs_weights=True), dtype).eval()
    preprocessing = bundle.preprocessing
    example = torch.zeros((2, preprocessing.input_px, preprocessing.input_px, preprocessing.channels), dtype=torch.uint8)
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},))
    torch.export.save(program, folder / "network.pt2")
    description = {
        "classes": bundle.classes,
        "input_px": preprocessing.input_px,
        "resize_px": preprocessing.resize_px,
        "interpolation": preprocessing.interpolation.upper(),
    }
    (folder / "description.json").write_text(json.dumps(description), encoding="utf-8")


def train_with_random_weights(backbone: str, photos: Sequence[Path], folder: Path) -> Bundle:
    """Train a head on a network with random weights, which do not affect the speed. Takes minutes.

    The photos are those of the comparison, in training and in validation: the accuracy says nothing, but each photo has a
    label that a server has to return. A bundle that is already in ``folder`` is opened, and an interrupted run resumed.
    """
    run = folder / backbone
    if (run / "bundle").is_dir():
        return open_bundle(run / "bundle")
    data = folder / f"{backbone}-photos"
    for split in ("train", "valid"):
        for photo in photos:
            link = data / split / photo.parent.name / photo.name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)
            link.symlink_to(photo.resolve())
    options = {
        "--data-dir": data,
        "--backbone": backbone,
        "--weights": random_weights(backbone, folder),
        "--head": "logistic",
        "--penalty": PENALTY,
        "--max-accuracy-loss": 0.5,
        "--output-dir": run,
    }
    arguments = [str(word) for option in options.items() for word in option]
    resume = ["--resume"] if run.is_dir() else []
    subprocess.run([sys.executable, "-m", "finetune", "train", *arguments, "--allow-leakage", *resume], check=True)
    return open_bundle(run / "bundle")


def expected_labels(bundle: Bundle, photos: Sequence[bytes]) -> list[str]:
    """Return the labels of photos in float32."""
    engine = OpenVINOEngine(bundle.graph("fp32"), outputs=["probabilities"], batch_sizes=(BATCH,))
    probabilities = engine.run(np.stack([bundle.preprocessing.pixels(photo) for photo in photos]))[0]
    return [bundle.classes[row] for row in probabilities.argmax(axis=1)]
