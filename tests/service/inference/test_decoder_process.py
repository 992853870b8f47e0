"""The decoder process: same pixels as in this process, limits of time and memory, and no effect on other images."""

from __future__ import annotations

import contextlib
import io
import os
import random
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

pytestmark = pytest.mark.slow

PREPROCESSING = Preprocessing(input_px=32, resize_px=40)
MAX_PIXELS = 50_000_000
SLOW = bomb_images.hidden_scans(60_000, 256)  # takes minutes to decode
Make = Callable[..., DecoderProcess]
T = TypeVar("T")


@pytest.fixture
def make() -> Iterator[Make]:
    """``make(**limits)`` creates a decoder process, which is ended after the test."""
    processes: list[DecoderProcess] = []

    def new(**limits: object) -> DecoderProcess:
        options = {"max_pixels": MAX_PIXELS, "max_body_bytes": 20 << 20, "timeout_s": 300.0, **limits}
        processes.append(DecoderProcess(**options))  # type: ignore[arg-type]
        return processes[-1]

    yield new
    for process in processes:
        process.close()


def crop(process: DecoderProcess, data: bytes, **options: float) -> np.ndarray:
    header, pixels = process.run("preprocess", data, preprocessing=asdict(PREPROCESSING), max_pixels=MAX_PIXELS, **options)
    return np.frombuffer(pixels, np.uint8).reshape(header["shape"])


def outcome(decode: Callable[[], T]) -> T | type[ImageError]:
    try:
        return decode()
    except ImageError as error:
        return type(error)


@pytest.mark.filterwarnings("ignore:::PIL")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_the_pixels_are_the_same_as_in_this_process(make: Make) -> None:
    process, outcomes = make(), Counter[object]()
    fields = {"preprocessing": asdict(PREPROCESSING), "max_pixels": MAX_PIXELS}
    for name, data in (odd_images() | bomb_images.isolated() | bomb_images.simple()).items():
        expected = outcome(partial(preprocess, data, PREPROCESSING, max_pixels=MAX_PIXELS))
        result = outcome(partial(process.run, "preprocess", data, **fields))
        if isinstance(expected, type) or isinstance(result, type):
            assert expected is result, name
            outcomes[expected] += 1
            continue
        header, pixels = result
        assert pixels == expected.pixels.tobytes(), name
        assert header.pop("shape") == [32, 32, 3]
        fields_of_image = {name: value for name, value in asdict(expected).items() if name != "pixels"}
        assert header == fields_of_image | {"notes": list(expected.notes)}
        outcomes["ok"] += 1
    assert outcomes["ok"] > 200
    assert outcomes[UnsupportedImageError] > 20


def test_a_rendered_image_is_the_same_as_in_this_process(make: Make) -> None:
    data = saved(picture("RGBA", (700, 500)), "TIFF")
    arguments = {"max_side_px": 320, "quality": 80, "max_pixels": MAX_PIXELS}
    _, file = make().run("render", data, **arguments)
    assert file == render(data, max_side_px=320, quality=80, max_pixels=MAX_PIXELS)
    assert Image.open(io.BytesIO(file)).size == (320, 229)


def test_one_process_serves_many_threads(make: Make) -> None:
    process = make()
    colors = [(i, 255 - i, 7) for i in range(0, 256, 5)]
    photos = [saved(Image.new("RGB", (40, 40), color), "TIFF") for color in colors]
    with ThreadPoolExecutor(8) as pool:
        crops = list(pool.map(lambda data: crop(process, data), photos))
    assert [tuple(pixels[0, 0]) for pixels in crops] == colors
    assert len([pid for pid in children_of_this() if pid == process.pid]) == 1


def children_of_this() -> list[int]:
    pids = []
    for task in os.listdir("/proc/self/task"):
        with open(f"/proc/self/task/{task}/children") as file:
            pids += [int(word) for word in file.read().split()]
    return pids


@pytest.mark.parametrize("form", ["HEIF", "AVIF"])
def test_damaged_photos_of_phones_end_neither_the_process_nor_wait(make: Make, form: str) -> None:
    """Truncated and with flipped bytes, also such whose structure the service would reject before."""
    rng, outcomes = random.Random(3), list[str]()
    process = make(count=outcomes.append)
    whole = saved(picture("RGBA"), form)
    for number in range(150):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if number % 5 == 0 else whole)
        for _ in range(number % 4):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        with contextlib.suppress(ImageError):
            crop(process, bytes(damaged))
    assert set(outcomes) == {"ok", "rejected"}


def test_a_job_that_takes_too_long_is_killed_and_the_next_one_runs(make: Make) -> None:
    outcomes: list[str] = []
    process = make(timeout_s=1.0, count=outcomes.append)
    with pytest.raises(TooComplexError, match="took longer than 1 s") as caught:
        crop(process, SLOW)
    assert caught.value.reason == "timeout"
    assert process.pid is None
    process.timeout_s = 300.0
    assert crop(process, saved(picture(), "TIFF")).shape == (32, 32, 3)
    assert outcomes == ["timeout", "ok"]


def test_a_job_cut_by_the_time_of_its_request_is_not_counted_against_the_image(make: Make) -> None:
    process = make()
    with pytest.raises(DecoderBusyError):
        crop(process, SLOW, within_s=0.5)
    with pytest.raises(DecoderBusyError):
        crop(process, SLOW, within_s=-1.0)
    assert crop(process, saved(picture(), "TIFF")).shape == (32, 32, 3)


def test_waiting_for_another_job_is_limited_by_the_time_of_the_request(make: Make) -> None:
    process = make()
    assert crop(process, saved(picture(), "TIFF")).size
    with process._lock, pytest.raises(DecoderBusyError):
        crop(process, saved(picture(), "TIFF"), within_s=0.01)


def cpu_ticks(pid: int) -> int:
    """Return the processor time that a process has used, in clock ticks."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_crash_fails_the_current_job_only(make: Make) -> None:
    process = make()
    assert crop(process, saved(picture(), "TIFF")).size
    child = process._child
    assert child
    idle_ticks = cpu_ticks(child.pid)
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(crop, process, SLOW)
        poll(lambda: cpu_ticks(child.pid) > idle_ticks + 5)  # it decodes; killed earlier, it would just be replaced
        os.kill(child.pid, 9)
        with pytest.raises(TooComplexError) as caught:
            slow.result(120)
    assert caught.value.reason == "crash"
    assert crop(process, saved(picture(), "TIFF")).size
    os.kill(process.pid or 0, 9)  # between two jobs, it fails none
    poll(lambda: process.pid is None)
    assert crop(process, saved(picture(), "TIFF")).size


def test_memory_is_limited(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoder_process, "SLACK_BYTES", 16 << 20)
    process = make(max_pixels=100_000, max_body_bytes=1000)
    with pytest.raises(TooComplexError) as caught:
        crop(process, saved(Image.new("RGB", (5000, 4000)), "PNG"))
    assert caught.value.reason == "memory"
    assert crop(process, saved(picture(), "TIFF")).size


def test_the_process_ends_when_it_is_idle_and_is_started_again(make: Make) -> None:
    process = make(idle_s=0.05)
    for _ in range(3):
        assert crop(process, saved(picture(), "TIFF")).size
        poll(lambda: process.pid is None)


def test_the_process_ends_with_its_parent() -> None:
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


def test_the_process_imports_no_server_or_engine_and_does_not_get_the_keys(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
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


# The image decoder


def test_simple_images_need_no_process_and_others_do() -> None:
    decoder = ImageDecoder.of(Settings(decode_timeout_s=300))
    for name, data in bomb_images.simple().items():
        if name not in ("nothing", "not an image"):
            assert decoder.preprocess(data, PREPROCESSING).pixels.shape == (32, 32, 3), name
    assert decoder.process.pid is None
    assert decoder.preprocess(saved(picture(), "TIFF"), PREPROCESSING).format == "TIFF"
    assert decoder.process.pid
    assert Image.open(io.BytesIO(decoder.render(saved(picture(), "TIFF"), max_side_px=50, quality=80))).width == 50
    decoder.process.close()


def test_large_images_are_decoded_in_the_process() -> None:
    decoder = ImageDecoder.of(Settings(decode_timeout_s=300))
    assert decoder.preprocess(saved(Image.new("RGBA", (4000, 3000), "red"), "PNG"), PREPROCESSING).width_px == 4000
    assert decoder.process.pid
    decoder.process.close()


def test_rejections_are_counted_by_their_reason() -> None:
    metrics = Metrics()
    decoder = ImageDecoder.of(Settings(decode_timeout_s=0.5), metrics)
    codes = []
    for data in (bomb_images.progressive(6000), bomb_images.tiff_tile(46_336), SLOW, saved(picture(), "JPEG")[:100]):
        with pytest.raises(Problem) as caught:
            decoder.preprocess(data, PREPROCESSING)
        codes.append(caught.value.code)
    assert codes == ["image_too_complex", "too_many_pixels", "image_too_complex", "damaged_image"]
    value = metrics.registry.get_sample_value
    for reason in ("jpeg_scans", "pixels", "timeout"):
        assert value("classifier_images_rejected_total", {"reason": reason}) == 1
    assert value("classifier_isolated_decodes_total", {"outcome": "timeout"}) == 1
    decoder.process.close()


# The service


def test_files_built_to_be_slow_do_not_delay_others(tiny_bundle: SimpleNamespace) -> None:
    """Good images are predicted while bombs arrive that are rejected or use up their decoding time."""
    good = saved(picture(), "PNG")
    with serve(tiny_bundle.path, decode_timeout_s=1) as server:
        (worker,) = server.workers()
        expected, before_mb = server.post(good).json()["predictions"], rss_mb(worker)
        max_mb, done = before_mb, threading.Event()

        def watch() -> None:
            nonlocal max_mb
            while not done.wait(0.01):
                max_mb = max(max_mb, rss_mb(worker))

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
                assert server.post(good).json()["predictions"] == expected
                assert server.get("/health/ready").status == 200
        done.set()
        watcher.join()
        assert [outcome.result() for outcome in slow] == [(422, "image_too_complex")] * 4
        codes = Counter(outcome.result() for outcome in outcomes)
        assert codes[422, "image_too_complex"] >= len(rejected) - 5
        assert codes[413, "too_many_pixels"] == 5
        assert all(status in (200, 413, 415, 422) for status, _ in codes), codes
        assert server.post(saved(picture(), "TIFF"), "image/tiff").status == 200
        assert server.workers() == [worker]
        assert max_mb - before_mb < 400
        metrics = server.metrics()
        assert metrics['classifier_isolated_decodes_total{outcome="timeout"}'] >= 4
        assert metrics['classifier_images_rejected_total{reason="jpeg_scans"}'] == 1
        lines = server.log()  # each is a JSON object, whatever libtiff writes
        assert not [line for line in lines if line["level"] == "ERROR"]


def test_the_server_is_not_ready_while_its_decoders_are_stalled() -> None:
    settings = Settings()
    models = ModelManager(settings, Metrics())
    batcher = SimpleNamespace(is_stalled=True)
    models._model = SimpleNamespace(batcher=batcher, summary={"name": "tiny"})  # type: ignore[assignment]
    client = create_api_app(create_services(settings, models)).test_client()
    reply = client.get("/health/ready")
    assert (reply.status_code, reply.get_json()["code"]) == (503, "decoders_stalled")
    assert client.get("/v2/health/ready").status_code == 503
    batcher.is_stalled = False
    assert client.get("/health/ready").status_code == 200
    assert client.get("/v2/health/ready").status_code == 200


def test_libtiff_writes_nothing_to_standard_error(tiny_bundle: SimpleNamespace) -> None:
    damaged = saved(picture(), "TIFF", compression="tiff_lzw")
    with serve(tiny_bundle.path) as server:
        for at in range(8, 200, 3):
            server.post(damaged[:at] + b"\xff\x7f\xff" + damaged[at + 3 :], "image/tiff")
        assert all(line["message"] for line in server.log())


def test_an_unexpected_error_in_the_process_does_not_reject_the_image(make: Make) -> None:
    with pytest.raises(RuntimeError, match="decoder process failed"):
        make().run("preprocess", png(), preprocessing={"no": "such"}, max_pixels=1)
