"""PyTorch engine for GPUs, with the same interface as the OpenVINO engine."""

from __future__ import annotations

import numpy as np
import torch

from models.artifacts.bundle import Bundle
from models.networks.classifier import load_classifier
from models.runtime.openvino_engine import Arrays, Pixels


class TorchEngine:
    """Compute a bundle's calibrated probabilities with PyTorch on ``device``, by default the GPU if there is one."""

    def __init__(self, bundle: Bundle, *, device: str | None = None) -> None:
        self._device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self._classifier = load_classifier(bundle).to(self._device)
        self._temperature = float(bundle.manifest["temperature"])

    @torch.inference_mode()
    def run(self, pixels: Pixels) -> Arrays:
        """Run the network on (N, H, W, C) uint8 pixels. Returns [probabilities (N, classes) float32]."""
        log_probs = self._classifier(torch.from_numpy(np.ascontiguousarray(pixels)).to(self._device))
        return [torch.softmax(log_probs / self._temperature, dim=1).cpu().numpy()]
