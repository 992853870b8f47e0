"""Export networks as ONNX graphs that take uint8 pixels."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from models.artifacts.ood_score import OOD_SCORE, OODParameters
from models.networks.batchnorm_fusion import fuse_batchnorm
from models.networks.classifier import Classifier
from models.networks.spec import ModelSpec
from models.networks.split_point import with_outputs
from models.preprocess import Preprocessing

PIXELS = "pixels"
OUTPUTS = ("probabilities", "embedding", "feature_map")


class OODScore(nn.Module):
    """Compute the OOD score of embeddings as ``OODParameters.scores`` does: (N, ...) -> (N,) float32."""

    center: Tensor
    directions: Tensor
    precisions: Tensor
    coordinates: Tensor
    squared_norms: Tensor

    def __init__(self, parameters: OODParameters) -> None:
        super().__init__()
        dimensions, self.count = len(parameters.center), parameters.num_components
        self.other_precision = float(1 / (parameters.other_variance * dimensions))
        buffers = {
            "center": parameters.center,
            "directions": parameters.directions.T.copy(),
            "precisions": 1 / (parameters.variances * np.float32(dimensions)),
            "coordinates": parameters.coordinates,
            "squared_norms": parameters.squared_norms,
        }
        for name, values in buffers.items():
            self.register_buffer(name, torch.from_numpy(values), persistent=False)

    def forward(self, embedding: Tensor) -> Tensor:
        flat = embedding.flatten(1)
        centered = flat / flat.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12) - self.center
        projected = centered @ self.directions
        components, along_means = projected[:, : self.count], projected[:, self.count :]
        squares = (components.unsqueeze(1) - self.coordinates).square()  # (N, C, k)
        lengths = centered.square().sum(1, keepdim=True) - 2 * along_means + self.squared_norms
        rest = (lengths - squares.sum(2)).clamp_min(0)
        return ((squares * self.precisions).sum(2) + rest * self.other_precision).amin(1).sqrt()


class _ServingGraph(nn.Module):
    """Compute calibrated probabilities, the embedding (the head's input), the last feature map, and the OOD score if any.

    pixels (N, H, W, C) uint8 -> probabilities (N, classes), embedding (N, d), feature_map (N, c, h, w), ood_score (N,), all
    float32.

    Log-probabilities differ from logits by a constant per image, which softmax cancels. Dividing them by the temperature is
    therefore equivalent to dividing the logits.
    """

    def __init__(self, classifier: Classifier, spec: ModelSpec, temperature: float, ood: OODParameters | None) -> None:
        super().__init__()
        self.net = fuse_batchnorm(with_outputs(classifier, [(spec.head, True), (spec.cam_layer, False)]))
        self.temperature = temperature
        self.ood_score = OODScore(ood) if ood else None

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        log_probs, embedding, feature_map = self.net(pixels)
        outputs = torch.softmax(log_probs / self.temperature, dim=1), embedding, feature_map
        return (*outputs, self.ood_score(embedding)) if self.ood_score else outputs


def export_serving_graph(
    classifier: Classifier, spec: ModelSpec, *, temperature: float, path: Path, ood: OODParameters | None = None
) -> None:
    """Write a bundle's graph with the input ``pixels`` and the outputs ``probabilities``, ``embedding`` and ``feature_map``.

    The last two are intermediate values of the first, so they add no computation. An engine can compute the probabilities
    only. With ``ood`` there is a further output, ``ood_score``.

    Args:
        classifier: The trained classifier.
        spec: The network's spec.
        temperature: The calibration temperature.
        path: The file to write.
        ood: The parameters of the OOD score.
    """
    serving_graph = _ServingGraph(classifier, spec, temperature, ood).eval()
    outputs = (*OUTPUTS, OOD_SCORE) if ood else OUTPUTS
    export_onnx(serving_graph, preprocessing=spec.preprocessing, outputs=outputs, path=path)


def export_onnx(
    module: nn.Module, *, preprocessing: Preprocessing, outputs: Sequence[str], path: Path, batch_size: int | None = None
) -> None:
    """Write a module as a single ONNX file.

    Args:
        module: Takes (N, H, W, C) uint8 pixels.
        preprocessing: Determines H, W and C.
        outputs: The names of the outputs.
        path: The file to write.
        batch_size: A fixed N, which halves the export time; None exports a dynamic N.
    """
    side, channels = preprocessing.input_px, preprocessing.channels
    example = torch.zeros((batch_size or 2, side, side, channels), dtype=torch.uint8)
    dynamic_shapes = ({0: torch.export.Dim("batch", min=1, max=4096)},) if batch_size is None else None
    with _silence_exporter(), _out_of_place(module):
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            dynamic_shapes=dynamic_shapes,
            input_names=[PIXELS],
            output_names=list(outputs),
            verbose=False,
        )
        assert program is not None
        ClearMetadataAndDocStringPass()(program.model)  # removes stack traces with paths of this machine
        program.save(path, external_data=False)


@contextlib.contextmanager
def _out_of_place(module: nn.Module) -> Iterator[None]:
    """Let activations return new tensors: the exporter takes a tenth of a second for each one that overwrites its input."""
    layers = [layer for layer in module.modules() if getattr(layer, "inplace", False)]
    for layer in layers:
        layer.inplace = False  # type: ignore[assignment]
    try:
        yield
    finally:
        for layer in layers:
            layer.inplace = True  # type: ignore[assignment]


@contextlib.contextmanager
def _silence_exporter() -> Iterator[None]:
    """Suppress the exporter's log messages and warnings, which address its developers."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
