"""PyTorch engine for GPUs, with the same interface as the OpenVINO engine."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from models.artifacts.bundle import Bundle
from models.artifacts.ood_score import OOD_FILE, OODParameters
from models.networks.classifier import load_classifier
from models.networks.onnx_export import OODScore
from models.networks.registry import get_spec
from models.networks.split_point import with_outputs
from models.runtime.openvino_engine import Arrays, Pixels


class TorchEngine:
    """Compute a bundle's calibrated probabilities, and the OOD score if it has one, with PyTorch.

    Args:
        bundle: The bundle.
        device: The device; by default the GPU if there is one.
    """

    def __init__(self, bundle: Bundle, *, device: str | None = None) -> None:
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        classifier = load_classifier(bundle)
        self._ood_score: OODScore | None = None
        if bundle.has_ood_score:
            self._ood_score = OODScore(OODParameters.read(bundle.path / OOD_FILE)).to(self._device)
            head = get_spec(bundle.backbone).head
            self._net: nn.Module = with_outputs(classifier, [(head, True)]).to(self._device)
        else:
            self._net = classifier.to(self._device)
        self._temperature = float(bundle.manifest["temperature"])

    @torch.inference_mode()
    def run(self, pixels: Pixels) -> Arrays:
        """Run the network on (N, H, W, C) uint8 pixels.

        Returns:
            Probabilities (N, classes), and OOD scores (N,) if the bundle has them, both float32.
        """
        outputs = self._net(torch.from_numpy(np.ascontiguousarray(pixels)).to(self._device))
        log_probs, *embeddings = outputs if self._ood_score else (outputs,)
        probabilities = torch.softmax(log_probs / self._temperature, dim=1)
        scores = [self._ood_score(embeddings[0])] if self._ood_score else []
        return [tensor.cpu().numpy() for tensor in (probabilities, *scores)]
