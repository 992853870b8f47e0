from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from finetune.io import array_store
from finetune.io.array_store import ArrayStore, prune
from tests.helpers.server import poll

ROOT = Path(__file__).resolve().parents[3]
CONTEXT = {"kind": "numbers", "version": 1}


def key(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()


def row(i: int, width: int = 16) -> NDArray[np.float32]:
    return np.random.default_rng(i).normal(size=width).astype(np.float32)


def open_store(root: Path, *, limit_mb: int = 100, **context: object) -> ArrayStore:
    return ArrayStore(root, CONTEXT | context, limit_mb=limit_mb)


def fill(root: Path, numbers: range, *, width: int = 16, limit_mb: int = 100, **context: object) -> list[Path]:
    """Write rows for ``numbers`` to one file and return the new files."""
    before = set(root.glob("*/*.safetensors"))
    store = open_store(root, limit_mb=limit_mb, **context)
    for i in numbers:
        store.add(key(i), row(i, width))
    store.flush()
    return sorted(set(root.glob("*/*.safetensors")) - before)


def found(root: Path, numbers: range, **context: object) -> set[int]:
    """Return the ``numbers`` whose rows a new process finds, and check the values of these rows."""
    rows = open_store(root, **context).load([key(i) for i in numbers])
    for i in numbers:
        if key(i) in rows:
            np.testing.assert_array_equal(rows[key(i)], row(i, len(rows[key(i)])))
    return {i for i in numbers if key(i) in rows}


def test_rows_are_read_back(tmp_path: Path) -> None:
    fill(tmp_path, range(10))
    rows = open_store(tmp_path).load([key(3), key(99), key(7)])
    assert list(rows) == [key(3), key(7)]
    assert rows[key(3)].dtype == np.float32
    np.testing.assert_array_equal(rows[key(7)], row(7))


def test_rows_have_any_shape_and_dtype(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    maps = {key(i): np.random.default_rng(i).integers(0, 256, (3, 4, 5)).astype(np.uint8) for i in range(3)}
    for name, value in maps.items():
        store.add(name, value)
    store.flush()
    for name, value in open_store(tmp_path).load(maps).items():
        assert value.dtype == np.uint8
        np.testing.assert_array_equal(value, maps[name])


def test_an_empty_store_creates_no_folder(tmp_path: Path) -> None:
    store = open_store(tmp_path / "cache")
    assert store.load([key(1)]) == {}
    store.flush()
    assert not (tmp_path / "cache").exists()


def test_rows_are_available_before_a_full_file_is_written(tmp_path: Path) -> None:
    store = open_store(tmp_path)
    for i in range(array_store.ROWS_PER_FILE + 1):
        store.add(key(i), row(i))
    assert len(store.load([key(i) for i in range(array_store.ROWS_PER_FILE + 1)])) == array_store.ROWS_PER_FILE + 1
    assert found(tmp_path, range(300)) == set(range(array_store.ROWS_PER_FILE))


def test_contexts_are_separate(tmp_path: Path) -> None:
    fill(tmp_path, range(4))
    fill(tmp_path, range(6), version=2, width=8)
    assert found(tmp_path, range(9)) == {0, 1, 2, 3}
    assert found(tmp_path, range(9), version=2) == {0, 1, 2, 3, 4, 5}
    assert found(tmp_path, range(9), version=3) == set()
    assert {len(r) for r in open_store(tmp_path).load([key(1)]).values()} == {16}


def test_a_truncated_file_is_deleted(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    (file,) = fill(tmp_path, range(3, 6), width=2)
    content = file.read_bytes()
    for length in range(len(content)):
        file.write_bytes(content[:length])
        assert found(tmp_path, range(6)) == {0, 1, 2}, f"truncated to {length} bytes"
        assert not file.exists()
    fill(tmp_path, range(3, 6))
    assert found(tmp_path, range(6)) == set(range(6))


def test_any_flipped_bit_is_detected(tmp_path: Path) -> None:
    (file,) = fill(tmp_path, range(2), width=2)
    content = file.read_bytes()
    for bit in range(8 * len(content)):
        bits = bytearray(content)
        bits[bit // 8] ^= 1 << bit % 8
        file.write_bytes(bits)
        assert found(tmp_path, range(2)) in (set(), {0, 1}), f"bit {bit}"  # found() also checks the values


def test_a_damaged_file_does_not_hide_the_others(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    (file,) = fill(tmp_path, range(3, 6))
    (file.parent / "zzz.safetensors").write_bytes(b"no tensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 255
    file.write_bytes(data)
    assert found(tmp_path, range(6)) == {0, 1, 2}


def age(file: Path, seconds: int) -> None:
    os.utime(file, (time.time() - seconds, time.time() - seconds))


def test_the_least_recently_used_file_is_deleted_first(tmp_path: Path) -> None:
    files = [fill(tmp_path, range(10 * i, 10 * i + 10), width=12_500)[0] for i in range(3)]  # 0.5 MB each
    for i, file in enumerate(files):
        age(file, 300 - i)
    assert found(tmp_path, range(10)) == set(range(10))  # reading the oldest file makes it the most recent
    fill(tmp_path, range(30, 40), width=12_500, limit_mb=2)
    assert [file.exists() for file in files] == [True, False, True]
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) <= 2_000_000
    assert found(tmp_path, range(40)) == {*range(10), *range(20, 40)}


def test_the_limit_covers_all_contexts_and_temporary_files(tmp_path: Path) -> None:
    (old,) = fill(tmp_path, range(10), width=12_500, version=7)
    left = old.with_name(".abc.safetensors.xyz.part")
    left.write_bytes(bytes(600_000))
    age(old, 100)
    age(left, 200)
    fill(tmp_path, range(20, 40), width=12_500, limit_mb=1)
    assert not left.exists()
    assert not old.exists()


def test_pruning_does_not_delete_other_files(tmp_path: Path) -> None:
    (tmp_path / "merged" / "bundle").mkdir(parents=True)
    mine = tmp_path / "merged" / "bundle" / "model.safetensors"
    mine.write_bytes(bytes(2_000_000))
    prune(tmp_path, 1_000_000)
    assert mine.exists()


WRITER = """
import sys
from pathlib import Path
from tests.finetune.io.test_array_store import key, open_store, row
store, first, last = open_store(Path(sys.argv[1])), int(sys.argv[2]), int(sys.argv[3])
for i in range(first, last):
    store.add(key(i), row(i, 20_000))
    store.flush()
sys.stdin.read()
"""


@contextlib.contextmanager
def writing(root: Path, first: int, last: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start a process that writes these rows one by one and exits when its standard input is closed."""
    words = [sys.executable, "-c", WRITER, root, first, last]
    with subprocess.Popen([str(word) for word in words], stdin=subprocess.PIPE, cwd=ROOT) as writer:
        yield writer


def wait_for_files(root: Path, count: int, writer: subprocess.Popen[bytes]) -> None:
    def exist() -> bool:
        assert writer.poll() is None, "the writer exited early"
        return len(list(root.glob("*/*.safetensors"))) >= count

    poll(exist, every_s=0.005)


def test_a_kill_leaves_only_complete_files(tmp_path: Path) -> None:
    for start, files in ((0, 1), (100_000, 8), (200_000, 21)):
        with writing(tmp_path, start, start + 300) as writer:
            wait_for_files(tmp_path, files, writer)
            writer.send_signal(signal.SIGKILL)
            assert writer.wait() == -signal.SIGKILL
    on_disk = len(list(tmp_path.glob("*/*.safetensors")))
    readable = {i for start in (0, 100_000, 200_000) for i in found(tmp_path, range(start, start + 300))}
    assert len(readable) == on_disk >= 21
    assert {0, 100_000, 200_000} <= readable
    fill(tmp_path, range(300_000, 300_010))
    assert len(found(tmp_path, range(300_000, 300_010))) == 10


def test_two_processes_write_at_the_same_time(tmp_path: Path) -> None:
    with writing(tmp_path, 0, 40) as one, writing(tmp_path, 20, 60) as other:
        wait_for_files(tmp_path, 1, one)
        assert found(tmp_path, range(60)) <= set(range(60))  # reads while both write
    assert (one.returncode, other.returncode) == (0, 0)
    assert found(tmp_path, range(60)) == set(range(60))


def test_a_full_disk_raises_and_keeps_the_existing_rows(tmp_path: Path) -> None:
    from tests.helpers.tiny_network import file_size_limit  # imports torch, which would slow down the writer processes

    fill(tmp_path, range(3))
    with file_size_limit(100_000), pytest.raises(OSError, match="too large"):
        fill(tmp_path, range(10, 20), width=12_500)
    assert len(list(tmp_path.rglob("*.safetensors"))) == 1
    assert found(tmp_path, range(20)) == {0, 1, 2}
    assert not list(tmp_path.rglob("*.part"))


def test_a_scratch_array_leaves_no_file(tmp_path: Path) -> None:
    array = ArrayStore(tmp_path, {}, limit_mb=1).scratch((3, 2))
    array[:] = [[0, 1], [2, 3], [4, 5]]
    assert array.dtype == np.float32
    assert array.sum() == 15
    assert list(tmp_path.iterdir()) == []
