"""Decide where dropped files go: which folder of their paths is the class, and which is the split."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from models.artifacts.data_folder import is_image_name, split_of

MAX_DEPTH = 20


@dataclass(frozen=True)
class Destination:
    """Where a dropped file goes: its class ("" without one), its split ("" without one), and its name in the class."""

    class_: str
    split: str
    name: str


def plan_drop(paths: Iterable[str]) -> dict[str, Destination]:
    """Return where each file of a drop goes. Hidden files and files that are not images are left out.

    Folders around the class folders are ignored. Below the class, folders become part of the file's name. A single folder with
    photos is a class, and photos outside of folders have none.

    Args:
        paths: The paths as the browser has them, from the dropped folder on.
    """
    split_paths = {path: parts for path in paths if (parts := _parts(path))}
    in_folders = {path: parts for path, parts in split_paths.items() if len(parts) > 1}
    depth = 0
    while in_folders and depth < MAX_DEPTH and _is_wrapper(in_folders.values(), depth):
        depth += 1
    has_splits = bool(in_folders) and _are_splits(in_folders.values(), depth)
    plan = {}
    for path, parts in split_paths.items():
        own = parts[depth:] if path in in_folders else parts
        split = split_of(own[0]) or "" if has_splits and len(own) > 2 else ""
        own = own[1:] if split else own
        plan[path] = Destination(own[0] if len(own) > 1 else "", split, "_".join(own[1:] or own))
    return plan


def _parts(path: str) -> list[str]:
    """Split a path, or return [] for a file that is not added."""
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if not parts or not is_image_name(parts[-1]) or any(part.startswith((".", "__")) for part in parts[:-1]):
        return []
    return parts


def _is_wrapper(paths: Iterable[list[str]], depth: int) -> bool:
    """Return whether all paths share the folder at this depth, and have another folder inside it."""
    rows = list(paths)
    return all(len(parts) > depth + 2 for parts in rows) and len({parts[depth] for parts in rows}) == 1


def _are_splits(paths: Iterable[list[str]], depth: int) -> bool:
    """Return whether the folders at this depth are splits with class folders in them."""
    rows = list(paths)
    return all(len(parts) > depth + 2 and split_of(parts[depth]) for parts in rows)
