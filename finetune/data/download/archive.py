"""Zip archives from strangers, read without trusting them."""

from __future__ import annotations

import contextlib
import lzma
import shutil
import stat
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath, PureWindowsPath

from models.errors import DataError


class ArchiveError(DataError):
    """The archive is damaged, unsafe or not the one that was wanted: another one is needed."""


@contextlib.contextmanager
def open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    """Open a zip archive to read; ``ArchiveError`` where it is none, or turns out damaged inside the block."""
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, UnicodeDecodeError) as error:
        raise ArchiveError(f"{path.name} is not a whole zip archive ({error}); download it again.") from error


def safe_members(archive: zipfile.ZipFile, *, max_members: int, max_bytes: int) -> list[zipfile.ZipInfo]:
    """The files of an archive, once all of its members were looked at.

    ``max_bytes`` bounds what they unpack to, together; a member cannot unpack to more than it says, because
    ``zipfile`` stops reading there.

    Raises ``ArchiveError`` for a member whose path leaves the folder, that is a link or a device, is encrypted or named
    twice, and for an archive over a limit.
    """
    members, title = archive.infolist(), Path(str(archive.filename)).name
    total_bytes = sum(member.file_size for member in members)
    if len(members) > max_members or total_bytes > max_bytes:
        raise ArchiveError(
            f"{title} would unpack to {len(members):,} files and {total_bytes:,} bytes, where at most "
            f"{max_members:,} files and {max_bytes:,} bytes were expected; it is not the archive that was wanted."
        )
    names = set()
    for member in members:
        problem = _problem(member) or ("is there twice" if member.filename in names else "")
        if problem:
            raise ArchiveError(f"{title} was not unpacked: its member {member.filename!r} {problem}.")
        names.add(member.filename)
    return [member for member in members if not member.is_dir()]


def extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, path: Path) -> None:
    """Write one member to ``path``, whatever path the archive has for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(member) as source, path.open("wb") as target:
        shutil.copyfileobj(source, target)


def _problem(member: zipfile.ZipInfo) -> str:
    path = PurePosixPath(member.filename)
    if path.is_absolute() or PureWindowsPath(member.filename).drive or "\\" in member.filename:
        return "has an absolute path, or one of another system"
    if ".." in path.parts:
        return "leads out of the folder"
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "is a link or a device, not a file"
    if member.flag_bits & 0x1:
        return "is encrypted"
    return ""
