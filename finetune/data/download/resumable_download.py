"""Downloads that go on from where they stopped (RFC 9110, sections 13.1.5 and 14: ``If-Range`` and ``Range``)."""

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
_BY_HAND = "or download it in a browser and pass --archive FILE"


class _RetryableError(Exception):
    """A try that failed and may be made again."""


@dataclass(frozen=True)
class _PartialDownload:
    """What is known about a half download: beside it, so that another run can go on."""

    validator: str  # an ETag or a date, for If-Range
    total: int | None


def download_file(
    url: str,
    path: Path,
    *,
    sleep: Callable[[float], None] = time.sleep,
    timeout_s: float = 30.0,
    max_attempts: int = 5,
) -> None:
    """Download ``url`` to ``path``, through the proxies that the environment names.

    Half a download stays as ``path.part``, with a note of what it is half of in ``path.json``: the next try, or the
    next run, asks for the missing bytes only. A server without ranges, or a file that changed, starts again. A file
    that is at ``path`` already is left alone, so its name should tell the URL. ``sleep`` is called with the seconds
    between tries; ``max_attempts`` is how many may fail in a row without a byte more than ever before.

    Raises ``DataError`` where the URL cannot be used, the server refuses, the network fails or the disk does.
    """
    _check_url(url)
    part, note_path = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            return
        if _read_note(note_path) is None:
            part.unlink(missing_ok=True)
        failures, best = 0, _size(part)
        while True:
            try:
                _fetch_rest(url, part, note_path, timeout_s)
                part.replace(path)
                note_path.unlink(missing_ok=True)
                return
            except _RetryableError as error:
                failures = 1 if _size(part) > best else failures + 1
                best = max(best, _size(part))
                if failures >= max_attempts:
                    raise DataError(
                        f"Could not download {url} ({error}); run the same command again to go on from where it "
                        f"stopped, {_BY_HAND}."
                    ) from error
                sleep(2.0 ** (failures - 1))
    except OSError as error:
        raise DataError(
            f"Could not write the download to {path.parent} ({error.strerror or error}); make room, or pick another "
            "folder with --cache-dir."
        ) from error


def _check_url(url: str) -> None:
    try:
        parts = urllib.parse.urlsplit(url)
        fits = (
            parts.scheme in ("http", "https")
            and bool(parts.hostname)
            and parts.port != 0
            and re.fullmatch(r"[!-~]+", url) is not None
        )
    except ValueError:
        fits = False
    if not fits:
        raise DataError(f"{url!r} is not an address to download from; it must start with https:// or http://.")


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _read_note(path: Path) -> _PartialDownload | None:
    try:
        return _PartialDownload(**json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def _fetch_rest(url: str, part: Path, note_path: Path, timeout_s: float) -> None:
    """Make one try: ask for the bytes that are missing and append them."""
    have, note = _size(part), _read_note(note_path) or _PartialDownload("", None)
    headers = {"User-Agent": "finetune"}
    if have:
        headers["Range"] = f"bytes={have}-"
        if note.validator:
            headers["If-Range"] = note.validator
    response = _open(urllib.request.Request(url, headers=headers), timeout_s)
    if response is None:  # 416: there is nothing after what we have, or the file is another one
        if have != note.total:
            part.unlink(missing_ok=True)
            raise _RetryableError("the server has no such range of bytes")
        return
    with response:
        if response.status == 206:
            start, total = _content_range(response.headers.get("Content-Range", ""))
            if start != have or (note.total is not None and total != note.total):
                part.unlink(missing_ok=True)
                raise _RetryableError("the server sent other bytes than it was asked for")
        else:
            have, total = 0, _content_length(response)
            note = _PartialDownload(_validator(response), total)
            part.unlink(missing_ok=True)
            atomic_write_text(note_path, json.dumps(asdict(note)))
        _append(response, part, have, total)
    if total is not None and _size(part) != total:
        raise _RetryableError(f"the connection closed after {_size(part):,} of {total:,} bytes")


def _append(response: IO[bytes], part: Path, have: int, total: int | None) -> None:
    bar = tqdm(total=total, initial=have, unit="B", unit_scale=True, unit_divisor=1024, disable=None, desc="download")
    with part.open("ab") as file, bar:
        while True:
            with _network():
                piece = response.read(_CHUNK_BYTES)
            if not piece:
                return
            file.write(piece)
            bar.update(len(piece))


def _open(request: urllib.request.Request, timeout_s: float) -> Any:
    """The response, or None for 416."""
    with _network():
        try:
            return urllib.request.urlopen(request, timeout=timeout_s)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == 416 and request.has_header("Range"):
                return None
            if error.code in (408, 425, 429) or error.code >= 500:
                raise _RetryableError(f"the server answered {error.code} {error.reason}") from error
            raise DataError(
                f"The server answered {error.code} {error.reason} for {request.full_url}; try another --url, {_BY_HAND}."
            ) from error


@contextlib.contextmanager
def _network() -> Iterator[None]:
    """Tell the errors of the network from those of the disk."""
    try:
        yield
    except (OSError, http.client.HTTPException, UnicodeError) as error:
        reason = getattr(error, "reason", None) or getattr(error, "strerror", None) or error
        raise _RetryableError(str(reason) or type(error).__name__) from error


def _content_range(text: str) -> tuple[int | None, int | None]:
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", text.strip())
    if not found:
        return None, None
    return int(found[1]), None if found[2] == "*" else int(found[2])


def _content_length(response: Any) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _validator(response: Any) -> str:
    """A strong ETag or a date; a weak ETag promises no equal bytes, and If-Range may not hold it."""
    etag: str = response.headers.get("ETag", "")
    return etag if etag.startswith('"') else response.headers.get("Last-Modified", "")
