"""Names of datasets, classes and photos, and where dropped files go."""

from __future__ import annotations

import unicodedata

import pytest

from service.http.errors import Problem
from service.studio.drop_layout import Destination, plan_drop
from service.studio.names import check_class_name, check_dataset_name, clean_file_name


@pytest.mark.parametrize("name", ["pets", "My photos 2", "_a-b", "日本語", "é" * 60])
def test_a_data_set_may_have_letters_digits_spaces_and_dashes(name: str) -> None:
    assert check_dataset_name(f" {unicodedata.normalize('NFD', name)} ") == unicodedata.normalize("NFC", name)


@pytest.mark.parametrize("name", ["", " ", ".", "..", "a/b", "a.b", "../x", "con", "LPT1", "a" * 61, "-a", "a\nb", "x:y"])
def test_a_data_set_with_another_name_is_rejected(name: str) -> None:
    with pytest.raises(Problem, match="A dataset cannot be named"):
        check_dataset_name(name)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "it must have 1 to 60 characters"),
        ("a" * 61, "it must have 1 to 60 characters"),
        ("..", "it has characters that a folder cannot have"),
        ("a/b", "it has characters that a folder cannot have"),
        ("a\\b", "it has characters that a folder cannot have"),
        (".hidden", "it has characters that a folder cannot have"),
        ("__pycache__", "it has characters that a folder cannot have"),
        ("a\u202eb", "it has characters that a folder cannot have"),
        ("NUL", "this name is reserved"),
        ("Unlabeled", "this name is reserved"),
        ("left-out", "this name is reserved"),
        ("Training_Set", "folders with this name are splits, not classes"),
        ("test", "folders with this name are splits, not classes"),
    ],
)
def test_a_class_whose_folder_would_not_be_read_as_a_class_is_rejected(name: str, reason: str) -> None:
    with pytest.raises(Problem) as caught:
        check_class_name(name)
    assert caught.value.detail == f"A class cannot be named {name[:60]!r}: {reason}. Choose another name."


def test_a_class_name_is_normalized() -> None:
    assert check_class_name(" cafe\u0301 ") == "caf\u00e9"


@pytest.mark.parametrize(
    ("name", "image_format", "expected"),
    [
        ("cat.JPG", "JPEG", "cat.JPG"),
        ("../../etc/passwd", "PNG", "etc_passwd.png"),
        ("C:\\photos\\cat.jpg", "JPEG", "C__photos_cat.jpg"),
        ("/abs/cat.jpg", "JPEG", "abs_cat.jpg"),
        (".hidden.jpg", "JPEG", "hidden.jpg"),
        ("con.jpg", "JPEG", "_con.jpg"),
        ("a\0b\n\u202ec.jpg", "JPEG", "a_b__c.jpg"),
        ("archive.tar", "GIF", "archive.tar.gif"),
        ("", "WEBP", "photo.webp"),
        ("....", None, "photo.jpg"),
        ("x" * 300 + ".jpg", "JPEG", "x" * 196 + ".jpg"),
        ("日" * 100 + ".jpg", "JPEG", "日" * 65 + ".jpg"),
    ],
)
def test_a_file_name_becomes_one_that_every_file_system_takes(name: str, image_format: str | None, expected: str) -> None:
    assert clean_file_name(name, image_format) == expected


def plan(*paths: str) -> dict[str, tuple[str, str, str]]:
    return {path: (to.class_, to.split, to.name) for path, to in plan_drop(paths).items()}


def test_the_folder_of_a_photo_is_its_class() -> None:
    assert plan("cats/1.jpg", "dogs/2.png", "3.jpg") == {
        "cats/1.jpg": ("cats", "", "1.jpg"),
        "dogs/2.png": ("dogs", "", "2.png"),
        "3.jpg": ("", "", "3.jpg"),
    }


def test_a_folder_around_the_class_folders_is_ignored() -> None:
    assert plan("download/pets/cats/1.jpg", "download/pets/dogs/1.jpg")["download/pets/cats/1.jpg"] == ("cats", "", "1.jpg")


def test_a_single_folder_is_a_class() -> None:
    assert plan("cats/1.jpg", "cats/2.jpg")["cats/2.jpg"] == ("cats", "", "2.jpg")


def test_folders_inside_a_class_become_a_part_of_the_name() -> None:
    assert plan("cats/a/1.jpg", "cats/1.jpg", "dogs/1.jpg")["cats/a/1.jpg"] == ("cats", "", "a_1.jpg")


def test_splits_are_kept() -> None:
    paths = ("pets/Training/cats/1.jpg", "pets/Training/dogs/1.jpg", "pets/val/cats/2.jpg", "pets/val/dogs/2.jpg")
    assert plan(*paths)[paths[0]] == ("cats", "train", "1.jpg")
    assert plan(*paths)[paths[2]] == ("cats", "valid", "2.jpg")


def test_hidden_files_and_other_files_are_left_out() -> None:
    assert plan("cats/1.jpg", "cats/.DS_Store", "cats/notes.txt", "__MACOSX/cats/1.jpg", "../x/1.jpg", "dogs/Thumbs.db") == {
        "cats/1.jpg": ("cats", "", "1.jpg"),
        "../x/1.jpg": ("x", "", "1.jpg"),
    }


def test_a_plan_of_nothing_is_empty() -> None:
    assert plan_drop([]) == {}
    assert plan_drop(["/", "..", ""]) == {}
    assert plan_drop(["1.jpg"]) == {"1.jpg": Destination("", "", "1.jpg")}
