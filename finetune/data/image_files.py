"""Find and read image files by one set of rules for all commands. Does not import torch.

Hidden folders, results of this project and files that are not images are skipped. Links are followed, but each folder is
visited only once, under its real location if that is part of the search. Everything that is skipped is recorded with a reason.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.io.terminal import escape_controls
from models.artifacts.data_folder import is_image_name
from models.errors import DataError, ImageError

HIDDEN = "hidden"
NOT_AN_IMAGE = "not a supported image type"
NOT_REGULAR = "not a regular file"
BROKEN_LINK = "broken link"
LINK_TO_PARENT = "link to a folder that contains it"
ALREADY_INCLUDED = "the same folder as one that is included"
RESULTS = "results of a command, not photos"
NEITHER_EXTRA = "photos of none of the classes, which --extra-data does not add"
HARMLESS = (HIDDEN, RESULTS, NEITHER_EXTRA)
# A folder with all files of a group was written by a command, or is a Python environment.
RESULT_FILES = (
    ("config.yaml", "bundle"),
    ("config.yaml", "checkpoint.pt"),
    ("manifest.json", "model.onnx"),
    ("manifest.json", "model.safetensors"),
    ("manifest.json", "head.safetensors"),
    ("metrics.json", "predictions.csv"),
    ("compare.json", "compare.md"),
    ("_settings.json",),
    ("filters.png", "maps"),
    ("pyvenv.cfg",),
)
SYSTEM_FILES = ("thumbs.db", "ehthumbs.db", "desktop.ini")
MAX_RESULT_DEPTH = 3
MAX_NAMED = 3


@dataclass(frozen=True)
class Skipped:
    """A file or folder that was skipped, and why."""

    path: Path
    reason: str


class ImageSearch:
    """A search for images below folders. ``skipped`` lists what was skipped so far.

    The entries of a folder are read once and kept until ``walk`` has visited it.
    """

    def __init__(self) -> None:
        self._skipped: dict[Skipped, None] = {}
        self._entries: dict[Path, list[os.DirEntry[str]]] = {}
        self._are_results: dict[Path, bool] = {}

    def probe(self) -> ImageSearch:
        """Return a search that shares the entries already read, but not what it skips."""
        search = ImageSearch()
        search._entries, search._are_results = self._entries, self._are_results
        return search

    @property
    def skipped(self) -> list[Skipped]:
        return list(self._skipped)

    def skip(self, path: Path, reason: str) -> None:
        self._skipped[Skipped(path, reason)] = None

    def folders(self, parent: Path) -> list[Path]:
        """List the folders in ``parent`` that may contain images, sorted by name."""
        return [path for path, is_folder in self._select(parent, self._read(parent)) if is_folder]

    def images(self, parent: Path) -> list[Path]:
        """List the images in ``parent`` itself, sorted by name."""
        return [path for path, is_folder in self._select(parent, self._read(parent)) if not is_folder]

    def walk(self, roots: Iterable[Path]) -> Iterator[Path]:
        """Yield the images below ``roots`` in a fixed order, with only one folder per level listed in memory.

        Links to folders are followed at the end, when all real folders have been visited.
        """
        visited: set[tuple[int, int]] = set()
        links: deque[Path] = deque()
        for root in roots:
            if root.is_symlink():
                links.append(root)
            else:
                yield from self._walk(root, visited, links)
        while links:
            yield from self._walk(links.popleft(), visited, links)

    def _walk(self, folder: Path, visited: set[tuple[int, int]], links: deque[Path]) -> Iterator[Path]:
        try:
            status = folder.stat()
            if (status.st_dev, status.st_ino) in visited:
                self.skip(folder, ALREADY_INCLUDED)
                return
            visited.add((status.st_dev, status.st_ino))
            entries = self._read(folder)
        except OSError as error:
            self.skip(folder, unreadable(error))
            return
        del self._entries[folder]
        for path, is_folder in self._select(folder, entries):
            if not is_folder:
                yield path
            elif path.is_symlink():
                links.append(path)
            else:
                yield from self._walk(path, visited, links)

    def _read(self, folder: Path) -> list[os.DirEntry[str]]:
        """Return the entries of a folder, sorted by name. Raises OSError."""
        if folder not in self._entries:
            with os.scandir(folder) as entries:
                self._entries[folder] = sorted(entries, key=lambda entry: entry.name)
        return self._entries[folder]

    def _select(self, folder: Path, entries: Sequence[os.DirEntry[str]]) -> Iterator[tuple[Path, bool]]:
        """Yield the images and folders among the entries that are not skipped, and whether each is a folder."""
        for entry in entries:
            path = folder / entry.name
            if reason := self._reason_to_skip(entry, path):
                self.skip(path, reason)
            else:
                yield path, entry.is_dir()

    def _reason_to_skip(self, entry: os.DirEntry[str], path: Path) -> str | None:
        try:
            if entry.is_symlink() and not path.exists():
                return BROKEN_LINK
            if entry.is_dir():
                if is_ignored_folder(entry.name):
                    return HIDDEN
                if entry.is_symlink() and _is_parent(path):
                    return LINK_TO_PARENT
                if path not in self._are_results:
                    self._are_results[path] = self._contains_results(path)
                return RESULTS if self._are_results[path] else None
            if entry.name.startswith(".") or entry.name.lower() in SYSTEM_FILES:
                return HIDDEN
            if not is_image_name(entry.name):
                return NOT_AN_IMAGE
            return None if entry.is_file() else NOT_REGULAR
        except OSError as error:
            return BROKEN_LINK if error.errno == errno.ELOOP else unreadable(error)

    def _contains_results(self, folder: Path, depth: int = MAX_RESULT_DEPTH) -> bool:
        """Return whether a command wrote this folder, or all folders in it (as in ``runs/``), without images next to them."""
        try:
            entries = [entry for entry in self._read(folder) if not entry.name.startswith(".")]
            names = {entry.name for entry in entries}
            if any(names.issuperset(group) for group in RESULT_FILES):
                return True
            if depth == 0 or any(is_image_name(entry.name) for entry in entries):
                return False
            inner = [entry for entry in entries if entry.is_dir(follow_symlinks=False) and not is_ignored_folder(entry.name)]
            if not inner:
                return "config.yaml" in names  # a run that was killed before its first checkpoint
            return all(self._contains_results(folder / entry.name, depth - 1) for entry in inner)
        except OSError:
            return False


def is_ignored_folder(folder_name: str) -> bool:
    """Return whether a folder is one that notebooks, editors or operating systems leave behind."""
    return folder_name.startswith((".", "__"))


def unreadable(error: OSError) -> str:
    return f"cannot be read ({error.strerror or error})"


def is_failure(reason: str) -> bool:
    """Return whether something was skipped because it could not be read, rather than because it is not a photo."""
    return reason.startswith("cannot be read") or reason in (BROKEN_LINK, NOT_REGULAR)


def describe_skipped(skipped: Sequence[Skipped], root: Path | None = None) -> list[str]:
    """Summarize what was skipped in one line per reason, with the number and the first few names.

    Args:
        skipped: What was skipped.
        root: Folder that names are relative to. None for complete paths.
    """
    counts = Counter(entry.reason for entry in skipped)
    lines = []
    for reason, count in counts.items():
        names = [_relative(entry.path, root) for entry in skipped if entry.reason == reason][:MAX_NAMED]
        lines.append(
            escape_controls(f"{count:,} skipped ({reason}): {', '.join(names)}{', ...' if count > len(names) else ''}")
        )
    return lines


def find_images(paths: Iterable[Path], search: ImageSearch) -> Iterator[Path]:
    """Yield the given files, and the images below the given folders, in a fixed order.

    Raises:
        DataError: A path does not exist, or a folder contains no images.
    """
    for path in paths:
        if path.is_dir():
            empty = True
            for image in search.walk([path]):
                empty = False
                yield image
            if empty:
                raise DataError(
                    f"No photos found in {path}. Pass photos, or a folder that contains some."
                    + "".join(f" {line[0].upper()}{line[1:]}." for line in describe_skipped(search.skipped, path))
                )
        elif path.exists():
            yield path
        else:
            raise DataError(f"No such photo or folder: {path}. Pass photos, or a folder that contains some.")


def read_image_file(path: Path) -> bytes:
    """Read a regular file. Does not wait for a named pipe and does not read devices.

    Raises:
        ImageError: The path is not a regular file, or contains a NUL character.
        OSError: The file cannot be read.
    """
    try:
        with open(path, "rb", opener=_open_without_waiting) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise ImageError("This is not a regular file. Use a file that contains an image.")
            return file.read()
    except ValueError:
        raise ImageError("The path contains a NUL character. Use the path of a file.") from None


def _open_without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _is_parent(link: Path) -> bool:
    """Return whether a link leads to a folder above itself."""
    return Path(os.path.realpath(link)) in Path(os.path.realpath(link.parent), link.name).parents


def _relative(path: Path, root: Path | None) -> str:
    return path.relative_to(root).as_posix() if root and path.is_relative_to(root) else str(path)
