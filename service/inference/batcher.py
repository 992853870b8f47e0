"""From photos' bytes to answers: one crew of threads that decodes and computes, in batches over all requests.

One thread more than processors, and each does what is most wanted next: decode a photo, or compute a batch of decoded ones.
So the processors are hardly fought over, an idle server decodes and computes a photo in one go, and a busy one fills its
batches by itself. Both kinds of work leave Python's lock to the others; the thread more works while one waits for it.

Large and unusual photos are decoded in a process of their own (``service.inference.decoder_process``). One more thread
waits for it, so that a photo that takes long holds up no others.
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
from models.runtime.openvino_engine import Engine
from service.http.errors import Problem
from service.inference.decoder_process import DecoderBusyError
from service.inference.image_decoder import DeferredError, ImageDecoder, PreprocessedImage
from service.telemetry.metrics import Metrics

log = logging.getLogger("service")
CANCEL_CHECK_S = 0.02  # to look whether a client is still there costs more than it saves


class BatcherClosedError(Exception):
    """The pipeline was closed before the photo came."""


class RequestCancelledError(Exception):
    """Nobody waited for the answer any more, so it was not computed."""


@dataclass(frozen=True)
class InferenceResult:
    """A photo as the model saw it and its probabilities (classes,); how long it took, and in how large a batch."""

    image: PreprocessedImage
    probabilities: NDArray[np.float32]
    decode_ms: float
    batch_queue_ms: float
    inference_ms: float
    batch_size: int

    @cached_property
    def top_class(self) -> int:
        """The class of the highest probability."""
        return int(self.probabilities.argmax())


@dataclass
class _Photo:
    data: bytes
    is_wanted: Callable[[], bool]
    until: float = math.inf  # when nobody waits any longer, by time.perf_counter
    answer: Future[InferenceResult] = field(default_factory=Future)
    came: float = field(default_factory=time.perf_counter)
    looked: float = 0.0  # when it was found that somebody waits for it
    prepared: PreprocessedImage | None = None
    is_simple: bool = True
    decode_s: float = 0.0
    ready: float = 0.0  # when it was decoded


class Batcher:
    """One model's crew. ``streams`` batches of up to ``max_batch_size`` photos are computed at a time.

    A batch that is not full waits only for photos that are being decoded, and for ``batch_timeout_s`` at most. How many photos
    may wait is bounded by who admits them (``service.http.admission``).
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
        self._engine, self._preprocessing, self._door, self._metrics = engine, preprocessing, decoder, metrics
        self._streams, self._max_batch, self._max_wait_s, self._deadline_s = (
            streams,
            max_batch_size,
            batch_timeout_s,
            deadline_s,
        )
        self._arrived: deque[_Photo] = deque()
        self._deferred: deque[_Photo] = deque()  # for the decoder process
        self._decoded: deque[_Photo] = deque()
        self._began: dict[int, float] = {}  # thread -> when it began with the photo that it is decoding
        self._isolated = self._computing = self._in_batches = 0
        self._closed = False
        lock = threading.RLock()
        self._changed = threading.Condition(lock)
        self._was_deferred = threading.Condition(lock)  # for the thread that waits for the decoder process
        self._threads = threads
        self._crew = [threading.Thread(target=self._work, name=f"crew-{i}", daemon=True) for i in range(threads)]
        self._crew.append(threading.Thread(target=self._work_isolated, name="isolated", daemon=True))
        for thread in self._crew:
            thread.start()

    @property
    def is_stalled(self) -> bool:
        """Whether every thread has been decoding one photo for longer than the deadline, so that no other is answered."""
        with self._changed:
            began = list(self._began.values())
        return len(began) >= self._threads and max(began) < time.perf_counter() - self._deadline_s

    def submit(
        self, photo: bytes | PreprocessedImage, is_wanted: Callable[[], bool], *, until: float = math.inf
    ) -> Future[InferenceResult]:
        """Begin with a photo, as ``submit_all`` does with several."""
        return self.submit_all([photo], is_wanted, until=until)[0]

    def submit_all(
        self, photos: Sequence[bytes | PreprocessedImage], is_wanted: Callable[[], bool], *, until: float = math.inf
    ) -> list[Future[InferenceResult]]:
        """Begin with photos, or with what was made of them elsewhere: with all of them, or with none (BatcherClosedError).

        A future raises Problem for a bad photo, and RequestCancelledError where ``is_wanted`` called it off, or where it
        was not decoded by ``until`` (of ``time.perf_counter``).
        """
        submitted = [_as_photo(photo, is_wanted, until) for photo in photos]
        with self._changed:
            if self._closed:
                raise BatcherClosedError
            for photo in submitted:
                (self._decoded if photo.prepared else self._arrived).append(photo)
            self._changed.notify(len(submitted))
        return [photo.answer for photo in submitted]

    def close(self) -> None:
        """Finish what was submitted, and end the threads. One that is not done within the deadline is left to itself."""
        with self._changed:
            self._closed = True
            self._wake_all()
        until = time.monotonic() + self._deadline_s
        for thread in self._crew:
            thread.join(max(0.0, until - time.monotonic()))
        if left := [thread.name for thread in self._crew if thread.is_alive()]:
            log.error("threads of a closed pipeline are still at work", extra={"threads": left})

    def _wake_all(self) -> None:
        self._changed.notify_all()
        self._was_deferred.notify_all()

    def _work(self) -> None:
        while work := self._next():
            work()

    def _work_isolated(self) -> None:
        while photo := self._next_deferred():
            self._decode(photo, waits=True)

    def _next(self) -> Callable[[], None] | None:
        """What is most wanted now: a full batch, else another photo for it, else what there is. None when all is done."""
        with self._changed:
            while True:
                may_compute = bool(self._decoded) and self._computing < self._streams
                if may_compute and len(self._decoded) >= self._batch_now():
                    return self._take_batch()
                if self._arrived:
                    photo = self._arrived.popleft()
                    self._began[threading.get_ident()] = time.perf_counter()
                    return partial(self._decode, photo, waits=False)
                wait_s = self._worth_waiting_s() if may_compute else None
                if wait_s == 0:
                    return self._take_batch()
                if self._closed and not (self._decoded or self._began or self._deferred or self._isolated):
                    self._changed.notify_all()  # the others can go as well
                    return None
                self._changed.wait(wait_s)

    def _next_deferred(self) -> _Photo | None:
        """The next photo for the decoder process: large ones first, as their time is known to be bounded. None at the end."""
        with self._changed:
            while not self._deferred:
                if self._closed and not (self._arrived or self._began):
                    self._changed.notify_all()
                    return None
                self._was_deferred.wait()
            photo = next((photo for photo in self._deferred if photo.is_simple), self._deferred[0])
            self._deferred.remove(photo)
            self._isolated += 1
            return photo

    def _batch_now(self) -> int:
        """How many photos to compute in one go: as many as leave work for all streams and one part to be decoded.

        Larger batches take less time a photo; but when all photos are in them, the processors wait for the next to arrive.
        """
        inside = len(self._arrived) + len(self._began) + len(self._decoded) + self._in_batches
        return max(1, min(self._max_batch, -(-inside // (self._streams + 1))))

    def _worth_waiting_s(self) -> float:
        """How long the decoded photos should wait for those that are being decoded."""
        if not self._began or self._closed:
            return 0
        return max(0.0, self._decoded[0].ready + self._max_wait_s - time.perf_counter())

    def _take_batch(self) -> Callable[[], None]:
        self._computing += 1
        photos = [self._decoded.popleft() for _ in range(min(len(self._decoded), self._batch_now()))]
        self._in_batches += len(photos)
        return lambda: self._compute(photos)

    def _decode(self, photo: _Photo, *, waits: bool) -> None:
        """Decode a photo, or defer it where that is for the decoder process and ``waits`` is false."""
        began = time.perf_counter()
        try:
            if _still_wanted(photo):
                photo.prepared = self._prepare(photo, waits=waits)
        except DeferredError as deferred:
            photo.is_simple = deferred.is_simple
            with self._changed:
                del self._began[threading.get_ident()]
                self._deferred.append(photo)
                self._was_deferred.notify()
            return
        except DecoderBusyError:
            photo.answer.set_exception(RequestCancelledError())
        except BaseException as error:
            photo.answer.set_exception(_without_frames(error))
        photo.data = b""
        photo.ready = time.perf_counter()
        photo.decode_s = photo.ready - began
        with self._changed:
            if waits:
                self._isolated -= 1
            else:
                del self._began[threading.get_ident()]
            if photo.prepared:
                self._decoded.append(photo)
            if self._closed:
                self._wake_all()
            else:
                self._changed.notify()
        self._metrics.stages["decode_queue"].observe(began - photo.came)
        self._metrics.stages["decode"].observe(photo.decode_s)

    def _prepare(self, photo: _Photo, *, waits: bool) -> PreprocessedImage:
        within_s = photo.until - time.perf_counter()
        return self._door.preprocess(photo.data, self._preprocessing, block=waits, within_s=within_s)

    def _compute(self, photos: list[_Photo]) -> None:
        try:
            wanted = [photo for photo in photos if _still_wanted(photo)]
            began = time.perf_counter()
            if wanted:
                pixels = np.stack([photo.prepared.pixels for photo in wanted if photo.prepared])
                self._answer(wanted, self._engine.run(pixels)[0], began)
        except Exception as error:
            for photo in photos:
                if not photo.answer.done():
                    photo.answer.set_exception(error)
        finally:
            with self._changed:
                self._computing -= 1
                self._in_batches -= len(photos)
                self._changed.notify()

    def _answer(self, photos: list[_Photo], probabilities: NDArray[np.float32], began: float) -> None:
        compute_s = time.perf_counter() - began
        self._metrics.batch_size.observe(len(photos))
        self._metrics.stages["inference"].observe(compute_s)
        for photo, row in zip(photos, probabilities, strict=True):
            assert photo.prepared is not None
            queue_s = began - photo.ready
            self._metrics.stages["batch_queue"].observe(queue_s)
            answer = InferenceResult(photo.prepared, row, photo.decode_s * 1e3, queue_s * 1e3, compute_s * 1e3, len(photos))
            photo.answer.set_result(answer)


def _without_frames(error: BaseException) -> BaseException:
    """The error without what its frames hold: the photo's bytes, and, in a circle, the future that holds the error."""
    if isinstance(error, Problem):
        return error.without_traceback()
    if error.__traceback__:
        error.__traceback__ = error.__traceback__.tb_next  # the caller's own, which is still running
    traceback.clear_frames(error.__traceback__)
    return error


def _as_photo(photo: bytes | PreprocessedImage, is_wanted: Callable[[], bool], until: float) -> _Photo:
    if isinstance(photo, bytes):
        return _Photo(photo, is_wanted, until)
    made = _Photo(b"", is_wanted, until, prepared=photo)
    made.ready = made.came
    return made


def _still_wanted(photo: _Photo) -> bool:
    """Whether anybody waits for the answer still; a photo that nobody wants is told so. One that came just now is wanted."""
    now = time.perf_counter()
    if now - max(photo.came, photo.looked) < CANCEL_CHECK_S:
        return True
    if photo.is_wanted():
        photo.looked = now
        return True
    photo.answer.set_exception(RequestCancelledError())
    return False
