from __future__ import annotations

import hashlib
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from models.artifacts.atomic_io import atomic_write, atomic_write_text, sha256_of

ROOT = Path(__file__).resolve().parents[3]


def test_atomic_write_creates_parent_folders_and_a_world_readable_file(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b" / "file.txt"
    with atomic_write(target) as temp:
        temp.write_text("new")
        assert not target.exists()
        assert temp.parent == target.parent  # a rename across file systems is not atomic
    assert target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o644
    assert list(target.parent.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_error_keeps_the_old_file_and_removes_the_temporary_one(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")

    def write() -> None:
        with atomic_write(target) as temp:
            temp.write_text("ne")
            raise error

    with pytest.raises(type(error)):
        write()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_kill_keeps_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "file.txt"
    target.write_text("old")
    code = (
        "import os, signal, sys; from pathlib import Path; from models.artifacts.atomic_io import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as temp:\n"
        "    temp.write_text('ne')\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(target)], cwd=ROOT)
    assert killed.returncode == -signal.SIGKILL
    assert target.read_text() == "old"


def test_atomic_write_text_encodes_utf8(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "file.txt", "Käse\n")
    assert (tmp_path / "file.txt").read_bytes() == b"K\xc3\xa4se\n"


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (2 << 20) + 5])
def test_sha256_matches_hashlib(tmp_path: Path, size: int) -> None:
    data = random.Random(size).randbytes(size)
    (tmp_path / "file").write_bytes(data)
    assert sha256_of(tmp_path / "file") == hashlib.sha256(data).hexdigest()
