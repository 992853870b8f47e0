"""Whatever is sent as a photo is answered or refused, and the next photo is answered as ever."""

from __future__ import annotations

import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

from service.http.errors import PROBLEM_TYPES
from tests.helpers.odd_images import odd_images, picture, saved
from tests.helpers.server import multipart, poll, rss_mb, serve

REFUSALS = {"not_an_image", "damaged_image", "too_many_pixels", "image_too_complex"}
SURE = {  # what has to be answered, odd as it is
    "JPEG of mode CMYK", "JPEG of mode L", "progressive JPEG", "JPEG 4:1:1", "JPEG turned in a way there is not", "MPO",
    "JPEG with EXIF that breaks off", "JPEG with junk behind it", "JPEG with a profile that is none",
    "PNG of mode I;16", "PNG of mode P", "PNG of one pixel", "PNG a million wide", "PNG with 20,000 comments",
    "PNG with EXIF that is none", "TIFF, group4", "TIFF of 100 pictures", "TIFF of mode F", "animated GIF", "animated PNG",
    "animated WebP, lossy", "portable map of 16 bits", "float map of values that are less than nothing",
}  # fmt: skip
NEVER = {  # what must not be
    "EPS", "PDF", "ICO", "SVG", "PSD", "EPS that loops", "PNG of 100 million pixels", "PNG of 2147483647 square",
    "PNG with a text of 80 MB", "JPEG of 65535 square", "a megabyte of zeros", "GIF of no frames", "PNG without pixels",
}  # fmt: skip


def test_odd_pictures_are_answered_or_refused_and_do_no_harm(tiny_bundle: SimpleNamespace) -> None:
    images = odd_images()
    assert len(images) > 300
    assert images.keys() >= SURE | NEVER
    good = saved(picture(), "PNG")
    seen: dict[str, str | None] = {}
    with serve(tiny_bundle.path) as server:
        (worker,) = server.workers()
        before_mb, wanted = rss_mb(worker), server.post(good).json()["predictions"]
        most_mb, done = before_mb, threading.Event()

        def watch() -> None:
            nonlocal most_mb
            while not done.wait(0.01):
                most_mb = max(most_mb, rss_mb(worker))

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            for name, data in images.items():
                reply = server.post(data, "application/octet-stream")
                seen[name] = reply.code
                if reply.code:
                    assert reply.code in REFUSALS, (name, reply.body)
                    assert reply.status == PROBLEM_TYPES[reply.code][0]
                else:
                    (row,) = reply.json()["predictions"]
                    assert abs(sum(row["probabilities"].values()) - 1) < 1e-4, name
                    assert row["width"] * row["height"] > 0
        finally:
            done.set()
            watcher.join()
        assert server.post(good).json()["predictions"] == wanted

        def together(start: int) -> list[tuple[str, str | None]]:
            names = sorted(images)[start::20]
            reply = server.post(*multipart(*[("file", "x", images[name]) for name in names[:16]]))
            assert reply.status == 200, reply.body
            return list(zip(names, (row.get("error", {}).get("code") for row in reply.json()["predictions"]), strict=False))

        with ThreadPoolExecutor(3) as clients:  # each photo's outcome is its own, whoever comes with it
            for outcomes in clients.map(together, range(20)):
                assert outcomes == [(name, seen[name]) for name, _ in outcomes]
        assert server.post(good).json()["predictions"] == wanted
        assert server.workers() == [worker]
        poll(lambda: server.metrics()["classifier_in_flight_images"] == 0)
        assert most_mb - before_mb < 400
        assert not [line for line in server.log_file.read_text(encoding="utf-8").splitlines() if '"ERROR"' in line]
    assert {name: seen[name] for name in SURE if seen[name]} == {}
    assert {name for name in NEVER if seen[name] is None} == set()
    assert Counter(seen.values()).keys() == {None, *REFUSALS}
