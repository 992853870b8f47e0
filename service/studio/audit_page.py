"""The audit of a data set: run ``finetune audit``, and show each finding with its photos and what to do about it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flask import Blueprint, Response, url_for

from service.context import services
from service.http.errors import Problem
from service.studio import background_tasks, finetune_process
from service.studio.access import protect
from service.studio.data_pages import changed, find_data_set
from service.studio.data_sets import DataSet, Photo, fingerprint
from service.studio.data_source import DATASET
from service.studio.fields import read_fields, uncached_json
from service.studio.start_page import page

REFRESH_S = 2
MAX_GROUPS = 40  # of a kind on the page; the next ones follow once these are done
TITLES = {
    "leakage": "The same photo for training and for validation",
    "conflicts": "The same photo in two classes",
    "damaged": "Damaged files",
    "duplicates": "The same photo several times in a class",
}
ADVICE = {
    "leakage": "Results on these photos look better than they are. Leave out the copies that are used for training.",
    "conflicts": "One of the classes is wrong. Leave out the photo that is in the wrong class, or move it.",
    "damaged": "Training skips them. Leave them out, or add the photos again.",
    "duplicates": "This does no harm, but copies teach the model nothing new. All but the first are selected.",
}

bp = protect(Blueprint("audit", __name__, url_prefix="/studio/datasets/<name>"))


@dataclass(frozen=True)
class Finding:
    """Photos with a problem. ``suggested`` are the paths to leave out. ``key`` identifies the finding in later audits."""

    key: str
    kind: str
    photos: tuple[Photo, ...]
    suggested: frozenset[str]
    note: str = ""


@bp.get("/audit")
def show(name: str) -> Response:
    """Show the findings of the last audit."""
    data_set = find_data_set(name)
    task = background_tasks.current_task(data_set)
    saved = data_set.read_state("audit.json", None)
    found = findings(data_set, saved) if saved else []
    ignored = set(data_set.read_state("ignored.json", []))
    sections = []
    for kind, title in TITLES.items():
        rows = [finding for finding in found if finding.kind == kind and finding.key not in ignored]
        if rows:
            shown = rows[:MAX_GROUPS]
            sections.append({"kind": kind, "title": title, "advice": ADVICE[kind], "rows": shown, "total": len(rows)})
    return page(
        "studio/audit.html",
        data_set=data_set,
        task=task if task and task.kind == "audit" else None,
        saved=saved,
        notes=notes(saved["report"]) if saved else [],
        sections=sections,
        usable=sum(sum(row.values()) for row in saved["report"]["counts"].values()) if saved else 0,
        train_url=url_for("training.form", data=f"{DATASET}{name}"),
        ignored=sum(finding.key in ignored for finding in found),
        is_outdated=bool(saved) and saved["fingerprint"] != data_fingerprint(data_set),
        classes=list(data_set.classes()),
        changes=data_set.changes(),
        refresh_s=REFRESH_S if task and task.is_running else None,
    )


@bp.get("/audit.json")
def show_json(name: str) -> Response:
    """Return the last audit: the report of `finetune audit --json`, and the findings that are left."""
    data_set = find_data_set(name)
    task = background_tasks.current_task(data_set)
    saved = data_set.read_state("audit.json", None)
    ignored = data_set.read_state("ignored.json", [])
    rows = [
        {"key": finding.key, "kind": finding.kind, "photos": [photo.path for photo in finding.photos], "note": finding.note}
        for finding in (findings(data_set, saved) if saved else [])
        if finding.key not in ignored
    ]
    return uncached_json(
        task=task.__dict__ if task and task.kind == "audit" else None,
        report=saved and saved["report"],
        is_outdated=bool(saved) and saved["fingerprint"] != data_fingerprint(data_set),
        findings=rows,
        ignored=ignored,
    )


@bp.post("/audit")
def start(name: str) -> Response:
    """Start an audit in the background."""
    data_set = find_data_set(name)
    read_fields({})
    timeout_s = services().settings.studio_audit_timeout_s
    folder, before = data_set.folder, data_fingerprint(data_set)

    def work(report: background_tasks.Report) -> str:
        report("Checking the photos", total=-1)
        # 1: there are findings
        result = finetune_process.run_json(["audit", "--json", str(folder)], timeout_s=timeout_s, ok=(0, 1))
        data_set.write_state("audit.json", {"report": result, "fingerprint": before})
        return "The photos were checked."

    background_tasks.start(data_set, "audit", work)
    return changed(data_set, status=202, back=url_for("audit.show", name=name))


@bp.post("/audit/ignore")
def ignore(name: str) -> Response:
    """Ignore findings, or with an empty list show the ignored ones again. Later audits ignore them as well."""
    data_set = find_data_set(name)
    keys = read_fields({"finding": list, "photo": list, "back": str})["finding"]
    known = {finding.key for finding in findings(data_set, data_set.read_state("audit.json", None))}
    if unknown := set(keys) - known:
        raise Problem("not_found", f"There is no finding {min(unknown)[:40]!r}. Check the photos again.")
    with data_set.locked():
        kept = data_set.read_state("ignored.json", []) if keys else []
        data_set.write_state("ignored.json", sorted({*kept, *keys}))
    return changed(data_set, back=url_for("audit.show", name=name))


def data_fingerprint(data_set: DataSet) -> str:
    return fingerprint(photo for by_split in data_set.classes().values() for photos in by_split.values() for photo in photos)


def findings(data_set: DataSet, saved: dict[str, Any] | None) -> list[Finding]:
    """Return the findings whose photos are still there: damaged files, and groups of at least two equal photos."""
    if saved is None:
        return []
    report = saved["report"]
    photos = {photo.path: photo for by_split in data_set.classes().values() for photos in by_split.values() for photo in photos}
    found = []
    for kind in ("leakage", "conflicts", "duplicates"):
        for names in report[kind]:
            group = tuple(photos[path] for path in names if path in photos)
            if len(group) > 1:
                found.append(_finding(_current_kind(kind, [photo.path for photo in group]), group))
    for path, reason in report["damaged"].items():
        if path in photos:
            found.append(_finding("damaged", (photos[path],), reason))
    return found


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
    digest = hashlib.sha256("\0".join([kind, *sorted(paths)]).encode("utf-8", "surrogateescape"))
    return Finding(digest.hexdigest()[:16], kind, photos, frozenset(suggested), note)


def notes(report: dict[str, Any]) -> list[str]:
    """Return a sentence for each finding that concerns classes instead of single photos, with what to do."""
    found = [f"{name}: {text}." for name, text in report["unlabeled"].items()]
    for split, names in report["class_mismatch"].items():
        found.append(f"Only in {split}: {', '.join(names)}. Use the same classes for training and validation.")
    found += [
        f"The class {name} has {photos:,} usable photo{'' if photos == 1 else 's'}. It needs at least two different ones."
        for name, photos in report["small_classes"].items()
    ]
    found += [f"{name} has no readable photos. Add photos, or delete the class." for name in report["empty_classes"]]
    for counts in report.get("similar_classes", []):
        named = ", ".join(f"{class_} ({photos:,} photo{'' if photos == 1 else 's'})" for class_, photos in counts.items())
        found.append(f"Some classes have similar names: {named}. Move the photos into one of them if they are the same.")
    if report["imbalance"] > 3:
        found.append(
            f"The largest class has {report['imbalance']:.1f} times as many photos as the smallest. Add photos to the small"
            " ones, or balance the classes when you train."
        )
    if report["skipped"]:
        names = ", ".join(list(report["skipped"])[:3])
        found.append(f"{len(report['skipped']):,} files are not used, such as {names}.")
    return found
