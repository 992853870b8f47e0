"""Load the model after the fork, check it against its golden outputs, and let a rollout replace it."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from models.artifacts.atomic_io import locked_folder
from models.artifacts.bundle import (
    GOLDEN,
    GRAPH,
    WEIGHTS,
    Bundle,
    check_file,
    check_golden,
    check_golden_ood_scores,
    open_bundle,
)
from models.artifacts.decision_rule import Decision, DecisionRule
from models.artifacts.ood_score import OOD_FILE
from models.artifacts.paths import compiled_dir, merged_dir, resolve_bundle
from models.errors import BundleError, UserError
from models.runtime.allocator import return_large_blocks
from models.runtime.openvino_engine import Arrays, Engine, OpenVINOEngine, Pixels
from models.runtime.precision import Precision, select_precision
from service.cpu_allocation import ResourceAllocation, allocate_resources
from service.http.errors import Problem
from service.inference.batcher import Batcher, InferenceResult
from service.inference.image_decoder import ImageDecoder
from service.inference.recent_predictions import RecentPrediction, RecentPredictions
from service.settings import Settings
from service.telemetry.metrics import Metrics

log = logging.getLogger("service")
RETRY_S = 10.0  # pause after a bundle could not be loaded
LOADING = "The model is being loaded. Retry in a second."
MERGING = "The bundle is being merged with its pretrained weights, which happens once. Retry in a few seconds."
T = TypeVar("T")


@dataclass(frozen=True)
class LoadedModel:
    """A bundle that is ready to predict.

    Attributes:
        bundle: The bundle, which is never head-only.
        precision: What the engine computes in, and why.
        golden_difference: The largest difference of a probability from the golden outputs.
        engine: Computes probabilities, and OOD scores if the bundle has them.
        batcher: Decodes images and runs the engine.
        card: The model card in Markdown, as it was when the bundle was loaded.
    """

    bundle: Bundle
    precision: Precision
    golden_difference: float
    engine: Engine
    batcher: Batcher
    card: str | None = None

    @property
    def rule(self) -> DecisionRule:
        """When the model abstains."""
        return self.bundle.decision_rule

    def decide(self, result: InferenceResult, *, abstain: bool = True) -> Decision:
        """Apply the rule to a result of this model."""
        return self.rule.decide(self.bundle.classes, result.probabilities, result.ood_score, abstain=abstain)

    @cached_property
    def summary(self) -> dict[str, str]:
        """The model as every response describes it."""
        return {
            "name": self.bundle.name,
            "version": self.bundle.version,
            "precision": self.precision.name,
            "preprocessing_sha256": self.bundle.preprocessing.sha256(),
        }


class ModelManager:
    """Hold the model that serves. Every model is loaded in one thread, which ``start`` starts.

    Args:
        settings: The settings.
        metrics: Receives the readiness, the model and the durations of its stages.
        bundles_to_load: Called before each attempt to load the first model; returns the folders to try in order.
            Default: the setting BUNDLE.
    """

    def __init__(self, settings: Settings, metrics: Metrics, *, bundles_to_load: Callable[[], Sequence[Path]] = tuple) -> None:
        self.metrics = metrics
        self.recent_predictions = RecentPredictions(settings.shadow_samples)
        self.decoder = ImageDecoder.of(settings, metrics)
        self.loaded = threading.Event()  # set after the first attempt to load, successful or not
        self.installed = threading.Event()  # set once there is a model
        self.closed = threading.Event()
        self._settings, self._bundles_to_load = settings, bundles_to_load
        self._model: LoadedModel | None = None
        self._progress = LOADING
        self._error: str | None = None
        self._lock = threading.Lock()
        self._on_failure: list[Callable[[str], None]] = []
        self._on_install: list[Callable[[LoadedModel], None]] = []
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._merge: subprocess.Popen[str] | None = None

    @classmethod
    def start(cls, settings: Settings, *, bundles_to_load: Callable[[], Sequence[Path]] = tuple) -> ModelManager:
        """Create a manager that loads its model in the background."""
        return_large_blocks()
        manager = cls(settings, Metrics(), bundles_to_load=bundles_to_load)
        threading.Thread(target=manager._work, name="load-model", daemon=True).start()
        return manager

    def get(self) -> LoadedModel:
        """Return the current model. Raises Problem if there is none."""
        if self._model is not None:
            return self._model
        if self._error is not None:
            raise Problem("not_ready", self._error, headers={"Retry-After": f"{RETRY_S:.0f}"})
        raise Problem("not_ready", self._progress, headers={"Retry-After": "1"})

    def check_ready(self) -> LoadedModel:
        """Return the current model if requests progress. Raises Problem."""
        model = self.get()
        if model.batcher.is_stalled:
            raise Problem(
                "decoders_stalled",
                "Every decoding thread has been busy with one image for longer than DEADLINE_MS. Use another server.",
                headers={"Retry-After": "1"},
            )
        return model

    def wait(self, timeout_s: float | None) -> LoadedModel:
        """Wait for the first attempt to load, and return the model. Raises Problem if it failed or took longer."""
        self.loaded.wait(timeout_s)
        return self.get()

    def add_failure_callback(self, callback: Callable[[str], None]) -> None:
        """Call ``callback`` with the reason whenever the first model cannot be loaded."""
        self._on_failure.append(callback)
        if self._error is not None:
            callback(self._error)

    def add_install_callback(self, callback: Callable[[LoadedModel], None]) -> None:
        """Call ``callback`` in the loading thread for the current model, if any, and for every later one."""
        with self._lock:
            self._on_install.append(callback)
            model = self._model
        if model:
            self._jobs.put(partial(_call, callback, model))

    def run_in_loader(self, job: Callable[[], T]) -> T:
        """Run ``job`` in the loading thread and return its result, or raise its exception."""
        done: Future[T] = Future()

        def work() -> None:
            try:
                done.set_result(job())
            except BaseException as error:
                done.set_exception(error)

        self._jobs.put(work)
        return done.result()

    def install(self, model: LoadedModel, predictions: Iterable[RecentPrediction] = ()) -> None:
        """Make ``model`` the current one. Running requests finish on the old one, which is then closed.

        Call it in the loading thread only.

        Args:
            model: The new model.
            predictions: Its results for the recent images of the old model.
        """
        with self._lock:
            previous, self._model = self._model, model
            callbacks = list(self._on_install)
        self.installed.set()
        self.recent_predictions.replace(predictions)
        if previous:
            self.metrics.model_info.labels(*_labels(previous)).set(0)
        self.metrics.model_info.labels(*_labels(model)).set(1)
        for callback in callbacks:
            _call(callback, model)
        if previous:
            previous.batcher.close()

    def close(self) -> None:
        """End the threads and child processes."""
        self.closed.set()
        self._jobs.put(None)
        if self._model:
            self._model.batcher.close()
        self.end_children()

    def end_children(self) -> None:
        """End the decoder process and a running merge."""
        self.decoder.process.close()
        if self._merge:
            self._merge.kill()

    def _work(self) -> None:
        while not self._load():
            self.loaded.set()
            if self.closed.wait(RETRY_S):
                return
        self.loaded.set()
        while job := self._jobs.get():
            job()

    def _load(self) -> bool:
        """Load the first of the bundles that can be loaded. Returns false if there is none."""
        started = time.perf_counter()
        reasons = []
        for path in self._bundles_to_load() or (self._settings.bundle,):
            try:
                self._merge_if_needed(path)
                with contextlib.suppress(OSError):  # the engine inherits the niceness; threads that serve clients come first
                    os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
                model = load_model(self._settings, allocate_resources(self._settings), self.metrics, self.decoder, path=path)
            except UserError as error:
                reasons.append(str(error))
            except Exception as error:
                log.exception("loading failed")
                reasons.append(f"The bundle {path} could not be loaded: {error!r}")
            else:
                break
            log.error(reasons[-1])
        else:
            self._error = reasons[0]
            for callback in self._on_failure:
                callback(self._error)
            return False
        gc.freeze()  # later collections skip what exists now, which costs every request otherwise
        self.metrics.ready.set(1)  # before /health/ready reports it
        self.install(model)
        log.info(
            "ready",
            extra={
                "model": model.bundle.name,
                "version": model.bundle.version,
                "precision": model.precision.name,
                "reason": model.precision.reason,
                "golden_difference": model.golden_difference,
                "duration_s": round(time.perf_counter() - started, 3),
            },
        )
        return True

    def _merge_if_needed(self, path: Path) -> None:
        """Merge a head-only bundle with its pretrained weights, in one worker at a time. Raises BundleError."""
        bundle = open_bundle(path, files=())
        if not bundle.is_head_only or merged_dir(bundle).is_dir():
            return
        self._progress = MERGING
        with locked_folder(path):
            if merged_dir(bundle).is_dir():  # another worker merged it
                return
            log.warning(
                "the bundle is being merged with its pretrained weights, which happens once", extra={"bundle": str(path)}
            )
            self._merge = subprocess.Popen(
                [sys.executable, "-m", "finetune", "merge", str(path)],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            _, output = self._merge.communicate()
            if self._merge.returncode:
                reason = (output.strip().splitlines() or [f"`finetune merge` ended with {self._merge.returncode}"])[-1]
                raise BundleError(f"The bundle {path} could not be merged with its pretrained weights: {reason}")
        self._progress = LOADING


def _call(callback: Callable[[LoadedModel], None], model: LoadedModel) -> None:
    try:
        callback(model)
    except Exception:  # must not keep the model from serving
        log.exception("a callback for the installed model failed")


def _labels(model: LoadedModel) -> tuple[str, str, str]:
    return model.bundle.name, model.bundle.version, model.precision.name


def load_model(
    settings: Settings, resources: ResourceAllocation, metrics: Metrics, decoder: ImageDecoder, *, path: Path | None = None
) -> LoadedModel:
    """Open a bundle, compile it for every batch size and check its golden outputs.

    Args:
        settings: The settings.
        resources: Threads and streams.
        metrics: Receives the durations of the model's stages.
        decoder: Decodes images for the model.
        path: The bundle; default: the setting BUNDLE.

    Raises:
        BundleError: The bundle is invalid, or does not reproduce its golden outputs.
        ConfigError: A setting does not fit the bundle or the machine.
    """
    path = resolve_bundle(path or settings.bundle)
    sizes = batch_sizes(settings.max_batch_size)
    with_torch = uses_torch(settings)
    bundle = open_bundle(path, files=(WEIGHTS if with_torch else GRAPH, GOLDEN))
    card = bundle.model_card()  # fails before a large network is compiled for minutes
    if with_torch:
        precision = Precision("fp32", float(bundle.manifest["golden"]["tolerance"]), "computed by torch")
        if bundle.has_ood_score:
            check_file(path, OOD_FILE, bundle.manifest["files"])
        from models.runtime.torch_engine import TorchEngine

        engine: Engine = TorchEngine(bundle)
    else:
        precision = select_precision(bundle, settings.precision)
        graph = bundle.graph(precision.name)
        check_file(path, graph.name, bundle.manifest["files"])
        engine = OpenVINOEngine(
            graph,
            outputs=bundle.engine_outputs,
            precision=precision.name,
            threads=resources.cpus_per_worker,
            streams=resources.streams,
            batch_sizes=sizes,
            cache_dir=compiled_dir(),
        )
    difference = _check_every_size(bundle, engine, sizes, precision=precision, streams=resources.streams)
    batcher = Batcher(
        engine,
        bundle.preprocessing,
        decoder=decoder,
        metrics=metrics,
        threads=resources.inference_threads,
        streams=resources.streams,
        max_batch_size=settings.max_batch_size,
        batch_timeout_s=settings.batch_timeout_ms / 1e3,
        deadline_s=settings.deadline_ms / 1e3,
    )
    return LoadedModel(bundle, precision, difference, engine, batcher, card)


def batch_sizes(largest: int) -> tuple[int, ...]:
    """Return the batch sizes to compile: 1 to 4, then steps of a half. Smaller batches are padded to the next size."""
    sizes = [1]
    while sizes[-1] < largest:
        sizes.append(min(largest, max(sizes[-1] + 1, sizes[-1] * 3 // 2)))
    return tuple(sizes)


def uses_torch(settings: Settings) -> bool:
    """Return whether to compute with torch: if ENGINE says so, or if there is a GPU. This does not import torch."""
    if settings.engine != "auto":
        return settings.engine == "torch"
    return Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()


def _check_every_size(bundle: Bundle, engine: Engine, sizes: tuple[int, ...], *, precision: Precision, streams: int) -> float:
    """Check the golden outputs in batches of every size. The first use of a size also compiles its kernels."""
    # Read once, as NumPy parses array headers in a way that is not thread-safe in Python 3.11.
    golden, golden_scores = bundle.golden(precision.name), bundle.golden_ood_scores(precision.name)
    tolerance = precision.tolerance

    def check(size: int) -> float:
        probabilities, *scores = _in_one_batch(engine, golden[0], size)
        if golden_scores is not None:
            check_golden_ood_scores(bundle, scores[0], tolerance=tolerance, expected=golden_scores)
        return check_golden(bundle, lambda _: probabilities, tolerance=tolerance, golden=golden)

    with ThreadPoolExecutor(streams) as pool:
        return max(pool.map(check, sizes))


def _in_one_batch(engine: Engine, pixels: Pixels, size: int) -> Arrays:
    """Run a batch of exactly ``size`` images and return the results of the first ones, at most ``len(pixels)``."""
    return [rows[: len(pixels)] for rows in engine.run(np.resize(pixels, (size, *pixels.shape[1:])))]
