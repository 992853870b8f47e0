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
    """The unfinished zip of a data set, which holds at most ``max_bytes``."""

    data_set: DataSet
    max_bytes: int

    @property
    def _file(self) -> Path:
        return self.data_set.workspace.uploads / f"{self.data_set.name}.zip.part"

    @property
    def received(self) -> int:
        """The number of bytes that are there."""
        return self._file.stat().st_size if self._file.is_file() else 0

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
            if offset and offset != self.received:
                raise Problem(
                    "upload_conflict", f"Expected the piece from byte {self.received} on, got {offset}. Continue there."
                )
            with self._file.open("r+b" if offset else "wb") as file:
                file.seek(offset)
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
        return offset + len(data)

    def complete(self) -> Path:
        """Return the file of the complete zip, which is no longer an upload."""
        target = self._file.with_name(f"{self.data_set.name}.zip")
        os.replace(self._file, target)
        return target
