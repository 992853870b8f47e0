"""Find the splits and the class folders of a data folder, however they are named and nested."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune.data.image_files import HIDDEN, RESULTS, ImageSearch, is_failure
from models.artifacts.data_folder import TEST, TRAIN, UNSTORABLE, VALID, class_name, is_neither, is_reserved, split_of
from models.errors import DataError

KNOWN_NAMES = "train, valid (or val, dev, eval) and test"
_LABEL_IN_NAME = re.compile(r"(.*[^\W\d_])[._ -]*\(?\d+\)?")
_CAMERA_NAMES = {"img", "dsc", "dscn", "dscf", "pxl", "image", "photo", "picture", "scan", "frame"}
LOOSE = "not in a class folder"
UNUSED = f"not a split; splits are named {KNOWN_NAMES}"
NEITHER_OUTSIDE = "photos of none of the classes belong next to the class folders of a split, as in valid/none"
REPEATED = "contains the other class folders again"
MAX_DEPTH = 6


@dataclass(frozen=True)
class Layout:
    """Where the photos of a data folder are.

    Attributes:
        base: The folder that contains the splits, or the classes if there are no splits.
        splits: The folder of each split ("train", "valid", "test").
        unused: Other folders next to those of the splits.
    """

    base: Path
    splits: dict[str, Path]
    unused: tuple[Path, ...]

    @property
    def train(self) -> Path:
        return self.splits.get(TRAIN, self.base)

    @property
    def valid(self) -> Path | None:
        """The folder to validate on: the test split if there is no validation split."""
        return self.splits.get(VALID, self.splits.get(TEST))


def find_layout(root: Path, search: ImageSearch) -> Layout:
    """Find the splits of a data folder, also inside wrapping folders such as those of an archive.

    Args:
        root: The data folder.
        search: Keeps the entries of the folders read. What is skipped here is not recorded.

    Raises:
        DataError: The folder does not exist, contains several datasets, or its splits are inside the class folders.
    """
    if not root.is_dir():
        raise DataError(f"No such folder: {root}. Expected a folder with photos in train/CLASS/ and valid/CLASS/.")
    base, unused, probe = root, [], search.probe()
    for _ in range(MAX_DEPTH):
        folders = probe.folders(base)
        splits = _select_splits(folders)
        if splits:
            unused += [folder for folder in folders if folder not in splits.values()]
            return Layout(base, splits, tuple(unused))
        inner = [folder for folder in folders if _contains_splits(folder, probe)]
        if len(inner) > 1:
            raise _ambiguous(base, inner, probe)
        if inner:
            _require_all_split(base, inner[0], folders, probe)
        if not inner and len(folders) == 1 and not probe.images(base) and probe.folders(folders[0]):
            inner = folders
        if not inner:
            break
        unused += [folder for folder in folders if folder != inner[0]]
        base = inner[0]
    return Layout(base, {}, tuple(unused))


def class_folders(split: Path, search: ImageSearch) -> tuple[Path, list[Path]]:
    """Find the class folders of a split, also inside a wrapping folder (as in ``training_set/training_set/cats``).

    Returns:
        The folder that contains the class folders, and the class folders.

    Raises:
        DataError: The folders look like splits, not like classes, or have a name that no class can have.
    """
    for _ in range(MAX_DEPTH):
        folders = search.folders(split)
        if len(folders) != 1 or search.images(split):
            break
        repeats_name = split_of(folders[0].name) is not None and split_of(folders[0].name) == split_of(split.name)
        if not (repeats_name or search.probe().folders(folders[0])):
            break
        split = folders[0]
    for folder in folders:
        _check_class_name(folder)
    names = {folder.name for folder in folders}
    repeated = [folder for folder in folders if _repeats(folder, names - {folder.name}, search.probe())]
    if len(repeated) < len(folders):
        for folder in repeated:
            search.skip(folder, REPEATED)
        folders = [folder for folder in folders if folder not in repeated]
    _require_classes(split, folders, search.probe())
    return split, folders


def labels_in_names(photos: Sequence[Path]) -> list[str]:
    """Return the labels in file names such as ``cat.0.jpg`` and ``dog_17.jpg``, if most names have one of a few."""
    matches = (_LABEL_IN_NAME.fullmatch(photo.stem) for photo in photos)
    labels = Counter(match[1] for match in matches if match and match[1].casefold() not in _CAMERA_NAMES)
    frequent = sorted(label for label, count in labels.items() if count > 1 or len(photos) < 10)
    return frequent if 2 <= len(frequent) <= max(20, len(photos) // 10) and sum(labels.values()) >= 0.9 * len(photos) else []


def note_unused(layout: Layout, root: Path, search: ImageSearch) -> None:
    """Record the folders and photos next to the splits, and those next to a wrapping folder.

    Other files there, such as a README, are only recorded if they cannot be read or have the name of a split.
    """
    base = root
    while True:
        probe = search.probe()
        photos = probe.images(base)
        for entry in probe.skipped:
            is_other_folder = entry.reason == RESULTS or (entry.reason == HIDDEN and entry.path.is_dir())
            if is_other_folder or is_failure(entry.reason) or split_of(entry.path.name):
                search.skip(entry.path, entry.reason)
        if layout.splits or base != layout.base:
            for photo in photos:
                search.skip(photo, LOOSE)
        if base == layout.base:
            break
        base /= layout.base.relative_to(base).parts[0]
    for folder in layout.unused:
        if next(search.probe().walk([folder]), None):
            search.skip(folder, NEITHER_OUTSIDE if is_neither(folder.name) else UNUSED)


def _check_class_name(folder: Path) -> None:
    if not class_name(folder.name):
        raise DataError(f"The class name {folder.name!r} has only spaces. Rename the folder {folder}.")
    if is_reserved(folder.name):
        raise DataError(f"The class name {folder.name!r} is reserved for photos without a label. Rename the folder {folder}.")
    if UNSTORABLE.search(folder.name):
        raise DataError(f"The class name {folder.name!r} has control characters or is not UTF-8. Rename the folder {folder}.")


def _select_splits(folders: Sequence[Path]) -> dict[str, Path]:
    """Select one folder per split: the one with the plainest name if there are several.

    The names of splits may also be equal but for one word, as in ``seg_train`` and ``seg_test``.
    """
    named: dict[str, list[Path]] = defaultdict(list)
    for folder in folders:
        if split := split_of(folder.name):
            named[split].append(folder)
    if TRAIN not in named:
        named = _splits_by_one_word(folders) or named
    return {
        split: min(named[split], key=lambda folder: (folder.name != split, folder.name.casefold() != split, folder.name))
        for split in (TRAIN, VALID, TEST)
        if split in named
    }


def _splits_by_one_word(folders: Sequence[Path]) -> dict[str, list[Path]] | None:
    """Find the folders whose names differ only in the word for the split. None if there are no or several such groups."""
    groups: dict[tuple[str, ...], dict[str, list[Path]]] = defaultdict(lambda: defaultdict(list))
    for folder in folders:
        words = re.findall(r"[^\W_]+", unicodedata.normalize("NFKC", folder.name).casefold())
        for position, word in enumerate(words):
            if split := split_of(word):
                groups[(*words[:position], "", *words[position + 1 :])][split].append(folder)
    found = [group for group in groups.values() if TRAIN in group and len(group) > 1]
    return found[0] if len(found) == 1 else None


def _contains_splits(folder: Path, probe: ImageSearch) -> bool:
    """Return whether a folder contains a training split: with class folders in it, or with another split next to it."""
    try:
        splits = _select_splits(probe.folders(folder))
        return TRAIN in splits and (len(splits) > 1 or bool(probe.folders(splits[TRAIN])))
    except OSError:
        return False


def _repeats(folder: Path, siblings: set[str], probe: ImageSearch) -> bool:
    try:
        return len(siblings) > 1 and siblings <= {inner.name for inner in probe.folders(folder)} and not probe.images(folder)
    except OSError:
        return False


def _require_classes(split: Path, folders: Sequence[Path], probe: ImageSearch) -> None:
    """Raise DataError if every folder contains the same two or more folders and no photos: these are splits."""
    contents = []
    for folder in folders:
        try:
            inner = _inner_names(folder, probe)
        except OSError:
            return
        if len(inner) < 2:
            return
        contents.append(inner)
    if len(contents) > 1 and len(set(contents)) == 1:
        names = _listed([folder.name for folder in folders])
        raise DataError(
            f"The folders {names} in {split} look like splits, not classes: each contains {_listed(contents[0])} and no photos "
            f"of its own. Splits are named {KNOWN_NAMES}. If they are classes, move their photos out of the inner folders."
        )


def _inner_names(folder: Path, probe: ImageSearch) -> tuple[str, ...]:
    """Return the names of the folders in a folder without photos of its own, also inside wrapping folders."""
    for _ in range(MAX_DEPTH):
        inner = probe.folders(folder)
        if probe.images(folder):
            return ()
        if len(inner) != 1:
            return tuple(class_name(path.name) for path in inner)
        folder = inner[0]
    return ()


def _require_all_split(base: Path, folder: Path, siblings: Sequence[Path], probe: ImageSearch) -> None:
    """Raise DataError if ``folder`` is a class with splits of its own next to classes without."""
    splits = _select_splits(probe.folders(folder))
    train = splits[TRAIN]
    if probe.folders(train) or labels_in_names(probe.images(train)):
        return
    others = [other.name for other in siblings if other != folder and next(probe.walk([other]), None)]
    if others:
        names = _listed([path.name for path in splits.values()])
        raise DataError(
            f"The folder {folder.name} in {base} has its own folders {names}, but {_listed(others)} next to it "
            f"{'has' if len(others) == 1 else 'have'} none. Expected SPLIT/CLASS for all classes, such as "
            f"{train.name}/{folder.name} and {train.name}/{others[0]}, or no splits."
        )


def _ambiguous(base: Path, inner: Sequence[Path], probe: ImageSearch) -> DataError:
    train = _select_splits(probe.folders(inner[0]))[TRAIN]
    names = _listed([folder.name for folder in inner])
    if not probe.folders(train):
        return DataError(
            f"The folders {names} in {base} each contain their own {train.name} folder with photos. Expected SPLIT/CLASS, "
            f"such as {train.name}/{inner[0].name}, instead of {inner[0].name}/{train.name}."
        )
    return DataError(f"{base} contains several datasets: {names}. Choose one of these folders.")


def _listed(names: Sequence[str]) -> str:
    shown = [*names[:4], *(["..."] if len(names) > 4 else [])]
    return f"{', '.join(shown[:-1])} and {shown[-1]}" if len(shown) > 1 and len(names) <= 4 else ", ".join(shown)
