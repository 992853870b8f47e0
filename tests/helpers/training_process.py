"""Import and export once what every training needs, in the process that training processes are forked from.

It must not start a thread, because a forked process does not have it. OpenVINO does on import, and tqdm for its monitor.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tqdm import tqdm

import finetune.pipeline
from models.networks.onnx_export import export_onnx
from models.preprocess import Preprocessing
from tests.helpers import tiny_network

__all__ = ["finetune", "tiny_network"]


class _Sum(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.float().sum(dim=(1, 2, 3))


tqdm.monitor_interval = 0
with tempfile.TemporaryDirectory() as folder:
    export_onnx(
        _Sum(),
        preprocessing=Preprocessing(input_px=4, resize_px=4),
        outputs=["sum"],
        path=Path(folder, "sum.onnx"),
        batch_size=1,
    )
