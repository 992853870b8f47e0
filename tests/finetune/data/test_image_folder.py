from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path

import pytest

from finetune.data.image_folder import read_dataset, read_split
from models.errors import DataError
from tests.conftest import PhotoFolder
from tests.helpers.tiny_network import color_folder, paint

CLASSES = ("cats", "dogs")


def count(folder: Path, **options: object) -> dict[tuple[str, str], int]:
    dataset = read_dataset(folder, **options)  # type: ignore[arg-type]
    return dict(Counter((photo.split, dataset.classes[photo.label]) for photo in dataset.samples))


@pytest.mark.parametrize("name", ["valid", "val", "validation", "test"])
def test_the_validation_folder_may_have_any_usual_name(tmp_path: Path, photo_folder: PhotoFolder, name: str) -> None:
    photo_folder(tmp_path, train=3, valid=2, valid_name=name)
    assert count(tmp_path) == {("train", c): 3 for c in CLASSES} | {("valid", c): 2 for c in CLASSES}
    dataset = read_dataset(tmp_path)
    assert not dataset.split_from_train
    assert dataset.samples[0].name == "train/cats/cats.0000.jpg"
    assert {photo.name.split("/")[0] for photo in dataset.in_split("valid")} == {name}


def test_the_training_folder_may_be_named_training(tmp_path: Path) -> None:
    (color_folder(tmp_path, train=2, valid=2) / "train").rename(tmp_path / "training")
    assert len(read_dataset(tmp_path).in_split("train")) == 4


@pytest.mark.parametrize("below", ["train", "."])
def test_without_a_validation_folder_a_fraction_of_each_class_is_held_out(tmp_path: Path, below: str) -> None:
    color_folder(tmp_path / "made", train=10, valid=0)
    shutil.copytree(tmp_path / "made" / "train", tmp_path / "data" / below)
    assert count(tmp_path / "data", valid_fraction=0.3) == {
        ("train", "blue"): 7,
        ("train", "red"): 7,
        ("valid", "blue"): 3,
        ("valid", "red"): 3,
    }
    assert read_dataset(tmp_path / "data").split_from_train


def test_the_hold_out_depends_only_on_the_seed(tmp_path: Path) -> None:
    color_folder(tmp_path, train=10, valid=0)

    def held(seed: int) -> list[str]:
        return [photo.name for photo in read_dataset(tmp_path, seed=seed).in_split("valid")]

    assert held(0) == held(0)
    assert held(0) != held(1)


def test_a_new_class_does_not_change_the_hold_out_of_the_others(tmp_path: Path) -> None:
    color_folder(tmp_path, train=10, valid=0)
    before = {photo.name for photo in read_dataset(tmp_path).in_split("valid")}
    for i in range(5):
        paint(tmp_path / "train" / "amber" / f"{i}.jpg", (255, 190, 0), seed=900 + i)
    after = {photo.name for photo in read_dataset(tmp_path).in_split("valid")}
    assert before < after


@pytest.mark.parametrize(("photos", "fraction"), [(2, 0.01), (2, 0.9), (3, 0.9)])
def test_a_hold_out_has_every_class_in_both_splits(tmp_path: Path, photos: int, fraction: float) -> None:
    color_folder(tmp_path, train=photos, valid=0)
    assert set(count(tmp_path, valid_fraction=fraction)) == {(s, c) for s in ("train", "valid") for c in ("blue", "red")}


def test_hidden_folders_are_ignored(tmp_path: Path) -> None:
    color_folder(tmp_path, train=2, valid=2)
    expected = count(tmp_path)
    photo = next((tmp_path / "train" / "red").iterdir())
    for stray in (".ipynb_checkpoints", "__MACOSX", "red/.ipynb_checkpoints", "blue/__MACOSX/deep"):
        (tmp_path / "train" / stray).mkdir(parents=True)
        shutil.copy(photo, tmp_path / "train" / stray / "copy.jpg")
    shutil.copy(photo, tmp_path / "train" / "red" / "._hidden.jpg")
    (tmp_path / "train" / "red" / "notes.txt").write_text("not a photo")
    assert read_dataset(tmp_path).classes == ("blue", "red")
    assert count(tmp_path) == expected


def test_nested_folders_and_uppercase_extensions_count(tmp_path: Path) -> None:
    color_folder(tmp_path, train=2, valid=2)
    paint(tmp_path / "train" / "red" / "summer" / "beach" / "A.JPEG", (255, 0, 0), seed=99)
    assert count(tmp_path)["train", "red"] == 3


def test_a_data_folder_may_be_inside_a_hidden_folder(tmp_path: Path) -> None:
    color_folder(tmp_path / ".hidden" / "__data", train=2, valid=1)
    assert len(read_dataset(tmp_path / ".hidden" / "__data").samples) == 6


def test_classes_may_have_any_name(tmp_path: Path) -> None:
    names = ("chats d'été", "котики", "犬 & 狼", '50%, or "more"')
    color_folder(tmp_path, train=2, valid=1, classes=names)
    assert read_dataset(tmp_path).classes == tuple(sorted(names))
    assert len(read_dataset(tmp_path).samples) == 12


def test_one_class_is_not_enough(tmp_path: Path) -> None:
    color_folder(tmp_path, train=2, valid=1, classes=("red",))
    with pytest.raises(DataError, match=r"Found only one class \(red\) in .*At least two are needed, one folder per class"):
        read_dataset(tmp_path)


def test_photos_without_class_folders_are_rejected(tmp_path: Path) -> None:
    for i in range(3):
        paint(tmp_path / "train" / f"cat.{i}.jpg", (255, 0, 0), seed=i)
    with pytest.raises(DataError, match=r"Found no class folders and 3 photos of its own in .*At least two are needed"):
        read_dataset(tmp_path)


def test_a_missing_folder_and_an_empty_one_have_different_errors(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"No such folder: .*nowhere"):
        read_dataset(tmp_path / "nowhere")
    for name in ("cats", "dogs"):
        (tmp_path / "train" / name).mkdir(parents=True)
        (tmp_path / "train" / name / "readme.txt").write_text("no photo")
    with pytest.raises(DataError, match=r"No photos in the class folders of .*\.jpg, "):
        read_dataset(tmp_path)


def test_validation_without_training_is_rejected(tmp_path: Path) -> None:
    (color_folder(tmp_path, train=1, valid=1) / "train").rename(tmp_path / "traning")
    with pytest.raises(DataError, match="has a folder valid but no folder train"):
        read_dataset(tmp_path)


def test_a_split_has_the_labels_of_the_bundle(tmp_path: Path) -> None:
    color_folder(tmp_path, train=1, valid=2)
    photos = read_split(tmp_path, "valid", ["amber", "red", "blue"]).samples
    assert [(photo.name.split("/")[1], photo.label, photo.split) for photo in photos] == [
        ("blue", 2, "valid"),
        ("blue", 2, "valid"),
        ("red", 1, "valid"),
        ("red", 1, "valid"),
    ]
    assert len(read_split(tmp_path, "train", ["red", "blue"]).samples) == 2


@pytest.mark.parametrize(
    ("split", "classes", "words"),
    [
        ("valid", ("cats", "red"), "has the class 'blue', but the bundle's classes are cats, red"),
        ("holiday", ("blue", "red"), "has no folder for the split 'holiday'"),
        ("empty", ("blue", "red"), "has no photos in folders named blue, red"),
    ],
)
def test_a_split_that_does_not_fit_the_bundle_is_rejected(
    tmp_path: Path, split: str, classes: tuple[str, ...], words: str
) -> None:
    color_folder(tmp_path, train=1, valid=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=words):
        read_split(tmp_path, split, classes)
    with pytest.raises(DataError, match="No such folder"):
        read_split(tmp_path / "nowhere", split, classes)
