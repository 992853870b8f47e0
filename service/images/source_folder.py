"""The labelled photos that the gallery shows: read from their folder, never from outside it, and never one for another."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from models.errors import UserError

MIB = 1 << 20
MAX_VERIFIED = 100_000
# NONBLOCK: opening a fifo would wait for a writer. NOFOLLOW: what was a folder when it was resolved may be a link by now.
OPEN_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# What tells one file's content from another without reading it: device, inode, size, and when content and inode changed.
FileFingerprint = tuple[int, int, int, int, int]


class ImageUnavailableError(UserError):
    """A photo that was evaluated cannot be shown; the text says why."""


class ImageMissingError(ImageUnavailableError):
    """There is no such photo in the folder."""


class ImageReplacedError(ImageUnavailableError):
    """There is another file where the photo was."""


@dataclass
class SourceFolder:
    """Read photos below ``roots``, each tried in turn, of at most ``max_bytes``; from several threads at once.

    A photo is named by its path relative to the data folder, as predictions.csv has it, and by its sha256, which decides: a
    file of other content is never shown. A link may lead to another place in the same root, but to nowhere else. Without roots
    every photo is missing.
    """

    roots: Sequence[Path]
    max_bytes: int = 256 * MIB
    _verified: OrderedDict[FileFingerprint, str] = field(default_factory=OrderedDict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def read(self, photo: str, sha256: str) -> bytes:
        """The photo's bytes, of exactly this sha256. Raises ImageMissingError and ImageReplacedError.

        What is returned is what was hashed, whatever happens to the file meanwhile.
        """
        for file in self._open_each(photo):
            if (data := self._read(file, sha256)) is not None:
                return data
        raise self._not_found(photo)

    def check(self, photo: str, sha256: str) -> None:
        """Raise what ``read`` would; a file that was hashed before and has not changed since is not read again."""
        for file in self._open_each(photo):
            mark = _mark(os.fstat(file))
            with self._lock:
                known = self._verified.get(mark)
            if known == sha256 or (known is None and self._read(file, sha256) is not None):
                return
        raise self._not_found(photo)

    def _read(self, file: int, sha256: str) -> bytes | None:
        """The open file's bytes, or None where they are other ones."""
        before = os.fstat(file)
        if before.st_size > self.max_bytes:
            return None
        with os.fdopen(os.dup(file), "rb") as stream:
            data = stream.read(self.max_bytes + 1)
        found = hashlib.sha256(data).hexdigest()
        if _mark(os.fstat(file)) == _mark(before) and len(data) == before.st_size:
            self._remember(_mark(before), found)
        return data if found == sha256 and len(data) <= self.max_bytes else None

    def _remember(self, mark: FileFingerprint, sha256: str) -> None:
        with self._lock:
            self._verified[mark] = sha256
            self._verified.move_to_end(mark)
            while len(self._verified) > MAX_VERIFIED:
                self._verified.popitem(last=False)

    def _open_each(self, photo: str) -> Iterator[int]:
        """The regular file of that name in each root that has one, open for reading."""
        for root in self.roots:
            # OSError: not there, not ours to read, too long a name. ValueError: a NUL, or text that can be no file's name.
            with contextlib.suppress(OSError, ValueError), _opened(root, photo) as file:
                if stat.S_ISREG(os.fstat(file).st_mode):
                    yield file

    def _not_found(self, photo: str) -> ImageUnavailableError:
        name = photo[:200].encode("utf-8", "replace").decode()
        if not self.roots:
            return ImageMissingError(f"The photo {name!r} cannot be shown, as no folder is set; start with DATA_DIR=FOLDER.")
        sizes = [os.fstat(file).st_size for file in self._open_each(photo)]
        if sizes and min(sizes) > self.max_bytes:
            limit_mb = self.max_bytes // MIB
            return ImageUnavailableError(
                f"The photo {name!r} has more than the {limit_mb} MiB that are shown; save it smaller."
            )
        if sizes:
            return ImageReplacedError(
                f"The photo {name!r} is not the one that was evaluated: the file was changed or replaced; evaluate again."
            )
        return ImageMissingError(
            f"The photo {name!r} is not in the data folder; set DATA_DIR to the folder that was evaluated."
        )


@contextlib.contextmanager
def _opened(root: Path, photo: str) -> Iterator[int]:
    """Open ``photo`` below ``root``, folder by folder: nothing can get in between a check and the opening."""
    named = PurePosixPath(photo)
    if not named.parts or named.is_absolute() or ".." in named.parts:
        raise ValueError(photo)
    base = os.path.realpath(root)
    parts = Path(os.path.realpath(os.path.join(base, photo))).relative_to(base).parts
    if not parts:
        raise ValueError(photo)
    folder = os.open(base, OPEN_FOLDER)
    try:
        for part in parts[:-1]:
            inner = os.open(part, OPEN_FOLDER, dir_fd=folder)
            os.close(folder)
            folder = inner
        file = os.open(parts[-1], OPEN_FILE, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        yield file
    finally:
        os.close(file)


def _mark(status: os.stat_result) -> FileFingerprint:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
