"""The crew that decodes and computes: who is computed with whom, and what becomes of those that fail."""

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
WAIT_S = 120.0  # for what has to come at once; nothing here takes that long unless it never comes
SEEN = Preprocessing(input_px=SIDE, resize_px=SIDE)


class Colours:
    """An engine that answers the colour of each photo, and remembers its batches; ``before`` may hold it up or fail."""

    def __init__(self, before: Callable[[NDArray[np.uint8]], None] = lambda pixels: None) -> None:
        self.before = before
        self.batches: list[list[int]] = []

    def run(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
        self.batches.append([int(row[0, 0, 0]) for row in pixels])
        self.before(pixels)
        return [pixels[:, 0, 0, :].astype(np.float32)]


class Door:
    """A front door for photos of one byte, the red of their colour; ``held`` are those that it keeps until they are let go."""

    def __init__(self, *held: int) -> None:
        self.held = {number: threading.Event() for number in held}
        self.inside: list[int] = []

    def preprocess(self, data: bytes, preprocessing: Preprocessing, **_: Any) -> PreprocessedImage:
        self.inside.append(data[0])
        if data[0] in self.held:
            assert self.held[data[0]].wait(WAIT_S)
        return PreprocessedImage(np.full((SIDE, SIDE, 3), data[0], np.uint8), SIDE, SIDE, "PNG")


@contextmanager
def running(engine: Any, *, door: Any = None, threads: int = 2, streams: int = 2, **limits: Any) -> Iterator[Batcher]:
    made = Batcher(
        engine,
        SEEN,
        decoder=door or ImageDecoder.of(Settings(max_megapixels=1)),
        metrics=Metrics(),
        threads=threads,
        streams=streams,
        **{"max_batch_size": 4, "batch_timeout_s": 0.004, **limits},
    )
    try:
        yield made
    finally:
        made.close()


def yes() -> bool:
    return True


def no() -> bool:
    return False


def png(color: tuple[int, int, int], side_px: int = SIDE) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (side_px, side_px), color).save(file, "PNG")
    return file.getvalue()


def red(answer: Future[InferenceResult]) -> int:
    return int(answer.result(WAIT_S).probabilities[0])


class Block:
    """Keeps the engine busy until ``go``: the first batch is inside when ``entered`` is set."""

    def __init__(self) -> None:
        self.entered, self.go = threading.Event(), threading.Event()

    def __call__(self, pixels: NDArray[np.uint8]) -> None:
        self.entered.set()
        assert self.go.wait(WAIT_S)


# Batches


def test_nobody_gets_anothers_answer() -> None:
    """Hundreds of photos, each of its own colour, from many threads: each gets its own colour back, and its own pixels."""
    colors = [(i % 256, i * 7 % 256, i // 256 * 90) for i in range(600)]
    assert len(set(colors)) == 600
    with running(Colours(), threads=3, streams=2) as pipeline, ThreadPoolExecutor(16) as clients:

        def ask(color: tuple[int, int, int]) -> InferenceResult:
            return pipeline.submit(png(color), yes).result(WAIT_S)

        answers = list(clients.map(ask, colors))
    for color, answer in zip(colors, answers, strict=True):
        assert tuple(answer.probabilities) == color
        assert (answer.image.pixels == np.array(color)).all()
        assert 1 <= answer.batch_size <= 4


def test_what_arrives_while_the_engine_is_busy_is_computed_together() -> None:
    block = Block()
    engine = Colours(block)
    with running(engine, door=Door(), threads=2, streams=1) as pipeline:
        first = pipeline.submit(bytes([1]), yes)
        assert block.entered.wait(WAIT_S)
        others = [pipeline.submit(bytes([number]), yes) for number in range(2, 12)]
        poll(
            lambda: (
                pipeline._metrics.registry.get_sample_value("classifier_stage_duration_seconds_count", {"stage": "decode"})
                == 11
            )
        )
        block.go.set()
        assert [red(answer) for answer in (first, *others)] == list(range(1, 12))
    assert engine.batches[0] == [1]
    assert [number for batch_size in engine.batches for number in batch_size] == list(range(1, 12))
    assert max(map(len, engine.batches)) == 4
    assert len(engine.batches) <= 6
    assert [answer.result().batch_size for answer in (first, *others)] == [len(b) for b in engine.batches for _ in b]


def test_no_more_batches_are_computed_at_once_than_there_are_streams() -> None:
    now, most, lock = 0, 0, threading.Lock()

    def count(pixels: NDArray[np.uint8]) -> None:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.002)  # long enough for another to come in, were it let
        with lock:
            now -= 1

    with running(Colours(count), door=Door(), threads=4, streams=2, max_batch_size=1) as pipeline:
        answers = [pipeline.submit(bytes([number]), yes) for number in range(60)]
        assert [red(answer) for answer in answers] == list(range(60))
    assert most <= 2


def test_a_lonely_photo_does_not_wait_for_others() -> None:
    with running(Colours(), door=Door(), batch_timeout_s=10 * WAIT_S) as pipeline:
        assert red(pipeline.submit(bytes([7]), yes)) == 7


def test_a_photo_waits_for_one_that_is_being_decoded() -> None:
    door, engine = Door(2, 3), Colours()
    with running(engine, door=door, threads=3, streams=1, batch_timeout_s=10 * WAIT_S) as pipeline:
        slow, slower = (pipeline.submit(bytes([number]), yes) for number in (2, 3))
        poll(lambda: len(door.inside) == 2)
        quick = pipeline.submit(bytes([1]), yes)
        poll(lambda: len(pipeline._decoded) == 1)
        door.held[2].set()
        assert (red(quick), red(slow)) == (1, 2)
        door.held[3].set()
        assert red(slower) == 3
    assert engine.batches == [[1, 2], [3]]


def test_a_photo_waits_for_no_longer_than_it_may() -> None:
    door, engine = Door(2, 3), Colours()
    with running(engine, door=door, threads=3, streams=1, batch_timeout_s=0.004) as pipeline:
        slow = [pipeline.submit(bytes([number]), yes) for number in (2, 3)]
        poll(lambda: len(door.inside) == 2)
        assert red(pipeline.submit(bytes([1]), yes)) == 1  # though the others are still with the decoder
        for number, answer in zip((2, 3), slow, strict=True):
            assert not answer.done()
            door.held[number].set()
            assert red(answer) == number


def test_photos_are_taken_in_the_order_in_which_they_came() -> None:
    engine = Colours()
    with running(engine, door=Door(), threads=1, streams=1) as pipeline:
        answers = [pipeline.submit(bytes([number]), yes) for number in range(100)]
        assert [red(answer) for answer in answers] == list(range(100))
    assert [number for batch_size in engine.batches for number in batch_size] == list(range(100))


def test_its_times_and_batches_are_measured() -> None:
    with running(Colours()) as pipeline:
        answer = pipeline.submit(png((1, 2, 3)), yes).result(WAIT_S)
        sample = pipeline._metrics.registry.get_sample_value
        poll(lambda: sample("classifier_stage_duration_seconds_count", {"stage": "decode"}) == 1)
        for stage in ("decode_queue", "decode", "batch_queue", "inference"):
            assert sample("classifier_stage_duration_seconds_count", {"stage": stage}) == 1
        assert sample("classifier_batch_size_sum") == 1
    assert min(answer.decode_ms, answer.batch_queue_ms, answer.inference_ms) >= 0
    assert (answer.image.width_px, answer.image.height_px, answer.image.format) == (SIDE, SIDE, "PNG")


class Isolating(Door):
    """A door that decodes every photo of ``isolated`` in a process, which holds each until it is let go."""

    def __init__(self, *isolated: int, simple: Sequence[int] = ()) -> None:
        super().__init__(*isolated)
        self.simple = simple

    def preprocess(self, data: bytes, preprocessing: Preprocessing, *, block: bool = True, **_: Any) -> PreprocessedImage:
        if data[0] in self.held and not block:
            raise DeferredError(Structure("PNG", 1, is_simple=data[0] in self.simple))
        return super().preprocess(data, preprocessing)


def test_photos_for_the_decoder_process_hold_up_no_others() -> None:
    door = Isolating(*range(10))
    with running(Colours(), door=door) as pipeline:
        waiting = [pipeline.submit(bytes([number]), yes) for number in range(10)]
        for number in range(50, 60):
            assert red(pipeline.submit(bytes([number]), yes)) == number
        assert not any(answer.done() for answer in waiting)
        for number in range(10):
            door.held[number].set()
        assert [red(answer) for answer in waiting] == list(range(10))


def test_large_photos_go_before_unusual_ones() -> None:
    """How long a large one takes is bounded; an unusual one may take all of its time-out."""
    door = Isolating(1, 2, 3, 4, simple=(3, 4))
    with running(Colours(), door=door, threads=1) as pipeline:
        answers = [pipeline.submit(bytes([1]), yes)]
        poll(lambda: door.inside == [1])
        answers += [pipeline.submit(bytes([number]), yes) for number in (2, 3, 4)]
        poll(lambda: len(pipeline._deferred) == 3)
        for event in door.held.values():
            event.set()
        assert [red(answer) for answer in answers] == [1, 2, 3, 4]
    assert door.inside == [1, 3, 4, 2]


def test_it_is_stalled_while_every_thread_decodes_for_longer_than_the_deadline() -> None:
    door = Door(1, 2)
    with running(Colours(), door=door, threads=2, deadline_s=0.001) as pipeline:
        first = pipeline.submit(bytes([1]), yes)
        poll(lambda: door.inside == [1])
        assert not pipeline.is_stalled
        second = pipeline.submit(bytes([2]), yes)
        poll(lambda: pipeline.is_stalled)
        for event in door.held.values():
            event.set()
        assert (red(first), red(second)) == (1, 2)
        poll(lambda: not pipeline.is_stalled)


def test_a_closed_pipeline_does_not_wait_for_a_photo_without_end() -> None:
    door = Door(1)
    with running(Colours(), door=door, deadline_s=0.05) as pipeline:
        answer = pipeline.submit(bytes([1]), yes)
        poll(lambda: door.inside == [1])
        pipeline.close()
        assert not answer.done()
        door.held[1].set()
        assert red(answer) == 1


@pytest.mark.parametrize("error", [Problem("damaged_image", "It is damaged."), ValueError("no photo")])
def test_what_failed_does_not_hold_its_photo(error: Exception) -> None:
    """The error reaches the client with its frames otherwise, and they refer to the photo's bytes."""

    gone = threading.Event()

    class Photo(bytes):
        def __del__(self) -> None:
            gone.set()

    class Broken(Door):
        def preprocess(self, data: bytes, preprocessing: Preprocessing, **_: Any) -> PreprocessedImage:
            opened = data
            raise error if opened else AssertionError

    gc.disable()
    try:
        with running(Colours(), door=Broken()) as pipeline:
            photo = Photo(b"1")
            answer = pipeline.submit(photo, yes)
            assert answer.exception(WAIT_S) is error
            del photo
            assert gone.wait(WAIT_S)
    finally:
        gc.enable()


# What fails


def test_a_bad_photo_gets_its_problem_and_the_others_their_answers() -> None:
    with running(Colours()) as pipeline:
        answers = [pipeline.submit(data, yes) for data in (png((1, 0, 0)), b"no", b"", png((2, 0, 0))[:50], png((3, 0, 0)))]
        problems = [answer.exception(WAIT_S) for answer in answers]
        assert [problem.code if isinstance(problem, Problem) else problem for problem in problems] == [
            None, "not_an_image", "empty_image", "damaged_image", None,
        ]  # fmt: skip
        assert (red(answers[0]), red(answers[4])) == (1, 3)


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, SystemExit])
def test_a_door_that_fails_fails_its_photo_only(error: type[BaseException]) -> None:
    class Broken(Door):
        def preprocess(self, data: bytes, preprocessing: Preprocessing, **_: Any) -> PreprocessedImage:
            if data == b"\x05":
                raise error("broken")
            return super().preprocess(data, preprocessing)

    with running(Colours(), door=Broken(), threads=1) as pipeline:
        answers = [pipeline.submit(bytes([number]), yes) for number in range(1, 10)]
        assert isinstance(answers[4].exception(WAIT_S), error)
        assert [red(answer) for i, answer in enumerate(answers) if i != 4] == [1, 2, 3, 4, 6, 7, 8, 9]


def test_an_engine_that_fails_fails_its_photos_only() -> None:
    def fail(pixels: NDArray[np.uint8]) -> None:
        if (pixels == 5).any():
            raise RuntimeError("out of luck")

    with running(Colours(fail), door=Door(), threads=1, streams=1, max_batch_size=1) as pipeline:
        for _ in range(5):  # more often than there are threads that it could end
            answers = [pipeline.submit(bytes([number]), yes) for number in range(1, 10)]
            assert str(answers[4].exception(WAIT_S)) == "out of luck"
            assert [red(answer) for i, answer in enumerate(answers) if i != 4] == [1, 2, 3, 4, 6, 7, 8, 9]


def test_an_engine_that_gives_too_few_answers_leaves_nobody_waiting() -> None:
    class Short(Colours):
        def run(self, pixels: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
            (rows,) = super().run(pixels)
            return [rows[:-1]] if (pixels == 5).any() else [rows]

    block = Block()
    engine = Short(block)
    with running(engine, door=Door(), threads=1, streams=1) as pipeline:
        first = pipeline.submit(bytes([1]), yes)
        assert block.entered.wait(WAIT_S)
        others = [pipeline.submit(bytes([number]), yes) for number in range(2, 9)]
        block.go.set()
        assert red(first) == 1
        for number, answer in zip(range(2, 9), others, strict=True):  # each its own, or a fault, but no other's
            assert answer.exception(WAIT_S) is not None or red(answer) == number
        assert any(answer.exception() for answer in others)
        assert red(pipeline.submit(bytes([9]), yes)) == 9


# What nobody wants


@pytest.fixture
def _looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """However short ago a photo came, whether it is wanted is asked."""
    monkeypatch.setattr(module, "CANCEL_CHECK_S", 0.0)


@pytest.mark.usefixtures("_looked_at")
def test_what_nobody_wants_is_neither_decoded_nor_computed() -> None:
    door, engine = Door(), Colours()
    with running(engine, door=door) as pipeline:
        unwanted = pipeline.submit(bytes([1]), no)
        assert isinstance(unwanted.exception(WAIT_S), RequestCancelledError)
        assert red(pipeline.submit(bytes([2]), yes)) == 2
    assert door.inside == [2]
    assert engine.batches == [[2]]


@pytest.mark.usefixtures("_looked_at")
def test_what_is_called_off_while_it_waits_for_the_engine_is_not_computed() -> None:
    block = Block()
    engine, wanted = Colours(block), True
    with running(engine, door=Door(), threads=2, streams=1) as pipeline:
        first = pipeline.submit(bytes([1]), yes)
        assert block.entered.wait(WAIT_S)
        second, third = pipeline.submit(bytes([2]), lambda: wanted), pipeline.submit(bytes([3]), yes)
        poll(
            lambda: (
                pipeline._metrics.registry.get_sample_value("classifier_stage_duration_seconds_count", {"stage": "decode"}) == 3
            )
        )
        wanted = False
        block.go.set()
        assert isinstance(second.exception(WAIT_S), RequestCancelledError)
        assert (red(first), red(third)) == (1, 3)
    assert engine.batches == [[1], [3]]


@pytest.mark.usefixtures("_looked_at")
def test_a_question_that_fails_fails_its_photo_only() -> None:
    """Whether a client is still there is asked of a socket, which may say anything."""

    def at(number: int) -> Callable[[], bool]:
        asked = 0

        def is_wanted() -> bool:
            nonlocal asked
            asked += 1
            if asked == number:
                raise OSError("bad file descriptor")
            return True

        return is_wanted

    with running(Colours(), door=Door(), threads=1, streams=1) as pipeline:
        for number in (1, 2):  # before decoding, and before computing
            failed = pipeline.submit(bytes([1]), at(number))
            assert isinstance(failed.exception(WAIT_S), OSError)
            assert red(pipeline.submit(bytes([2]), yes)) == 2


# The end


@pytest.mark.parametrize("photos", [0, 1, 3])
def test_closing_ends_every_thread(photos: int) -> None:
    door = Door(0)
    with running(Colours(), door=door, threads=8) as pipeline:
        answers = [pipeline.submit(bytes([number]), yes) for number in range(photos)]
        poll(lambda: len(door.inside) == photos)
        closing = threading.Thread(target=pipeline.close, daemon=True)
        closing.start()
        poll(lambda: pipeline._closed)
        door.held[0].set()
        assert [red(answer) for answer in answers] == list(range(photos))
        closing.join(WAIT_S)
        alive = [thread.name for thread in pipeline._crew if thread.is_alive()]
        with pipeline._changed:
            pipeline._changed.notify_all()  # so that a failure does not keep the test for ever
        assert alive == []


def test_closing_finishes_what_is_inside_and_takes_no_more() -> None:
    block = Block()
    with running(Colours(block), door=Door(), threads=2, streams=1) as pipeline:
        answers = [pipeline.submit(bytes([number]), yes) for number in range(50)]
        assert block.entered.wait(WAIT_S)
        closing = threading.Thread(target=pipeline.close)
        closing.start()
        poll(lambda: pipeline._closed)
        with pytest.raises(BatcherClosedError):
            pipeline.submit(bytes([99]), yes)
        assert closing.is_alive()
        block.go.set()
        closing.join(WAIT_S)
        assert not closing.is_alive()
        assert all(answer.done() for answer in answers)
        assert [red(answer) for answer in answers] == list(range(50))
        assert not any(thread.is_alive() for thread in pipeline._crew)
        pipeline.close()


# Several at once, and pixels in place of a photo


def test_several_photos_are_taken_together_pixels_among_them() -> None:
    pixels = PreprocessedImage(np.full((SIDE, SIDE, 3), 7, np.uint8), SIDE, SIDE, "pixels")
    with running(Colours()) as pipeline:
        answers = pipeline.submit_all([png((1, 0, 0)), pixels, png((3, 0, 0))], yes)
        assert [red(answer) for answer in answers] == [1, 7, 3]
    with pytest.raises(BatcherClosedError):
        pipeline.submit_all([pixels], yes)
