"""Recognize image files by their extension and walk folders of images. Does not import torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".pgm")


def is_image_file(path: Path, root: Path) -> bool:
    """Return whether a file has an image extension and is not in an ignored folder below ``root``."""
    return is_image_name(path.name) and not in_ignored_folder(path, root)


def is_image_name(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in EXTENSIONS and not name.startswith(".")


def in_ignored_folder(path: Path, root: Path) -> bool:
    return any(is_ignored_folder(folder) for folder in path.relative_to(root).parts[:-1])


def is_ignored_folder(folder_name: str) -> bool:
    """Return whether a folder is one that notebooks, editors or operating systems leave behind."""
    return folder_name.startswith((".", "__"))


def walk_images(root: Path) -> Iterator[Path]:
    """Yield the images below ``root`` in a fixed order, with only one folder per level listed in memory."""
    with os.scandir(root) as entries:
        listing = sorted((entry.name, entry.is_dir(follow_symlinks=False), entry.is_file()) for entry in entries)
    for name, is_folder, is_file in listing:
        if is_folder and not is_ignored_folder(name):
            yield from walk_images(root / name)
        elif is_file and is_image_name(name):
            yield root / name
