"""A killed training can be resumed and gives the same weights as an uninterrupted one."""

from __future__ import annotations

import contextlib
import csv
import json
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from finetune.compute.device import select_compute
from finetune.data.image_folder import Sample
from finetune.data.inspection import ImageRecord, fingerprint_context, inspect_images
from finetune.features.cache import FeatureCache
from finetune.features.extractor import FeatureExtractor
from finetune.io.array_store import ArrayStore
from models.artifacts.atomic_io import sha256_of
from models.networks.classifier import build_classifier
from models.networks.split_point import split_model
from tests.helpers.dataset_server import write_class_folders, write_idx
from tests.helpers.server import poll
from tests.helpers.tiny_network import TINY, color_folder, finetune, start_finetune

pytestmark = pytest.mark.slow

EPOCHS = 60


def train_until(condition: Callable[[], bool], *flags: object, hold_at: int, by: signal.Signals) -> tuple[int, str, str]:
    """Run ``finetune train`` in a child process that never finishes the epoch ``hold_at``, and send a signal to it.

    Args:
        condition: When to send the signal.
        flags: The flags of the training.
        hold_at: The epoch.
        by: The signal.

    Returns:
        The exit code, standard output and standard error.
    """
    with start_finetune("train", *flags, HOLD_AT=str(hold_at)) as child:
        poll(lambda: not child.is_running() or condition(), within_s=600, every_s=0.02)
        assert child.is_running(), f"ended before the signal: {child.wait()}"
        child.kill(by)
        return child.wait()


def history(run: Path) -> list[dict[str, str]]:
    file = run / "history.csv"
    if not file.is_file():
        return []
    with file.open(encoding="utf-8", newline="") as rows:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in csv.DictReader(rows)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folder(tmp_path_factory.mktemp("data") / "colours", train=9, valid=5)


def test_a_run_interrupted_three_times_ends_with_the_same_weights(data: Path, tmp_path: Path, tiny_weights: Path) -> None:
    """Kill a run before the first feature, interrupt and kill it between epochs, and compare it with an uninterrupted run."""
    flags = ("--data-dir", data, "--backbone", "tiny", "--weights", tiny_weights, "--epochs", EPOCHS, "--lr-schedule", "cosine")
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    caches = [("--cache-dir", tmp_path / name) for name in ("cache", "other-cache")]
    events = ("--progress-file", tmp_path / "progress.jsonl")
    resume = ("--resume", "--output-dir", run, *events)

    started = (run / "config.yaml").is_file
    code, _, _ = train_until(started, *flags, "--output-dir", run, *caches[0], *events, hold_at=1, by=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (run / "checkpoint.pt").exists()

    code, out, err = train_until(lambda: len(history(run)) >= 3, *resume, hold_at=12, by=signal.SIGINT)
    assert code == 130
    assert f"Interrupted. Resume with: finetune train --resume --output-dir {run}" in out
    assert "Traceback" not in out + err
    interrupted = len(history(run))

    code, out, _ = train_until(
        lambda: len(history(run)) >= interrupted + 15, *resume, hold_at=interrupted + 30, by=signal.SIGKILL
    )
    assert code == -signal.SIGKILL
    assert f"Resuming after epoch {interrupted}." in out
    (run / ".bundle.abc.part").mkdir()  # as left by a later kill
    (run / "plots").mkdir()
    (run / "plots" / ".reliability.png.xyz.part").write_bytes(b"half")
    killed = len(history(run))
    assert interrupted + 15 <= killed < EPOCHS

    code, out, err = finetune("train", *resume)
    assert (code, err) == (0, "")
    assert f"Resuming after epoch {killed}" in out or f"Resuming after epoch {killed + 1}" in out  # between two files
    assert finetune("train", *flags, "--output-dir", uninterrupted, *caches[1])[0] == 0

    ours, theirs = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (run, uninterrupted))
    assert ours["epoch"] == theirs["epoch"] == EPOCHS
    assert ours["best_epoch"] == theirs["best_epoch"]
    for state in ("best", "last"):
        assert ours[state].keys() == theirs[state].keys()
        assert all(torch.equal(ours[state][name], theirs[state][name]) for name in ours[state])
    ours, theirs = (load_file(folder / "bundle" / "model.safetensors") for folder in (run, uninterrupted))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert history(run) == history(uninterrupted)
    assert (run / "predictions.csv").read_text() == (uninterrupted / "predictions.csv").read_text()
    assert not list(run.rglob("*.part"))
    assert_epochs_are_reported(tmp_path / "progress.jsonl", killed)

    code, out, _ = finetune("train", *resume)
    assert code == 0
    assert f"The run in {run} is already finished." in out.splitlines()
    code, _, err = finetune("train", *resume, "--lr", 0.3)
    assert code == 2
    assert "was started with --lr 0.05, not 0.3" in err


def assert_epochs_are_reported(file: Path, killed: int) -> None:
    """Check the events of a run that was killed after ``killed`` epochs or one more."""
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):  # an empty line, or one that the killed process left incomplete
            rows.append(json.loads(line))
    assert "Drawing the plots" in [row["text"] for row in rows if row["event"] == "step"]
    images = [row for row in rows if row["event"] == "images"]
    assert {row["phase"] for row in images} == {"inspection"}
    assert (images[-1]["done"], images[-1]["total"]) == (28, 28)
    trainings = [row for row in rows if row["event"] == "training"]
    assert trainings[-1]["epoch"] in (killed, killed + 1)
    assert {(row["epochs"], row["train"], row["valid"]) for row in trainings} == {(EPOCHS, 18, 10)}
    epochs = [row for row in rows if row["event"] == "epoch"]
    assert {row["epoch"] for row in epochs} >= {*range(trainings[-1]["epoch"] + 1, EPOCHS + 1)}
    for row in epochs:
        assert row["valid_accuracy_low"] <= row["valid_accuracy"] <= row["valid_accuracy_high"]
        assert len(row.get("changed", [])) == row.get("changed_count", 0)
        assert all(photo["before"] != photo["now"] for photo in row.get("changed", []))
    first, *others = epochs
    assert "changed" not in first
    assert all("changed" in row for row in others)


FROM_SCRATCH = {
    "idx files": ("--dataset", "mnist", "--backbone", "cnn_mnist"),
    "class folders": ("--dataset", "cifar10", "--backbone", "lenet_cifar"),
    "class folders with augmentation": ("--dataset", "cifar10", "--backbone", "lenet_cifar", "--augment"),
    "photos that are decoded in every epoch": ("--backbone", "lenet_cifar", "--augment", "--lr-schedule", "cosine"),
}


@pytest.mark.parametrize("kind", FROM_SCRATCH)
def test_a_killed_run_from_random_weights_ends_with_the_same_weights(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if kind == "idx files":
        write_idx(tmp_path / "files", seed=1)
    elif kind.startswith("class folders"):
        write_class_folders(tmp_path / "files")
    else:
        color_folder(tmp_path / "files", train=9, valid=5)
    flags = (*FROM_SCRATCH[kind], "--data-dir", tmp_path / "files", "--epochs", 4, "--batch-size", 7)
    flags += ("--cache-dir", tmp_path / "cache")
    run, uninterrupted = tmp_path / "run", tmp_path / "uninterrupted"
    code, _, _ = train_until(lambda: len(history(run)) == 2, *flags, "--output-dir", run, hold_at=3, by=signal.SIGKILL)
    assert code == -signal.SIGKILL
    code, out, err = finetune("train", "--resume", "--output-dir", run)
    assert (code, err) == (0, "")
    assert "Resuming after epoch 2." in out
    code, _, err = finetune("train", *flags, "--output-dir", uninterrupted)
    assert (code, err) == (0, "")

    ours, theirs = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (run, uninterrupted))
    for state in ("best", "last"):
        assert ours[state].keys() == theirs[state].keys()
        assert all(torch.equal(ours[state][name], theirs[state][name]) for name in ours[state])
    assert history(run) == history(uninterrupted)
    assert (run / "predictions.csv").read_text() == (uninterrupted / "predictions.csv").read_text()
    weights = [load_file(folder / "bundle" / "model.safetensors") for folder in (run, uninterrupted)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


class _InterruptedAfter(FeatureExtractor):
    """A feature extractor that is interrupted after ``batches`` batches."""

    batches = 1

    def compile(self) -> None:
        """Do nothing, as ``run`` needs no network."""

    def run(self, pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        if not self.batches:
            raise KeyboardInterrupt
        self.batches -= 1
        return pixels.reshape(len(pixels), -1)[:, :7].astype(np.float32)


def test_features_computed_before_an_interrupt_are_cached(tmp_path: Path, tiny_weights: Path) -> None:
    photos = sorted((color_folder(tmp_path / "data", train=40, valid=0) / "train").glob("*/*.jpg"))
    records = [ImageRecord(Sample(path.name, path, 0, "train"), sha256_of(path), None, None) for path in photos]
    split = split_model(build_classifier(TINY, num_classes=2, base=None))
    frozen = _InterruptedAfter(split, TINY.preprocessing, select_compute("cpu", "fp32"))

    def cache() -> FeatureCache:
        return FeatureCache(frozen, ArrayStore(tmp_path / "cache", {"what": "features"}, limit_mb=10))

    def missing_from(cache: FeatureCache) -> set[str]:
        return {sha256 for sha256 in sha256s if cache.needs(sha256)}

    sha256s = [record.sha256 for record in records]
    with pytest.raises(KeyboardInterrupt):
        cache().features(records, TINY.preprocessing, label="features")
    missing = missing_from(cache())
    assert 0 < len(missing) < 80
    assert missing == set(sha256s[-len(missing) :])
    frozen.batches = 1
    rows = cache().features(records, TINY.preprocessing, label="features")
    assert missing_from(cache()) == set()
    for i in (3, 75):
        np.testing.assert_array_equal(rows[i], TINY.preprocessing.pixels(photos[i].read_bytes()).reshape(-1)[:7])


def test_features_of_an_interrupted_inspection_are_cached(tmp_path: Path, tiny_weights: Path) -> None:
    photos = sorted((color_folder(tmp_path / "data", train=40, valid=0) / "train").glob("*/*.jpg"))
    samples = [Sample(path.name, path, 0, "train") for path in photos]
    split = split_model(build_classifier(TINY, num_classes=2, base=None))
    frozen = _InterruptedAfter(split, TINY.preprocessing, select_compute("cpu", "fp32"))

    def cache() -> FeatureCache:
        return FeatureCache(frozen, ArrayStore(tmp_path / "cache", {"what": "features"}, limit_mb=10))

    def inspect() -> list[ImageRecord]:
        store = ArrayStore(tmp_path / "cache", fingerprint_context(), limit_mb=10)
        return inspect_images(samples, store=store, preprocessing=TINY.preprocessing, consumer=cache(), quiet=True)

    with pytest.raises(KeyboardInterrupt):
        inspect()
    assert sum(not cache().needs(sha256_of(path)) for path in photos) == 64
    frozen.batches = 1  # the rest
    records = inspect()
    rows = cache().features(records, TINY.preprocessing, label="features")
    for row, path in zip(rows, photos, strict=True):
        np.testing.assert_array_equal(row, TINY.preprocessing.pixels(path.read_bytes()).reshape(-1)[:7])
