"""Decode images and run them through the model in batches over all requests.

One pool of threads, one larger than the number of CPUs, does both kinds of work: a free thread decodes an image or runs a
batch of decoded ones. An idle server handles an image without a handoff between threads, and a busy one fills its batches.

Large and unusual images are decoded in a separate process (``service.inference.decoder_process``). One more thread waits for
that process, so that a slow image does not delay others.
"""

from __future__ import annotations

import logging
import math
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from models.preprocess import Preprocessing
from models.runtime.openvino_engine import Arrays, Engine
from service.http.errors import Problem
from service.inference.decoder_process import DecoderBusyError
from service.inference.image_decoder import DeferredError, ImageDecoder, PreprocessedImage
from service.telemetry.metrics import Metrics

log = logging.getLogger("service")
CANCEL_CHECK_S = 0.02  # checking a connection costs a system call, so each image is checked at most this often


class BatcherClosedError(Exception):
    """The batcher was closed before the images were submitted."""


class RequestCancelledError(Exception):
    """The image was not computed, because its request was cancelled or its deadline passed."""


@dataclass(frozen=True)
class InferenceResult:
    """A preprocessed image, its results, and the time and batch size of each stage.

    The results are the probabilities (classes,), and the OOD score, which is None if the model has none.
    """

    image: PreprocessedImage
    probabilities: NDArray[np.float32]
    decode_ms: float
    batch_queue_ms: float
    inference_ms: float
    batch_size: int
    ood_score: float | None = None

    @cached_property
    def top_class(self) -> int:
        """The index of the highest probability."""
        return int(self.probabilities.argmax())


@dataclass
class _Item:
    """An image on its way through the batcher. Times are of ``time.perf_counter``."""

    data: bytes
    is_cancelled: Callable[[], bool]
    deadline: float = math.inf
    future: Future[InferenceResult] = field(default_factory=Future)
    submitted_at: float = field(default_factory=time.perf_counter)
    checked_at: float = 0.0  # when it was last known not to be cancelled
    image: PreprocessedImage | None = None
    is_simple: bool = True
    decode_s: float = 0.0
    decoded_at: float = 0.0


class Batcher:
    """Decode and compute images for one model. ``close`` ends its threads.

    The queue is not bounded here: ``service.http.admission`` limits the number of images in flight.

    Args:
        engine: Computes (N, H, W, C) uint8 pixels.
        preprocessing: What the engine's network takes.
        decoder: Decodes image files.
        metrics: Receives the duration of each stage.
        threads: Threads that decode and compute.
        streams: Batches that are computed at a time.
        max_batch_size: Images per batch.
        batch_timeout_s: How long a partial batch waits for images that are being decoded.
        deadline_s: A decode that takes longer counts as stalled.
    """

    def __init__(
        self,
        engine: Engine,
        preprocessing: Preprocessing,
        *,
        decoder: ImageDecoder,
        metrics: Metrics,
        threads: int,
        streams: int,
        max_batch_size: int,
        batch_timeout_s: float,
        deadline_s: float = 60.0,
    ) -> None:
        self._engine, self._preprocessing, self._decoder, self._metrics = engine, preprocessing, decoder, metrics
        self._streams, self._max_batch_size = streams, max_batch_size
        self._batch_timeout_s, self._deadline_s = batch_timeout_s, deadline_s
        self._undecoded: deque[_Item] = deque()
        self._deferred: deque[_Item] = deque()  # for the decoder process
        self._decoded: deque[_Item] = deque()
        self._decoding: dict[int, float] = {}  # thread id -> when it started the image that it decodes
        self._isolated = self._running_batches = self._batched_images = 0
        self._closed = False
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._was_deferred = threading.Condition(lock)
        self._pool_size = threads
        self._threads = [threading.Thread(target=self._work, name=f"batcher-{i}", daemon=True) for i in range(threads)]
        self._threads.append(threading.Thread(target=self._work_isolated, name="batcher-isolated", daemon=True))
        for thread in self._threads:
            thread.start()

    @property
    def is_stalled(self) -> bool:
        """Whether every thread has been decoding one image for longer than the deadline, so that no request progresses."""
        with self._changed:
            started = list(self._decoding.values())
        return len(started) >= self._pool_size and max(started) < time.perf_counter() - self._deadline_s

    def submit(
        self, images: Sequence[bytes | PreprocessedImage], is_cancelled: Callable[[], bool], *, deadline: float = math.inf
    ) -> list[Future[InferenceResult]]:
        """Submit all images or none.

        Args:
            images: Image files, or images that were preprocessed elsewhere.
            is_cancelled: Called before each stage, from any thread. If it returns true, the image is dropped.
            deadline: Time of ``time.perf_counter`` after which an image is no longer decoded.

        Returns:
            A future for each image. It raises Problem for an invalid image and RequestCancelledError for a dropped one.

        Raises:
            BatcherClosedError: The batcher was closed.
        """
        items = [_to_item(image, is_cancelled, deadline) for image in images]
        with self._changed:
            if self._closed:
                raise BatcherClosedError
            for item in items:
                (self._decoded if item.image else self._undecoded).append(item)
            self._changed.notify(len(items))
        return [item.future for item in items]

    def close(self) -> None:
        """Finish what was submitted and end the threads. A thread that takes longer than the deadline is abandoned."""
        with self._changed:
            self._closed = True
            self._wake_all()
        deadline = time.monotonic() + self._deadline_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if alive := [thread.name for thread in self._threads if thread.is_alive()]:
            log.error("threads of a closed batcher are still running", extra={"threads": alive})

    def _wake_all(self) -> None:
        self._changed.notify_all()
        self._was_deferred.notify_all()

    def _work(self) -> None:
        while work := self._next():
            work()

    def _work_isolated(self) -> None:
        while item := self._next_deferred():
            self._decode(item, block=True)

    def _next(self) -> Callable[[], None] | None:
        """Wait for work: a full batch first, then an image to decode, then a partial batch. None once closed and empty."""
        with self._changed:
            while True:
                can_compute = bool(self._decoded) and self._running_batches < self._streams
                if can_compute and len(self._decoded) >= self._target_batch_size():
                    return self._take_batch()
                if self._undecoded:
                    item = self._undecoded.popleft()
                    self._decoding[threading.get_ident()] = time.perf_counter()
                    return partial(self._decode, item, block=False)
                wait_s = self._batch_wait_s() if can_compute else None
                if wait_s == 0:
                    return self._take_batch()
                if self._closed and not (self._decoded or self._decoding or self._deferred or self._isolated):
                    self._changed.notify_all()  # the other threads can end as well
                    return None
                self._changed.wait(wait_s)

    def _next_deferred(self) -> _Item | None:
        """Wait for an image for the decoder process, simple ones first, as their time is bounded. None once closed."""
        with self._changed:
            while not self._deferred:
                if self._closed and not (self._undecoded or self._decoding):
                    self._changed.notify_all()
                    return None
                self._was_deferred.wait()
            item = next((item for item in self._deferred if item.is_simple), self._deferred[0])
            self._deferred.remove(item)
            self._isolated += 1
            return item

    def _target_batch_size(self) -> int:
        """Return the batch size that leaves work for every stream and one share of the images to decode.

        Larger batches take less time per image. But with all images in batches, the CPUs would wait for new ones.
        """
        in_flight = len(self._undecoded) + len(self._decoding) + len(self._decoded) + self._batched_images
        return max(1, min(self._max_batch_size, -(-in_flight // (self._streams + 1))))

    def _batch_wait_s(self) -> float:
        """Return how long the decoded images should wait for images that are being decoded."""
        if not self._decoding or self._closed:
            return 0
        return max(0.0, self._decoded[0].decoded_at + self._batch_timeout_s - time.perf_counter())

    def _take_batch(self) -> Callable[[], None]:
        self._running_batches += 1
        items = [self._decoded.popleft() for _ in range(min(len(self._decoded), self._target_batch_size()))]
        self._batched_images += len(items)
        return lambda: self._compute(items)

    def _decode(self, item: _Item, *, block: bool) -> None:
        """Decode an image, or defer it if it needs the decoder process and ``block`` is false."""
        started = time.perf_counter()
        try:
            if not _is_cancelled(item):
                item.image = self._decoder.preprocess(
                    item.data, self._preprocessing, block=block, within_s=item.deadline - time.perf_counter()
                )
        except DeferredError as deferred:
            item.is_simple = deferred.is_simple
            with self._changed:
                del self._decoding[threading.get_ident()]
                self._deferred.append(item)
                self._was_deferred.notify()
            return
        except DecoderBusyError:
            item.future.set_exception(RequestCancelledError())
        except BaseException as error:
            item.future.set_exception(_without_frames(error))
        item.data = b""
        item.decoded_at = time.perf_counter()
        item.decode_s = item.decoded_at - started
        with self._changed:
            if block:
                self._isolated -= 1
            else:
                del self._decoding[threading.get_ident()]
            if item.image:
                self._decoded.append(item)
            if self._closed:
                self._wake_all()
            else:
                self._changed.notify()
        self._metrics.stages["decode_queue"].observe(started - item.submitted_at)
        self._metrics.stages["decode"].observe(item.decode_s)

    def _compute(self, items: list[_Item]) -> None:
        try:
            active = [item for item in items if not _is_cancelled(item)]
            started = time.perf_counter()
            if active:
                pixels = np.stack([item.image.pixels for item in active if item.image])
                self._resolve(active, self._engine.run(pixels), started)
        except Exception as error:
            for item in items:
                if not item.future.done():
                    item.future.set_exception(error)
        finally:
            with self._changed:
                self._running_batches -= 1
                self._batched_images -= len(items)
                self._changed.notify()

    def _resolve(self, items: list[_Item], outputs: Arrays, started: float) -> None:
        inference_s = time.perf_counter() - started
        self._metrics.batch_size.observe(len(items))
        self._metrics.stages["inference"].observe(inference_s)
        scores = outputs[1].tolist() if len(outputs) > 1 else [None] * len(items)
        for item, row, score in zip(items, outputs[0], scores, strict=True):
            assert item.image is not None
            queue_s = started - item.decoded_at
            self._metrics.stages["batch_queue"].observe(queue_s)
            item.future.set_result(
                InferenceResult(item.image, row, item.decode_s * 1e3, queue_s * 1e3, inference_s * 1e3, len(items), score)
            )


def _without_frames(error: BaseException) -> BaseException:
    """Drop an error's frames, which reference the image file and, in a cycle, the future that holds the error."""
    if isinstance(error, Problem):
        return error.without_traceback()
    if error.__traceback__:
        error.__traceback__ = error.__traceback__.tb_next  # the caller's own frame is still running
    traceback.clear_frames(error.__traceback__)
    return error


def _to_item(image: bytes | PreprocessedImage, is_cancelled: Callable[[], bool], deadline: float) -> _Item:
    if isinstance(image, bytes):
        return _Item(image, is_cancelled, deadline)
    item = _Item(b"", is_cancelled, deadline, image=image)
    item.decoded_at = item.submitted_at
    return item


def _is_cancelled(item: _Item) -> bool:
    """Check at most every CANCEL_CHECK_S whether the request was cancelled, and fail the image's future if so."""
    now = time.perf_counter()
    if now - max(item.submitted_at, item.checked_at) < CANCEL_CHECK_S:
        return False
    if item.is_cancelled():
        item.future.set_exception(RequestCancelledError())
        return True
    item.checked_at = now
    return False
