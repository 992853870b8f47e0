"""Data folders in practice: names of splits, nesting, links, and other files next to the photos."""

from __future__ import annotations

import os
import socket
import unicodedata
from collections import Counter
from pathlib import Path

import pytest

from finetune.data.class_names import find_similar
from finetune.data.folder_layout import labels_in_names
from finetune.data.image_files import ImageSearch, describe_skipped, read_image_file
from finetune.data.image_folder import NO_LABEL, read_dataset, read_split
from models.artifacts.data_folder import split_of
from models.errors import DataError, ImageError

BOTH = {("train", "cats"): 3, ("train", "dogs"): 3, ("valid", "cats"): 3, ("valid", "dogs"): 3}
HELD_OUT = {("train", "cats"): 2, ("train", "dogs"): 2, ("valid", "cats"): 1, ("valid", "dogs"): 1}


def touch(root: Path, *names: str) -> Path:
    """Create empty files. These tests only list folders, so the content does not matter."""
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"")
    return root


def photos(root: Path, *folders: str, count: int = 3) -> Path:
    return touch(root, *(f"{folder}/{number}.jpg" for folder in folders for number in range(count)))


def splits(root: Path, train: str, valid: str, classes: tuple[str, ...] = ("cats", "dogs")) -> Path:
    return photos(root, *(f"{split}/{name}" for split in (train, valid) for name in classes))


def count(root: Path) -> dict[tuple[str, str], int]:
    dataset = read_dataset(root)
    return dict(Counter((sample.split, dataset.classes[sample.label]) for sample in dataset.samples))


def skipped(root: Path) -> dict[str, str]:
    return {entry.path.relative_to(root).as_posix(): entry.reason for entry in read_dataset(root).skipped}


@pytest.mark.parametrize(
    ("split", "names"),
    [
        ("train", ["train", "Train", "TRAINING", "training_set", "train-set", "TrainSet", "train_data", "data_train"]),
        ("train", ["trainset", "training images", "images_train", "train2017", "trn", "Training_Data", "train-00001"]),
        ("valid", ["valid", "Valid", "VALID", "val", "Val", "VAL", "validation", "Validation_set", "validating", "val2017"]),
        ("valid", ["dev", "DEV", "dev_set", "devset", "development", "eval", "Evaluation", "eval-data"]),
        ("valid", ["holdout", "hold-out", "held-out", "HeldOut"]),
        ("test", ["test", "Test", "TESTING", "test_set", "testset", "test1", "test_images", "tst", "Test Data"]),
        (None, ["cats", "tests of time", "trainer", "data", "set", "devices", "evaluate me", "valley", "latest", "retrain"]),
    ],
)
def test_splits_are_recognized_by_name(split: str | None, names: list[str]) -> None:
    assert {name: split_of(name) for name in names} == dict.fromkeys(names, split)


@pytest.mark.parametrize(
    ("train", "valid"),
    [("Train", "Test"), ("train", "dev"), ("training_set", "test_set"), ("TRAIN", "VAL"), ("trainset", "Eval"), ("trn", "tst")],
)
@pytest.mark.parametrize("wrapper", [".", "dogs_vs_cats", "a/b/c"])
def test_splits_are_read_in_any_spelling_and_nesting(tmp_path: Path, train: str, valid: str, wrapper: str) -> None:
    splits(tmp_path / wrapper, train, valid)
    photos(tmp_path, "__MACOSX/train")
    assert count(tmp_path) == BOTH
    assert skipped(tmp_path) == {"__MACOSX": "hidden"}


def test_splits_with_the_same_folder_inside_are_read(tmp_path: Path) -> None:
    """A popular dataset of Kaggle has training_set/training_set/cats and test_set/test_set/cats."""
    splits(tmp_path, "training_set/training_set", "test_set/test_set")
    assert count(tmp_path) == BOTH
    assert read_dataset(tmp_path).samples[0].name == "training_set/training_set/cats/0.jpg"


@pytest.mark.parametrize(
    ("train", "valid"),
    [
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("cats-and-dogs train", "cats-and-dogs val"),
        ("train_v2", "test_v2"),
        ("x_train", "x_test"),
        ("my.Training", "my.Testing"),
        ("train_dir", "dev_dir"),
    ],
)
def test_splits_that_differ_in_one_word_are_read(tmp_path: Path, train: str, valid: str) -> None:
    splits(tmp_path, train, valid)
    touch(tmp_path, "seg_pred/seg_pred/1.jpg", "seg_pred/seg_pred/2.jpg")
    assert count(tmp_path) == BOTH
    assert skipped(tmp_path) == {"seg_pred": "not a split; splits are named train, valid (or val, dev, eval) and test"}


def test_classes_whose_names_contain_the_word_for_a_split_are_classes(tmp_path: Path) -> None:
    photos(tmp_path, "model train", "steam train", "crash test")
    assert read_dataset(tmp_path).classes == ("crash test", "model train", "steam train")


@pytest.mark.parametrize("name", ["valid", "Test"])
def test_a_split_that_cannot_be_read_is_named(tmp_path: Path, name: str) -> None:
    photos(tmp_path, "train/cats", "train/dogs")
    touch(tmp_path, "README.md", "labels.csv")
    (tmp_path / name).symlink_to("/nowhere")
    assert count(tmp_path) == {("train", "cats"): 2, ("train", "dogs"): 2, ("valid", "cats"): 1, ("valid", "dogs"): 1}
    assert skipped(tmp_path) == {name: "broken link"}
    (tmp_path / name).unlink()
    os.mkfifo(tmp_path / name)
    assert skipped(tmp_path) == {name: "not a supported image type"}


@pytest.mark.parametrize("wrapper", ["PetImages", "data/animals"])
def test_classes_without_splits_are_read_in_any_nesting(tmp_path: Path, wrapper: str) -> None:
    photos(tmp_path / wrapper, "cats", "dogs")
    touch(tmp_path, "readme.txt")
    assert count(tmp_path) == HELD_OUT


def test_the_splits_are_found_next_to_other_folders(tmp_path: Path) -> None:
    splits(tmp_path / "data", "train", "valid")
    photos(tmp_path, "docs")
    touch(tmp_path, "notebooks/a.ipynb")
    assert count(tmp_path) == BOTH
    assert skipped(tmp_path) == {"docs": "not a split; splits are named train, valid (or val, dev, eval) and test"}


@pytest.mark.parametrize("name", ["holiday", "train2/x", "extra"])
def test_an_unused_folder_next_to_the_splits_is_named(tmp_path: Path, name: str) -> None:
    splits(tmp_path, "train", "valid")
    photos(tmp_path, f"{name}/cats")
    assert count(tmp_path) == BOTH
    assert skipped(tmp_path) == {name.split("/")[0]: "not a split; splits are named train, valid (or val, dev, eval) and test"}


def test_a_test_split_next_to_a_validation_split_is_kept_for_evaluation(tmp_path: Path) -> None:
    splits(tmp_path, "train", "val")
    photos(tmp_path, "Test/cats", "Test/dogs", count=1)
    assert count(tmp_path) == BOTH
    assert skipped(tmp_path) == {}
    assert read_dataset(tmp_path).test_split == "Test"
    assert len(read_split(tmp_path, "test", ["cats", "dogs"]).samples) == 2


def test_loose_photos_are_named(tmp_path: Path) -> None:
    splits(tmp_path, "train", "valid")
    touch(tmp_path, "train/a.jpg", "valid/b.png", "c.jpg", "DATASET.json")
    assert count(tmp_path) == BOTH
    assert skipped(tmp_path) == dict.fromkeys(["train/a.jpg", "valid/b.png", "c.jpg"], "not in a class folder")


def test_a_copy_of_the_class_folders_in_one_more_folder_is_not_a_class(tmp_path: Path) -> None:
    photos(tmp_path, "sick", "well", "cell_images/sick", "cell_images/well")
    assert read_dataset(tmp_path).classes == ("sick", "well")
    assert skipped(tmp_path) == {"cell_images": "contains the other class folders again"}


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (
            ["part a/cats", "part a/dogs", "part b/cats", "part b/dogs"],
            "The folders part a and part b in {root} look like splits, not classes: each contains cats and "
            "dogs and no photos of "
            "its own. Splits are named train, valid (or val, dev, eval) and test. If they are classes, move "
            "their photos out of "
            "the inner folders.",
        ),
        (
            ["learn/all/cats", "learn/all/dogs", "check/all/cats", "check/all/dogs"],
            "The folders check and learn in {root} look like splits, not classes: each contains cats and dogs and no photos "
            "of its own. Splits are named train, valid (or val, dev, eval) and test. If they are classes, move their photos "
            "out of the inner folders.",
        ),
        (
            ["cats/train", "cats/test", "dogs/train", "dogs/test"],
            "The folders cats and dogs in {root} each contain their own train folder with photos. Expected "
            "SPLIT/CLASS, such as "
            "train/cats, instead of cats/train.",
        ),
        (
            ["cats/train", "cats/valid", "dogs"],
            "The folder cats in {root} has its own folders train and valid, but dogs next to it has none. Expected SPLIT/CLASS "
            "for all classes, such as train/cats and train/dogs, or no splits.",
        ),
        (
            ["cats/train", "cats/test", "dogs", "birds/sparrows"],
            "The folder cats in {root} has its own folders train and test, but birds and dogs next to it have none. Expected "
            "SPLIT/CLASS for all classes, such as train/cats and train/birds, or no splits.",
        ),
        (
            ["fold1/train/cats", "fold1/train/dogs", "fold2/train/cats", "fold2/train/dogs"],
            "{root} contains several datasets: fold1 and fold2. Choose one of these folders.",
        ),
        (
            ["train", "bus", "car"],
            "Found no class folders and 3 photos of its own in {root}/train. At least two are needed, one "
            "folder per class. Move "
            "the folders bus, car into {root}/train if they are classes.",
        ),
        (
            ["cats", "unlabeled"],
            "The class name 'unlabeled' is reserved for photos without a label. Rename the folder {root}/unlabeled.",
        ),
        (
            ["train/dogs", os.fsdecode(b"train/caf\xe9")],
            "The class name 'caf\\udce9' has control characters or is not UTF-8. Rename the folder {root}/train/caf\udce9.",
        ),
        (
            ["cats", "dogs\n"],
            "The class name 'dogs\\n' has control characters or is not UTF-8. Rename the folder {root}/dogs\n.",
        ),
        (
            ["valid/cats", "traning/cats"],
            "{root} has a folder valid but no folder train. Rename the folder of the training photos to train.",
        ),
    ],
)
def test_folders_that_are_not_classes_are_rejected(tmp_path: Path, folders: list[str], message: str) -> None:
    with pytest.raises(DataError) as raised:
        read_dataset(photos(tmp_path, *folders))
    assert str(raised.value) == message.format(root=tmp_path)


@pytest.mark.parametrize("separator", [".", "_", "-", " ", ""])
def test_labels_in_file_names_are_recognized(tmp_path: Path, separator: str) -> None:
    touch(tmp_path, *(f"train/train/{label}{separator}{i}.jpg" for label in ("cat", "dog") for i in range(9)))
    touch(tmp_path, *(f"test1/{i}.jpg" for i in range(4)))
    folder = tmp_path / "train" / "train"
    with pytest.raises(DataError) as raised:
        read_dataset(tmp_path)
    assert str(raised.value) == (
        f"{folder} has no class folders, but 18 photos named like cat{separator}0.jpg and dog{separator}0.jpg. Move the photos "
        f"of each class into a folder of its own (train/cat, train/dog). To unpack the archive of Kaggle's Dogs "
        f"vs. Cats so, use "
        f"`finetune download kaggle OUT --archive FILE`."
    )


def test_names_of_cameras_are_not_labels() -> None:
    assert labels_in_names([Path(f"{name}_{i:04}.jpg") for name in ("IMG", "DSC", "holiday") for i in range(5)]) == []
    assert labels_in_names([Path(f"photo{i}.jpg") for i in range(20)]) == []
    assert labels_in_names([Path(f"{name}_{i}.jpg") for name in ("great_dane", "pug") for i in range(5)]) == [
        "great_dane",
        "pug",
    ]


def test_unicode_forms_of_a_name_are_the_same_class(tmp_path: Path) -> None:
    nfc, nfd = (unicodedata.normalize(form, "bébé") for form in ("NFC", "NFD"))
    photos(tmp_path, f"train/{nfc}", f"train/{nfd}/more", f"valid/{nfd}", "train/dogs", "valid/dogs")
    assert read_dataset(tmp_path).classes == (nfc, "dogs")
    assert count(tmp_path) == {("train", nfc): 6, ("train", "dogs"): 3, ("valid", nfc): 3, ("valid", "dogs"): 3}
    for classes in ([nfc, "dogs"], [nfd, "dogs"]):
        assert [sample.label for sample in read_split(tmp_path, "valid", classes).samples] == [0, 0, 0, 1, 1, 1]


def test_links_to_class_folders_are_followed(tmp_path: Path) -> None:
    photos(tmp_path / "store", "cats", "dogs")
    (tmp_path / "data").mkdir()
    for name in ("cats", "dogs"):
        (tmp_path / "data" / name).symlink_to(f"../store/{name}")
    assert count(tmp_path / "data") == HELD_OUT
    assert [path.relative_to(tmp_path).as_posix() for path in ImageSearch().walk([tmp_path / "data"])] == [
        f"data/{name}/{number}.jpg" for name in ("cats", "dogs") for number in range(3)
    ]


def test_each_folder_is_visited_once(tmp_path: Path) -> None:
    """Links that lead up or around would repeat photos, or never end. A photo has the label of its real folder."""
    splits(tmp_path, "train", "valid")
    links = {
        "train/cats/a": ".",
        "train/cats/b": "..",
        "train/cats/c": "../../valid",
        "train/cats/d": "../dogs",
        "train/dogs/e": "../cats",
        "valid/cats/f": "../../..",
        "train/kittens": "cats",
        "train/cats/g": "g",
        "train/cats/h": "nowhere",
    }
    for name, target in links.items():
        (tmp_path / name).symlink_to(target)
    assert count(tmp_path) == BOTH
    again, above = "the same folder as one that is included", "link to a folder that contains it"
    assert skipped(tmp_path) == {
        "train/cats/a": above,
        "train/cats/b": above,
        "train/cats/c/cats": again,
        "train/cats/c/dogs": again,
        "train/cats/d": again,
        "train/dogs/e": again,
        "valid/cats/f": above,
        "train/kittens": again,
        "train/cats/g": "broken link",
        "train/cats/h": "broken link",
    }


def test_each_folder_is_read_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "valid"):
        photos(tmp_path / "wrapper" / split, "cats", "dogs/puppies", "birds")
    photos(tmp_path / "wrapper", "more/cats", ".hidden/dogs")
    read: Counter[str] = Counter()
    scandir = os.scandir

    def count_and_scan(folder: Path) -> object:
        read[folder.relative_to(tmp_path).as_posix()] += 1
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", count_and_scan)
    monkeypatch.setattr(os, "listdir", count_and_scan)
    assert len(read_dataset(tmp_path).samples) == 18
    classes = ("cats", "dogs", "dogs/puppies", "birds")
    expected = {".", "wrapper", "wrapper/more", "wrapper/more/cats"}
    expected |= {f"wrapper/{split}{name}" for split in ("train", "valid") for name in ("", *(f"/{label}" for label in classes))}
    assert read == dict.fromkeys(expected, 1)


def test_two_links_between_two_folders_end(tmp_path: Path) -> None:
    photos(tmp_path, "one", "two")
    (tmp_path / "one" / "to two").symlink_to("../two")
    (tmp_path / "two" / "to one").symlink_to("../one")
    search = ImageSearch()
    assert len(list(search.walk([tmp_path]))) == 6
    assert [entry.path.name for entry in search.skipped] == ["to two", "to one"]


def test_files_that_are_not_regular_are_skipped(tmp_path: Path) -> None:
    splits(tmp_path, "train", "valid")
    os.mkfifo(tmp_path / "train" / "cats" / "pipe.jpg")
    (tmp_path / "train" / "cats" / "zero.jpg").symlink_to("/dev/zero")
    (tmp_path / "train" / "cats" / "gone.jpg").symlink_to("nowhere.jpg")
    here = Path.cwd()
    with socket.socket(socket.AF_UNIX) as listening:
        os.chdir(tmp_path / "train" / "cats")  # a socket's path must be short
        try:
            listening.bind("socket.jpg")
        finally:
            os.chdir(here)
        assert count(tmp_path) == BOTH
        assert skipped(tmp_path) == {
            "train/cats/gone.jpg": "broken link",
            "train/cats/pipe.jpg": "not a regular file",
            "train/cats/socket.jpg": "not a regular file",
            "train/cats/zero.jpg": "not a regular file",
        }
    for name in ("pipe.jpg", "zero.jpg"):
        with pytest.raises(ImageError, match="not a regular file"):
            read_image_file(tmp_path / "train" / "cats" / name)
    with pytest.raises(ImageError, match="NUL"):
        read_image_file(Path("a\0b.jpg"))


def test_an_unreadable_folder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests may run as root, who can read every folder."""
    splits(tmp_path, "train", "valid")
    photos(tmp_path, "train/cats/batch2")
    scandir = os.scandir

    def deny(path: Path) -> object:
        if Path(path).name == "batch2":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", deny)
    assert count(tmp_path) == BOTH
    assert skipped(tmp_path) == {"train/cats/batch2": "cannot be read (Permission denied)"}


@pytest.mark.parametrize(
    "files",
    [
        ("runs/cats-vgg16/config.yaml", "runs/cats-vgg16/bundle/manifest.json", "runs/cats-vgg16/plots/roc.png"),
        ("runs/killed/config.yaml", "runs/stopped/config.yaml", "runs/stopped/checkpoint.pt"),
        ("runs/compare/compare.json", "runs/compare/compare.md", "runs/compare/compare.png"),
        ("evaluations/a/metrics.json", "evaluations/a/predictions.csv", "evaluations/a/plots/roc.png"),
        ("bundle/manifest.json", "bundle/model.onnx", "bundle/plots/roc.png"),
        ("head/manifest.json", "head/head.safetensors", "head/plots/roc.png"),
        ("visualizations/run/filters.png", "visualizations/run/maps/00-input.png"),
        ("scores/_settings.json", "scores/part-00000000.parquet"),
        ("venv/pyvenv.cfg", "venv/lib/python3/site-packages/matplotlib/home.png"),
    ],
)
@pytest.mark.parametrize("parent", [".", "cats", "train"])
def test_results_of_commands_are_not_classes(tmp_path: Path, files: tuple[str, ...], parent: str) -> None:
    photos(tmp_path / "train" if parent == "train" else tmp_path, "cats", "dogs")
    touch(tmp_path / parent, *files)
    assert count(tmp_path) == HELD_OUT
    inside = "" if parent == "." else f"{parent}/"
    assert skipped(tmp_path) == {f"{inside}{files[0].split('/')[0]}": "results of a command, not photos"}


def test_results_next_to_the_splits_are_named(tmp_path: Path) -> None:
    splits(tmp_path / "data", "train", "valid")
    touch(tmp_path, "runs/cats/config.yaml", "runs/cats/bundle/manifest.json", "runs/cats/plots/roc.png")
    touch(tmp_path / "data", "bundle/manifest.json", "bundle/model.onnx", "bundle/plots/roc.png")
    assert count(tmp_path) == BOTH
    assert skipped(tmp_path) == dict.fromkeys(["runs", "data/bundle"], "results of a command, not photos")


def test_a_class_may_contain_files_with_the_names_of_results(tmp_path: Path) -> None:
    photos(tmp_path, "cats", "dogs")
    touch(tmp_path, "cats/metrics.json", "cats/manifest.json", "dogs/config.yaml")
    assert count(tmp_path) == HELD_OUT


def test_what_was_skipped_is_summarized_by_reason(tmp_path: Path) -> None:
    photos(tmp_path, "cats", "dogs")
    touch(tmp_path, "cats/Thumbs.db", *(f"dogs/{i}.svg" for i in range(5)), "dogs/.DS_Store", "dogs/._0.jpg", "cats/.git/x")
    assert describe_skipped(read_dataset(tmp_path).skipped, tmp_path) == [
        "4 skipped (hidden): cats/.git, cats/Thumbs.db, dogs/.DS_Store, ...",
        "5 skipped (not a supported image type): dogs/0.svg, dogs/1.svg, dogs/2.svg, ...",
    ]


def test_a_folder_of_other_files_only_is_explained(tmp_path: Path) -> None:
    touch(tmp_path, "cats/0.svg", "dogs/0.svg")
    with pytest.raises(DataError, match=r"No photos in the class folders of .*not a supported image type\): cats/0\.svg"):
        read_dataset(tmp_path)


# Photos of none of the classes


@pytest.mark.parametrize("name", ["none", "Neither", "NONE "])
def test_a_folder_of_none_of_the_classes_is_not_a_class(tmp_path: Path, name: str) -> None:
    photos(splits(tmp_path, "train", "valid"), f"train/{name}", f"valid/{name}", count=2)
    dataset = read_dataset(tmp_path)
    assert dataset.classes == ("cats", "dogs")
    assert count(tmp_path) == BOTH
    assert [(sample.name, sample.label) for sample in dataset.neither] == [
        (f"{split}/{name}/{number}.jpg", NO_LABEL) for split in ("train", "valid") for number in range(2)
    ]
    assert dataset.skipped == ()
    listed = read_split(tmp_path, "train", ["cats", "dogs"])
    assert [sample.name for sample in listed.neither] == [f"train/{name}/0.jpg", f"train/{name}/1.jpg"]
    assert len(listed.samples) == 6


def test_without_splits_the_folder_next_to_the_classes_is_measured(tmp_path: Path) -> None:
    photos(tmp_path, "cats", "dogs", "none")
    dataset = read_dataset(tmp_path)
    assert dataset.classes == ("cats", "dogs")
    assert count(tmp_path) == HELD_OUT
    assert [sample.name for sample in dataset.neither] == ["none/0.jpg", "none/1.jpg", "none/2.jpg"]


def test_a_bundle_may_have_a_class_of_that_name(tmp_path: Path) -> None:
    photos(tmp_path, "valid/none", "valid/rock")
    listed = read_split(tmp_path, "valid", ["none", "rock"])
    assert [sample.label for sample in listed.samples] == [0, 0, 0, 1, 1, 1]
    assert listed.neither == []


def test_a_folder_of_none_of_the_classes_next_to_the_splits_is_named(tmp_path: Path) -> None:
    photos(splits(tmp_path, "train", "valid"), "neither")
    assert skipped(tmp_path) == {
        "neither": "photos of none of the classes belong next to the class folders of a split, as in valid/none"
    }


def test_a_folder_of_none_of_the_classes_is_not_the_second_class(tmp_path: Path) -> None:
    photos(tmp_path, "train/cats", "train/none")
    with pytest.raises(DataError) as raised:
        read_dataset(tmp_path)
    assert str(raised.value) == (
        f"Found only one class (cats) in {tmp_path}/train. At least two are needed, one folder per class. The name none or "
        "neither stands for photos of none of the classes."
    )


def test_extra_photos_of_none_of_the_classes_are_named(tmp_path: Path) -> None:
    photos(splits(tmp_path / "data", "train", "valid"))
    photos(tmp_path / "extra", "train/cats", "train/neither", count=2)
    dataset = read_dataset(tmp_path / "data", extra=[tmp_path / "extra"])
    assert {entry.path.relative_to(tmp_path).as_posix(): entry.reason for entry in dataset.skipped} == {
        f"extra/train/neither/{number}.jpg": "photos of none of the classes, which --extra-data does not add"
        for number in range(2)
    }


# Class names


def test_spaces_around_a_folder_name_are_not_part_of_the_class(tmp_path: Path) -> None:
    photos(tmp_path, "train/cats", "train/dogs ", "valid/cats ", "valid/dogs")
    assert count(tmp_path) == BOTH
    assert [sample.label for sample in read_split(tmp_path, "valid", ["cats", "dogs "]).samples] == [0, 0, 0, 1, 1, 1]


def test_a_folder_name_of_spaces_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"The class name '  ' has only spaces\. Rename the folder "):
        read_dataset(photos(tmp_path, "cats", "dogs", "  "))


@pytest.mark.parametrize(
    ("names", "groups"),
    [
        (["cats", "Dogs", "dogs"], [["Dogs", "dogs"]]),
        (["dog", "dogs", "Dogs", "cat"], [["dog", "dogs", "Dogs"]]),
        (["my pug", "my_pug", "My-Pug"], [["my pug", "my_pug", "My-Pug"]]),
        (["ﬁsh", "fish"], [["ﬁsh", "fish"]]),
        (["dogs\u200b", "dogs", "do\u00a0gs", "do gs"], [["dogs\u200b", "dogs"], ["do\u00a0gs", "do gs"]]),
        (["puppy", "puppies", "fox", "foxes"], [["puppy", "puppies"], ["fox", "foxes"]]),
        (["a", "A"], [["a", "A"]]),
        (["1", "-1", "10", "1-0", "0", "a", "as", "b-", "b", "bus", "glass", "🐱", "🐶", "é", "e", "猫"], []),
    ],
)  # fmt: skip
def test_names_that_probably_mean_the_same_class(names: list[str], groups: list[list[str]]) -> None:
    assert find_similar(names) == groups
