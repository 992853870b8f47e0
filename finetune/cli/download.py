"""``finetune download``: download photos of cats and dogs."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

from finetune.data.download.downloader import download
from finetune.data.download.sources import SOURCES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``finetune download``."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = "sources:\n" + "\n".join(f"  {name:<10} {source.description}" for name, source in SOURCES.items())
    add = parser.add_argument
    add("name", metavar="SOURCE", help=f"one of {', '.join(SOURCES)}")
    add("out", type=Path, metavar="OUT", help="folder to create; must be empty if it exists")
    add("--archive", type=Path, metavar="FILE", help="use this manually downloaded archive")
    add("--url", help="download from this mirror")
    add("--sha256", metavar="HEX", help="expected sha256 of the archive, instead of the published one")
    add(
        "--valid-fraction",
        type=float,
        default=0.2,
        metavar="F",
        help="fraction of each class for validation if the source has no split (default: %(default)s)",
    )
    add("--seed", type=int, default=0, help="seed of this split (default: %(default)s)")
    add("--cache-dir", type=Path, metavar="DIR", help="keep the archive here (default: delete it after unpacking)")


def run(args: argparse.Namespace) -> int:
    """Run ``finetune download``: download a source, then print a summary and the next command."""
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
    check = "verified" if summary.verified else "recorded in SOURCE.json; no published one to compare with"
    print(f"sha256 {summary.sha256} ({check}).")
    if total != source.image_count:
        print(f"Note: the published archive has {source.image_count:,} photos.")
    if source.note:
        print(source.note)
    print(f"Next: finetune train {shlex.quote(str(summary.out))} --backbone efficientnet_lite0")
    return 0
