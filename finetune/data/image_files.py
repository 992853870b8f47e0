"""Which files are photos, by their names, and the photos below a folder, one after another. No torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def is_image_file(path: Path, root: Path) -> bool:
    """Whether a file is named as a photo is, and lies in no stray folder below ``root``."""
    return is_image_name(path.name) and not in_ignored_folder(path, root)


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def in_ignored_folder(path: Path, root: Path) -> bool:
    return any(is_ignored_folder(folder) for folder in path.relative_to(root).parts[:-1])


def is_ignored_folder(folder_name: str) -> bool:
    """Folders that notebooks, editors and operating systems leave behind."""
    return folder_name.startswith((".", "__"))


def walk_images(root: Path) -> Iterator[Path]:
    """The photos below ``root``, always in the same order; of the names, no more than a folder's own are held at a time."""
    with os.scandir(root) as entries:
        here = sorted((entry.name, entry.is_dir(follow_symlinks=False), entry.is_file()) for entry in entries)
    for name, is_folder, is_file in here:
        if is_folder and not is_ignored_folder(name):
            yield from walk_images(root / name)
        elif is_file and is_image_name(name):
            yield root / name
