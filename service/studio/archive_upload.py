"""Receive a zip in pieces, each appended to a file on disk, so that an upload that broke off continues."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from service.http.errors import Problem
from service.http.request_body import body_too_large
from service.studio.data_sets import DataSet


@dataclass(frozen=True)
class ArchiveUpload:
    """The unfinished zip of a dataset, which holds at most ``max_bytes``."""

    data_set: DataSet
    max_bytes: int

    @property
    def _unfinished(self) -> Path | None:
        """The file of the unfinished zip, whose name has the size of the complete one."""
        return next(self.data_set.workspace.uploads.glob(f"{self.data_set.name}.zip.*.part"), None)

    @property
    def received(self) -> int:
        """The number of bytes that are there."""
        file = self._unfinished
        return file.stat().st_size if file else 0

    @property
    def total(self) -> int:
        """The size of the complete zip, or 0 if there is no unfinished one."""
        file = self._unfinished
        return int(file.suffixes[-2][1:]) if file else 0

    def write(self, data: bytes, *, offset: int, total: int) -> int:
        """Append a piece. A piece at offset 0 begins again.

        Args:
            data: The bytes.
            offset: Their place in the zip.
            total: The size of the zip.

        Returns:
            The number of bytes that are there now.

        Raises:
            Problem: The zip is too large, or the piece does not follow the last one.
        """
        if total > self.max_bytes:
            raise body_too_large(self.max_bytes, total, advice="Split the zip, or copy the folder into DATA_DIR.")
        if not data or offset + len(data) > total:
            raise Problem("bad_parameter", "A piece must have at least one byte, and end before `total`.")
        self.data_set.workspace.require_space(total - offset)
        with self.data_set.locked():
            before = self._unfinished
            if offset and (offset, total) != (self.received, self.total):
                problem = f"Expected byte {self.received:,} of a zip of {self.total:,} bytes, got byte {offset:,} of {total:,}."
                raise Problem("upload_conflict", f"{problem} Continue there, or start again with offset=0.")
            if before and not offset:
                before.unlink()
            file = self.data_set.workspace.uploads / f"{self.data_set.name}.zip.{total}.part"
            with file.open("r+b" if offset else "wb") as opened:
                opened.seek(offset)
                opened.write(data)
                opened.flush()
                os.fsync(opened.fileno())
        return offset + len(data)

    def complete(self) -> Path:
        """Return the file of the complete zip, which is no longer an upload."""
        source = self._unfinished
        assert source is not None, "only a zip that was received is complete"
        return source.replace(source.with_name(f"{self.data_set.name}.zip"))
