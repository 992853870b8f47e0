"""Every file sent as an image is predicted or rejected, and the next image is predicted as before."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from service.http.errors import PROBLEM_TYPES
from tests.helpers.odd_images import odd_images, picture, saved
from tests.helpers.server import multipart, poll, rss_mb, serve

pytestmark = pytest.mark.slow

REJECTIONS = {"not_an_image", "damaged_image", "too_many_pixels", "image_too_complex"}
SUPPORTED = {  # unusual, but must be predicted
    "JPEG of mode CMYK", "JPEG of mode L", "progressive JPEG", "JPEG 4:1:1", "JPEG turned in a way there is not", "MPO",
    "JPEG with EXIF that breaks off", "JPEG with junk behind it", "JPEG with a profile that is none",
    "PNG of mode I;16", "PNG of mode P", "PNG of one pixel", "PNG a million wide", "PNG with 20,000 comments",
    "PNG with EXIF that is none", "PNG with a text of 80 MB", "TIFF, group4",
    "TIFF of 100 pictures", "TIFF of mode F", "animated GIF", "animated PNG",
    "animated WebP, lossy", "HEIF of mode RGB", "HEIF of tiles", "HEIF of two images", "AVIF of mode RGBA",
    "AVIF of several frames", "portable map of 16 bits", "float map of values that are less than nothing",
}  # fmt: skip
UNSUPPORTED = {  # must be rejected
    "EPS", "PDF", "ICO", "SVG", "PSD", "EPS that loops", "PNG of 100 million pixels", "PNG of 2147483647 square",
    "JPEG of 65535 square", "a megabyte of zeros", "GIF of no frames", "PNG without pixels", "HEIC of nothing",
}  # fmt: skip


def test_odd_images_are_predicted_or_rejected_and_do_not_affect_others(tiny_bundle: SimpleNamespace) -> None:
    images = odd_images()
    assert len(images) > 300
    assert images.keys() >= SUPPORTED | UNSUPPORTED
    good = saved(picture(), "PNG")
    codes: dict[str, str | None] = {}
    with serve(tiny_bundle.path) as server:
        (worker,) = server.workers()
        before_mb, expected = rss_mb(worker), server.post(good).json()["predictions"]
        max_mb, done = before_mb, threading.Event()

        def watch() -> None:
            nonlocal max_mb
            while not done.wait(0.01):
                max_mb = max(max_mb, rss_mb(worker))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for name, data in images.items():
                reply = server.post(data, "application/octet-stream")
                codes[name] = reply.code
                if reply.code:
                    assert reply.code in REJECTIONS, (name, reply.body)
                    assert reply.status == PROBLEM_TYPES[reply.code][0]
                else:
                    (row,) = reply.json()["predictions"]
                    assert abs(sum(row["probabilities"].values()) - 1) < 1e-4, name
                    assert row["width"] * row["height"] > 0
        finally:
            done.set()
            watcher.join()
        assert server.post(good).json()["predictions"] == expected

        def predict_together(start: int) -> list[tuple[str, str | None]]:
            names = sorted(images)[start::20]
            reply = server.post(*multipart(*[("file", "x", images[name]) for name in names[:16]]))
            assert reply.status == 200, reply.body
            return list(zip(names, (row.get("error", {}).get("code") for row in reply.json()["predictions"]), strict=False))

        with ThreadPoolExecutor(3) as clients:  # an image's outcome does not depend on the others in its request
            for outcomes in clients.map(predict_together, range(20)):
                assert outcomes == [(name, codes[name]) for name, _ in outcomes]
        assert server.post(good).json()["predictions"] == expected
        assert server.workers() == [worker]
        poll(lambda: server.metrics()["classifier_in_flight_images"] == 0)
        assert max_mb - before_mb < 400
        assert not [line for line in server.log_file.read_text(encoding="utf-8").splitlines() if '"ERROR"' in line]
    assert {name: codes[name] for name in SUPPORTED if codes[name]} == {}
    assert {name for name in UNSUPPORTED if codes[name] is None} == set()
    assert Counter(codes.values()).keys() == {None, *REJECTIONS}
