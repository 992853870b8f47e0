"""Select the device and the numeric precision."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from models.errors import ConfigError
from models.runtime.openvino_engine import supports_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """A device and the precision on it. Trained layers always have float32 weights.

    Attributes:
        device: The device.
        precision: The precision of the frozen layers.
        from_scratch: Whether all layers are trained, in which case they run in this precision on a CPU as well.
    """

    device: torch.device
    precision: str
    from_scratch: bool = False

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Return an autocast context. A new head on frozen layers is trained in float32 on a CPU, as it is small."""
        if self.precision == "fp32" or (self.device.type == "cpu" and not self.from_scratch):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    def __str__(self) -> str:
        return f"{self.device.type}, {self.precision}"


def select_compute(device: str, precision: str, *, from_scratch: bool = False) -> Compute:
    """Select the device and precision.

    Args:
        device: "auto" (a GPU if available), "cpu", "cuda" or "mps".
        precision: "auto", "fp32", "bf16" or "fp16".
        from_scratch: Whether all layers are trained.

    Raises:
        ConfigError: The device or the precision is not available on this machine.
    """
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    selected = next(name for name in ("cuda", "mps", "cpu") if available[name]) if device == "auto" else device
    if not available[selected]:
        raise ConfigError(f"No {selected.upper()} device found. Remove --device or use --device cpu.")
    if precision == "auto":
        precision = {"cpu": "fp32", "mps": "fp32", "cuda": ""}[selected] or _cuda_precision()
    elif precision == "fp16" and selected == "cpu":
        raise ConfigError("--precision fp16 requires a GPU. On a CPU use fp32, or bf16 if the CPU supports it.")
    elif precision == "bf16" and selected == "cpu" and not supports_bf16():
        raise ConfigError("This CPU does not support --precision bf16. Use --precision fp32 or remove the option.")
    return Compute(torch.device(selected), precision, from_scratch)


def _cuda_precision() -> str:
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
