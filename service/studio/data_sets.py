"""The datasets of the studio on disk: list, add, move, leave out, undo, rename and delete photos and datasets.

The file system is the only record of what a dataset contains, so that its folder can be used by the command line as well.
Every change of names runs under a file lock, which all workers of the server share.
"""

from __future__ import annotations

import contextlib
import fcntl
import filecmp
import hashlib
import itertools
import json
import os
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path, PurePosixPath
from typing import Any

from models.artifacts.atomic_io import atomic_write_text
from models.artifacts.data_folder import TEST, TRAIN, VALID, is_image_name
from service.http.errors import Problem
from service.settings import MIB, Settings
from service.studio.drop_layout import Destination
from service.studio.names import LEFT_OUT, check_class_name, check_dataset_name, clean_file_name
from service.studio.workspace import Workspace

UNLABELED = "unlabeled"  # first folder of the path of a photo without a class, as LEFT_OUT is of one that was left out
SPLITS = (TRAIN, VALID, TEST)
MAX_CHANGES = 100  # undoable changes kept per dataset
USAGE_MAX_AGE_S = 30.0
_usage: dict[Path, tuple[float, int, int]] = {}  # folder -> (time, bytes, photos), as counted by this process
_usage_lock = threading.Lock()


@dataclass(frozen=True)
class Photo:
    """A photo of a dataset. ``path`` is relative to the dataset, or begins with UNLABELED or LEFT_OUT."""

    path: str
    size: int
    modified_ns: int

    @property
    def name(self) -> str:
        return PurePosixPath(self.path).name

    @property
    def version(self) -> str:
        """A text that changes with the content, for an address that browsers may cache."""
        return f"{self.modified_ns:x}-{self.size:x}"


@dataclass(frozen=True)
class DataSet:
    """A dataset that exists: a folder of the workspace."""

    workspace: Workspace
    settings: Settings
    name: str

    @classmethod
    def find(cls, workspace: Workspace, settings: Settings, name: str) -> DataSet:
        """Return the dataset of a name. Raises Problem if there is none."""
        with contextlib.suppress(Problem):
            found = cls(workspace, settings, check_dataset_name(name))
            if found.folder.is_dir():
                return found
        raise Problem("not_found", f"There is no dataset {name[:60]!r}. The start page of the studio lists them.")

    @classmethod
    def create(cls, workspace: Workspace, settings: Settings, name: str) -> DataSet:
        """Create an empty dataset. Raises Problem if the name is invalid or taken."""
        created = cls(workspace, settings, check_dataset_name(name))
        workspace.require_space(0)
        if any(other.casefold() == created.name.casefold() for other in workspace.dataset_names()):
            raise _taken(created.name)
        try:
            created.folder.mkdir()
        except FileExistsError:
            raise _taken(created.name) from None
        return created

    @property
    def folder(self) -> Path:
        return self.workspace.datasets / self.name

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that are folders, or ("",) if the class folders are directly in the dataset."""
        if not (self.folder / TRAIN).is_dir():
            return ("",)
        return tuple(split for split in SPLITS if (self.folder / split).is_dir())

    def side_folder(self, kind: str) -> Path:
        """Return the folder of the photos that are UNLABELED or LEFT_OUT."""
        return self.workspace.datasets / f"{self.name}.{kind}"

    def state_file(self, kind: str) -> Path:
        return self.workspace.state / f"{self.name}.{kind}"

    # Listing

    def classes(self) -> dict[str, dict[str, list[Photo]]]:
        """Return the photos of each class by split, sorted by name. A class may have none."""
        found: dict[str, dict[str, list[Photo]]] = {}
        for split in self.splits:
            with contextlib.suppress(FileNotFoundError):
                for entry in sorted(os.scandir(self.folder / split), key=lambda entry: entry.name):
                    is_class = entry.is_dir(follow_symlinks=False) and entry.name.isprintable()
                    if is_class and not entry.name.startswith((".", "__")):
                        found.setdefault(entry.name, {})[split] = list(_photos_in(Path(entry.path), f"{split}/{entry.name}"))
        return dict(sorted(found.items()))

    def photos_of(self, class_: str) -> list[Photo]:
        """Return the photos of a class in all splits, or the photos that are UNLABELED or LEFT_OUT."""
        if class_ in (UNLABELED, LEFT_OUT):
            return sorted(_photos_below(self.side_folder(class_), class_), key=lambda photo: photo.path)
        return [photo for photos in self.classes().get(class_, {}).values() for photo in photos]

    def find_photo(self, path: str) -> Path:
        """Return the file of a photo. Raises Problem if there is none."""
        file = self._file(path)
        if file is None or not file.is_file() or file.is_symlink():
            raise Problem("not_found", f"The dataset {self.name} has no photo {path[:200]!r}.")
        return file

    def _file(self, path: str) -> Path | None:
        """Return the place of a photo by its path, or None for a path that no photo can have."""
        parts = path.split("/")
        if not 2 <= len(parts) <= 4 or any(part.startswith(".") or not part.isprintable() for part in parts):
            return None
        if not all(parts) or not is_image_name(parts[-1]):
            return None
        if parts[0] in (UNLABELED, LEFT_OUT):
            return self.side_folder(parts[0]).joinpath(*parts[1:])
        return self.folder.joinpath(*parts)

    # Adding

    def class_path(self, class_: str, split: str = "") -> str:
        """Return the path of the folder that photos of a class are added to. Raises Problem for an invalid name."""
        if class_ in ("", UNLABELED):
            return UNLABELED
        split = split if split in self.splits else self.splits[0]
        return "/".join(filter(None, (split, check_class_name(class_))))

    def add(self, data: bytes, *, class_: str, name: str, image_format: str | None, split: str = "") -> tuple[Photo, bool]:
        """Add a photo atomically: after a kill it is there completely or not at all.

        Args:
            data: The file, which has been checked.
            class_: Its class, or "" for a photo without one.
            name: The client's file name.
            image_format: Pillow's name of the format.
            split: The split, if the dataset has it.

        Returns:
            The photo, and whether it is new. A file of the same name and content is not added again, and one of the same name
            and another content gets another name.

        Raises:
            Problem: A limit is exceeded, or a name is invalid.
        """
        folder, name = self.class_path(class_, split), clean_file_name(name, image_format)
        self._require_room(len(data), 1)
        handle, temporary = tempfile.mkstemp(suffix=".part", dir=self.workspace.uploads)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp sets 0600, but another user may train
            with self.locked():
                target, path, is_new = self._free_place(f"{folder}/{name}", Path(temporary))
                if not is_new:
                    return _photo(target, path), False
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
        with _usage_lock:
            if self.folder in _usage:
                at, used, photos = _usage[self.folder]
                _usage[self.folder] = at, used + len(data), photos + 1
        return _photo(target, path), True

    def adopt(self, file: Path, *, class_: str, split: str, copy: bool) -> bool:
        """Move or copy a file that was prepared on the server into a class, and return whether it is new. See ``add``."""
        data_set_path = f"{self.class_path(class_, split)}/{clean_file_name(file.name)}"
        if copy:
            handle, name = tempfile.mkstemp(suffix=".part", dir=self.workspace.uploads)
            os.close(handle)
            file = Path(shutil.copyfile(file, name))
        try:
            file.chmod(0o644)
            with self.locked():
                target, _, is_new = self._free_place(data_set_path, file)
                if is_new:
                    target.parent.mkdir(parents=True, exist_ok=True)
                    file.replace(target)
                return is_new
        finally:
            file.unlink(missing_ok=True)

    def _free_place(self, path: str, file: Path) -> tuple[Path, str, bool]:
        """Return where a file goes: the first free path like ``path``, or the one that has the same content already."""
        for free in _numbered(path):
            target = self._file(free)
            assert target is not None, free
            if not os.path.lexists(target):
                return target, free, True
            if target.is_file() and filecmp.cmp(target, file, shallow=False):
                return target, free, False
        raise AssertionError("the numbers do not end")

    def split_path(self, path: str) -> tuple[str, str, str]:
        """Return the class, the split and the file name of a path. Raises Problem for a path that no photo can have."""
        parts = path.split("/")
        split = parts[0] if len(parts) == 3 and parts[0] in SPLITS else ""
        if len(parts) != (3 if split else 2) or not all(parts):
            raise Problem("bad_parameter", f"{path[:200]!r} is not CLASS/FILE. Send the photos of a class to its name.")
        return parts[-2], split, parts[-1]

    def missing(self, files: Iterable[tuple[str, int, Destination]]) -> tuple[list[tuple[str, str]], int]:
        """Compare files with the photos that are there, by class, name and size.

        Args:
            files: The client's path, size and destination of each file.

        Returns:
            The path of each file that is missing and the path that it is added under, and how many files are there.
        """
        known = {(photo.path, photo.size) for by in self.classes().values() for photos in by.values() for photo in photos}
        known |= {(photo.path, photo.size) for photo in self.photos_of(UNLABELED)}
        missing, present = [], 0
        for path, size, destination in files:
            target = f"{self.class_path(destination.class_, destination.split)}/{clean_file_name(destination.name)}"
            if (target, size) in known:
                present += 1
            else:
                missing.append((path, target))
        return missing, present

    def create_splits(self, splits: Iterable[str]) -> None:
        """Create the folders of splits in a dataset without photos, which then has these splits."""
        named = set(splits) & set(SPLITS)
        with self.locked():
            if named and not self.classes():
                for split in {TRAIN, *named}:
                    (self.folder / split).mkdir(exist_ok=True)

    def forget_usage(self) -> None:
        """Count the photos again when their number is needed next."""
        with _usage_lock:
            _usage.pop(self.folder, None)

    def usage(self) -> tuple[int, int]:
        """Return the bytes and the number of photos, with those without a class or left out, as of a few seconds ago."""
        with _usage_lock:
            at, used, photos = _usage.get(self.folder, (-USAGE_MAX_AGE_S, 0, 0))
            if time.monotonic() - at >= USAGE_MAX_AGE_S:
                folders = (self.folder, self.side_folder(UNLABELED), self.side_folder(LEFT_OUT))
                sizes = [photo.size for folder in folders for photo in _photos_below(folder, "")]
                used, photos = sum(sizes), len(sizes)
                _usage[self.folder] = time.monotonic(), used, photos
            return used, photos

    def _require_room(self, size: int, photos: int) -> None:
        used, count = self.usage()
        require_bounds(self.settings, used + size, count + photos)
        self.workspace.require_space(size)

    # Changing

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Wait until no other request changes names in this dataset. Raises Problem if it was deleted or renamed meanwhile."""
        with self.state_file("lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if not self.folder.is_dir():
                raise Problem("not_found", f"The dataset {self.name} was deleted or renamed.")
            yield

    def move(self, paths: Sequence[str], to: str, *, actor: str | None = None) -> int:
        """Move photos to a class, or to the folder UNLABELED or LEFT_OUT. The change can be undone.

        Args:
            paths: The photos. A photo that someone else has moved meanwhile is skipped.
            to: The class, UNLABELED or LEFT_OUT.
            actor: Who moves them.

        Returns:
            How many photos were moved.
        """
        if to not in (UNLABELED, LEFT_OUT):
            to = check_class_name(to)
        moves = []
        with self.locked():
            for path in dict.fromkeys(paths):
                file = self._file(path)
                if file is None or not file.is_file() or file.is_symlink():
                    continue
                target = self._target(path, to)
                if target.rpartition("/")[0] != path.rpartition("/")[0]:
                    moves.append([path, self._rename(file, target)])
            if moves:
                change = {"id": uuid.uuid4().hex[:12], "time": _now(), "actor": actor, "to": to, "moves": moves}
                self._write("changes.json", [*self.changes(), change][-MAX_CHANGES:])
        return len(moves)

    def _target(self, path: str, to: str) -> str:
        """Return where a photo goes: in the split that it is in, or was in before it was left out."""
        parts = path.split("/")
        if parts[0] == LEFT_OUT:
            parts = parts[1:]
        if to == LEFT_OUT:
            return "/".join((LEFT_OUT, *parts))
        if to == UNLABELED:
            return f"{UNLABELED}/{parts[-1]}"
        split = parts[0] if parts[0] in self.splits else self.splits[0]
        return "/".join(filter(None, (split, to, parts[-1])))

    def _rename(self, file: Path, path: str) -> str:
        """Rename a file to the first free path like ``path``, and return that."""
        for free in _numbered(path):
            target = self._file(free)
            if target is not None and not os.path.lexists(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                file.rename(target)
                return free
        raise AssertionError("the numbers do not end")

    def changes(self) -> list[dict[str, Any]]:
        """Return the changes that can be undone, the oldest first."""
        return list(self._read("changes.json", []))

    def undo(self) -> dict[str, Any]:
        """Take back the latest change, and return it. Raises Problem if there is none."""
        with self.locked():
            changes = self.changes()
            if not changes:
                raise Problem("nothing_to_undo", f"There is no change of {self.name} to undo.")
            change: dict[str, Any] = changes.pop()
            for before, after in reversed(change["moves"]):
                file = self._file(after)
                if file is not None and file.is_file():
                    self._rename(file, before)
            self._write("changes.json", changes)
        return change

    def remove_photo(self, path: str) -> None:
        """Delete one photo for good. Raises Problem if there is none."""
        with self.locked():
            self.find_photo(path).unlink()

    def rename_class(self, class_: str, to: str) -> None:
        """Rename a class in all splits. Raises Problem if there is no such class, or the name is invalid or taken."""
        to = check_class_name(to)
        with self.locked():
            classes = self.classes()
            if class_ not in classes:
                raise Problem("not_found", f"The dataset {self.name} has no class {class_[:60]!r}.")
            if to in classes:
                raise Problem("name_taken", f"There is already a class {to}. Move the photos to it instead.")
            for split in classes[class_]:
                (self.folder / split / class_).rename(self.folder / split / to)
            self.state_file("changes.json").unlink(missing_ok=True)  # its paths have the old name

    def rename(self, to: str) -> DataSet:
        """Rename the dataset. Raises Problem if the name is invalid or taken."""
        to = check_dataset_name(to)
        others = [name.casefold() for name in self.workspace.dataset_names() if name != self.name]
        with self.locked():
            if to.casefold() in others:
                raise _taken(to)
            if to != self.name:
                for folder in (self.workspace.datasets, self.workspace.state):
                    for path in [*folder.glob(f"{self.name}.*"), folder / self.name]:
                        if path.exists() and path.suffix != ".lock":
                            path.rename(path.with_name(to + path.name.removeprefix(self.name)))
        return DataSet(self.workspace, self.settings, to)

    def delete(self) -> None:
        """Delete the dataset with all that belongs to it. It disappears at once, and then its files are deleted."""
        grave = Path(tempfile.mkdtemp(prefix="deleted-", dir=self.workspace.uploads))
        with self.locked():
            for folder in (self.workspace.datasets, self.workspace.state):
                for path in [folder / self.name, *folder.glob(f"{self.name}.*")]:
                    if path.exists() and path.suffix != ".lock":
                        path.rename(grave / f"{path.parent.name}-{path.name}")
        for path in self.workspace.uploads.glob(f"{self.name}.zip*"):
            path.unlink(missing_ok=True)
        shutil.rmtree(grave, ignore_errors=True)

    # Findings of the audit that are ignored, and the audit itself

    def read_state(self, kind: str, default: Any) -> Any:
        return self._read(kind, default)

    def write_state(self, kind: str, value: Any) -> None:
        self._write(kind, value)

    def _read(self, kind: str, default: Any) -> Any:
        with contextlib.suppress(FileNotFoundError, ValueError):
            return json.loads(self.state_file(kind).read_text(encoding="utf-8"))
        return default

    def _write(self, kind: str, value: Any) -> None:
        atomic_write_text(self.state_file(kind), json.dumps(value, ensure_ascii=False))


def require_bounds(settings: Settings, size: int, photos: int) -> None:
    """Raise Problem for a dataset that is too large."""
    if size > settings.studio_max_dataset_mb * MIB:
        limit = f"{settings.studio_max_dataset_mb:,g} MB"
        raise Problem("dataset_too_large", f"A dataset may have {limit}. Delete photos, or start another dataset.")
    if photos > settings.studio_max_photos:
        raise Problem(
            "dataset_too_large",
            f"A dataset may have {settings.studio_max_photos:,} photos. Delete photos, or start another dataset.",
        )


def fingerprint(photos: Iterable[Photo]) -> str:
    """Return a text that differs if photos were added, moved or replaced."""
    digest = hashlib.sha256()
    for photo in photos:
        digest.update(f"{photo.path}\0{photo.version}\0".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()[:16]


def _photos_in(folder: Path, path: str) -> Iterator[Photo]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_file(follow_symlinks=False) and is_image_name(entry.name) and entry.name.isprintable():
            status = entry.stat(follow_symlinks=False)
            yield Photo(f"{path}/{entry.name}".lstrip("/"), status.st_size, status.st_mtime_ns)


def _photos_below(folder: Path, path: str) -> Iterator[Photo]:
    if folder.is_dir():
        yield from _photos_in(folder, path)
        for entry in os.scandir(folder):
            if entry.is_dir(follow_symlinks=False):
                yield from _photos_below(Path(entry.path), f"{path}/{entry.name}".lstrip("/"))


def _photo(file: Path, path: str) -> Photo:
    status = file.stat()
    return Photo(path, status.st_size, status.st_mtime_ns)


def _numbered(path: str) -> Iterator[str]:
    """Yield a path, and then others that end in -2, -3 and so on."""
    yield path
    pure = PurePosixPath(path)
    for number in itertools.count(2):
        yield str(pure.with_name(f"{pure.stem}-{number}{pure.suffix}"))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _taken(name: str) -> Problem:
    return Problem("name_taken", f"There is already a dataset named {name}. Choose another name, or open it to add photos.")
