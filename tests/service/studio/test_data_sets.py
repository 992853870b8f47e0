"""Datasets on disk: adding, moving, undoing and deleting photos, within limits and without leaving their folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from service.http.errors import Problem
from service.settings import Settings
from service.studio.data_sets import UNLABELED, DataSet
from service.studio.drop_layout import plan_drop
from service.studio.names import LEFT_OUT
from service.studio.workspace import Workspace


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(studio=True, studio_dir=tmp_path / "studio", studio_min_free_mb=0)


@pytest.fixture
def pets(settings: Settings) -> DataSet:
    return DataSet.create(Workspace.of(settings), settings, "pets")


def add(data_set: DataSet, path: str, data: bytes = b"photo") -> str:
    class_, split, name = data_set.split_path(path)
    return data_set.add(data, class_=class_, split=split, name=name, image_format="JPEG")[0].path


def paths(data_set: DataSet) -> list[str]:
    return sorted(photo.path for by in data_set.classes().values() for photos in by.values() for photo in photos)


def error_of(function: Any, *args: Any) -> Problem:
    with pytest.raises(Problem) as caught:
        function(*args)
    return caught.value


def test_a_data_set_is_an_ordinary_image_folder(pets: DataSet, settings: Settings) -> None:
    add(pets, "cats/1.jpg", b"one")
    add(pets, "dogs/1.jpg", b"two")
    folder = settings.resolved_studio_dir / "datasets" / "pets"
    assert {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*.jpg")} == {
        "cats/1.jpg": b"one",
        "dogs/1.jpg": b"two",
    }
    assert (folder / "cats" / "1.jpg").stat().st_mode & 0o777 == 0o644
    assert not any(settings.resolved_studio_dir.joinpath("uploads").iterdir())


def test_the_same_file_is_added_once_and_another_one_gets_another_name(pets: DataSet) -> None:
    assert pets.add(b"one", class_="cats", name="1.jpg", image_format="JPEG")[1]
    assert not pets.add(b"one", class_="cats", name="1.jpg", image_format="JPEG")[1]
    assert add(pets, "cats/1.jpg", b"two") == "cats/1-2.jpg"
    assert add(pets, "cats/1.jpg", b"two") == "cats/1-2.jpg"
    assert paths(pets) == ["cats/1-2.jpg", "cats/1.jpg"]


def test_only_what_is_missing_has_to_be_sent(pets: DataSet) -> None:
    add(pets, "cats/1.jpg", b"one")
    files = [("photos/cats/1.jpg", 3), ("photos/cats/2.jpg", 3), ("photos/dogs/1.jpg", 3), ("loose.jpg", 4)]
    plan = plan_drop(path for path, _ in files)
    missing, present = pets.missing([(path, size, plan[path]) for path, size in files])
    assert present == 1
    assert missing == [
        ("photos/cats/2.jpg", "cats/2.jpg"),
        ("photos/dogs/1.jpg", "dogs/1.jpg"),
        ("loose.jpg", "unlabeled/loose.jpg"),
    ]


def test_moved_photos_return_by_undo(pets: DataSet) -> None:
    for number in range(3):
        add(pets, f"cats/{number}.jpg", bytes([number]))
    add(pets, "dogs/1.jpg", b"dog")
    assert pets.move(["cats/0.jpg", "cats/1.jpg", "cats/9.jpg"], "dogs", actor="ann") == 2
    assert paths(pets) == ["cats/2.jpg", "dogs/0.jpg", "dogs/1-2.jpg", "dogs/1.jpg"]
    assert pets.move(["dogs/1.jpg"], LEFT_OUT) == 1
    assert [photo.path for photo in pets.photos_of(LEFT_OUT)] == ["left-out/dogs/1.jpg"]
    assert pets.move(["dogs/0.jpg"], UNLABELED) == 1
    for _ in range(3):
        pets.undo()
    assert paths(pets) == ["cats/0.jpg", "cats/1.jpg", "cats/2.jpg", "dogs/1.jpg"]
    assert error_of(pets.undo).code == "nothing_to_undo"


def test_a_photo_that_was_left_out_returns_to_its_split(pets: DataSet) -> None:
    pets.create_splits(["train", "valid"])
    add(pets, "valid/cats/1.jpg")
    pets.move(["valid/cats/1.jpg"], LEFT_OUT)
    assert pets.move(["left-out/valid/cats/1.jpg"], "dogs") == 1
    assert paths(pets) == ["valid/dogs/1.jpg"]


@pytest.mark.parametrize(
    "path",
    [
        "../pets2/cats/1.jpg",
        "cats/../../1.jpg",
        "/etc/passwd",
        "cats//1.jpg",
        "cats/.1.jpg",
        "cats/1.txt",
        "1.jpg",
        "a/b/c/d/e.jpg",
    ],
)
def test_a_path_cannot_lead_out_of_the_data_set(pets: DataSet, path: str) -> None:
    assert error_of(pets.find_photo, path).code == "not_found"
    assert pets.move([path], "dogs") == 0


def test_links_are_not_followed(pets: DataSet, tmp_path: Path) -> None:
    secret = tmp_path / "secret.jpg"
    secret.write_bytes(b"secret")
    add(pets, "cats/1.jpg")
    (pets.folder / "cats" / "link.jpg").symlink_to(secret)
    assert error_of(pets.find_photo, "cats/link.jpg").code == "not_found"
    assert pets.move(["cats/link.jpg"], "dogs") == 0
    assert paths(pets) == ["cats/1.jpg"]


def test_a_data_set_is_limited_in_bytes_in_photos_and_by_the_free_disk(settings: Settings) -> None:
    small = dataclasses.replace(settings, studio_max_dataset_mb=0.001, studio_max_photos=2)
    pets = DataSet.create(Workspace.of(small), small, "pets")
    problem = error_of(add, pets, "cats/1.jpg", bytes(2000))
    assert (problem.code, problem.detail) == (
        "dataset_too_large",
        "A dataset may have 0.001 MB. Delete photos, or start another dataset.",
    )
    add(pets, "cats/1.jpg")
    add(pets, "cats/2.jpg", b"two")
    assert error_of(add, pets, "cats/3.jpg").detail == "A dataset may have 2 photos. Delete photos, or start another dataset."
    full = dataclasses.replace(settings, studio_min_free_mb=100_000_000)
    problem = error_of(add, DataSet(Workspace.of(full), full, "pets"), "cats/1.jpg")
    assert problem.code == "storage_full"
    assert problem.detail.endswith(
        " MB left, and 100,000,000 MB stay free. Delete a dataset or a run, or ask the administrator for more space."
    )
    assert not any(full.resolved_studio_dir.joinpath("uploads").iterdir())


def test_renaming_keeps_what_belongs_to_a_data_set(pets: DataSet, settings: Settings) -> None:
    add(pets, "cats/1.jpg")
    add(pets, "cats/2.jpg", b"two")
    pets.move(["cats/1.jpg"], LEFT_OUT)
    renamed = pets.rename("Animals")
    assert pets.workspace.dataset_names() == ["Animals"]
    assert [photo.path for photo in renamed.photos_of(LEFT_OUT)] == ["left-out/cats/1.jpg"]
    renamed.undo()
    renamed.rename_class("cats", "felines")
    assert paths(renamed) == ["felines/1.jpg", "felines/2.jpg"]
    DataSet.create(pets.workspace, settings, "other")
    assert error_of(renamed.rename, "OTHER").code == "name_taken"
    assert error_of(DataSet.create, pets.workspace, settings, "animals").code == "name_taken"


def test_a_deleted_data_set_leaves_nothing(pets: DataSet) -> None:
    add(pets, "cats/1.jpg")
    add(pets, "unlabeled/2.jpg")
    pets.move(["cats/1.jpg"], LEFT_OUT)
    pets.delete()
    left = [file for file in pets.workspace.root.rglob("*") if file.is_file() and file.suffix != ".lock"]
    assert left == []
    assert error_of(add, pets, "cats/1.jpg").detail == "The dataset pets was deleted or renamed."
