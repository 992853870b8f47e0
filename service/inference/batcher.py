"""From photos' bytes to answers: one crew of threads that decodes and computes, in batches over all requests.

One thread more than processors, and each does what is most wanted next: decode a photo, or compute a batch of decoded ones.
So the processors are hardly fought over, an idle server decodes and computes a photo in one go, and a busy one fills its
batches by itself. Both kinds of work leave Python's lock to the others; the thread more works while one waits for it.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
from numpy.typing import NDArray

from models.preprocess import Preprocessing
from models.runtime.openvino_engine import Engine
from service.inference.image_decoder import DecoderBusyError, ImageDecoder, PreprocessedImage
from service.telemetry.metrics import Metrics

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
    queue_ms: float
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
    answer: Future[InferenceResult] = field(default_factory=Future)
    came: float = field(default_factory=time.perf_counter)
    looked: float = 0.0  # when it was found that somebody waits for it
    prepared: PreprocessedImage | None = None
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
    ) -> None:
        self._engine, self._preprocessing, self._door, self._metrics = engine, preprocessing, decoder, metrics
        self._streams, self._max_batch, self._max_wait_s = streams, max_batch_size, batch_timeout_s
        self._arrived: deque[_Photo] = deque()
        self._aside: deque[_Photo] = deque()  # heavy ones, while another is being decoded
        self._decoded: deque[_Photo] = deque()
        self._decoding = self._computing = self._in_batches = 0
        self._closed = False
        self._changed = threading.Condition()
        self._crew = [threading.Thread(target=self._work, name=f"crew-{i}", daemon=True) for i in range(threads)]
        for thread in self._crew:
            thread.start()

    def submit(self, photo: bytes | PreprocessedImage, is_wanted: Callable[[], bool]) -> Future[InferenceResult]:
        """Begin with a photo, as ``submit_all`` does with several."""
        return self.submit_all([photo], is_wanted)[0]

    def submit_all(
        self, photos: Sequence[bytes | PreprocessedImage], is_wanted: Callable[[], bool]
    ) -> list[Future[InferenceResult]]:
        """Begin with photos, or with what was made of them elsewhere: with all of them, or with none (BatcherClosedError).

        A future raises Problem for a bad photo, and RequestCancelledError where ``is_wanted`` called it off.
        """
        submitted = [_as_photo(photo, is_wanted) for photo in photos]
        with self._changed:
            if self._closed:
                raise BatcherClosedError
            for photo in submitted:
                (self._decoded if photo.prepared else self._arrived).append(photo)
            self._changed.notify(len(submitted))
        return [photo.answer for photo in submitted]

    def close(self) -> None:
        """Finish what was submitted, and end the threads."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._crew:
            thread.join()

    def _work(self) -> None:
        while work := self._next():
            work()

    def _next(self) -> Callable[[], None] | None:
        """What is most wanted now: a full batch, else another photo for it, else what there is. None when all is done."""
        with self._changed:
            while True:
                may_compute = bool(self._decoded) and self._computing < self._streams
                if may_compute and len(self._decoded) >= self._batch_now():
                    return self._take_batch()
                if photo := self._take_photo():
                    self._decoding += 1
                    return partial(self._decode, photo)
                wait_s = self._worth_waiting_s() if may_compute else None
                if wait_s == 0:
                    return self._take_batch()
                if self._closed and not (self._decoded or self._decoding or self._aside):
                    self._changed.notify_all()  # the others can go as well
                    return None
                self._changed.wait(wait_s)

    def _batch_now(self) -> int:
        """How many photos to compute in one go: as many as leave work for all streams and one part to be decoded.

        Larger batches take less time a photo; but when all photos are in them, the processors wait for the next to arrive.
        """
        inside = len(self._arrived) + self._decoding + len(self._decoded) + self._in_batches
        return max(1, min(self._max_batch, -(-inside // (self._streams + 1))))

    def _worth_waiting_s(self) -> float:
        """How long the decoded photos should wait for those that are being decoded."""
        if not self._decoding or self._closed:
            return 0
        return max(0.0, self._decoded[0].ready + self._max_wait_s - time.perf_counter())

    def _take_photo(self) -> _Photo | None:
        """The next to be decoded: one that was put aside as soon as it can be, else the one that came first."""
        if self._aside and not self._door.is_busy:
            return self._aside.popleft()
        return self._arrived.popleft() if self._arrived else None

    def _take_batch(self) -> Callable[[], None]:
        self._computing += 1
        photos = [self._decoded.popleft() for _ in range(min(len(self._decoded), self._batch_now()))]
        self._in_batches += len(photos)
        return lambda: self._compute(photos)

    def _decode(self, photo: _Photo) -> None:
        began = time.perf_counter()
        try:
            if _still_wanted(photo):
                photo.prepared = self._door.preprocess(photo.data, self._preprocessing)
        except DecoderBusyError:
            with self._changed:
                self._decoding -= 1
                self._aside.append(photo)
            return
        except BaseException as error:
            photo.answer.set_exception(error)
        photo.data = b""
        photo.ready = time.perf_counter()
        photo.decode_s = photo.ready - began
        with self._changed:
            self._decoding -= 1
            if photo.prepared:
                self._decoded.append(photo)
            self._changed.notify()
        self._metrics.stages["wait"].observe(began - photo.came)
        self._metrics.stages["decode"].observe(photo.decode_s)

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
        self._metrics.stages["compute"].observe(compute_s)
        for photo, row in zip(photos, probabilities, strict=True):
            assert photo.prepared is not None
            queue_s = began - photo.ready
            self._metrics.stages["queue"].observe(queue_s)
            answer = InferenceResult(photo.prepared, row, photo.decode_s * 1e3, queue_s * 1e3, compute_s * 1e3, len(photos))
            photo.answer.set_result(answer)


def _as_photo(photo: bytes | PreprocessedImage, is_wanted: Callable[[], bool]) -> _Photo:
    if isinstance(photo, bytes):
        return _Photo(photo, is_wanted)
    made = _Photo(b"", is_wanted, prepared=photo)
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
