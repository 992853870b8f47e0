"""Images whose cost only decoding tells: decoded in a process with limits, with the same pixels, and without harm to others."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TypeVar

import numpy as np
import pytest
from PIL import Image

from models.errors import ImageError, TooComplexError, UnsupportedImageError
from models.preprocess import Preprocessing
from service.app import create_api_app, create_services
from service.http.errors import Problem
from service.inference import decoder_process
from service.inference.decoder_process import DecoderBusyError, DecoderProcess
from service.inference.decoding import preprocess, render
from service.inference.image_decoder import ImageDecoder
from service.inference.model_manager import ModelManager
from service.settings import Settings
from service.telemetry.metrics import Metrics
from tests.helpers import bomb_images
from tests.helpers.odd_images import odd_images, picture, png, saved
from tests.helpers.server import poll, rss_mb, serve

SEEN = Preprocessing(input_px=32, resize_px=40)
MAX_PIXELS = 50_000_000
SLOW = bomb_images.hidden_scans(60_000, 256)  # minutes
Made = Callable[..., DecoderProcess]
T = TypeVar("T")


@pytest.fixture
def make() -> Iterator[Made]:
    """``make(**limits)`` gives a decoder process, which is ended after the test."""
    made: list[DecoderProcess] = []

    def new(**limits: object) -> DecoderProcess:
        options = {"max_pixels": MAX_PIXELS, "max_body_bytes": 20 << 20, "timeout_s": 300.0, **limits}
        made.append(DecoderProcess(**options))  # type: ignore[arg-type]
        return made[-1]

    yield new
    for process in made:
        process.close()


def crop(process: DecoderProcess, data: bytes, **options: float) -> np.ndarray:
    header, pixels = process.run("preprocess", data, preprocessing=asdict(SEEN), max_pixels=MAX_PIXELS, **options)
    return np.frombuffer(pixels, np.uint8).reshape(header["shape"])


def outcome(decode: Callable[[], T]) -> T | type[ImageError]:
    try:
        return decode()
    except ImageError as error:
        return type(error)


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_the_pixels_are_those_of_this_process(make: Made) -> None:
    process, outcomes = make(), Counter[object]()
    fields = {"preprocessing": asdict(SEEN), "max_pixels": MAX_PIXELS}
    for name, data in (odd_images() | bomb_images.isolated() | bomb_images.simple()).items():
        here = outcome(partial(preprocess, data, SEEN, max_pixels=MAX_PIXELS))
        there = outcome(partial(process.run, "preprocess", data, **fields))
        if isinstance(here, type) or isinstance(there, type):
            assert here is there, name
            outcomes[here] += 1
            continue
        header, pixels = there
        assert pixels == here.pixels.tobytes(), name
        assert header.pop("shape") == [32, 32, 3]
        assert header == {name: value for name, value in asdict(here).items() if name != "pixels"} | {"notes": list(here.notes)}
        outcomes["ok"] += 1
    assert outcomes["ok"] > 200
    assert outcomes[UnsupportedImageError] > 20


def test_a_picture_for_people_is_the_same(make: Made) -> None:
    data = saved(picture("RGBA", (700, 500)), "TIFF")
    arguments = {"max_side_px": 320, "quality": 80, "max_pixels": MAX_PIXELS}
    header, made = make().run("render", data, **arguments)
    here = render(data, max_side_px=320, quality=80, max_pixels=MAX_PIXELS)
    assert (made, header["width_px"], header["height_px"]) == (here.data, 320, 229)


def test_one_process_serves_many_threads(make: Made) -> None:
    process = make()
    colors = [(i, 255 - i, 7) for i in range(0, 256, 5)]
    photos = [saved(Image.new("RGB", (40, 40), color), "TIFF") for color in colors]
    with ThreadPoolExecutor(8) as pool:
        crops = list(pool.map(lambda data: crop(process, data), photos))
    assert [tuple(pixels[0, 0]) for pixels in crops] == colors
    assert len([pid for pid in children_of_this() if pid == process.pid]) == 1


def children_of_this() -> list[int]:
    found = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children") as file:
            found += [int(word) for word in file.read().split()]
    return found


def test_one_that_takes_too_long_is_killed_and_the_next_is_decoded(make: Made) -> None:
    counted: list[str] = []
    process = make(timeout_s=1.0, count=counted.append)
    with pytest.raises(TooComplexError, match="took longer than 1 s") as caught:
        crop(process, SLOW)
    assert caught.value.reason == "timeout"
    assert process.pid is None
    process.timeout_s = 300.0
    assert crop(process, saved(picture(), "TIFF")).shape == (32, 32, 3)
    assert counted == ["timeout", "ok"]


def test_the_time_of_the_request_cuts_it_off_without_a_word_against_the_photo(make: Made) -> None:
    process = make()
    with pytest.raises(DecoderBusyError):
        crop(process, SLOW, within_s=0.5)
    with pytest.raises(DecoderBusyError):
        crop(process, SLOW, within_s=-1.0)
    assert crop(process, saved(picture(), "TIFF")).shape == (32, 32, 3)


def test_who_waits_for_another_photo_waits_no_longer_than_it_has(make: Made) -> None:
    process = make()
    assert crop(process, saved(picture(), "TIFF")).size
    with process._turn, pytest.raises(DecoderBusyError):
        crop(process, saved(picture(), "TIFF"), within_s=0.01)


def cpu_ticks(pid: int) -> int:
    """Return the processor time that a process has used, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_process_that_dies_costs_its_photo_only(make: Made) -> None:
    process = make()
    assert crop(process, saved(picture(), "TIFF")).size
    child = process._child
    assert child
    idle_ticks = cpu_ticks(child.pid)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(crop, process, SLOW)
        poll(lambda: cpu_ticks(child.pid) > idle_ticks + 5)  # it decodes; killed before, it would only be replaced
        os.kill(child.pid, 9)
        with pytest.raises(TooComplexError) as caught:
            slow.result(120)
    assert caught.value.reason == "crash"
    assert crop(process, saved(picture(), "TIFF")).size
    os.kill(process.pid or 0, 9)  # and between two photos, it costs none
    poll(lambda: process.pid is None)
    assert crop(process, saved(picture(), "TIFF")).size


def test_its_memory_is_limited(make: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_process, "SLACK_BYTES", 16 << 20)
    process = make(max_pixels=100_000, max_body_bytes=1000)
    with pytest.raises(TooComplexError) as caught:
        crop(process, saved(Image.new("RGB", (5000, 4000)), "PNG"))
    assert caught.value.reason == "memory"
    assert crop(process, saved(picture(), "TIFF")).size


def test_it_ends_when_it_is_idle_and_comes_again(make: Made) -> None:
    process = make(idle_s=0.05)
    for _ in range(3):
        assert crop(process, saved(picture(), "TIFF")).size
        poll(lambda: process.pid is None)


def test_it_ends_with_its_parent() -> None:
    code = (
        "import os, sys; from service.inference.decoder_process import DecoderProcess;"
        "from service.inference.decoding import Preprocessing;"
        "from dataclasses import asdict; process = DecoderProcess(max_pixels=10**6, max_body_bytes=10**6, timeout_s=60);"
        "process.run('preprocess', sys.stdin.buffer.read(), preprocessing=asdict(Preprocessing()), max_pixels=10**6);"
        "print(process.pid, flush=True); os.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], input=saved(picture(), "TIFF"), capture_output=True, check=False)
    pid = int(done.stdout)
    poll(lambda: not os.path.exists(f"/proc/{pid}") or "Z" in status(pid))


def status(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "Z"


def test_it_imports_neither_the_server_nor_an_engine_and_sees_no_keys(make: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_KEYS", "ann:secret")
    code = (
        "import sys, service.inference.decoder_process;"
        "print({'flask', 'openvino', 'torch', 'gunicorn', 'sqlalchemy', 'prometheus_client'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
    process = make()
    assert crop(process, saved(picture(), "TIFF")).size
    with open(f"/proc/{process.pid}/environ", "rb") as file:
        assert b"secret" not in file.read()


# The front door


def test_what_is_simple_needs_no_process_and_the_rest_does() -> None:
    door = ImageDecoder.of(Settings(decode_timeout_s=300))
    for name, data in bomb_images.simple().items():
        if name not in ("nothing", "not an image"):
            assert door.preprocess(data, SEEN).pixels.shape == (32, 32, 3), name
    assert door.process.pid is None
    assert door.preprocess(saved(picture(), "TIFF"), SEEN).format == "TIFF"
    assert door.process.pid
    assert door.render(saved(picture(), "TIFF"), max_side_px=50, quality=80).width_px == 50
    door.process.close()


def test_large_ones_are_decoded_there_too() -> None:
    door = ImageDecoder.of(Settings(decode_timeout_s=300))
    assert door.preprocess(saved(Image.new("RGBA", (4000, 3000), "red"), "PNG"), SEEN).width_px == 4000
    assert door.process.pid
    door.process.close()


def test_rejections_are_counted_by_their_reason() -> None:
    metrics = Metrics()
    door = ImageDecoder.of(Settings(decode_timeout_s=0.5), metrics)
    codes = []
    for data in (bomb_images.progressive(6000), bomb_images.tiff_tile(46_336), SLOW, saved(picture(), "JPEG")[:100]):
        with pytest.raises(Problem) as caught:
            door.preprocess(data, SEEN)
        codes.append(caught.value.code)
    assert codes == ["image_too_complex", "too_many_pixels", "image_too_complex", "damaged_image"]
    value = metrics.registry.get_sample_value
    for reason in ("jpeg_scans", "pixels", "timeout"):
        assert value("classifier_images_rejected_total", {"reason": reason}) == 1
    assert value("classifier_isolated_decodes_total", {"outcome": "timeout"}) == 1
    door.process.close()


# The service


def test_files_that_are_built_to_be_slow_hold_up_nobody(tiny_bundle: SimpleNamespace) -> None:
    """Bombs that are rejected, and that are decoded for as long as they may, come all the while; good photos are answered."""
    good = saved(picture(), "PNG")
    with serve(tiny_bundle.path, decode_timeout_s=1) as server:
        (worker,) = server.workers()
        wanted, before_mb = server.post(good).json()["predictions"], rss_mb(worker)
        most_mb, done = before_mb, threading.Event()

        def watch() -> None:
            nonlocal most_mb
            while not done.wait(0.01):
                most_mb = max(most_mb, rss_mb(worker))

        def attack(data: bytes) -> tuple[int, str | None]:
            reply = server.post(data, "application/octet-stream")
            return reply.status, reply.code

        watcher = threading.Thread(target=watch)
        watcher.start()
        rejected = [data for data, _ in bomb_images.rejected().values()]
        with ThreadPoolExecutor(6) as attackers:
            slow = [attackers.submit(attack, SLOW) for _ in range(4)]
            outcomes = [attackers.submit(attack, data) for data in (*rejected, *bomb_images.isolated().values())]
            while not all(outcome.done() for outcome in slow):
                assert server.post(good).json()["predictions"] == wanted
                assert server.get("/health/ready").status == 200
        done.set()
        watcher.join()
        assert [outcome.result() for outcome in slow] == [(422, "image_too_complex")] * 4
        codes = Counter(outcome.result() for outcome in outcomes)
        assert codes[422, "image_too_complex"] >= len(rejected) - 3
        assert codes[413, "too_many_pixels"] == 3
        assert all(status in (200, 413, 415, 422) for status, _ in codes), codes
        assert server.post(saved(picture(), "TIFF"), "image/tiff").status == 200
        assert server.workers() == [worker]
        assert most_mb - before_mb < 400
        counted = server.metrics()
        assert counted['classifier_isolated_decodes_total{outcome="timeout"}'] >= 4
        assert counted['classifier_images_rejected_total{reason="jpeg_scans"}'] == 1
        lines = server.log()  # each is a JSON object, whatever libtiff had to say
        assert not [line for line in lines if line["level"] == "ERROR"]


def test_it_is_not_ready_while_its_decoders_are_stalled() -> None:
    settings = Settings()
    served = ModelManager(settings, Metrics())
    batcher = SimpleNamespace(is_stalled=True)
    served._model = SimpleNamespace(batcher=batcher, summary={"name": "tiny"})  # type: ignore[assignment]
    client = create_api_app(create_services(settings, served)).test_client()
    reply = client.get("/health/ready")
    assert (reply.status_code, reply.get_json()["code"]) == (503, "decoders_stalled")
    assert client.get("/v2/health/ready").status_code == 503
    batcher.is_stalled = False
    assert client.get("/health/ready").status_code == 200
    assert client.get("/v2/health/ready").status_code == 200


def test_libtiff_says_nothing_on_standard_error(tiny_bundle: SimpleNamespace) -> None:
    damaged = saved(picture(), "TIFF", compression="tiff_lzw")
    with serve(tiny_bundle.path) as server:
        for at in range(8, 200, 3):
            server.post(damaged[:at] + b"\xff\x7f\xff" + damaged[at + 3 :], "image/tiff")
        assert all(line["message"] for line in server.log())


def test_an_error_in_the_process_is_no_refusal(make: Made) -> None:
    with pytest.raises(RuntimeError, match="decoder process failed"):
        make().run("preprocess", png(), preprocessing={"no": "such"}, max_pixels=1)
