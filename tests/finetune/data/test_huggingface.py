"""Datasets of the Hugging Face library, from local folders."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest

from finetune.config import default_data_dir, from_mapping
from finetune.data.image_folder import read_dataset
from finetune.data.label_source import locate_data
from finetune.data.label_table import read_label_table
from models.errors import DataError
from tests.helpers.tiny_network import COLORS, color_folder, finetune, paint


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def save(root: Path, **splits: int) -> Path:
    """Save a dataset with so many images in each split, as ``save_to_disk`` does."""
    features = datasets.Features(
        {
            "photo": datasets.Image(),
            "labels": datasets.ClassLabel(names=["cat", "dog/wolf"]),
            "group": datasets.Value("string"),
            "light": datasets.ClassLabel(names=["day", "night"]),
            "exposure": datasets.Value("float32"),
            "boxes": datasets.Sequence(datasets.Value("int32")),
        }
    )
    parts = {}
    for number, (split, count) in enumerate(splits.items()):
        rows: dict[str, list[Any]] = {
            "photo": [
                str(paint(root / "src" / f"{split}-{i}.png", COLORS[i % 2], seed=100 * number + i)) for i in range(count)
            ],
            "labels": [i % 2 for i in range(count)],
            "group": [f"{split} {i // 2}" for i in range(count)],
            "light": [i % 2 if i else -1 for i in range(count)],
            "exposure": [0.5 * i for i in range(count)],
            "boxes": [[1, 2]] * count,
        }
        parts[split] = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(parts).save_to_disk(str(root / "saved"))
    return root / "saved"


def test_a_saved_data_set_becomes_a_folder_with_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = f"hf://{save(tmp_path, train=6, validation=4, test=2, unsupervised=2)}"
    folder, table = locate_data(tmp_path / "data", source)
    assert (folder, table) == (tmp_path / "data", tmp_path / "data" / "labels.parquet")
    assert capsys.readouterr().out == f"Saved 12 images of {source} to {folder}. Left out: unsupervised.\n"
    dataset = read_dataset(folder, labels=table)
    assert dataset.classes == ("cat", "dog-wolf")
    assert [len(dataset.in_split(split)) for split in ("train", "valid")] == [6, 4]
    assert dataset.test_split == "test"
    first, second = (next(s for s in dataset.samples if s.name == f"images/train/00000{i}.png") for i in range(2))
    assert (first.group, first.facets) == ("train 0", {"exposure": "0.0"})
    assert (second.group, second.facets) == ("train 0", {"light": "night", "exposure": "0.5"})
    assert first.path.read_bytes() == (tmp_path / "src" / "train-0.png").read_bytes()


def test_a_data_set_is_saved_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f"hf://{save(tmp_path, train=4)}"
    locate_data(tmp_path / "data", source)
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert locate_data(tmp_path / "data", source)[1] == tmp_path / "data" / "labels.parquet"
    with pytest.raises(DataError) as caught:
        locate_data(tmp_path / "data", "hf://other")
    assert str(caught.value) == f"{tmp_path / 'data'} contains {source}, not hf://other. Set --data-dir to another folder."


def test_a_folder_of_images_is_loaded_with_its_splits(tmp_path: Path) -> None:
    data = color_folder(tmp_path / "pets", train=3, valid=2)
    _, table = locate_data(tmp_path / "out", f"hf://{data}")
    assert table
    rows = read_label_table(table, tmp_path / "out").rows
    assert {(row.split, row.label) for row in rows} == set(itertools.product(("train", "valid"), ("blue", "red")))
    assert len(rows) == 10


def test_images_without_a_label_are_left_out(tmp_path: Path) -> None:
    saved = save(tmp_path, train=4, test=2)
    parts = datasets.load_from_disk(str(saved))
    parts["test"] = parts["test"].map(lambda row: {"labels": -1})
    parts.save_to_disk(str(tmp_path / "public"))
    _, table = locate_data(tmp_path / "data", f"hf://{tmp_path / 'public'}")
    assert table
    assert {row.split for row in read_label_table(table, tmp_path / "data").rows} == {"train"}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"text": ["a"], "label": [0]},
            "has no column of images (found: text, label). Use a dataset for image",
        ),
        ({"text": ["a"]}, "has no column of images (found: text). Use a dataset for image"),
    ],
)
def test_other_data_sets_are_rejected(tmp_path: Path, columns: dict[str, list[Any]], message: str) -> None:
    datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns)}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(DataError) as caught:
        locate_data(tmp_path / "data", f"hf://{tmp_path / 'saved'}")
    assert str(caught.value) == f"hf://{tmp_path / 'saved'} {message} classification."
    assert not (tmp_path / "data").exists()


def test_without_known_splits_or_without_the_data_set_a_sentence_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has no split named train, valid or test \(found: extra\)\.$"):
        locate_data(tmp_path / "data", f"hf://{save(tmp_path, extra=2)}")
    with pytest.raises(DataError, match=r"^Cannot load hf:///no/such/folder \(.+\)\. Check the name, the config"):
        locate_data(tmp_path / "data", "hf:///no/such/folder")


def test_without_the_library_a_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert finetune("audit", tmp_path / "data", "--labels", "hf://beans") == (
        2,
        "",
        "finetune: hf://beans requires the library datasets. Install the library with: pip install -e '.[huggingface]'\n",
    )


def test_a_data_set_is_saved_to_a_folder_of_its_name() -> None:
    assert default_data_dir("hf://user/pets:small") == Path("data/pets-small")
    assert from_mapping({"labels": "hf://beans"}).data_dir == Path("data/beans")


@pytest.mark.slow
def test_a_network_trains_on_a_data_set(tmp_path: Path, tiny_weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = f"hf://{save(tmp_path, train=8, validation=4)}"
    flags = ("--labels", source, "--backbone", "tiny", "--weights", tiny_weights, "--output-dir", tmp_path / "run")
    code, out, _ = finetune("train", *flags)
    assert code == 0
    assert f"Saved 12 images of {source} to data/saved." in out
    assert f"  finetune evaluate {tmp_path}/run/bundle --data-dir data/saved --labels {source} --folds 5\n" in out
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {row["column"] for row in metrics["slices"]} == {"light", "exposure"}
    assert metrics["groups"] == 2
