"""Thumbnails: small, created once, cached within a limit, on any kind of disk."""

from __future__ import annotations

import errno
import io
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from models.errors import UserError
from service.http.errors import problem_from
from service.images.disk_cache import DiskCache
from service.images.thumbnails import THUMBNAIL_MAX_PX, ThumbnailCache
from service.images.worker_pool import WorkerPool
from service.inference.image_decoder import ImageDecoder
from service.settings import Settings

pytestmark = pytest.mark.slow


def photo(size: tuple[int, int] = (900, 600), color: str = "red", **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "JPEG", **options)
    return file.getvalue()


@pytest.fixture
def make() -> Iterator[Callable[..., ThumbnailCache]]:
    pool = WorkerPool("thumbnails", threads=2, max_queued=64, timeout_s=300)

    def made(folder: Path | None, *, limit_mb: int = 8, max_pixels: int = 50_000_000) -> ThumbnailCache:
        decoder = ImageDecoder.of(Settings(max_megapixels=max_pixels / 1e6))
        decoders.append(decoder)
        return ThumbnailCache(folder, limit_mb=limit_mb, render=decoder.render, pool=pool)

    yield made
    pool.close()


decoders: list[ImageDecoder] = []


def never() -> bytes:
    raise AssertionError("it is cached")


@pytest.mark.parametrize(
    ("size", "expected"), [((900, 600), (320, 213)), ((600, 900), (213, 320)), ((100, 50), (100, 50)), ((5000, 2), (320, 1))]
)
def test_longer_side_is_limited_and_small_photos_keep_their_size(
    make: Callable[..., ThumbnailCache], tmp_path: Path, size: tuple[int, int], expected: tuple[int, int]
) -> None:
    data = make(tmp_path).get("a", lambda: photo(size))
    assert Image.open(io.BytesIO(data)).size == expected
    assert max(expected) <= THUMBNAIL_MAX_PX


def test_thumbnail_is_cached_for_other_processes(make: Callable[..., ThumbnailCache], tmp_path: Path) -> None:
    made = make(tmp_path).get("a", photo)
    assert make(tmp_path).get("a", never) == made


@pytest.mark.parametrize("limit_mb", [0, 8])
def test_without_a_folder_the_cache_is_in_memory(make: Callable[..., ThumbnailCache], tmp_path: Path, limit_mb: int) -> None:
    thumbnails = make(tmp_path if limit_mb == 0 else None, limit_mb=limit_mb)
    made = thumbnails.get("a", photo)
    assert thumbnails.get("a", never) == made
    assert list(tmp_path.iterdir()) == []


def test_unwritable_disk(make: Callable[..., ThumbnailCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr("service.images.disk_cache.atomic_write", full)
    thumbnails = make(tmp_path)
    made = thumbnails.get("a", photo)
    assert thumbnails.get("a", never) == made


@pytest.mark.parametrize("spoil", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"<html>" * 200])
def test_damaged_file_is_created_again(
    make: Callable[..., ThumbnailCache], tmp_path: Path, spoil: Callable[[bytes], bytes]
) -> None:
    made = make(tmp_path).get("a", photo)
    (kept,) = (path for path in tmp_path.rglob("*") if path.is_file())
    kept.write_bytes(spoil(kept.read_bytes()))
    assert make(tmp_path).get("a", photo) == made
    assert kept.read_bytes() == made


def test_24_concurrent_calls_read_the_photo_once(make: Callable[..., ThumbnailCache], tmp_path: Path) -> None:
    thumbnails, reads, all_ask = make(tmp_path), [], threading.Barrier(24)

    def read() -> bytes:
        reads.append(1)
        return photo()

    def ask(_: int) -> bytes:
        all_ask.wait(300)
        return thumbnails.get("a", read)

    with ThreadPoolExecutor(24) as pool:
        assert len(set(pool.map(ask, range(24)))) == 1
    assert len(reads) == 1


def test_invalid_and_too_large_photos_are_rejected_before_decoding(make: Callable[..., ThumbnailCache], tmp_path: Path) -> None:
    def code(data: bytes) -> str:
        with pytest.raises(UserError) as caught:
            make(tmp_path, max_pixels=1_000_000).get("a", lambda: data)
        problem = problem_from(caught.value)
        assert problem
        return problem.code

    bomb = io.BytesIO()
    Image.new("1", (9000, 9000)).save(bomb, "PNG")
    assert code(bomb.getvalue()) == "too_many_pixels"
    assert code(b"no photo") == "not_an_image"
    assert code(photo()[:3000]) == "damaged_image"
    assert code(b"") == "empty_image"
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_large_photos_are_decoded_in_a_process(make: Callable[..., ThumbnailCache], monkeypatch: pytest.MonkeyPatch) -> None:
    here = make(None).get("a", photo)
    monkeypatch.setattr("service.inference.image_decoder.HEAVY_BYTES", 1000)
    thumbnails = make(None)
    with ThreadPoolExecutor(8) as pool:
        made = list(pool.map(lambda name: thumbnails.get(str(name), photo), range(8)))
    assert decoders[-1].process.pid
    decoders[-1].process.close()
    assert made == [here] * 8


# The disk cache


def disk_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_size_limit_removes_the_least_recently_used(tmp_path: Path) -> None:
    limit = 100_000
    cache = DiskCache(tmp_path, limit_bytes=limit)
    now = time.time()
    for number in range(300):
        cache.put(str(number), bytes(1000))
        assert disk_bytes(tmp_path) <= limit
        for path in tmp_path.rglob("*"):  # file times are coarse: put each an hour after the previous one
            if path.is_file() and path.stat().st_mtime > now - 1e6:
                os.utime(path, (0, now - 2e6 + 3600 * number))
    kept = [number for number in range(300) if cache.get(str(number))]
    assert kept[-1] == 299
    assert len(kept) >= 85
    assert kept == list(range(kept[0], 300))


def test_recently_used_files_stay(tmp_path: Path) -> None:
    DiskCache(tmp_path, limit_bytes=100_000).put("favourite", bytes(1000))
    long_ago = time.time() - 1e6
    for path in tmp_path.rglob("*"):
        os.utime(path, (long_ago, long_ago))
    cache = DiskCache(tmp_path, limit_bytes=100_000)
    assert cache.get("favourite")
    for number in range(80):
        cache.put(str(number), bytes(1000))
    older = time.time() - 1e5
    for path in tmp_path.rglob("*"):
        if path.is_file() and path != _path_in(tmp_path, cache, "favourite"):
            os.utime(path, (older, older))
    for number in range(80, 120):
        cache.put(str(number), bytes(1000))
    assert cache.get("favourite")
    assert not all(cache.get(str(number)) for number in range(80))


def _path_in(folder: Path, cache: DiskCache, name: str) -> Path:
    from service.images.disk_cache import _path

    return _path(folder, name)


def test_folder_above_the_limit_is_trimmed_at_the_first_write(tmp_path: Path) -> None:
    DiskCache(tmp_path, limit_bytes=10**9).put("warm", b"x")
    large = DiskCache(tmp_path, limit_bytes=10**9)
    for number in range(50):
        large.put(str(number), bytes(1000))
    DiskCache(tmp_path, limit_bytes=20_000).put("new", bytes(1000))
    assert disk_bytes(tmp_path) <= 18_000


def test_stale_incomplete_files_are_removed(tmp_path: Path) -> None:
    cache = DiskCache(tmp_path, limit_bytes=10_000)
    cache.put("a", b"a")
    folder = next(tmp_path.iterdir())
    (folder / ".old.part").write_bytes(b"x")
    (folder / ".new.part").write_bytes(b"x")
    os.utime(folder / ".old.part", (0, time.time() - 7200))
    DiskCache(tmp_path, limit_bytes=10_000).put("b", b"b")
    assert not (folder / ".old.part").exists()
    assert (folder / ".new.part").exists()


def test_memory_limit_removes_the_least_recently_used() -> None:
    cache = DiskCache(None, limit_bytes=0, memory_bytes=3000)
    for name in "abc":
        cache.put(name, bytes(1000))
    assert cache.get("a")
    cache.put("a", bytes(500))
    cache.put("d", bytes(1000))
    assert [name for name in "abcd" if cache.get(name)] == ["a", "c", "d"]
    cache.put("huge", bytes(5000))
    assert cache.get("huge") is None


def test_no_name_refers_to_a_file_outside_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "kept"
    cache = DiskCache(folder, limit_bytes=10_000)
    for name in ("../../out", "/etc/passwd", "\0", "\ud800", "x" * 9999):
        cache.put(name, b"data")
        assert cache.get(name) == b"data"
    assert list(tmp_path.iterdir()) == [folder]
