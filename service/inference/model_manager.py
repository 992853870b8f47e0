"""The model that is served: loaded after the fork, warmed, and checked against its golden answers before it answers anybody."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from models.artifacts.bundle import GOLDEN, GRAPH, WEIGHTS, Bundle, check_golden, open_bundle
from models.artifacts.paths import compiled_dir, resolve_bundle
from models.errors import UserError
from models.runtime.openvino_engine import Engine, OpenVINOEngine, Pixels
from models.runtime.precision import Precision, select_precision
from service.http.errors import Problem
from service.inference.batcher import Batcher
from service.inference.image_decoder import ImageDecoder
from service.inference.memory import return_large_blocks
from service.inference.recent_predictions import RecentPrediction, RecentPredictions
from service.resources import ResourceAllocation, allocate_resources
from service.rollout.bundle_link import initial_state
from service.rollout.state import RolloutStore
from service.settings import Settings
from service.telemetry.metrics import Metrics

log = logging.getLogger("service")
T = TypeVar("T")


@dataclass(frozen=True)
class LoadedModel:
    """A bundle that is ready to answer, and how exactly it does."""

    bundle: Bundle
    precision: Precision
    golden_difference: float
    engine: Engine
    batcher: Batcher
    card: str | None = None  # Markdown, as it was when the bundle was loaded

    @cached_property
    def summary(self) -> dict[str, str]:
        """What every answer says of the model that gave it."""
        return {
            "name": self.bundle.name,
            "version": self.bundle.version,
            "precision": self.precision.name,
            "preprocessing_sha256": self.bundle.preprocessing.sha256(),
        }


class ModelManager:
    """The place where the model stands, and where another may take it; until there is one ``get`` says why there is none.

    One thread of its own loads whatever is loaded.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.metrics = metrics
        self.rollout_store = RolloutStore.from_environment()
        self.recent_predictions = RecentPredictions(settings.shadow_samples)
        self.decoder = ImageDecoder.of(settings, metrics)
        self.closed = threading.Event()
        self._settings = settings
        self._model: LoadedModel | None = None
        self._error: str | None = None
        self.loaded = threading.Event()  # or failed
        self._when_failed: list[Callable[[str], None]] = []
        self._when_serving: list[Callable[[LoadedModel], None]] = []
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()

    @classmethod
    def start(cls, settings: Settings) -> ModelManager:
        """Begin to load in a thread, so that /health/live answers meanwhile."""
        return_large_blocks()
        served = cls(settings, Metrics())
        threading.Thread(target=served._work, name="load", daemon=True).start()
        return served

    def get(self) -> LoadedModel:
        """The model; raises Problem while there is none."""
        if self._model is not None:
            return self._model
        if self._error is not None:
            raise Problem("not_ready", self._error)
        raise Problem("not_ready", "The model is being loaded; ask again in a second.", headers={"Retry-After": "1"})

    def check_ready(self) -> LoadedModel:
        """The model, where photos that are sent now would be decoded. Raises Problem."""
        model = self.get()
        if model.batcher.is_stalled:
            raise Problem(
                "decoders_stalled",
                "Every decoding thread has been busy with one image for longer than DEADLINE_MS; ask another server.",
                headers={"Retry-After": "1"},
            )
        return model

    def wait(self, timeout_s: float | None) -> LoadedModel:
        """The model, once it is loaded."""
        self.loaded.wait(timeout_s)
        return self.get()

    def add_failure_callback(self, call: Callable[[str], None]) -> None:
        """Have ``call`` told why, should loading fail."""
        self._when_failed.append(call)
        if self._error is not None:
            call(self._error)

    def add_install_callback(self, call: Callable[[LoadedModel], None]) -> None:
        """Have ``call`` told of each model that begins to serve, and of the one that does: from the loading thread."""
        self._jobs.put(lambda: self._tell_from_now_on(call))

    def run_in_loader(self, job: Callable[[], T]) -> T:
        """Run ``job`` in the thread that loads, and give what it gives."""
        done: Future[T] = Future()

        def work() -> None:
            try:
                done.set_result(job())
            except BaseException as error:
                done.set_exception(error)

        self._jobs.put(work)
        return done.result()

    def install(self, model: LoadedModel, predictions: Iterable[RecentPrediction] = ()) -> None:
        """Serve ``model`` from now on; in the loading thread only. What was begun ends with the model that it began with.

        ``predictions`` are its answers to photos that the one before had answered.
        """
        before, self._model = self._model, model
        self.recent_predictions.replace(predictions)
        if before:
            self.metrics.model_info.labels(*_labels(before)).set(0)
        self.metrics.model_info.labels(*_labels(model)).set(1)
        self.rollout_store.publish_version(model.bundle.version)
        if before:
            before.batcher.close()
        for call in self._when_serving:
            _tell(call, model)

    def close(self) -> None:
        self.closed.set()
        self._jobs.put(None)
        if self._model:
            self._model.batcher.close()
        self.decoder.process.close()

    def _work(self) -> None:
        with contextlib.suppress(OSError):  # this thread's children compute; those that talk to clients come first
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        self._load()
        while job := self._jobs.get():
            job()

    def _load(self) -> None:
        began = time.perf_counter()
        chosen = self.rollout_store.read().active  # by the others, where this worker takes a dead one's place
        path = Path(chosen.bundle) if chosen else self._settings.bundle
        try:
            model = load_model(self._settings, allocate_resources(self._settings), self.metrics, self.decoder, path=path)
            if chosen is None:
                with self.rollout_store.lock(wait=True):
                    self.rollout_store.write(initial_state(self._settings))
        except UserError as error:
            self._fail(str(error))
        except Exception as error:
            log.exception("loading failed")
            self._fail(f"The bundle {path} could not be loaded: {error!r}")
        else:
            gc.freeze()  # what is there by now stays; to look through all of it again and again costs every request
            self.metrics.ready.set(1)  # before /health/ready says so
            self.install(model)
            log.info(
                "ready",
                extra={
                    "model": model.bundle.name,
                    "version": model.bundle.version,
                    "precision": model.precision.name,
                    "reason": model.precision.reason,
                    "golden_difference": model.golden_difference,
                    "duration_s": round(time.perf_counter() - began, 3),
                },
            )
        self.loaded.set()

    def _fail(self, reason: str) -> None:
        self._error = reason
        log.error(reason)
        for call in self._when_failed:
            call(reason)

    def _tell_from_now_on(self, call: Callable[[LoadedModel], None]) -> None:
        self._when_serving.append(call)
        if self._model:
            _tell(call, self._model)


def _tell(call: Callable[[LoadedModel], None], model: LoadedModel) -> None:
    try:
        call(model)
    except Exception:  # what others make of a model must not keep it from serving
        log.exception("a call that was told of the model failed")


def _labels(model: LoadedModel) -> tuple[str, str, str]:
    return model.bundle.name, model.bundle.version, model.precision.name


def load_model(
    settings: Settings, resources: ResourceAllocation, metrics: Metrics, decoder: ImageDecoder, *, path: Path | None = None
) -> LoadedModel:
    """Open the bundle at ``path`` (that of the settings), compile, warm up and check it; nothing answers before that is done.

    Raises BundleError or ConfigError.
    """
    path = resolve_bundle(path or settings.bundle)
    sizes = batch_sizes(settings.max_batch_size)
    with_torch = uses_torch(settings)
    bundle = open_bundle(path, files=(WEIGHTS if with_torch else GRAPH, GOLDEN))
    card = bundle.model_card()  # checked before the minutes that a large network may take to compile
    if with_torch:
        precision = Precision("fp32", float(bundle.manifest["golden"]["tolerance"]), "torch computes it")
        from models.runtime.torch_engine import TorchEngine

        engine: Engine = TorchEngine(bundle)
    else:
        precision = select_precision(bundle, settings.precision)
        engine = OpenVINOEngine(
            path / GRAPH,
            outputs=["probabilities"],
            precision=precision.name,
            threads=resources.cpus_per_worker,
            streams=resources.streams,
            batch_sizes=sizes,
            cache_dir=compiled_dir(),
        )
    difference = _check_every_size(bundle, engine, sizes, tolerance=precision.tolerance, streams=resources.streams)
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


def batch_sizes(most: int) -> tuple[int, ...]:
    """The sizes that are computed: all up to four, then every half more, as a smaller batch is padded to the next."""
    sizes = [1]
    while sizes[-1] < most:
        sizes.append(min(most, max(sizes[-1] + 1, sizes[-1] * 3 // 2)))
    return tuple(sizes)


def uses_torch(settings: Settings) -> bool:
    """Whether torch computes: where it is asked for, or where there is a GPU. Nothing heavy is imported to find out."""
    if settings.engine != "auto":
        return settings.engine == "torch"
    return Path("/dev/nvidia0").exists() or Path("/dev/kfd").exists()


def _check_every_size(bundle: Bundle, engine: Engine, sizes: tuple[int, ...], *, tolerance: float, streams: int) -> float:
    """Check the golden answers in batches of every size; as kernels are compiled at a size's first use, this warms them up."""

    golden = bundle.golden()  # once: NumPy parses an array's header, which Python 3.11 cannot do in two threads at a time

    def check(size: int) -> float:
        return check_golden(bundle, lambda pixels: _in_one_batch(engine, pixels, size), tolerance=tolerance, golden=golden)

    with ThreadPoolExecutor(streams) as pool:
        return max(pool.map(check, sizes))


def _in_one_batch(engine: Engine, pixels: Pixels, size: int) -> NDArray[np.float32]:
    """The answers to as many of ``pixels`` as a batch of ``size`` holds."""
    return engine.run(np.resize(pixels, (size, *pixels.shape[1:])))[0][: len(pixels)]
