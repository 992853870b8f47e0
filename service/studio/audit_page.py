"""The audit of a dataset: run ``finetune audit``, and show each finding with its photos and what to do about it."""

from __future__ import annotations

from flask import Blueprint, Response, url_for

from service.context import services
from service.http.errors import Problem
from service.studio import background_tasks, finetune_process
from service.studio.authorization import protect
from service.studio.data_pages import changed, find_data_set
from service.studio.data_source import DATASET
from service.studio.fields import read_fields, uncached_json
from service.studio.findings import CLASSES, Audit, data_fingerprint
from service.studio.start_page import page

REFRESH_S = 2
MAX_GROUPS = 40  # findings of a kind on the page; more are shown once these are resolved
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


@bp.get("/audit")
def show(name: str) -> Response:
    """Show the findings of the last audit."""
    data_set = find_data_set(name)
    task = background_tasks.current_task(data_set)
    audit = Audit.read(data_set)
    sections = []
    for kind, title in TITLES.items():
        rows = [finding for finding in audit.left if finding.kind == kind]
        if rows:
            shown = rows[:MAX_GROUPS]
            sections.append({"kind": kind, "title": title, "advice": ADVICE[kind], "rows": shown, "total": len(rows)})
    return page(
        "studio/audit.html",
        data_set=data_set,
        task=task if task and task.kind == "audit" else None,
        audit=audit,
        sections=sections,
        usable=sum(sum(row.values()) for row in audit.report["counts"].values()) if audit.report else 0,
        train_url=url_for("training.form", data=f"{DATASET}{name}"),
        ignored=len(audit.keys & audit.ignored),
        classes=list(data_set.classes()),
        changes=data_set.changes(),
        refresh_s=REFRESH_S if task and task.is_running else None,
    )


@bp.get("/audit.json")
def show_json(name: str) -> Response:
    """Return the last audit: the report of `finetune audit --json`, and the findings that are left."""
    data_set = find_data_set(name)
    task = background_tasks.current_task(data_set)
    audit = Audit.read(data_set)
    rows = [
        {"key": finding.key, "kind": finding.kind, "photos": [photo.path for photo in finding.photos], "note": finding.note}
        for finding in audit.left
    ]
    rows += [
        {"key": finding.key, "kind": CLASSES, "photos": [], "note": finding.text}
        for finding in audit.left_class_findings
        if finding.key
    ]
    return uncached_json(
        task=task.__dict__ if task and task.kind == "audit" else None,
        report=audit.report,
        is_outdated=audit.is_outdated,
        findings=rows,
        ignored=sorted(audit.ignored),
        accepted=audit.accepted_settings,
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
    """Ignore findings, or with an empty list show the ignored ones again. Later audits and training ignore them as well."""
    data_set = find_data_set(name)
    keys = read_fields({"finding": list, "photo": list, "back": str})["finding"]
    if unknown := set(keys) - Audit.read(data_set).keys:
        raise Problem("not_found", f"There is no finding {min(unknown)[:40]!r}. Check the photos again.")
    with data_set.locked():
        kept = data_set.read_state("ignored.json", []) if keys else []
        data_set.write_state("ignored.json", sorted({*kept, *keys}))
    return changed(data_set, back=url_for("audit.show", name=name))
