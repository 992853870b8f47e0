"""From a network to an ONNX graph that takes pixels, for engines that know nothing of torch."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn

from models.networks.batchnorm_fusion import fuse_batchnorm
from models.networks.classifier import Classifier
from models.networks.spec import ModelSpec
from models.networks.split_point import with_outputs
from models.preprocess import Preprocessing

PIXELS = "pixels"
OUTPUTS = ("probabilities", "embedding", "feature_map")


class _ServingGraph(nn.Module):
    """Calibrated probabilities and what explains them: the head's input, and the last map.

    pixels (N, H, W, C) uint8 -> probabilities (N, classes), embedding (N, d), feature_map (N, c, h, w), all float32.
    Log-probabilities differ from logits by a constant a photo, which softmax takes out: dividing them by the temperature
    is dividing the logits.
    """

    def __init__(self, classifier: Classifier, spec: ModelSpec, temperature: float) -> None:
        super().__init__()
        self.net = fuse_batchnorm(with_outputs(classifier, [(spec.head, True), (spec.cam_layer, False)]))
        self.temperature = temperature

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_probs, embedding, feature_map = self.net(pixels)
        return torch.softmax(log_probs / self.temperature, dim=1), embedding, feature_map


def export_serving_graph(classifier: Classifier, spec: ModelSpec, *, temperature: float, path: Path) -> None:
    """Write the graph that a bundle carries: ``pixels`` in, ``probabilities``, ``embedding`` and ``feature_map`` out.

    The extra outputs lie on the way to the probabilities; an engine that asks for the probabilities alone drops them.
    """
    served = _ServingGraph(classifier, spec, temperature).eval()
    export_onnx(served, preprocessing=spec.preprocessing, outputs=OUTPUTS, path=path)


def export_onnx(
    module: nn.Module, *, preprocessing: Preprocessing, outputs: Sequence[str], path: Path, batch_size: int | None = None
) -> None:
    """Write ``module``, which takes (N, H, W, C) uint8 pixels, as ONNX in a single file.

    ``batch_size`` fixes N, which halves the exporter's time; without it N is free.
    """
    side, channels = preprocessing.input_px, preprocessing.channels
    example = torch.zeros((batch_size or 2, side, side, channels), dtype=torch.uint8)
    free = ({0: torch.export.Dim("batch", min=1, max=4096)},) if batch_size is None else None
    with _quiet():
        program = torch.onnx.export(
            module,
            (example,),
            dynamo=True,
            dynamic_shapes=free,
            input_names=[PIXELS],
            output_names=list(outputs),
            verbose=False,
        )
        assert program is not None
        ClearMetadataAndDocStringPass()(program.model)  # the exporter notes its stack traces there: paths of this machine
        program.save(path, external_data=False)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter speaks to its own developers, through logging and with warnings."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
