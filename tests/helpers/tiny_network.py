"""A network of a few thousand parameters for end-to-end tests: frozen BatchNorm before the split point, dropout after it.

``registered()`` registers it temporarily. ``finetune(...)`` runs a command in this process, ``start_finetune(...)`` in a child
process, and ``python -m tests.helpers.tiny_network train ...`` in a process that torchrun starts. With HOLD_AT=7 in the
environment of a child, training waits before it writes the checkpoint of epoch 7, so that a test can kill it there.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import itertools
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.onnx._internal.exporter._registration import ONNXRegistry

from models.artifacts.atomic_io import sha256_of
from models.networks import registry
from models.networks.spec import ModelSpec, Recipe, WeightsSource
from models.preprocess import Preprocessing

if TYPE_CHECKING:
    from finetune.training.trainer import Progress

ROOT = Path(__file__).resolve().parents[2]
PLOTTING_COMMANDS = (("train",), ("evaluate",), ("compare",))
CHILD_TIMEOUT_S = 900.0  # the machine may be busy
_FORKSERVER = multiprocessing.get_context("forkserver")
_FORKSERVER.set_forkserver_preload(["tests.helpers.training_process"])
COLORS = ((40, 60, 255), (255, 40, 40), (40, 200, 60), (255, 220, 0), (150, 60, 160))
TINY = ModelSpec(
    name="tiny",
    title="Tiny",
    year=2024,
    paper="https://arxiv.org/abs/1409.1556",
    head="classifier.4",
    cam_layer="features.5",
    preprocessing=Preprocessing(input_px=32, resize_px=36),
    recipe=Recipe(epochs=3, batch_size=5, lr=0.05),
    pretrained_classes=10,
)


# The exporter builds a table of all operators for every export, which takes half of the time of a small one.
ONNXRegistry.from_torchlib = staticmethod(functools.cache(ONNXRegistry.from_torchlib))  # type: ignore[method-assign]


class Tiny(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, stride=2, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
        )
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.classifier = nn.Sequential(
            nn.Linear(64, 32), nn.ReLU(), nn.Dropout(), nn.Linear(32, 32), nn.Linear(32, num_classes)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.classifier(torch.flatten(self.pool(self.features(images)), 1))


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """Register ``tiny`` inside the block only, so that tests of all networks do not include it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry._ENTRIES, TINY.name, (TINY, Tiny))
        yield


@contextlib.contextmanager
def registered_with_local_weights() -> Iterator[None]:
    """Register ``tiny`` and ``tiny_large``, whose input is larger, with pretrained weights that need no download."""
    large = Preprocessing(input_px=40, resize_px=44, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    with pytest.MonkeyPatch.context() as patch:
        for seed, spec in enumerate((TINY, replace(TINY, name="tiny_large", preprocessing=large))):
            patch.setitem(registry._ENTRIES, spec.name, (spec, Tiny))
            file = Path(torch.hub.get_dir()) / "checkpoints" / f"{spec.name}.pth"
            file.parent.mkdir(parents=True, exist_ok=True)
            sha256 = sha256_of(save_weights(file, backbone=spec.name, seed=seed))
            source = WeightsSource(sha256=sha256, license=f"license of {spec.name}", url=f"https://localhost/{spec.name}.pth")
            patch.setitem(registry._ENTRIES, spec.name, (replace(spec, weights=source), Tiny))
        yield


def save_weights(path: Path, *, backbone: str = "tiny", seed: int = 0) -> Path:
    """Save a random state dict of ``backbone``, including BatchNorm statistics, as pretrained weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        state = registry.create_model(backbone).state_dict()
        for name, tensor in state.items():
            if tensor.dim() > 1:
                nn.init.kaiming_normal_(tensor)
            elif name.endswith("running_mean"):
                tensor.uniform_(-0.2, 0.2)
            elif name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
    torch.save(state, path)
    return path


def paint(path: Path, color: tuple[int, int, int], *, seed: int, size: tuple[int, int] = (56, 44)) -> Path:
    """Paint soft random spots around ``color``: different for each seed, and easy to separate by color."""
    spots = np.random.default_rng(seed).integers(0, 256, (6, 6, 3))
    pixels = ((spots + np.array(color)) // 2).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path, quality=95)
    return path


def color_folder(
    root: Path, *, train: int = 6, valid: int = 3, classes: Sequence[str] = ("blue", "red"), valid_name: str = "valid"
) -> Path:
    """Paint ``train`` and ``valid`` photos of each class into a data folder."""
    for split, (name, count) in enumerate((("train", train), (valid_name, valid))):
        for (index, label), number in itertools.product(enumerate(classes), range(count)):
            seed = 10_000 * split + 100 * index + number
            paint(root / name / label / f"{label[:4]}.{number:03d}.jpg", COLORS[index], seed=seed)
    return root


def finetune(*words: object, plots: bool = False) -> tuple[int, str, str]:
    """Run a ``finetune`` command in this process.

    Args:
        words: The command and its arguments.
        plots: Draw the plots of a training or an evaluation, which takes longer than all else that it does.

    Returns:
        The exit code, standard output and standard error.
    """
    from finetune.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), contextlib.ExitStack() as stack:
        if not plots and words[:1] in PLOTTING_COMMANDS:
            stack.enter_context(without_plots())
        code = main([str(word) for word in words])
    return code, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def without_plots() -> Iterator[None]:
    """Draw no plots of trainings and evaluations inside the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("finetune.reports.plot_process.PlotProcess.start", lambda *args, **options: None)
        yield


class FinetuneProcess:
    """A ``finetune`` command in a child process, which writes to files in ``folder``."""

    def __init__(self, words: Sequence[object], folder: Path, environment: Mapping[str, str]) -> None:
        self._outputs = [folder / "stdout", folder / "stderr"]
        arguments = [str(word) for word in words]
        self.process = _FORKSERVER.Process(target=_run_in_child, args=(arguments, os.environ | environment, self._outputs))
        self.process.start()

    def is_running(self) -> bool:
        return self.process.is_alive()

    def kill(self, by: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal, unless the process has ended."""
        assert self.process.pid is not None
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, by)

    def wait(self) -> tuple[int, str, str]:
        """Wait for the end. Returns the exit code (negative for a signal), standard output and standard error."""
        self.process.join(CHILD_TIMEOUT_S)
        assert self.process.exitcode is not None, "the process has not ended"
        out, err = (file.read_text(encoding="utf-8") for file in self._outputs)
        return self.process.exitcode, out, err


@contextlib.contextmanager
def start_finetune(*words: object, **environment: str) -> Iterator[FinetuneProcess]:
    """Run a ``finetune`` command in a child process, which is killed at the end of the block.

    It is forked from a process that has imported PyTorch, because the import takes seconds.

    Args:
        words: The command and its arguments.
        environment: Variables to add to the environment.
    """
    with tempfile.TemporaryDirectory(prefix="finetune-") as folder, pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))  # of the process to fork from, which the first child starts
        child = FinetuneProcess(words, Path(folder), environment)
        try:
            yield child
        finally:
            child.process.kill()
            child.process.join()


def _run_in_child(arguments: list[str], environment: dict[str, str], outputs: Sequence[Path]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, file in zip((sys.stdout, sys.stderr), outputs, strict=True):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), stream.fileno())
    try:
        _run_command(arguments)
    finally:
        sys.stdout.flush()
        atexit._run_exitfuncs()  # multiprocessing does not run them


def _run_command(arguments: list[str] | None = None) -> None:
    """Run a command with ``tiny`` registered and exit."""
    from finetune.__main__ import main

    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by default in background jobs of a shell
    if "HOLD_AT" in os.environ:
        hold_at(int(os.environ["HOLD_AT"]))
    with registered():
        sys.exit(main(arguments))


@contextlib.contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """Limit files to ``size`` bytes, so that a write fails midway as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def hold_at(epoch: int) -> None:
    """Make training wait at the end of ``epoch``, before its checkpoint is saved."""
    from finetune.training import run_directory

    save = run_directory.save_checkpoint

    def save_or_wait(folder: Path, progress: Progress, *, inputs: str) -> None:
        while progress.epoch >= epoch:
            time.sleep(1)
        save(folder, progress, inputs=inputs)

    run_directory.save_checkpoint = save_or_wait


if __name__ == "__main__":
    _run_command()
