"""Where to compute, and in which precision."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass

import torch

from models.errors import ConfigError
from models.runtime.openvino_engine import supports_bf16

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Compute:
    """A device, and the precision of the frozen part on it; what is trained keeps float32 weights everywhere."""

    device: torch.device
    precision: str

    def autocast(self) -> contextlib.AbstractContextManager[object]:
        """Mixed precision around torch's forward pass on a GPU; on a CPU torch runs only what is trained, in float32."""
        if self.precision == "fp32" or self.device.type == "cpu":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=DTYPES[self.precision])

    def __str__(self) -> str:
        return f"{self.device.type}, {self.precision}"


def select_compute(device: str, precision: str) -> Compute:
    """Take a GPU where there is one, and the precision that suits it. Raises ConfigError for what the machine has not."""
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    chosen = next(name for name in ("cuda", "mps", "cpu") if there[name]) if device == "auto" else device
    if not there[chosen]:
        raise ConfigError(f"--device is {chosen}, and this machine has none; leave it out, or say --device cpu.")
    if precision == "auto":
        precision = {"cpu": "fp32", "mps": "fp32", "cuda": ""}[chosen] or _cuda_precision()
    elif precision == "fp16" and chosen == "cpu":
        raise ConfigError("--precision is fp16, which is for GPUs; on a CPU say fp32, or bf16 where the processor has it.")
    elif precision == "bf16" and chosen == "cpu" and not supports_bf16():
        raise ConfigError("--precision is bf16, which this processor does not have; say fp32, or leave it out.")
    return Compute(torch.device(chosen), precision)


def _cuda_precision() -> str:
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"
