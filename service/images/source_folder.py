"""Read evaluated photos from the data folder: only from inside it, and only with the content that was evaluated."""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import threading
import unicodedata
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from models.errors import UserError

MIB = 1 << 20
MAX_VERIFIED = 100_000
# NONBLOCK: opening a FIFO would wait for a writer. NOFOLLOW: a resolved component may have become a link since.
OPEN_FILE = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_NOFOLLOW | os.O_CLOEXEC
OPEN_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC

# Identifies a file's content without reading it: device, inode, size, and the times of content and inode changes.
FileFingerprint = tuple[int, int, int, int, int]


class ImageUnavailableError(UserError):
    """An evaluated photo cannot be shown. The message states the reason."""


class ImageMissingError(ImageUnavailableError):
    """The folder has no such photo."""


class ImageReplacedError(ImageUnavailableError):
    """The file at the photo's path has other content."""


@dataclass
class SourceFolder:
    """Read photos below ``roots``, which are tried in order. Thread-safe.

    A photo is identified by its path relative to the data folder, as in predictions.csv, and by its sha256: a file with other
    content is never returned. Links may lead to another place in the same root, but not out of it. Names match in any Unicode
    normalization form, as macOS and archives change it.
    """

    roots: Sequence[Path]
    max_bytes: int = 256 * MIB
    _verified: OrderedDict[FileFingerprint, str] = field(default_factory=OrderedDict, init=False, repr=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False, repr=False)

    def read(self, photo: str, sha256: str) -> bytes:
        """Read a photo. The returned bytes are the hashed ones.

        Raises:
            ImageMissingError: There is no such file.
            ImageReplacedError: The file has other content.
            ImageUnavailableError: The file is too large.
        """
        for file in self._open_each(photo):
            if (data := self._read(file, sha256)) is not None:
                return data
        raise self._not_found(photo)

    def check(self, photo: str, sha256: str) -> None:
        """Raise what ``read`` would raise. A file that was hashed before and has not changed since is not read again."""
        for file in self._open_each(photo):
            fingerprint = _fingerprint(os.fstat(file))
            with self._lock:
                known = self._verified.get(fingerprint)
            if known == sha256 or (known is None and self._read(file, sha256) is not None):
                return
        raise self._not_found(photo)

    def _read(self, file: int, sha256: str) -> bytes | None:
        """Read an open file. Returns None if its content is another one."""
        before = os.fstat(file)
        if before.st_size > self.max_bytes:
            return None
        with os.fdopen(os.dup(file), "rb") as stream:
            data = stream.read(self.max_bytes + 1)
        digest = hashlib.sha256(data).hexdigest()
        if _fingerprint(os.fstat(file)) == _fingerprint(before) and len(data) == before.st_size:
            self._remember(_fingerprint(before), digest)
        return data if digest == sha256 and len(data) <= self.max_bytes else None

    def _remember(self, fingerprint: FileFingerprint, sha256: str) -> None:
        with self._lock:
            self._verified[fingerprint] = sha256
            self._verified.move_to_end(fingerprint)
            while len(self._verified) > MAX_VERIFIED:
                self._verified.popitem(last=False)

    def _open_each(self, photo: str) -> Iterator[int]:
        """Open the regular file of that name in each root that has one."""
        for root in self.roots:
            # OSError: missing, not readable, name too long. ValueError: a NUL, or a name that leads out of the root.
            with contextlib.suppress(OSError, ValueError), _opened(root, photo) as file:
                if stat.S_ISREG(os.fstat(file).st_mode):
                    yield file

    def _not_found(self, photo: str) -> ImageUnavailableError:
        name = photo[:200].encode("utf-8", "replace").decode()
        if not self.roots:
            return ImageMissingError(f"The photo {name!r} cannot be shown. Start the service with DATA_DIR=FOLDER.")
        sizes = [os.fstat(file).st_size for file in self._open_each(photo)]
        if sizes and min(sizes) > self.max_bytes:
            return ImageUnavailableError(
                f"The photo {name!r} exceeds the limit of {self.max_bytes // MIB} MiB. Save it in a smaller size."
            )
        if sizes:
            return ImageReplacedError(f"The photo {name!r} was changed or replaced after the evaluation. Evaluate again.")
        if any(_leads_out(root, photo) for root in self.roots):
            return ImageMissingError(
                f"The photo {name!r} is a link that leads out of DATA_DIR, and such links are not followed. Set DATA_DIR to a "
                "folder that contains the files, or copy them into it."
            )
        return ImageMissingError(f"The photo {name!r} is not in the data folder. Set DATA_DIR to the evaluated folder.")


@contextlib.contextmanager
def _opened(root: Path, photo: str) -> Iterator[int]:
    """Open ``photo`` below ``root`` component by component, so that no link can be inserted between check and opening."""
    base = os.path.realpath(root)
    parts = Path(_resolve(base, photo)).relative_to(base).parts
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


def _resolve(base: str, photo: str) -> str:
    """Return the real path of ``photo``, which may be anywhere. Raises ValueError for a name that is not a relative path."""
    named = PurePosixPath(photo)
    if not named.parts or named.is_absolute() or ".." in named.parts:
        raise ValueError(photo)
    path = os.path.join(base, photo)
    if not photo.isascii() and not os.path.lexists(path):
        path = base
        for part in named.parts:
            path = os.path.join(path, _same_name(path, part))
    return os.path.realpath(path)


def _same_name(folder: str, name: str) -> str:
    """Return the entry of a folder that is equal to ``name`` after Unicode normalization, or ``name``."""
    if name.isascii() or os.path.lexists(os.path.join(folder, name)):
        return name
    normal = unicodedata.normalize("NFC", name)
    return next((entry for entry in os.listdir(folder) if unicodedata.normalize("NFC", entry) == normal), name)


def _leads_out(root: Path, photo: str) -> bool:
    """Return whether a photo is a file that is reached through a link out of the root."""
    with contextlib.suppress(OSError, ValueError):
        base = os.path.realpath(root)
        path = _resolve(base, photo)
        return os.path.isfile(path) and not Path(path).is_relative_to(base)
    return False


def _fingerprint(status: os.stat_result) -> FileFingerprint:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns
