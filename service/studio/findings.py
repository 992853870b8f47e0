"""The findings of the last audit of a dataset: which are left, which are ignored, and what training accepts therefore."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from service.studio.data_sets import DataSet, Photo, fingerprint

CLASSES = "classes"  # the kind of the findings that concern classes instead of single photos
ACCEPTED = {  # what a setting of `finetune train` accepts
    "allow_leakage": "equal photos in training and validation",
    "allow_class_mismatch": "missing or too small classes",
}


@dataclass(frozen=True)
class Finding:
    """Photos with a problem. ``suggested`` are the paths to leave out. ``key`` identifies the finding in later audits."""

    key: str
    kind: str
    photos: tuple[Photo, ...]
    suggested: frozenset[str]
    note: str = ""


@dataclass(frozen=True)
class ClassFinding:
    """A sentence about classes, with what to do. Training fails unless it is ignored, if it has a ``key``."""

    text: str
    key: str = ""


@dataclass(frozen=True)
class Audit:
    """The last audit of a dataset, compared with the photos that are there now. ``report`` is None if there was none."""

    data_set: DataSet
    report: dict[str, Any] | None
    is_outdated: bool
    ignored: frozenset[str]

    @classmethod
    def read(cls, data_set: DataSet) -> Audit:
        saved = data_set.read_state("audit.json", None)
        is_outdated = bool(saved) and saved["fingerprint"] != data_fingerprint(data_set)
        return cls(data_set, saved and saved["report"], is_outdated, frozenset(data_set.read_state("ignored.json", [])))

    @cached_property
    def findings(self) -> list[Finding]:
        """The findings whose photos are still there: damaged files, and groups of at least two equal photos."""
        if self.report is None:
            return []
        photos = {photo.path: photo for photo in _photos(self.data_set)}
        found = []
        for kind in ("leakage", "conflicts", "duplicates"):
            for names in self.report[kind]:
                group = tuple(photos[path] for path in names if path in photos)
                if len(group) > 1:
                    found.append(_finding(_current_kind(kind, [photo.path for photo in group]), group))
        for path, reason in self.report["damaged"].items():
            if path in photos:
                found.append(_finding("damaged", (photos[path],), reason))
        return found

    @cached_property
    def class_findings(self) -> list[ClassFinding]:
        return _class_findings(self.report) if self.report else []

    @property
    def keys(self) -> set[str]:
        """The keys of all findings that can be ignored."""
        return {finding.key for finding in self.findings} | {finding.key for finding in self.class_findings if finding.key}

    @property
    def left(self) -> list[Finding]:
        """The findings that are not ignored."""
        return [finding for finding in self.findings if finding.key not in self.ignored]

    @property
    def left_class_findings(self) -> list[ClassFinding]:
        """The findings about classes that are not ignored."""
        return [finding for finding in self.class_findings if finding.key not in self.ignored]

    @property
    def accepted_settings(self) -> dict[str, bool]:
        """The settings of ``finetune train`` that accept the ignored findings. An outdated audit accepts nothing."""
        return {} if self.is_outdated else self._accepted

    @property
    def training_note(self) -> str:
        """A sentence about what training accepts because it is ignored, or ""."""
        accepted = " and ".join(ACCEPTED[name] for name in self._accepted)
        if accepted and self.is_outdated:
            return f"{accepted.capitalize()} were ignored, but the photos have changed since. Check them again first."
        return f"Training accepts {accepted}, because these findings are ignored." if accepted else ""

    @cached_property
    def _accepted(self) -> dict[str, bool]:
        leaks = {finding.key for finding in self.findings if finding.kind == "leakage"}
        classes = {finding.key for finding in self.class_findings if finding.key}
        return {name: True for name, keys in zip(ACCEPTED, (leaks, classes), strict=True) if keys and keys <= self.ignored}


def data_fingerprint(data_set: DataSet) -> str:
    return fingerprint(_photos(data_set))


def _photos(data_set: DataSet) -> Iterable[Photo]:
    return (photo for by_split in data_set.classes().values() for photos in by_split.values() for photo in photos)


def _current_kind(kind: str, paths: Sequence[str]) -> str:
    """Return what a group of equal photos is after some of them were moved or left out."""
    if len({path.rpartition("/")[0] for path in paths}) == 1:
        return "duplicates"
    if kind == "leakage" and len({path.split("/")[0] for path in paths}) == 1:
        return "conflicts"
    if kind == "conflicts" and len({path.split("/")[-2] for path in paths}) == 1:
        return "leakage"
    return kind


def _finding(kind: str, photos: tuple[Photo, ...], note: str = "") -> Finding:
    paths = [photo.path for photo in photos]
    suggested = {
        "leakage": [path for path in paths if path.startswith("train/")],
        "conflicts": [],
        "damaged": paths,
        "duplicates": paths[1:],
    }[kind]
    return Finding(_key(kind, sorted(paths)), kind, photos, frozenset(suggested), note)


def _key(kind: str, names: Iterable[str]) -> str:
    return hashlib.sha256("\0".join([kind, *names]).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _class_findings(report: dict[str, Any]) -> list[ClassFinding]:
    found = [ClassFinding(f"{name}: {text}.") for name, text in report["unlabeled"].items()]
    for split, names in report["class_mismatch"].items():
        text = f"Only in {split}: {', '.join(names)}. Use the same classes for training and validation."
        found.append(ClassFinding(text, _key(f"only in {split}", sorted(names))))
    for name, photos in report["small_classes"].items():
        count = f"{photos:,} usable photo{'' if photos == 1 else 's'}"
        text = f"The class {name} has {count}. It needs at least two different ones."
        found.append(ClassFinding(text, _key("small class", [name])))
    for name in report["empty_classes"]:
        text = f"{name} has no readable photos. Add photos, or delete the class."
        found.append(ClassFinding(text, _key("empty class", [name])))
    for counts in report.get("similar_classes", []):
        named = ", ".join(f"{class_} ({photos:,} photo{'' if photos == 1 else 's'})" for class_, photos in counts.items())
        found.append(
            ClassFinding(f"Some classes have similar names: {named}. Move the photos into one of them if they are the same.")
        )
    if report["imbalance"] > 3:
        found.append(
            ClassFinding(
                f"The largest class has {report['imbalance']:.1f} times as many photos as the smallest. Add photos to the small"
                " ones, or balance the classes when you train."
            )
        )
    if report["skipped"]:
        names = ", ".join(list(report["skipped"])[:3])
        found.append(ClassFinding(f"{len(report['skipped']):,} files are not used, such as {names}."))
    return found
