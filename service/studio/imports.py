"""Fill a dataset from a zip, from a folder on the server, or with drawn pictures, in the background.

The files are listed by ``finetune audit --files``, so that a dataset from any source is read by the rules of training. They
are prepared in the folder of uploads and land in the dataset at the end.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from models.artifacts.archive import extract, open_zip, safe_members
from models.artifacts.data_folder import TRAIN, is_image_name
from models.errors import UserError
from service.http.errors import Problem
from service.settings import MIB
from service.studio import finetune_process
from service.studio.background_tasks import Report, start
from service.studio.data_sets import DataSet, require_bounds
from service.studio.names import check_class_name

ALL = "all"  # the split of a folder without splits, as `finetune audit --files` names it
LIST_TIMEOUT_S = 300.0
DRAW_TIMEOUT_S = 600.0
Check = Callable[[bytes], object]
NO_PHOTOS = "No photos were found. Put the photos of each class into a folder with the name of the class."


def import_zip(data_set: DataSet, archive: Path, *, check: Check) -> None:
    """Unpack a zip into a dataset, and delete the zip.

    Args:
        data_set: The dataset.
        archive: The zip.
        check: Raises UserError for a file that is not added.

    Raises:
        Problem: The dataset is busy.
    """

    def work(report: Report) -> str:
        try:
            with _staging(data_set) as folder:
                _unpack(data_set, archive, folder / "photos", report)
                return _land(data_set, folder / "photos", report, check=check)
        finally:
            archive.unlink(missing_ok=True)

    start(data_set, "import", work)


def import_folder(data_set: DataSet, root: Path, name: str, *, check: Check) -> None:
    """Copy the photos of a folder below DATA_DIR into a dataset.

    Args:
        data_set: The dataset.
        root: DATA_DIR.
        name: The folder, relative to it.
        check: Raises UserError for a file that is not added.

    Raises:
        Problem: There is no such folder inside DATA_DIR, or the dataset is busy.
    """
    base = root.resolve()
    source = (base / name).resolve()
    if not source.is_relative_to(base) or not source.is_dir():
        raise Problem("bad_parameter", f"DATA_DIR has no folder {name[:200]!r}. Name a folder inside it.")
    start(data_set, "import", lambda report: _land(data_set, source, report, check=check, copy=True))


def import_demo(data_set: DataSet, *, check: Check) -> None:
    """Draw cats and dogs. See ``import_zip``."""

    def work(report: Report) -> str:
        with _staging(data_set) as folder:
            report("Drawing pictures", total=-1)
            finetune_process.run(["synthesize", str(folder / "pictures")], timeout_s=DRAW_TIMEOUT_S)
            return _land(data_set, folder / "pictures", report, check=check)

    start(data_set, "import", work)


@contextmanager
def _staging(data_set: DataSet) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="import-", dir=data_set.workspace.uploads, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


def _unpack(data_set: DataSet, archive: Path, folder: Path, report: Report) -> None:
    """Extract the images of a zip. Raises DataError for an archive that is damaged or unsafe, and Problem for one too large."""
    settings = data_set.settings
    limit = int(settings.studio_max_dataset_mb * MIB)
    with open_zip(archive) as opened:
        members = safe_members(opened, max_members=2 * settings.studio_max_photos + 1000, max_bytes=limit)
        images = [member for member in members if is_image_name(Path(member.filename).name)]
        size = sum(member.file_size for member in images)
        used, photos = data_set.usage()
        require_bounds(settings, used + size, photos + len(images))
        data_set.workspace.require_space(size)
        folder.mkdir()
        for number, member in enumerate(images):
            report("Unpacking", number, len(images))
            path = folder / member.filename
            if path.resolve().is_relative_to(folder.resolve()):
                extract(opened, member, path)


def _land(data_set: DataSet, source: Path, report: Report, *, check: Check, copy: bool = False) -> str:
    """Move or copy the photos of a folder into a dataset, each into its class, and return a sentence about it."""
    report("Reading the folders", total=-1)
    rows = list(_destinations(data_set, source))
    if not rows:
        raise UserError(NO_PHOTOS)
    sizes = [os.stat(file).st_size for file, *_ in rows]
    used, photos = data_set.usage()
    require_bounds(data_set.settings, used + sum(sizes), photos + len(rows))
    data_set.workspace.require_space(sum(sizes) if copy else 0)
    data_set.create_splits({split for _, _, split in rows})
    added, rejected = 0, []
    for number, (file, class_, split) in enumerate(rows):
        report("Adding photos", number, len(rows))
        try:
            check(_read(file, data_set.settings.max_body_bytes))
        except UserError as error:
            rejected.append(f"{file.name}: {error}")
        else:
            added += data_set.adopt(file, class_=class_, split=split, copy=copy)
    data_set.forget_usage()
    same = len(rows) - added - len(rejected)
    message = "1 photo was added." if added == 1 else f"{added:,} photos were added."
    message += f" {same:,} were there before." if same else ""
    if rejected:
        message += f" {len(rejected):,} file{' was' if len(rejected) == 1 else 's were'} left out, such as {rejected[0]}"
    return message


def _read(file: Path, max_bytes: int) -> bytes:
    if file.stat().st_size > max_bytes:
        raise UserError(f"The file has more than {max_bytes / MIB:g} MB.")
    return file.read_bytes()


def _destinations(data_set: DataSet, source: Path) -> Iterator[tuple[Path, str, str]]:
    """Yield each photo of a folder with its class and split. Without class folders all photos are without a class."""
    try:
        listing: dict[str, Any] = finetune_process.run_json(["audit", "--files", str(source)], timeout_s=LIST_TIMEOUT_S)
    except finetune_process.CommandError as error:
        folders = [path for path in source.rglob("*") if path.is_dir()]
        if any(is_image_name(file.name) for folder in folders for file in folder.iterdir()):
            message = str(error).replace(f"{source}/", "").replace(str(source), "the folder")
            raise finetune_process.CommandError(message) from None
        yield from ((file, "", "") for file in sorted(source.iterdir()) if is_image_name(file.name) and _is_regular(file))
        return
    for split, classes in listing["splits"].items():
        for class_, names in classes.items():
            class_ = check_class_name(class_)
            yield from ((source / name, class_, "" if split == ALL else split) for name in names if _is_regular(source / name))
    yield from ((source / name, "none", TRAIN) for name in listing["neither"] if _is_regular(source / name))


def _is_regular(file: Path) -> bool:
    return stat.S_ISREG(os.lstat(file).st_mode)
