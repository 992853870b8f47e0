"""Resumable HTTP downloads with ``Range`` and ``If-Range`` requests.

See `RFC 9110 <https://www.rfc-editor.org/rfc/rfc9110>`_, sections 13.1.5 and 14.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

from models.artifacts.atomic_io import atomic_write_text
from models.errors import DataError

_CHUNK_BYTES = 1 << 16
_MANUAL_DOWNLOAD = "or download it in a browser and pass --archive FILE"


class _RetryableError(Exception):
    """A failed attempt that may be retried."""


@dataclass(frozen=True)
class _PartialDownload:
    """Metadata of a partial download, saved next to it so that another run can resume."""

    validator: str  # value for If-Range: an ETag or a date
    total: int | None


def download_file(
    url: str,
    path: Path,
    *,
    sleep: Callable[[float], None] = time.sleep,
    timeout_s: float = 30.0,
    max_attempts: int = 5,
) -> None:
    """Download a URL to a file, resuming after interruptions.

    A partial download stays in ``path.part`` and its metadata in ``path.json``, so that the next attempt or run requests
    only the missing bytes. The download restarts if the server does not support ranges or the file has changed. The
    environment's proxy settings apply.

    Args:
        url: An http(s) URL.
        path: Target file. Nothing is downloaded if it exists, so its name should identify the URL.
        sleep: Called with the seconds to wait before a retry.
        timeout_s: Timeout of network operations in seconds.
        max_attempts: Maximum number of consecutive attempts without progress.

    Raises:
        DataError: The URL is invalid, the server rejects the request, the network fails, or the file cannot be written.
    """
    _check_url(url)
    partial, metadata_path = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            return
        if _read_metadata(metadata_path) is None:
            partial.unlink(missing_ok=True)
        failures, max_size = 0, _size(partial)
        while True:
            try:
                _fetch_missing(url, partial, metadata_path, timeout_s)
                partial.replace(path)
                metadata_path.unlink(missing_ok=True)
                return
            except _RetryableError as error:
                failures = 1 if _size(partial) > max_size else failures + 1
                max_size = max(max_size, _size(partial))
                if failures >= max_attempts:
                    raise DataError(
                        f"Could not download {url} ({error}). Re-run the same command to resume, {_MANUAL_DOWNLOAD}."
                    ) from error
                sleep(2.0 ** (failures - 1))
    except OSError as error:
        raise DataError(
            f"Could not write the download to {path.parent} ({error.strerror or error}). Free some space, or choose another "
            "folder with --cache-dir."
        ) from error


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        valid = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and re.fullmatch(r"[!-~]+", url) is not None
        )
    except ValueError:
        valid = False
    if not valid:
        raise DataError(f"Invalid download URL {url!r}. It must start with https:// or http://.")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_metadata(path: Path) -> _PartialDownload | None:
    try:
        return _PartialDownload(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _fetch_missing(url: str, partial: Path, metadata_path: Path, timeout_s: float) -> None:
    """Make one attempt to request and append the missing bytes."""
    offset, metadata = _size(partial), _read_metadata(metadata_path) or _PartialDownload("", None)
    headers = {"User-Agent": "finetune"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if metadata.validator:
            headers["If-Range"] = metadata.validator
    response = _open(urllib.request.Request(url, headers=headers), timeout_s)
    if response is None:  # 416: the download is complete, or the file has changed
        if offset != metadata.total:
            partial.unlink(missing_ok=True)
            raise _RetryableError("the server rejected the byte range")
        return
    with response:
        if response.status == 206:
            start, total = _content_range(response.headers.get("Content-Range", ""))
            if start != offset or (metadata.total is not None and total != metadata.total):
                partial.unlink(missing_ok=True)
                raise _RetryableError("the server sent a different range than requested")
        else:
            offset, total = 0, _content_length(response)
            metadata = _PartialDownload(_validator(response), total)
            partial.unlink(missing_ok=True)
            atomic_write_text(metadata_path, json.dumps(asdict(metadata)))
        _append(response, partial, offset, total)
    if total is not None and _size(partial) != total:
        raise _RetryableError(f"the connection closed after {_size(partial):,} of {total:,} bytes")


def _append(response: IO[bytes], partial: Path, offset: int, total: int | None) -> None:
    bar = tqdm(total=total, initial=offset, unit="B", unit_scale=True, unit_divisor=1024, disable=None, desc="download")
    with partial.open("ab") as file, bar:
        while True:
            with _retry_network_errors():
                chunk = response.read(_CHUNK_BYTES)
            if not chunk:
                return
            file.write(chunk)
            bar.update(len(chunk))


def _open(request: urllib.request.Request, timeout_s: float) -> Any:
    """Send the request and return the response, or None for status 416."""
    with _retry_network_errors():
        try:
            return urllib.request.urlopen(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and request.has_header("Range"):
                return None
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _RetryableError(f"the server returned {error.code} {error.reason}") from error
            raise DataError(
                f"The server returned {error.code} {error.reason} for {request.full_url}. Try another --url, "
                f"{_MANUAL_DOWNLOAD}."
            ) from error


@contextlib.contextmanager
def _retry_network_errors() -> Iterator[None]:
    """Convert network errors, but not disk errors of the caller, to retryable ones."""
    try:
        yield
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise _RetryableError(str(reason) or type(error).__name__) from error


def _content_range(text: str) -> tuple[int | None, int | None]:
    """Parse the start and the total size."""
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text.strip())
    if not match:
        return None, None
    return int(match[1]), None if match[2] == "*" else int(match[2])


def _content_length(response: Any) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _validator(response: Any) -> str:
    """Return a strong ETag or the modification date. If-Range does not allow weak ETags."""
    etag: str = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
