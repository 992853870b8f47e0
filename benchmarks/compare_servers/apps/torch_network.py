"""The network that every other server runs, so that only the serving differs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from benchmarks.compare_servers.apps.preprocessing import DESCRIPTION, FOLDER

THREADS = int(os.environ["TORCH_THREADS"])


class TorchNetwork:
    """The exported network: BatchNorm is fused, and the weights are channels last."""

    def __init__(self) -> None:
        torch.set_num_threads(THREADS)
        self._module = torch.export.load(FOLDER / "network.pt2").module().to(memory_format=torch.channels_last)
        self.predict([np.zeros((DESCRIPTION["input_px"], DESCRIPTION["input_px"], 3), np.uint8)])  # the first call is slow

    @torch.inference_mode()
    def predict(self, images: Sequence[NDArray[np.uint8]]) -> list[dict[str, Any]]:
        """Classify images (H, W, 3) uint8 in one batch."""
        probabilities = self._module(torch.from_numpy(np.stack(images))).tolist()
        classes = DESCRIPTION["classes"]
        return [
            {"label": classes[max(range(len(row)), key=row.__getitem__)], "probabilities": dict(zip(classes, row, strict=True))}
            for row in probabilities
        ]
