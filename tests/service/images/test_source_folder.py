"""Photos of a folder by name and sha256: the requested photo is returned, or an error states the reason."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import unicodedata
from pathlib import Path
from typing import Literal

import pytest

from service.images.source_folder import ImageMissingError, ImageReplacedError, ImageUnavailableError, SourceFolder

CAT = b"the bytes of a cat"
CAT_SHA256 = hashlib.sha256(CAT).hexdigest()
NAME = "valid/cats/cat.1.jpg"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "valid" / "cats").mkdir(parents=True)
    (folder / NAME).write_bytes(CAT)
    (tmp_path / "outside.jpg").write_bytes(CAT)
    return folder


def is_missing(root: Path, name: str) -> None:
    folder = SourceFolder([root])
    for ask in (folder.read, folder.check):
        with pytest.raises(ImageMissingError) as caught:
            ask(name, CAT_SHA256)
        str(caught.value).encode("utf-8")  # a page can hold it


def test_a_photo_is_read_by_its_name_and_sha256(root: Path) -> None:
    folder = SourceFolder([root])
    assert folder.read(NAME, CAT_SHA256) == CAT
    folder.check(NAME, CAT_SHA256)


@pytest.mark.parametrize(
    "name",
    [
        "valid/cats/cat.2.jpg",
        "../outside.jpg",
        "valid/../../outside.jpg",
        "valid/cats/../cats/cat.1.jpg",
        "valid/cats",
        "valid/cats/cat.1.jpg/more",
        "",
        ".",
        "/",
        "valid/cats/cat.1.jpg\0",
        "\0",
        "\ud800.jpg",
        "x" * 5000,
        "a/" * 3000,
    ],
)
def test_a_name_that_leaves_the_folder_or_is_no_file_is_missing(root: Path, name: str) -> None:
    is_missing(root, name)


def test_an_absolute_name_is_missing_even_for_a_photo_in_the_folder(root: Path) -> None:
    is_missing(root, str(root / NAME))
    is_missing(root, str(root.parent / "outside.jpg"))


def test_a_link_may_point_inside_the_folder_but_not_outside(root: Path) -> None:
    (root / "inside.jpg").symlink_to(root / NAME)
    (root / "train").symlink_to("valid")
    assert SourceFolder([root]).read("inside.jpg", CAT_SHA256) == CAT
    assert SourceFolder([root]).read("train/cats/cat.1.jpg", CAT_SHA256) == CAT
    (root / "out.jpg").symlink_to(root.parent / "outside.jpg")
    (root / "up").symlink_to("..")
    (root / "loop.jpg").symlink_to("loop.jpg")
    (root / "itself").symlink_to(root)
    for name in ("out.jpg", "up/outside.jpg", "loop.jpg", "itself"):
        is_missing(root, name)


def test_the_root_may_be_a_link(root: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(root)
    assert SourceFolder([tmp_path / "link"]).read(NAME, CAT_SHA256) == CAT


def test_a_special_file_is_missing_and_does_not_block(root: Path) -> None:
    os.mkfifo(root / "fifo.jpg")
    is_missing(root, "fifo.jpg")
    is_missing(Path("/dev"), "zero")
    is_missing(Path("/dev"), "null")


def test_a_name_that_is_not_utf8_is_found(root: Path) -> None:
    name = os.fsdecode(b"valid/cats/\xe9t\xe9.jpg")
    (root / name).write_bytes(CAT)
    assert SourceFolder([root]).read(name, CAT_SHA256) == CAT
    (root / name).write_bytes(b"another")
    with pytest.raises(ImageReplacedError) as caught:
        SourceFolder([root]).read(name, CAT_SHA256)
    str(caught.value).encode("utf-8")


def test_a_replaced_photo_is_never_shown(root: Path) -> None:
    folder = SourceFolder([root])
    folder.check(NAME, CAT_SHA256)
    dog = b"the bytes of a dog"  # of the same length
    assert len(dog) == len(CAT)
    before = (root / NAME).stat()
    (root / "new.jpg").write_bytes(dog)
    os.utime(root / "new.jpg", ns=(before.st_atime_ns, before.st_mtime_ns))
    (root / "new.jpg").replace(root / NAME)
    for ask in (folder.read, folder.check):
        with pytest.raises(ImageReplacedError, match=r"changed or replaced"):
            ask(NAME, CAT_SHA256)
    folder.check(NAME, hashlib.sha256(dog).hexdigest())


def test_a_verified_photo_is_not_read_again(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[int] = []
    real = hashlib.sha256
    monkeypatch.setattr(hashlib, "sha256", lambda data: hashed.append(len(data)) or real(data))  # type: ignore[func-returns-value]
    folder = SourceFolder([root])
    for _ in range(3):
        folder.check(NAME, CAT_SHA256)
    with pytest.raises(ImageReplacedError):
        folder.check(NAME, "0" * 64)
    assert hashed == [len(CAT)]


def test_the_cache_of_verified_photos_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.images.source_folder.MAX_VERIFIED", 3)
    folder = SourceFolder([root])
    for number in range(10):
        (root / f"{number}.jpg").write_bytes(CAT)
        folder.check(f"{number}.jpg", CAT_SHA256)
    assert len(folder._verified) == 3
    folder.check("0.jpg", CAT_SHA256)


def test_roots_are_searched_in_order_and_the_sha256_selects(root: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    (other / "valid" / "cats").mkdir(parents=True)
    (other / NAME).write_bytes(b"another photo of that name")
    folder = SourceFolder([tmp_path / "nowhere", other, root])
    assert folder.read(NAME, CAT_SHA256) == CAT
    folder.check(NAME, CAT_SHA256)
    with pytest.raises(ImageReplacedError):
        folder.read(NAME, "0" * 64)


def test_without_a_folder_the_error_states_how_to_set_one() -> None:
    with pytest.raises(ImageMissingError, match="DATA_DIR=FOLDER"):
        SourceFolder([]).read(NAME, CAT_SHA256)


def test_a_file_above_the_size_limit_is_reported(root: Path) -> None:
    with pytest.raises(ImageUnavailableError, match="Save it in a smaller size"):
        SourceFolder([root], max_bytes=len(CAT) - 1).read(NAME, CAT_SHA256)
    assert SourceFolder([root], max_bytes=len(CAT)).read(NAME, CAT_SHA256) == CAT


def files_open() -> list[Path]:
    """Return the open files of this process. Another thread may close some meanwhile."""
    found = []
    for descriptor in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.append(descriptor.readlink())
    return found


def test_every_file_is_closed(root: Path) -> None:
    folder = SourceFolder([root])
    for _ in range(5):
        folder.read(NAME, CAT_SHA256)
        folder.check(NAME, CAT_SHA256)
        with pytest.raises(ImageReplacedError):
            folder.read(NAME, "0" * 64)
        with pytest.raises(ImageMissingError):
            folder.read("valid/none.jpg", CAT_SHA256)
    assert [path for path in files_open() if path.is_relative_to(root)] == []


def test_only_the_requested_photo_is_returned_while_the_file_is_being_replaced(root: Path) -> None:
    """A writer swaps the file, and its folder with a link to the outside. A reader gets the photo or an error."""
    other = root.parent / "other" / "cats"
    other.mkdir(parents=True)
    (other / "cat.1.jpg").write_bytes(b"secret")
    stop = threading.Event()

    def swap() -> None:
        real, aside = root / "valid" / "cats", root / "valid" / "aside"
        while not stop.is_set():
            real.rename(aside)
            real.symlink_to(other)
            real.unlink()
            aside.rename(real)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        folder, seen = SourceFolder([root]), set()
        secret = hashlib.sha256(b"secret").hexdigest()
        for _ in range(2000):
            for sha256 in (CAT_SHA256, secret):
                try:
                    seen.add(folder.read(NAME, sha256))
                except ImageUnavailableError:
                    continue
    finally:
        stop.set()
        thread.join()
    assert seen <= {CAT}


def test_a_link_out_of_the_folder_is_reported_as_the_reason(root: Path) -> None:
    (root / "out.jpg").symlink_to(root.parent / "outside.jpg")
    (root / "broken.jpg").symlink_to(root.parent / "nothing.jpg")
    for method in (SourceFolder([root]).read, SourceFolder([root]).check):
        with pytest.raises(ImageMissingError) as caught:
            method("out.jpg", CAT_SHA256)
        assert str(caught.value) == (
            "The photo 'out.jpg' is a link that leads out of DATA_DIR, and such links are not followed. Set DATA_DIR to a "
            "folder that contains the files, or copy them into it."
        )
        with pytest.raises(ImageMissingError, match="is not in the data folder"):
            method("broken.jpg", CAT_SHA256)


@pytest.mark.parametrize("forms", [("NFC", "NFD"), ("NFD", "NFC")])
def test_names_match_in_any_unicode_form(root: Path, forms: tuple[Literal["NFC", "NFD"], Literal["NFC", "NFD"]]) -> None:
    stored, requested = (unicodedata.normalize(form, "valid/b\u00e9b\u00e9/\u00e9t\u00e9.jpg") for form in forms)
    (root / stored).parent.mkdir()
    (root / stored).write_bytes(CAT)
    folder = SourceFolder([root])
    assert folder.read(requested, CAT_SHA256) == CAT
    folder.check(requested, CAT_SHA256)
    is_missing(root, requested.replace("valid", "train"))
