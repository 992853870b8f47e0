"""The pages and endpoints of datasets: create, upload, look through, move, leave out, undo, rename and delete."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from flask import Blueprint, Response, g, redirect, request, url_for

from models.errors import UserError
from service.context import gallery, image_access, services, workspace
from service.db.training_jobs import ACTIVE, list_jobs
from service.http.errors import Problem
from service.http.request_body import parse_json, read_body
from service.http.request_images import read_uploads
from service.settings import MIB
from service.studio import imports
from service.studio.archive_upload import ArchiveUpload
from service.studio.authorization import protect
from service.studio.background_tasks import current_task
from service.studio.data_sets import UNLABELED, DataSet, Photo
from service.studio.data_source import DATASET
from service.studio.drop_layout import Destination, plan_drop
from service.studio.fields import read_fields, uncached_json, wants_page
from service.studio.names import LEFT_OUT
from service.studio.start_page import page
from service.studio.suggestions import most_useful_first, read_suggestions, suggest
from service.web.layout import ONE_YEAR_S

PHOTOS_PER_PAGE = 60
PREVIEWS = 6
REFRESH_S = 2
FORM_PHOTOS = 1000  # most photos in one form; its size is limited by MAX_BODY_MB
MAX_PLANNED = 1_000_000  # values in the JSON of a plan
MAX_PLAN_BYTES = 32 << 20
SOURCES = ("", "demo", "folder")
PLAN_HINT = 'Send {"files": [["cats/1.jpg", 12345], ...]}: the path and the size of each file.'

bp = protect(Blueprint("data", __name__, url_prefix="/studio"))


# Datasets


@bp.get("/datasets.json")
def list_json() -> Response:
    """Return the datasets with their classes and counts."""
    names = workspace().dataset_names()
    return uncached_json(datasets=[summary(find_data_set(name)) for name in names])


@bp.post("/datasets")
def create() -> Response:
    """Create a dataset: empty, with drawn pictures, or from a folder below DATA_DIR."""
    fields = read_fields({"name": str, "source": str, "folder": str})
    source, root = fields["source"], services().settings.data_dir
    if source not in SOURCES:
        raise Problem("bad_parameter", f"`source` must be demo, folder or empty (got {source[:40]!r}).")
    if source == "folder" and root is None:
        raise Problem(
            "bad_parameter", "The server has no DATA_DIR, so that no folder of it can be used. Upload the photos instead."
        )
    data_set = DataSet.create(workspace(), services().settings, fields["name"])
    check = services().model_manager.decoder.check
    try:
        if source == "demo":
            imports.import_demo(data_set, check=check)
        elif source == "folder" and root is not None:
            imports.import_folder(data_set, root, fields["folder"], check=check)
    except UserError:
        data_set.delete()
        raise
    return changed(data_set, status=201)


@bp.get("/datasets/<name>")
def show(name: str) -> Response:
    """Show the classes of a dataset."""
    data_set = find_data_set(name)
    classes = data_set.classes()
    rows = []
    for class_, by_split in classes.items():
        photos = [photo for photos in by_split.values() for photo in photos]
        rows.append({"name": class_, "count": len(photos), "photos": photos[:PREVIEWS], "splits": _counts(by_split)})
    unlabeled = data_set.photos_of(UNLABELED)
    task = current_task(data_set)
    return page(
        "studio/dataset.html",
        data_set=data_set,
        rows=rows,
        unlabeled=unlabeled,
        left_out=len(data_set.photos_of(LEFT_OUT)),
        task=task,
        changes=data_set.changes(),
        train_url=url_for("training.form", data=f"{DATASET}{name}"),
        audit_url=url_for("audit.show", name=name),
        refresh_s=REFRESH_S if task and task.is_running else None,
    )


@bp.get("/datasets/<name>/files.json")
def files_json(name: str) -> Response:
    """Return the photos of a dataset by class, with the state of its import or audit."""
    data_set = find_data_set(name)
    task = current_task(data_set)
    listing = {class_: [_row(photo) for photos in by.values() for photo in photos] for class_, by in data_set.classes().items()}
    return uncached_json(
        **summary(data_set),
        files=listing | {UNLABELED: [_row(photo) for photo in data_set.photos_of(UNLABELED)]},
        task=task and task.__dict__,
    )


@bp.post("/datasets/<name>/rename")
def rename(name: str) -> Response:
    """Rename a dataset, or one of its classes."""
    data_set = find_data_set(name)
    fields = read_fields({"to": str, "class": str})
    _require_no_training(data_set)
    if fields["class"]:
        data_set.rename_class(fields["class"], fields["to"])
    else:
        _require_idle(data_set)
        data_set = data_set.rename(fields["to"])
    return changed(data_set)


@bp.post("/datasets/<name>/delete")
def delete(name: str) -> Response:
    """Delete a dataset. The name has to be sent again, as it cannot be undone."""
    data_set = find_data_set(name)
    if read_fields({"confirm": str})["confirm"].strip() != data_set.name:
        raise Problem("bad_parameter", f"To delete the dataset, enter its name ({data_set.name}). It cannot be undone.")
    _require_idle(data_set)
    _require_no_training(data_set)
    data_set.delete()
    return _redirect(url_for("studio.start")) if wants_page() else uncached_json(deleted=data_set.name)


# Photos


@bp.post("/datasets/<name>/missing")
def missing(name: str) -> Response:
    """Return where each file of a drop goes, and which are not there yet. An upload that broke off sends only these."""
    data_set = find_data_set(name)
    body = read_body(request, services().settings, max_bytes=MAX_PLAN_BYTES, advice="Drop fewer files at a time.")
    document = parse_json(body, max_values=MAX_PLANNED, hint=PLAN_HINT)
    files = document.get("files") if isinstance(document, dict) else None
    if not isinstance(files, list) or not all(_is_file_row(row) for row in files):
        raise Problem("bad_json", f"The JSON has no list `files`. {PLAN_HINT}")
    class_ = document.get("class")
    if class_ is not None and not isinstance(class_, str):
        raise Problem("bad_json", f"`class` must be text. {PLAN_HINT}")
    plan = plan_drop(path for path, _ in files)
    if class_ is not None:
        plan = {path: Destination(class_, "", path.rpartition("/")[2]) for path in plan}
    data_set.create_splits({destination.split for destination in plan.values()} - {""})
    missing, present = data_set.missing([(path, size, plan[path]) for path, size in files if path in plan])
    return uncached_json(
        missing=[{"path": path, "photo": target} for path, target in missing],
        present=present,
        skipped=[path for path, _ in files if path not in plan],
    )


def _is_file_row(row: Any) -> bool:
    return isinstance(row, list) and len(row) == 2 and isinstance(row[0], str) and isinstance(row[1], int)


@bp.get("/datasets/<name>/photos")
def photos(name: str) -> Response:
    """Show the photos of a class, those without one as `unlabeled`, or the left-out ones as `left-out`."""
    data_set = find_data_set(name)
    class_ = request.args.get("class", "")
    number = request.args.get("page", "1")
    if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= 10**9:
        raise Problem("bad_parameter", f"`page` must be a whole number of 1 or more (got {number[:40]!r}).")
    classes = list(data_set.classes())
    if class_ not in (*classes, UNLABELED, LEFT_OUT):
        raise Problem("not_found", f"The dataset {data_set.name} has no class {class_[:60]!r}.")
    found = data_set.photos_of(class_)
    suggestions = read_suggestions(data_set) if class_ == UNLABELED else {}
    if suggestions:
        found = most_useful_first(found, suggestions)
    task = current_task(data_set)
    pages = max(1, math.ceil(len(found) / PHOTOS_PER_PAGE))
    number_shown = min(int(number), pages)
    first = (number_shown - 1) * PHOTOS_PER_PAGE
    return page(
        "studio/photos.html",
        data_set=data_set,
        class_=class_,
        classes=[other for other in classes if other != class_],
        photos=found[first : first + PHOTOS_PER_PAGE],
        total=len(found),
        number=number_shown,
        pages=pages,
        suggestions=suggestions,
        suggested=sorted({suggestions[photo.path].label for photo in found if photo.path in suggestions}),
        unsure=sum(suggestions[photo.path].is_unsure for photo in found if photo.path in suggestions),
        can_suggest=class_ == UNLABELED and bool(classes),
        task=task if task and task.kind == "classification" else None,
        refresh_s=REFRESH_S if task and task.is_running else None,
        changes=data_set.changes(),
    )


@bp.post("/datasets/<name>/photos")
def add_photos(name: str) -> Response:
    """Add the photos of a form to a class, for browsers without JavaScript."""
    data_set = find_data_set(name)
    form = read_uploads(request, replace(services().settings, max_images=FORM_PHOTOS))
    class_ = form.fields.get("class", "").strip()
    problems = []
    for number, upload in enumerate(form.images, 1):
        photo_name = upload.name or f"photo {number}.jpg"
        try:
            _add(data_set, upload.data, class_=class_, name=photo_name)
        except UserError as error:
            problems.append(f"{photo_name}: {error}")
            if len(form.images) == 1:
                raise
    if problems:
        rest = f" and {len(problems) - 1:,} more" if len(problems) > 1 else ""
        added = len(form.images) - len(problems)
        raise Problem("not_an_image", f"{added:,} photos were added. These were not: {problems[0]}{rest}")
    return changed(data_set)


@bp.put("/datasets/<name>/photos/<path:path>")
def put_photo(name: str, path: str) -> Response:
    """Add one photo: the body is the file, and the address its class and name. Sending it again changes nothing."""
    data_set = find_data_set(name)
    class_, split, file_name = data_set.split_path(path)
    data = read_body(request, services().settings)
    photo, is_new = _add(data_set, data, class_=class_, split=split, name=file_name)
    response = uncached_json(**_row(photo))
    response.status_code = 201 if is_new else 200
    return response


@bp.get("/datasets/<name>/photos/<path:path>")
def get_photo(name: str, path: str) -> Response:
    """Return a photo as a JPEG thumbnail, or with `size=display` in up to 2,048 pixels."""
    size = request.args.get("size", "thumbnail")
    if size not in ("thumbnail", "display"):
        raise Problem("bad_parameter", f"`size` must be thumbnail or display (got {size[:40]!r}).")
    data = find_data_set(name).find_photo(path).read_bytes()
    access = image_access()
    response = Response(access.thumbnail_of(data) if size == "thumbnail" else access.display(data), mimetype="image/jpeg")
    is_versioned = "v" in request.args
    response.headers["Cache-Control"] = f"private, max-age={ONE_YEAR_S}, immutable" if is_versioned else "no-cache"
    return response


@bp.delete("/datasets/<name>/photos/<path:path>")
def delete_photo(name: str, path: str) -> Response:
    """Delete one photo for good."""
    find_data_set(name).remove_photo(path)
    return uncached_json(deleted=path)


@bp.post("/datasets/<name>/move")
def move(name: str) -> Response:
    """Move photos to a class, leave them out, or take away their class. It can be undone."""
    data_set = find_data_set(name)
    fields = read_fields({"photo": list, "to": str, "new_class": str, "back": str})
    if not fields["photo"]:
        raise Problem("bad_parameter", "Select at least one photo, then choose what to do with it.")
    moved = data_set.move(fields["photo"], fields["new_class"].strip() or fields["to"], actor=g.key_name)
    return changed(data_set, moved=moved, back=fields["back"])


@bp.post("/datasets/<name>/undo")
def undo(name: str) -> Response:
    """Take back the latest change."""
    data_set = find_data_set(name)
    back = read_fields({"back": str})["back"]
    change = data_set.undo()
    return changed(data_set, undone=len(change["moves"]), back=back)


@bp.post("/datasets/<name>/suggestions")
def start_suggestions(name: str) -> Response:
    """Let the active model suggest classes for the photos without one, in the background."""
    data_set = find_data_set(name)
    read_fields({})
    suggest(data_set, services())
    query: dict[str, Any] = {"class": UNLABELED}
    return changed(data_set, status=202, back=url_for("data.photos", name=data_set.name, **query))


# A zip, in pieces


@bp.get("/datasets/<name>/archive")
def archive_state(name: str) -> Response:
    """Return how many bytes of an unfinished zip are there."""
    upload = _archive(find_data_set(name))
    return uncached_json(received=upload.received, total=upload.total)


@bp.put("/datasets/<name>/archive")
def put_archive(name: str) -> Response:
    """Receive a zip, or a piece of it from `offset` on. The last piece starts the import."""
    data_set = find_data_set(name)
    _require_idle(data_set)
    upload = _archive(data_set)
    data = read_body(request, services().settings, advice="Send the zip in pieces, with `offset` and `total`.")
    received = upload.write(data, offset=_whole_number("offset", 0), total=(total := _whole_number("total", len(data))))
    if received == total:
        imports.import_zip(data_set, upload.complete(), check=services().model_manager.decoder.check)
    response = uncached_json(received=received, total=total)
    response.status_code = 202 if received == total else 200
    return response


@bp.post("/datasets/<name>/archive")
def post_archive(name: str) -> Response:
    """Import the zip of a form, for browsers without JavaScript."""
    data_set = find_data_set(name)
    _require_idle(data_set)
    form = read_uploads(request, services().settings)
    upload = _archive(data_set)
    data = form.images[0].data
    upload.write(data, offset=0, total=len(data))
    imports.import_zip(data_set, upload.complete(), check=services().model_manager.decoder.check)
    return changed(data_set)


def _archive(data_set: DataSet) -> ArchiveUpload:
    return ArchiveUpload(data_set, max_bytes=int(services().settings.studio_max_zip_mb * MIB))


def _whole_number(name: str, default: int) -> int:
    text = request.args.get(name, str(default))
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise Problem("bad_parameter", f"`{name}` must be a whole number (got {text[:40]!r}).")
    return int(text)


# Shared


def summary(data_set: DataSet) -> dict[str, Any]:
    """Return the name of a dataset and its counts."""
    classes = {class_: sum(map(len, by_split.values())) for class_, by_split in data_set.classes().items()}
    unlabeled = len(data_set.photos_of(UNLABELED))
    return {"name": data_set.name, "classes": classes, "photos": sum(classes.values()), "unlabeled": unlabeled}


def _add(data_set: DataSet, data: bytes, *, class_: str, name: str, split: str = "") -> tuple[Photo, bool]:
    structure = services().model_manager.decoder.check(data)
    return data_set.add(data, class_=class_, name=name, image_format=structure.format, split=split)


def find_data_set(name: str) -> DataSet:
    return DataSet.find(workspace(), services().settings, name)


def _require_idle(data_set: DataSet) -> None:
    if (task := current_task(data_set)) and task.is_running:
        raise Problem("dataset_busy", f"The {task.kind} of {data_set.name} is still running. Wait until it has finished.")


def _require_no_training(data_set: DataSet) -> None:
    """Raise Problem if a training run that waits or runs reads the photos, whose paths must not change meanwhile."""
    with gallery().database.read() as connection:
        jobs = list_jobs(connection, *ACTIVE)
    # File systems may ignore case, so that a run can name the dataset in another one.
    users = [job.run for job in jobs if job.data.casefold() == f"{DATASET}{data_set.name}".casefold()]
    if users:
        raise Problem(
            "dataset_busy",
            f"The training run {users[-1]} uses {data_set.name}. Wait until it has ended, or cancel it.",
        )


def _row(photo: Photo) -> dict[str, Any]:
    return {"photo": photo.path, "size": photo.size, "version": photo.version}


def _counts(by_split: dict[str, list[Photo]]) -> dict[str, int]:
    return {split: len(photos) for split, photos in by_split.items() if split}


def _redirect(target: str) -> Response:
    response = redirect(target, 303)
    response.headers["Cache-Control"] = "no-store"
    return response  # type: ignore[return-value]


def changed(data_set: DataSet, *, status: int = 200, back: str = "", **values: Any) -> Response:
    """Respond to a change: with JSON, or by a redirect to the page that a form came from."""
    if not wants_page():
        response = uncached_json(**summary(data_set), **values)
        response.status_code = status
        return response
    address = url_for("data.show", name=data_set.name)
    is_own = back.startswith(address) and "//" not in back and "\\" not in back
    return _redirect(back if is_own else address)
