"""Download photos of cats and dogs into ``OUT/{train,valid}/{cats,dogs}``."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from finetune.data.download.kaggle import download_competition
from finetune.data.download.resumable_download import download_file
from finetune.data.download.sources import SOURCES, Source
from finetune.io.output_folder import atomic_folder, require_empty_folder
from models.artifacts.archive import ArchiveError, extract, open_zip, safe_members
from models.artifacts.atomic_io import sha256_of
from models.errors import DataError, did_you_mean

__all__ = ["SOURCES", "DownloadSummary", "Source", "download"]

_SPLITS = ("train", "valid")
_CLASSES = ("cats", "dogs")
_FOLDERS = {"validation": "valid", "Cat": "cats", "Dog": "dogs", "cat": "cats", "dog": "dogs"}


@dataclass(frozen=True)
class DownloadSummary:
    """Result of a download.

    Attributes:
        name: Name of the source.
        out: The image folder.
        origin: File, URL or competition that the archive came from.
        sha256: The archive's sha256.
        verified: Whether the sha256 was compared with an expected one.
        image_counts: Number of images by split and class.
    """

    name: str
    out: Path
    origin: str
    sha256: str
    verified: bool
    image_counts: dict[str, dict[str, int]]


def download(
    name: str,
    out: Path,
    *,
    url: str | None = None,
    sha256: str | None = None,
    valid_fraction: float = 0.2,
    seed: int = 0,
    cache_dir: Path | None = None,
    archive: Path | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> DownloadSummary:
    """Download a source and write it to an image folder atomically, together with a ``SOURCE.json``.

    Args:
        name: Key of ``SOURCES``.
        out: The folder to create.
        url: Mirror to use instead of the source's URL.
        sha256: Expected sha256 of the archive, instead of the published one. No sha256 is published for ``filtered``, so
            its archive is only verified with this argument.
        valid_fraction: Fraction of each class used for validation if the source has no split.
        seed: Seed of this split.
        cache_dir: Folder that keeps the archive. By default it is downloaded to ``.NAME.download`` next to ``out``, where
            a partial download stays for the next run and a complete one is deleted after unpacking.
        archive: An archive that was downloaded manually.
        sleep: Called with the seconds to wait before a retry.

    Raises:
        DataError: An argument is invalid, or the download, the archive or the disk fails.
    """
    source = _source(name)
    _check_options(valid_fraction, sha256)
    require_empty_folder(out)
    target = Path(os.path.abspath(out))
    cache = cache_dir or target.parent / f".{target.name}.download"
    try:
        archive_path = archive or _fetch(name, source, url or source.url, cache, sleep)
    except DataError:
        with contextlib.suppress(OSError):
            cache.rmdir()  # fails if there is a partial download
        raise
    expected = (sha256 or source.sha256 or "").lower()
    split = None if source.has_split else {"valid_fraction": valid_fraction, "seed": seed}
    try:
        actual = _verify_sha256(archive_path, expected)
        with atomic_folder(out) as folder:
            image_counts = _unpack(archive_path, source, folder, valid_fraction, seed)
            record = {
                "source": name,
                "url": url or source.url,
                "competition": None if url else source.competition,
                "archive": archive.name if archive else None,
                "sha256": actual,
                "sha256_verified": bool(expected),
                "split": split,
                "photos": image_counts,
            }
            (folder / "SOURCE.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except ArchiveError:
        if archive is None:
            archive_path.unlink(missing_ok=True)  # do not reuse it in the next run
        raise
    if cache_dir is None:
        shutil.rmtree(cache, ignore_errors=True)
    origin = str(archive or url or source.url or f"kaggle.com/c/{source.competition}")
    return DownloadSummary(name, out, origin, actual, bool(expected), image_counts)


def _check_options(valid_fraction: float, sha256: str | None) -> None:
    if not 0 < valid_fraction < 1:
        raise DataError(f"--valid-fraction must be between 0 and 1, such as 0.2 (got {valid_fraction}).")
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise DataError(f"--sha256 must be 64 hexadecimal digits (got {sha256!r}).")


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise DataError(f"Unknown source {name!r}. Valid sources: {', '.join(SOURCES)}.{did_you_mean(name, SOURCES)}")
    return SOURCES[name]


def _fetch(name: str, source: Source, url: str | None, cache: Path, sleep: Callable[[float], None]) -> Path:
    if url is None:
        assert source.competition is not None
        return download_competition(source.competition, cache)
    # The name depends on the URL, so that an archive from another URL is not resumed or reused.
    path = cache / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.zip"
    download_file(url, path, sleep=sleep)
    return path


def _verify_sha256(archive: Path, expected: str) -> str:
    try:
        actual = sha256_of(archive)
    except OSError as error:
        raise DataError(f"Could not read the archive {archive} ({error.strerror or error}). Check the path.") from error
    if expected and actual != expected:
        raise ArchiveError(
            f"The archive has the sha256 {actual}, expected {expected}. Download it again, or pass --sha256 {actual} if you "
            f"trust it."
        )
    return actual


def _unpack(path: Path, source: Source, folder: Path, valid_fraction: float, seed: int) -> dict[str, dict[str, int]]:
    """Unpack the images into ``folder/{train,valid}/{cats,dogs}`` and return their number by split and class."""
    with open_zip(path) as archive:
        members = safe_members(archive, max_members=source.max_members, max_bytes=source.max_bytes)
        inner_archive = next((member for member in members if member.filename == source.inner_archive), None)
        if inner_archive is not None:
            nested = folder / inner_archive.filename
            extract(archive, inner_archive, nested)
            image_counts = _unpack(nested, replace(source, inner_archive=None), folder, valid_fraction, seed)
            nested.unlink()
            return image_counts
        images = _assign_splits(members, source, valid_fraction, seed)
        with tqdm(total=sum(map(len, images.values())), unit=" images", desc="unpack", disable=None) as bar:
            for (split, label), class_members in images.items():
                for member in class_members:
                    extract(archive, member, folder / split / label / PurePosixPath(member.filename).name)
                    bar.update()
    return {split: {label: len(images[split, label]) for label in _CLASSES} for split in _SPLITS}


def _assign_splits(
    members: list[zipfile.ZipInfo], source: Source, valid_fraction: float, seed: int
) -> dict[tuple[str, str], list[zipfile.ZipInfo]]:
    """Group the members that match the source's image pattern by split and class."""
    images: dict[tuple[str, str], list[zipfile.ZipInfo]] = {(s, c): [] for s in _SPLITS for c in _CLASSES}
    for member in sorted(members, key=lambda member: member.filename):
        if match := re.fullmatch(source.image_pattern, member.filename):
            folders = {group: _FOLDERS.get(name, name) for group, name in match.groupdict().items()}
            images[folders.get("split", "train"), folders["label"]].append(member)
    if not source.has_split:
        for label in _CLASSES:
            class_members = images["train", label]
            random.Random(f"{seed}/{label}").shuffle(class_members)
            n_valid = max(1, round(len(class_members) * valid_fraction))
            images["valid", label], images["train", label] = class_members[:n_valid], class_members[n_valid:]
    empty = [f"{split}/{label}" for (split, label), class_members in images.items() if not class_members]
    if empty:
        raise ArchiveError(
            f"The archive has no photos for {', '.join(empty)}. Expected paths that match {source.image_pattern!r}. Check "
            "that it is the archive of this source."
        )
    return images
