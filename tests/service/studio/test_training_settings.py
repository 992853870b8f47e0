"""What a form may set, and which data it may name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from finetune import config
from models.errors import ConfigError
from service.settings import Settings
from service.studio import training_settings
from service.studio.data_source import describe_data, resolve_data
from service.studio.training_settings import (
    DEFAULTS,
    FIELDS,
    chosen_head,
    form_values,
    parse_settings,
    training_command,
)


def test_a_form_becomes_a_command_that_the_command_line_accepts(tmp_path: Path) -> None:
    form = {
        "backbone": "timm:convnext_tiny",
        "epochs": "3",
        "unfreeze": "layer3 layer4",
        "augment": "1",
        "class_weights": "balanced",
        "sampling": "none",
        "lr": "1e-3",
        "target_precision": "dogs=0.99,cats=0.9",
        "allow_leakage": "",
        "optimizer": "",
    }
    settings = parse_settings(form)
    command = training_command(
        settings, run="a", data_dir=tmp_path, output_dir=tmp_path / "run", reviews=None, progress_file=tmp_path / "progress"
    )
    assert command[:4] == [sys.executable, "-m", "finetune", "train"]
    parsed = _parse(command[4:])
    assert (parsed.backbone, parsed.epochs, parsed.unfreeze, parsed.lr) == (
        "timm:convnext_tiny",
        3,
        ("layer3", "layer4"),
        0.001,
    )
    assert (parsed.augment, parsed.allow_leakage, parsed.class_weights) == (True, False, "balanced")
    assert (parsed.data_dir, parsed.name, parsed.target_precision) == (tmp_path, "a", "dogs=0.99,cats=0.9")


def _parse(words: list[str]) -> config.Config:
    import argparse

    from finetune.cli.train import add_arguments

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return config.from_arguments(parser.parse_args(words))


def test_every_field_is_a_setting_of_the_command() -> None:
    assert set(FIELDS) <= set(config.Config.__dataclass_fields__)


def test_defaults_and_settings_of_epochs_are_those_of_the_command() -> None:
    fields = config.Config.__dataclass_fields__
    assert {name: fields[name].default for name in DEFAULTS} == DEFAULTS
    assert set(training_settings.EPOCH_SETTINGS) == set(config.EPOCH_SETTINGS)


@pytest.mark.parametrize(
    ("name", "text"),
    [("epochs", "2"), ("optimizer", "adam"), ("lr", "0.1"), ("momentum", "0"), ("weight_decay", "0"), ("lr_schedule", "cosine"),
     ("patience", "0"), ("patience", "2"), ("unfreeze", "layer4"), ("augment", "0"), ("augment", "1"), ("batch_size", "8")],
)  # fmt: skip
def test_the_form_rejects_what_the_command_rejects_for_a_logistic_head(name: str, text: str, tmp_path: Path) -> None:
    form = {"backbone": "vgg16", name: text}
    paths = dict.fromkeys(("data_dir", "output_dir", "progress_file"), tmp_path)
    words = training_command(parse_settings(form) | {"head": "logistic"}, run="a", reviews=None, **paths)
    is_valid, is_accepted = True, True
    try:
        _parse(words[4:])
    except ConfigError:
        is_valid = False
    try:
        parse_settings(form | {"head": "logistic"})
    except ConfigError:
        is_accepted = False
    assert is_accepted == is_valid
    assert parse_settings(form | {"head": "linear"})["head"] == "linear"


def test_the_head_is_known_unless_the_recipe_decides() -> None:
    form = {"backbone": "vgg16"}
    assert chosen_head(parse_settings(form | {"patience": "0", "augment": "0"})) == ""
    assert chosen_head(parse_settings(form | {"momentum": "0"})) == "linear"
    assert chosen_head(parse_settings(form | {"head": "logistic"})) == "logistic"


@pytest.mark.parametrize("form", [{"penalty": "0.001"}, {"normalization": "standard"}, {"penalty": "1", "head": "logistic"}])
def test_a_setting_of_logistic_regression_selects_it(form: dict[str, str], tmp_path: Path) -> None:
    paths = dict.fromkeys(("data_dir", "output_dir", "progress_file"), tmp_path)
    words = training_command(parse_settings({"backbone": "a+b", **form}), run="a", reviews=None, **paths)
    parsed = _parse(words[4:])
    assert (parsed.backbone, parsed.head) == ("a+b", "logistic")
    assert parsed.penalty == (float(form["penalty"]) if "penalty" in form else None)
    assert parsed.normalization == form.get("normalization", "unit")


def test_a_table_of_labels_is_inside_the_data_folder(tmp_path: Path) -> None:
    (tmp_path / "data" / "clinic").mkdir(parents=True)
    for table in ("secret.csv", "data/clinic/labels.csv", "data/notes.txt"):
        (tmp_path / table).write_text("image,label\n")
    (tmp_path / "data" / "link.csv").symlink_to(tmp_path / "secret.csv")

    def command(labels: str) -> list[str]:
        settings = parse_settings({"backbone": "vgg16", "labels": labels})
        data, paths = tmp_path / "data", {"output_dir": tmp_path / "run", "progress_file": tmp_path / "progress"}
        return training_command(settings, run="a", data_dir=data, reviews=None, **paths)

    parsed = _parse(command("clinic/labels.csv")[4:])
    assert (parsed.labels, parsed.data_dir) == (str(tmp_path / "data/clinic/labels.csv"), tmp_path / "data" / "clinic")
    for labels in ("../secret.csv", "link.csv", str(tmp_path / "secret.csv"), "none.csv", "notes.txt", "clinic", "hf://beans"):
        with pytest.raises(ConfigError) as error:
            command(labels)
        assert str(error.value) == (
            f"Table of labels: the data folder has no table {labels[:80]!r} (.csv, .tsv, .parquet, .jsonl)."
        )


def test_the_settings_of_a_model_fill_the_form() -> None:
    saved = config.Config(data_dir=Path("x"), backbone="vgg16", epochs=3, unfreeze=("a", "b"), augment=True).as_dict()
    values = form_values(saved)
    assert {name: values[name] for name in ("backbone", "epochs", "unfreeze", "augment")} == {
        "backbone": "vgg16",
        "epochs": "3",
        "unfreeze": "a b",
        "augment": "1",
    }
    assert "data_dir" not in values
    assert "allow_leakage" not in values


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "Network: choose one."),
        ({"backbone": "--help"}, "Network: '--help' is not valid. Any name that `finetune models` lists, timm:NAME, or joined "
         "networks such as A+B."),
        ({"epochs": "-3"}, "Epochs: expected 1 to 10,000 (got -3)."),
        ({"epochs": "many"}, "Epochs: expected a whole number (got 'many')."),
        ({"lr": "nan"}, "Learning rate: expected 1e-09 to 100 (got nan)."),
        ({"optimizer": "rmsprop"}, "Optimizer: 'rmsprop' is not valid. Use sgd, adam."),
        ({"augment": "maybe"}, "Random crops, flips and colors: expected 0 or 1 (got 'maybe')."),
        ({"unfreeze": "layer4; rm"}, "Also train these layers: 'layer4; rm' is not valid. For example layer4 or features.28, "
         "separated by spaces. Slower: every epoch runs the complete network."),
        ({"class_weights": "balanced", "sampling": "balanced"}, "Class weights and Sampling both balance the classes. Use one "
         "of them."),
        ({"head": "logistic", "epochs": "3"}, 'Last layer: logistic regression has no epochs. Reset "Epochs", or select '
         '"Linear layer, SGD or Adam".'),
        ({"head": "logistic", "lr": "0.1", "momentum": "0"}, 'Last layer: logistic regression has no epochs. Reset "Learning '
         'rate" and "Momentum", or select "Linear layer, SGD or Adam".'),
        ({"penalty": "0.001", "lr": "0.1"}, 'Last layer: logistic regression has no epochs. Reset "Learning rate", or select '
         '"Linear layer, SGD or Adam".'),
        ({"head": "linear", "penalty": "1", "normalization": "none"}, 'Last layer: the linear layer is not trained by logistic '
         'regression. Reset "L2 penalty" and "Embeddings of logistic regression", or select "Logistic regression: fast, no '
         'epochs".'),
        ({"head": "logistic", "augment": "1"}, 'Last layer: logistic regression needs frozen layers. Reset "Random crops, '
         'flips and colors", or select "Linear layer, SGD or Adam".'),
    ],
)  # fmt: skip
def test_an_invalid_value_is_explained(values: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_settings({"backbone": "vgg16"} | values if values else {})
    assert str(error.value) == message


@pytest.fixture
def studio(tmp_path: Path) -> Settings:
    (tmp_path / "studio" / "datasets" / "pets").mkdir(parents=True)
    (tmp_path / "data" / "birds").mkdir(parents=True)
    (tmp_path / "secret").mkdir()
    (tmp_path / "data" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "studio" / "datasets" / "linked").symlink_to(tmp_path / "secret")
    return Settings(studio=True, studio_dir=tmp_path / "studio", data_dir=tmp_path / "data")


@pytest.mark.parametrize(
    ("data", "folder"),
    [
        ("dataset:pets", "studio/datasets/pets"),
        ("folder:birds", "data/birds"),
        ("folder:", "data"),
        ("folder:./birds/", "data/birds"),
    ],
)
def test_data_sets_and_folders_below_the_data_folder_are_found(
    studio: Settings, tmp_path: Path, data: str, folder: str
) -> None:
    assert resolve_data(studio, data) == tmp_path / folder


@pytest.mark.parametrize(
    "data",
    ["folder:../secret", "folder:link", "folder:/etc", "folder:\0", "dataset:../../secret", "dataset:linked", "dataset:",
     "dataset:..", "dataset:none", "folder:none", "", "/etc", "pets"],
)  # fmt: skip
def test_no_other_folder_can_be_named(studio: Settings, data: str) -> None:
    with pytest.raises(ConfigError, match=r"^Data: (there is no|choose)"):
        resolve_data(studio, data)


def test_without_a_data_folder_only_data_sets_can_be_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^Data: choose a dataset, or a folder below DATA_DIR\.$"):
        resolve_data(Settings(studio=True, studio_dir=tmp_path), "folder:")


def test_data_is_named_for_people() -> None:
    texts = {data: describe_data(data) for data in ("dataset:pets", "folder:birds", "folder:")}
    assert texts == {"dataset:pets": "pets", "folder:birds": "DATA_DIR/birds", "folder:": "DATA_DIR"}
