"""The batcher: which images are computed together, and what happens to images that fail."""

from __future__ import annotations

import gc
import io
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from models.image_structure import Structure
from models.preprocess import Preprocessing
from service.http.errors import Problem
from service.inference import batcher as module
from service.inference.batcher import Batcher, BatcherClosedError, InferenceResult, RequestCancelledError
from service.inference.image_decoder import DeferredError, ImageDecoder, PreprocessedImage
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.helpers.server import poll

SIDE = 8
WAIT_S = 120.0  # reached only if an event never happens
PREPROCESSING = Preprocessing(input_px=SIDE, resize_px=SIDE)


class ColorEngine:
    """An engine that returns each image's color and records its batches. ``before`` may block or fail."""

    def __init__(self, before: Callable[[NDArray[np.uint8]], None] = lambda pixels: None) -> None:
        self.before = before
        self.batches: list[list[int]] = []

    def run(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        self.batches.append([int(row[0, 0, 0]) for row in pixels])
        self.before(pixels)
        return [pixels[:, 0, 0, :].astype(np.float32)]


class FakeDecoder:
    """A decoder for images of one byte, their red value. It blocks on those of ``blocked`` until their event is set."""

    def __init__(self, *blocked: int) -> None:
        self.events = {number: threading.Event() for number in blocked}
        self.started: list[int] = []

    def preprocess(self, data: bytes, preprocessing: Preprocessing, **_: Any) -> PreprocessedImage:
        self.started.append(data[0])
        if data[0] in self.events:
            assert self.events[data[0]].wait(WAIT_S)
        return PreprocessedImage(np.full((SIDE, SIDE, 3), data[0], np.uint8), SIDE, SIDE, "PNG")


@contextmanager
def running(engine: Any, *, decoder: Any = None, threads: int = 2, streams: int = 2, **limits: Any) -> Iterator[Batcher]:
    made = Batcher(
        engine,
        PREPROCESSING,
        decoder=decoder or ImageDecoder.of(Settings(max_megapixels=1)),
        metrics=Metrics(),
        threads=threads,
        streams=streams,
        **{"max_batch_size": 4, "batch_timeout_s": 0.004, **limits},
    )
    try:
        yield made
    finally:
        made.close()


def submit(batcher: Batcher, image: bytes, is_cancelled: Callable[[], bool]) -> Future[InferenceResult]:
    return batcher.submit([image], is_cancelled)[0]


def active() -> bool:
    return False


def cancelled() -> bool:
    return True


def png(color: tuple[int, int, int], side_px: int = SIDE) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side_px, side_px), color).save(file, "PNG")
    return file.getvalue()


def red(future: Future[InferenceResult]) -> int:
    return int(future.result(WAIT_S).probabilities[0])


class Block:
    """Block the engine until ``go`` is set. ``entered`` is set once the first batch runs."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()

    def __call__(self, pixels: NDArray[np.uint8]) -> None:
        self.entered.set()
        assert self.go.wait(WAIT_S)


# Batches


def test_results_are_not_mixed_up_between_requests() -> None:
    """Hundreds of images of different colors from many threads: each gets its own color and pixels back."""
    colors = [(i % 256, (7 * i) % 256, i // 256 * 90) for i in range(600)]
    assert len(set(colors)) == 600
    with running(ColorEngine(), threads=3, streams=2) as batcher, ThreadPoolExecutor(16) as clients:

        def predict(color: tuple[int, int, int]) -> InferenceResult:
            return submit(batcher, png(color), active).result(WAIT_S)

        futures = list(clients.map(predict, colors))
    for color, future in zip(colors, futures, strict=True):
        assert tuple(future.probabilities) == color
        assert (future.image.pixels == np.array(color)).all()
        assert 1 <= future.batch_size <= 4


def test_images_that_arrive_while_the_engine_is_busy_share_batches() -> None:
    block = Block()
    engine = ColorEngine(block)
    with running(engine, decoder=FakeDecoder(), threads=2, streams=1) as batcher:
        first = submit(batcher, bytes([1]), active)
        assert block.entered.wait(WAIT_S)
        others = [submit(batcher, bytes([number]), active) for number in range(2, 12)]
        poll(
            lambda: (
                batcher._metrics.registry.get_sample_value("classifier_stage_duration_seconds_count", {"stage": "decode"}) == 11
            )
        )
        block.go.set()
        assert [red(future) for future in (first, *others)] == list(range(1, 12))
    assert engine.batches[0] == [1]
    assert [number for batch_size in engine.batches for number in batch_size] == list(range(1, 12))
    assert max(map(len, engine.batches)) == 4
    assert len(engine.batches) <= 6
    assert [future.result().batch_size for future in (first, *others)] == [len(b) for b in engine.batches for _ in b]


def test_at_most_streams_batches_run_at_a_time() -> None:
    running_now, max_running, lock = 0, 0, threading.Lock()

    def count(pixels: NDArray[np.uint8]) -> None:
        nonlocal running_now, max_running
        with lock:
            running_now += 1
            max_running = max(max_running, running_now)
        time.sleep(0.002)  # long enough for another batch to start if that were allowed
        with lock:
            running_now -= 1

    with running(ColorEngine(count), decoder=FakeDecoder(), threads=4, streams=2, max_batch_size=1) as batcher:
        futures = [submit(batcher, bytes([number]), active) for number in range(60)]
        assert [red(future) for future in futures] == list(range(60))
    assert max_running <= 2


def test_a_single_image_does_not_wait_for_others() -> None:
    with running(ColorEngine(), decoder=FakeDecoder(), batch_timeout_s=10 * WAIT_S) as batcher:
        assert red(submit(batcher, bytes([7]), active)) == 7


def test_an_image_waits_for_one_that_is_being_decoded() -> None:
    decoder, engine = FakeDecoder(2, 3), ColorEngine()
    with running(engine, decoder=decoder, threads=3, streams=1, batch_timeout_s=10 * WAIT_S) as batcher:
        slow, slower = (submit(batcher, bytes([number]), active) for number in (2, 3))
        poll(lambda: len(decoder.started) == 2)
        quick = submit(batcher, bytes([1]), active)
        poll(lambda: len(batcher._decoded) == 1)
        decoder.events[2].set()
        assert (red(quick), red(slow)) == (1, 2)
        decoder.events[3].set()
        assert red(slower) == 3
    assert engine.batches == [[1, 2], [3]]


def test_an_image_waits_at_most_for_the_batch_timeout() -> None:
    decoder, engine = FakeDecoder(2, 3), ColorEngine()
    with running(engine, decoder=decoder, threads=3, streams=1, batch_timeout_s=0.004) as batcher:
        slow = [submit(batcher, bytes([number]), active) for number in (2, 3)]
        poll(lambda: len(decoder.started) == 2)
        assert red(submit(batcher, bytes([1]), active)) == 1  # the others are still being decoded
        for number, future in zip((2, 3), slow, strict=True):
            assert not future.done()
            decoder.events[number].set()
            assert red(future) == number


def test_images_are_computed_in_the_order_of_submission() -> None:
    engine = ColorEngine()
    with running(engine, decoder=FakeDecoder(), threads=1, streams=1) as batcher:
        futures = [submit(batcher, bytes([number]), active) for number in range(100)]
        assert [red(future) for future in futures] == list(range(100))
    assert [number for batch_size in engine.batches for number in batch_size] == list(range(100))


def test_stage_durations_and_batch_sizes_are_measured() -> None:
    with running(ColorEngine()) as batcher:
        future = submit(batcher, png((1, 2, 3)), active).result(WAIT_S)
        sample = batcher._metrics.registry.get_sample_value
        poll(lambda: sample("classifier_stage_duration_seconds_count", {"stage": "decode"}) == 1)
        for stage in ("decode_queue", "decode", "batch_queue", "inference"):
            assert sample("classifier_stage_duration_seconds_count", {"stage": stage}) == 1
        assert sample("classifier_batch_size_sum") == 1
    assert min(future.decode_ms, future.batch_queue_ms, future.inference_ms) >= 0
    assert (future.image.width_px, future.image.height_px, future.image.format) == (SIDE, SIDE, "PNG")


class IsolatingDecoder(FakeDecoder):
    """A decoder that defers the images of ``isolated`` to its process, which blocks on each until its event is set."""

    def __init__(self, *isolated: int, simple: Sequence[int] = ()) -> None:
        super().__init__(*isolated)
        self.simple = simple

    def preprocess(self, data: bytes, preprocessing: Preprocessing, *, block: bool = True, **_: Any) -> PreprocessedImage:
        if data[0] in self.events and not block:
            raise DeferredError(Structure("PNG", 1, is_simple=data[0] in self.simple))
        return super().preprocess(data, preprocessing)


def test_images_for_the_decoder_process_do_not_delay_others() -> None:
    decoder = IsolatingDecoder(*range(10))
    with running(ColorEngine(), decoder=decoder) as batcher:
        deferred = [submit(batcher, bytes([number]), active) for number in range(10)]
        for number in range(50, 60):
            assert red(submit(batcher, bytes([number]), active)) == number
        assert not any(future.done() for future in deferred)
        for number in range(10):
            decoder.events[number].set()
        assert [red(future) for future in deferred] == list(range(10))


def test_large_images_go_before_unusual_ones() -> None:
    """The time of a large image is bounded; an unusual one may take the whole timeout."""
    decoder = IsolatingDecoder(1, 2, 3, 4, simple=(3, 4))
    with running(ColorEngine(), decoder=decoder, threads=1) as batcher:
        futures = [submit(batcher, bytes([1]), active)]
        poll(lambda: decoder.started == [1])
        futures += [submit(batcher, bytes([number]), active) for number in (2, 3, 4)]
        poll(lambda: len(batcher._deferred) == 3)
        for event in decoder.events.values():
            event.set()
        assert [red(future) for future in futures] == [1, 2, 3, 4]
    assert decoder.started == [1, 3, 4, 2]


def test_the_batcher_is_stalled_while_every_thread_decodes_for_longer_than_the_deadline() -> None:
    decoder = FakeDecoder(1, 2)
    with running(ColorEngine(), decoder=decoder, threads=2, deadline_s=0.001) as batcher:
        first = submit(batcher, bytes([1]), active)
        poll(lambda: decoder.started == [1])
        assert not batcher.is_stalled
        second = submit(batcher, bytes([2]), active)
        poll(lambda: batcher.is_stalled)
        for event in decoder.events.values():
            event.set()
        assert (red(first), red(second)) == (1, 2)
        poll(lambda: not batcher.is_stalled)


def test_closing_abandons_a_decode_that_exceeds_the_deadline() -> None:
    decoder = FakeDecoder(1)
    with running(ColorEngine(), decoder=decoder, deadline_s=0.05) as batcher:
        future = submit(batcher, bytes([1]), active)
        poll(lambda: decoder.started == [1])
        batcher.close()
        assert not future.done()
        decoder.events[1].set()
        assert red(future) == 1


@pytest.mark.parametrize("error", [Problem("damaged_image", "It is damaged."), ValueError("no photo")])
def test_an_error_does_not_keep_its_image_in_memory(error: Exception) -> None:
    """The frames of its traceback refer to the image file."""
    gone = threading.Event()

    class Photo(bytes):
        def __del__(self) -> None:
            gone.set()

    class Broken(FakeDecoder):
        def preprocess(self, data: bytes, preprocessing: Preprocessing, **_: Any) -> PreprocessedImage:
            opened = data
            raise error if opened else AssertionError

    gc.disable()
    try:
        with running(ColorEngine(), decoder=Broken()) as batcher:
            photo = Photo(b"1")
            future = submit(batcher, photo, active)
            assert future.exception(WAIT_S) is error
            del photo
            assert gone.wait(WAIT_S)
    finally:
        gc.enable()


# Failures


def test_an_invalid_image_fails_and_the_others_are_computed() -> None:
    with running(ColorEngine()) as batcher:
        futures = [submit(batcher, data, active) for data in (png((1, 0, 0)), b"no", b"", png((2, 0, 0))[:50], png((3, 0, 0)))]
        problems = [future.exception(WAIT_S) for future in futures]
        assert [problem.code if isinstance(problem, Problem) else problem for problem in problems] == [
            None, "not_an_image", "empty_image", "damaged_image", None,
        ]  # fmt: skip
        assert (red(futures[0]), red(futures[4])) == (1, 3)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, SystemExit])
def test_an_error_in_the_decoder_fails_its_image_only(error: type[BaseException]) -> None:
    class Broken(FakeDecoder):
        def preprocess(self, data: bytes, preprocessing: Preprocessing, **_: Any) -> PreprocessedImage:
            if data == b"\x05":
                raise error("broken")
            return super().preprocess(data, preprocessing)

    with running(ColorEngine(), decoder=Broken(), threads=1) as batcher:
        futures = [submit(batcher, bytes([number]), active) for number in range(1, 10)]
        assert isinstance(futures[4].exception(WAIT_S), error)
        assert [red(future) for i, future in enumerate(futures) if i != 4] == [1, 2, 3, 4, 6, 7, 8, 9]


def test_an_error_in_the_engine_fails_its_batch_only() -> None:
    def fail(pixels: NDArray[np.uint8]) -> None:
        if (pixels == 5).any():
            raise RuntimeError("engine error")

    with running(ColorEngine(fail), decoder=FakeDecoder(), threads=1, streams=1, max_batch_size=1) as batcher:
        for _ in range(5):  # more often than there are threads that the error could end
            futures = [submit(batcher, bytes([number]), active) for number in range(1, 10)]
            assert str(futures[4].exception(WAIT_S)) == "engine error"
            assert [red(future) for i, future in enumerate(futures) if i != 4] == [1, 2, 3, 4, 6, 7, 8, 9]


def test_an_engine_that_returns_too_few_rows_leaves_no_future_pending() -> None:
    class Short(ColorEngine):
        def run(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
            (rows,) = super().run(pixels)
            return [rows[:-1]] if (pixels == 5).any() else [rows]

    block = Block()
    engine = Short(block)
    with running(engine, decoder=FakeDecoder(), threads=1, streams=1) as batcher:
        first = submit(batcher, bytes([1]), active)
        assert block.entered.wait(WAIT_S)
        others = [submit(batcher, bytes([number]), active) for number in range(2, 9)]
        block.go.set()
        assert red(first) == 1
        for number, future in zip(range(2, 9), others, strict=True):  # its own result or an error, but not another's result
            assert future.exception(WAIT_S) is not None or red(future) == number
        assert any(future.exception() for future in others)
        assert red(submit(batcher, bytes([9]), active)) == 9


# Cancellation


@pytest.fixture
def _checked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cancellation is checked however recently the image was submitted."""
    monkeypatch.setattr(module, "CANCEL_CHECK_S", 0.0)


@pytest.mark.usefixtures("_checked_at_once")
def test_a_cancelled_image_is_neither_decoded_nor_computed() -> None:
    decoder, engine = FakeDecoder(), ColorEngine()
    with running(engine, decoder=decoder) as batcher:
        dropped = submit(batcher, bytes([1]), cancelled)
        assert isinstance(dropped.exception(WAIT_S), RequestCancelledError)
        assert red(submit(batcher, bytes([2]), active)) == 2
    assert decoder.started == [2]
    assert engine.batches == [[2]]


@pytest.mark.usefixtures("_checked_at_once")
def test_an_image_cancelled_in_the_batch_queue_is_not_computed() -> None:
    block = Block()
    engine, is_cancelled = ColorEngine(block), False
    with running(engine, decoder=FakeDecoder(), threads=2, streams=1) as batcher:
        first = submit(batcher, bytes([1]), active)
        assert block.entered.wait(WAIT_S)
        second, third = submit(batcher, bytes([2]), lambda: is_cancelled), submit(batcher, bytes([3]), active)
        poll(
            lambda: (
                batcher._metrics.registry.get_sample_value("classifier_stage_duration_seconds_count", {"stage": "decode"}) == 3
            )
        )
        is_cancelled = True
        block.go.set()
        assert isinstance(second.exception(WAIT_S), RequestCancelledError)
        assert (red(first), red(third)) == (1, 3)
    assert engine.batches == [[1], [3]]


@pytest.mark.usefixtures("_checked_at_once")
def test_an_error_in_is_cancelled_fails_its_image_only() -> None:
    """The check reads from a socket, which may raise any error."""

    def fail_at(call: int) -> Callable[[], bool]:
        calls = 0

        def is_cancelled() -> bool:
            nonlocal calls
            calls += 1
            if calls == call:
                raise OSError("bad file descriptor")
            return False

        return is_cancelled

    with running(ColorEngine(), decoder=FakeDecoder(), threads=1, streams=1) as batcher:
        for number in (1, 2):  # before decoding, and before computing
            failed = submit(batcher, bytes([1]), fail_at(number))
            assert isinstance(failed.exception(WAIT_S), OSError)
            assert red(submit(batcher, bytes([2]), active)) == 2


# Closing


@pytest.mark.parametrize("images", [0, 1, 3])
def test_closing_ends_every_thread(images: int) -> None:
    decoder = FakeDecoder(0)
    with running(ColorEngine(), decoder=decoder, threads=8) as batcher:
        futures = [submit(batcher, bytes([number]), active) for number in range(images)]
        poll(lambda: len(decoder.started) == images)
        closing = threading.Thread(target=batcher.close, daemon=True)
        closing.start()
        poll(lambda: batcher._closed)
        decoder.events[0].set()
        assert [red(future) for future in futures] == list(range(images))
        closing.join(WAIT_S)
        alive = [thread.name for thread in batcher._threads if thread.is_alive()]
        with batcher._changed:
            batcher._changed.notify_all()  # so that a failing test ends
        assert alive == []


def test_closing_finishes_what_was_submitted_and_accepts_no_more() -> None:
    block = Block()
    with running(ColorEngine(block), decoder=FakeDecoder(), threads=2, streams=1) as batcher:
        futures = [submit(batcher, bytes([number]), active) for number in range(50)]
        assert block.entered.wait(WAIT_S)
        closing = threading.Thread(target=batcher.close)
        closing.start()
        poll(lambda: batcher._closed)
        with pytest.raises(BatcherClosedError):
            submit(batcher, bytes([99]), active)
        assert closing.is_alive()
        block.go.set()
        closing.join(WAIT_S)
        assert not closing.is_alive()
        assert all(future.done() for future in futures)
        assert [red(future) for future in futures] == list(range(50))
        assert not any(thread.is_alive() for thread in batcher._threads)
        batcher.close()


# Several images, and pixels


def test_files_and_pixels_can_be_submitted_together() -> None:
    pixels = PreprocessedImage(np.full((SIDE, SIDE, 3), 7, np.uint8), SIDE, SIDE, "pixels")
    with running(ColorEngine()) as batcher:
        futures = batcher.submit([png((1, 0, 0)), pixels, png((3, 0, 0))], active)
        assert [red(future) for future in futures] == [1, 7, 3]
    with pytest.raises(BatcherClosedError):
        batcher.submit([pixels], active)
