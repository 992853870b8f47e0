"""Photos of cats and dogs, from where they are published, as ``OUT/{train,valid}/{cats,dogs}``."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import re
import shlex
import shutil
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from finetune.data.download.archive import ArchiveError, extract, open_zip, safe_members
from finetune.data.download.kaggle import download_competition
from finetune.data.download.resumable_download import download_file
from finetune.data.download.sources import SOURCES, Source
from finetune.io.output_folder import atomic_folder, require_empty_folder
from models.artifacts.atomic_io import sha256_of
from models.errors import DataError, did_you_mean

__all__ = ["SOURCES", "DownloadSummary", "Source", "add_arguments", "download", "run"]

_SPLITS = ("train", "valid")
_CLASSES = ("cats", "dogs")
_FOLDERS = {"validation": "valid", "Cat": "cats", "Dog": "dogs", "cat": "cats", "dog": "dogs"}


@dataclass(frozen=True)
class DownloadSummary:
    """What arrived: ``image_counts`` is by split and class; ``verified`` says that a known sha256 was checked."""

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
    """Fetch the photos of ``SOURCES[name]`` and lay them out in ``out``, whole or not at all, with a ``SOURCE.json``.

    ``url`` and ``sha256`` stand in for the source's own (a mirror); ``archive`` is a file that was downloaded by hand.
    Where the source has no split of its own, ``valid_fraction`` of each class, drawn with ``seed``, is for validation.
    Half a download waits in ``cache_dir`` (``.NAME.download`` beside ``out`` unless given) for the next run; only a
    given ``cache_dir`` keeps the archive after success. ``sleep`` is called with the seconds between tries.

    Nobody publishes the sha256 of ``filtered``: the one that arrived is recorded, not checked, unless one is given.

    Raises ``DataError`` for everything outside this program that can go wrong.
    """
    source = _source(name)
    _check_options(valid_fraction, sha256)
    require_empty_folder(out)
    home = Path(os.path.abspath(out))
    cache = cache_dir or home.parent / f".{home.name}.download"
    try:
        fetched = archive or _fetch(name, source, url or source.url, cache, sleep)
    except DataError:
        with contextlib.suppress(OSError):
            cache.rmdir()  # which it refuses where half a download waits
        raise
    known = (sha256 or source.sha256 or "").lower()
    split = None if source.has_split else {"valid_fraction": valid_fraction, "seed": seed}
    try:
        arrived = _checked_sha256(fetched, known)
        with atomic_folder(out) as folder:
            photos = _unpack(fetched, source, folder, valid_fraction, seed)
            record = {
                "source": name,
                "url": url or source.url,
                "competition": None if url else source.competition,
                "archive": archive.name if archive else None,
                "sha256": arrived,
                "sha256_verified": bool(known),
                "split": split,
                "photos": photos,
            }
            (folder / "SOURCE.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    except ArchiveError:
        if archive is None:
            fetched.unlink(missing_ok=True)  # or the next run would take it up again
        raise
    if cache_dir is None:
        shutil.rmtree(cache, ignore_errors=True)
    origin = str(archive or url or source.url or f"kaggle.com/c/{source.competition}")
    return DownloadSummary(name, out, origin, arrived, bool(known), photos)


def _check_options(valid_fraction: float, sha256: str | None) -> None:
    if not 0 < valid_fraction < 1:
        raise DataError(f"--valid-fraction {valid_fraction} is not between 0 and 1; 0.2 is usual.")
    if sha256 is not None and not re.fullmatch("[0-9a-fA-F]{64}", sha256):
        raise DataError(f"--sha256 {sha256!r} is not 64 hexadecimal digits; copy it from where the archive is published.")


def _source(name: str) -> Source:
    if name not in SOURCES:
        raise DataError(f"There is no source {name!r}; there are {', '.join(SOURCES)}.{did_you_mean(name, SOURCES)}")
    return SOURCES[name]


def _fetch(name: str, source: Source, url: str | None, cache: Path, sleep: Callable[[float], None]) -> Path:
    if url is None:
        assert source.competition is not None
        return download_competition(source.competition, cache)
    # The URL is in the name: a half or a whole archive from elsewhere is another file.
    path = cache / f"{name}-{hashlib.sha256(url.encode()).hexdigest()[:8]}.zip"
    download_file(url, path, sleep=sleep)
    return path


def _checked_sha256(archive: Path, known: str) -> str:
    try:
        arrived = sha256_of(archive)
    except OSError as error:
        raise DataError(f"Could not read the archive {archive} ({error.strerror or error}); check the path.") from error
    if known and arrived != known:
        raise ArchiveError(
            f"The archive has the sha256 {arrived}, where {known} was wanted, and was not used: download it again, or "
            f"pass --sha256 {arrived} if you trust this one."
        )
    return arrived


def _unpack(path: Path, source: Source, folder: Path, valid_fraction: float, seed: int) -> dict[str, dict[str, int]]:
    """Unpack the photos into ``folder/{train,valid}/{cats,dogs}`` and count them."""
    with open_zip(path) as archive:
        members = safe_members(archive, max_members=source.max_members, max_bytes=source.max_bytes)
        inner_archive = next((member for member in members if member.filename == source.inner_archive), None)
        if inner_archive is not None:
            nested = folder / inner_archive.filename
            extract(archive, inner_archive, nested)
            photos = _unpack(nested, replace(source, inner_archive=None), folder, valid_fraction, seed)
            nested.unlink()
            return photos
        placed = _place(members, source, valid_fraction, seed)
        with tqdm(total=sum(map(len, placed.values())), unit=" photos", desc="unpack", disable=None) as bar:
            for (split, label), photos_there in placed.items():
                for member in photos_there:
                    extract(archive, member, folder / split / label / PurePosixPath(member.filename).name)
                    bar.update()
    return {split: {label: len(placed[split, label]) for label in _CLASSES} for split in _SPLITS}


def _place(
    members: list[zipfile.ZipInfo], source: Source, valid_fraction: float, seed: int
) -> dict[tuple[str, str], list[zipfile.ZipInfo]]:
    """The photos of each split and class; what is not a photo by its name is left out."""
    placed: dict[tuple[str, str], list[zipfile.ZipInfo]] = {(s, c): [] for s in _SPLITS for c in _CLASSES}
    for member in sorted(members, key=lambda member: member.filename):
        if found := re.fullmatch(source.image_pattern, member.filename):
            words = {group: _FOLDERS.get(word, word) for group, word in found.groupdict().items()}
            placed[words.get("split", "train"), words["label"]].append(member)
    if not source.has_split:
        for label in _CLASSES:
            photos = placed["train", label]
            random.Random(f"{seed}/{label}").shuffle(photos)
            cut = max(1, round(len(photos) * valid_fraction))
            placed["valid", label], placed["train", label] = photos[:cut], photos[cut:]
    empty = [f"{split}/{label}" for (split, label), photos in placed.items() if not photos]
    if empty:
        raise ArchiveError(
            f"The archive holds no photos for {', '.join(empty)}: it is not laid out as {source.image_pattern!r}; "
            "check that it is the archive of this source."
        )
    return placed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``finetune download``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "sources:\n" + "\n".join(f"  {name:<10} {source.description}" for name, source in SOURCES.items())
    add = parser.add_argument
    add("name", metavar="SOURCE", help=f"one of {', '.join(SOURCES)}")
    add("out", type=Path, metavar="OUT", help="the folder to make; it must not exist or be empty")
    add("--archive", type=Path, metavar="FILE", help="use this archive, which you downloaded by hand")
    add("--url", help="download from this mirror instead")
    add("--sha256", metavar="HEX", help="the sha256 that the archive must have, instead of the published one")
    add(
        "--valid-fraction",
        type=float,
        default=0.2,
        metavar="F",
        help="the share of each class for validation, where the source has no split of its own (%(default)s)",
    )
    add("--seed", type=int, default=0, help="which photos those are (%(default)s)")
    add("--cache-dir", type=Path, metavar="DIR", help="keep the archive here (otherwise it is deleted once unpacked)")


def run(args: argparse.Namespace) -> int:
    """Download what ``args`` asks for, say what arrived and what to type next."""
    summary = download(
        args.name,
        args.out,
        url=args.url,
        sha256=args.sha256,
        valid_fraction=args.valid_fraction,
        seed=args.seed,
        cache_dir=args.cache_dir,
        archive=args.archive,
    )
    source, total = SOURCES[summary.name], sum(sum(counts.values()) for counts in summary.image_counts.values())
    print(f"Unpacked {total:,} photos from {summary.origin} into {summary.out}.")
    for split, counts in summary.image_counts.items():
        print(f"  {split}: " + ", ".join(f"{count:,} {label}" for label, count in counts.items()))
    checked = "as was wanted" if summary.verified else "recorded in SOURCE.json; no published one is known to compare"
    print(f"sha256 {summary.sha256} ({checked}).")
    if total != source.image_count:
        print(f"Note: {source.image_count:,} photos were published.")
    if source.note:
        print(source.note)
    print(f"Next: finetune train --data-dir {shlex.quote(str(summary.out))} --backbone efficientnet_lite0")
    return 0
