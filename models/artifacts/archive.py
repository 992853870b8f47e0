"""Extract untrusted zip archives safely."""

from __future__ import annotations

import contextlib
import lzma
import os
import shutil
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from models.errors import DataError

MAX_DIRECTORY_BYTES = 64 << 20  # more than half a million files
MAX_END_BYTES = 22 + 20 + (1 << 16)  # the end record with the longest comment, and the locator of ZIP64 before it


class ArchiveError(DataError):
    """The archive is damaged, unsafe or not the expected one."""


@contextlib.contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive for reading. Raises ArchiveError if it is invalid, or found to be damaged inside the block."""
    try:
        if _directory_bytes(path) > MAX_DIRECTORY_BYTES:
            raise ArchiveError(f"{path.name} lists too many files. Split it into several archives.")
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise ArchiveError(f"{path.name} is not a complete zip archive ({error}). Download it again.") from error


def safe_members(archive: zipfile.ZipFile, *, max_members: int, max_bytes: int) -> list[zipfile.ZipInfo]:
    """Check all members of an archive and list its files.

    Args:
        archive: The archive.
        max_members: Maximum number of members.
        max_bytes: Maximum total uncompressed size in bytes. A member cannot exceed its declared size, because
            ``zipfile`` stops reading there.

    Raises:
        ArchiveError: A limit is exceeded, or a member has an unsafe path, is a link or device, is encrypted, or occurs
            more than once.
    """
    members, title = archive.infolist(), Path(str(archive.filename)).name
    total_bytes = sum(member.file_size for member in members)
    if len(members) > max_members or total_bytes > max_bytes:
        raise ArchiveError(
            f"{title} has {len(members):,} files and {total_bytes:,} bytes uncompressed, but the limits are "
            f"{max_members:,} files and {max_bytes:,} bytes. Check that it is the expected archive."
        )
    names = set()
    for member in members:
        problem = _problem(member) or ("occurs more than once" if member.filename in names else "")
        if problem:
            raise ArchiveError(f"{title} was not unpacked because its member {member.filename!r} {problem}.")
        names.add(member.filename)
    return [member for member in members if not member.is_dir()]


def extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Extract one member to ``path``, ignoring its path in the archive."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)


def _directory_bytes(path: Path) -> int:
    """Read the size of an archive's list of files, which ``zipfile`` loads completely; 0 if there is none."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MAX_END_BYTES))
        tail = file.read()
        end = tail.rfind(b"PK\x05\x06")
        if end < 0 or len(tail) < end + 16:
            return 0
        (directory,) = struct.unpack_from("<I", tail, end + 12)
        if directory == 0xFFFFFFFF and end >= 20:  # ZIP64: a locator before the end leads to the record with the size
            file.seek(struct.unpack_from("<Q", tail, end - 12)[0])
            record = file.read(48)
            directory = struct.unpack_from("<Q", record, 40)[0] if len(record) == 48 else directory
    return int(directory)


def _problem(member: zipfile.ZipInfo) -> str:
    path = PurePosixPath(member.filename)
    if path.is_absolute() or PureWindowsPath(member.filename).drive or "\\" in member.filename:
        return "has an absolute or non-POSIX path"
    if ".." in path.parts:
        return "points outside the target folder"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device, not a file"
    if member.flag_bits & 0x1:
        return "is encrypted"
    return ""
