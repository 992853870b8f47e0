from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetune import config as settings
from finetune.__main__ import main
from finetune.config import Config
from models.artifacts.paths import default_cache_dir
from models.errors import ConfigError
from models.networks.spec import Recipe


def parse(*words: str) -> Config:
    parser = argparse.ArgumentParser()
    settings.add_arguments(parser)
    return settings.from_arguments(parser.parse_args(words))


def write_yaml(tmp_path: Path, text: str) -> str:
    (tmp_path / "settings.yaml").write_text(text, encoding="utf-8")
    return str(tmp_path / "settings.yaml")


def test_no_arguments_give_the_defaults() -> None:
    assert parse() == Config()
    assert parse().backbone == "vgg16"


def test_flags_override_the_file_and_the_file_overrides_defaults(tmp_path: Path) -> None:
    file = write_yaml(tmp_path, "epochs: 7\nbatch-size: 8\nseed: 3\n")
    config = parse("--config", file, "--epochs", "2", "--batch-size", "16")
    assert (config.epochs, config.batch_size, config.seed, config.momentum) == (2, 16, 3, None)


def test_a_flag_can_turn_off_a_boolean_of_the_file(tmp_path: Path) -> None:
    file = write_yaml(tmp_path, "augment: yes\nfeature_cache: false\n")
    assert parse("--config", file).augment
    config = parse("--config", file, "--no-augment", "--feature-cache")
    assert not config.augment
    assert config.feature_cache


def test_yaml_values_are_converted_to_their_types(tmp_path: Path) -> None:
    text = "lr: 1e-3\nmin-delta: 0\nunfreeze: [layer4, layer3.1]\ndata-dir: ~/photos\nweights: none\noutput_dir:\n"
    config = parse("--config", write_yaml(tmp_path, text))
    assert config.lr == 0.001
    assert config.min_delta == 0.0
    assert isinstance(config.min_delta, float)
    assert config.unfreeze == ("layer4", "layer3.1")
    assert config.data_dir == Path.home() / "photos"
    assert config.weights == "none"
    assert config.output_dir is None


@pytest.mark.parametrize("text", ["unfreeze: layer4,layer3", "unfreeze: [layer4, layer3]"])
def test_a_list_may_be_yaml_or_comma_separated(tmp_path: Path, text: str) -> None:
    assert parse("--config", write_yaml(tmp_path, text)).unfreeze == ("layer4", "layer3")


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert parse("--config", write_yaml(tmp_path, "# nothing yet\n")) == Config()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", ["Unknown setting 'epoch'", "Did you mean 'epochs'?"]),
        ("batch-sise: 3", ["Unknown setting 'batch_sise'", "Did you mean 'batch_size'?"]),
        ("epochs: many", ["epochs must be a whole number", "(got 'many')"]),
        ("epochs: 1.5", ["epochs must be a whole number", "(got 1.5)"]),
        ("epochs: true", ["epochs must be a whole number", "(got True)"]),
        ("lr: fast", ["lr must be a number", "(got 'fast')"]),
        ("lr: .nan", ["--lr must be at least 0", "(got nan)"]),
        ("augment: 1", ["augment must be true or false", "(got 1)"]),
        ("backbone: 16", ["backbone must be a string", "(got 16)"]),
        ("data_dir: 5", ["data_dir must be a path", "(got 5)"]),
        ("unfreeze: 4", ["unfreeze must be a list of names", "(got 4)"]),
        ("backbone:", ["backbone must be a string", "(got None)"]),
        ("- epochs\n- lr", ["contains a list", "epochs: 10"]),
        ("epochs: [1", ["Cannot read", "YAML"]),
    ],
)
def test_an_invalid_file_is_explained_in_one_line(tmp_path: Path, text: str, words: list[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parse("--config", write_yaml(tmp_path, text))
    for word in words:
        assert word in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_reported(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Cannot read the config file .*nothing\.yaml"):
        parse("--config", str(tmp_path / "nothing.yaml"))


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"epochs": 0}, "--epochs must be at least 1 (got 0)."),
        ({"batch_size": 0}, "--batch-size must be at least 1 (got 0)."),
        ({"lr": -1.0}, "--lr must be at least 0 (got -1.0)."),
        ({"momentum": 1.5}, "--momentum must be between 0 and 1 (got 1.5)."),
        ({"valid_fraction": 0.0}, "--valid-fraction must be between 0.01 and 0.9 (got 0.0)."),
        ({"workers": -1}, "--workers must be at least 0 (got -1)."),
        ({"device": "gpu"}, "--device must be one of auto, cpu, cuda, mps (got 'gpu'). Did you mean 'cpu'?"),
        ({"lr_schedule": "cosin"}, "Did you mean 'cosine'?"),
        ({"export": "onnx"}, "--export must be one of full, graph, head (got 'onnx')."),
        ({"export": "head", "weights": "none"}, "--export head"),
    ],
)
def test_an_invalid_value_is_rejected(value: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**value)
    assert words in str(caught.value)


def test_the_recipe_fills_only_unset_settings() -> None:
    config = Config(epochs=2, lr=0.5).with_recipe(Recipe(epochs=30, batch_size=8, lr=0.1, weight_decay=1e-4))
    assert (config.epochs, config.lr) == (2, 0.5)
    assert (config.batch_size, config.weight_decay, config.momentum) == (8, 1e-4, 0.9)
    assert None not in (config.momentum, config.lr_schedule)


LOGISTIC = Recipe(head="logistic", epochs=30, lr=0.1)


@pytest.mark.parametrize(
    ("settings", "head"),
    [
        ({}, "logistic"),
        ({"batch_size": 8}, "logistic"),
        ({"epochs": 3}, "linear"),
        ({"momentum": 0.0}, "linear"),
        ({"patience": 2}, "linear"),
        ({"weights": "none"}, "linear"),
        ({"unfreeze": ("layer4",)}, "linear"),
        ({"augment": True}, "linear"),
        ({"head": "linear"}, "linear"),
    ],
)
def test_the_recipes_head_applies_unless_other_settings_need_epochs(settings: dict[str, Any], head: str) -> None:
    config = Config(**settings).with_recipe(LOGISTIC)
    assert config.head == head
    assert config.batch_size is not None
    assert (config.lr, config.optimizer) == ((None, None) if head == "logistic" else (0.1, "sgd"))


def test_a_penalty_selects_the_logistic_head() -> None:
    assert Config(penalty=0.1).with_recipe(Recipe()).head == "logistic"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"lr": 0.1}, "--lr does not apply to --head logistic, which has no epochs. Remove one of the two."),
        ({"patience": 1}, "--patience does not apply to --head logistic, which has no epochs. Remove one of the two."),
        ({"augment": True}, "--head logistic needs frozen layers before the last one, and --augment trains or varies them."),
        (
            {"weights": "none"},
            "--head logistic needs frozen layers before the last one, and --weights none trains or varies them.",
        ),
        ({"penalty": 0.0}, "--penalty must be at least 1e-09 (got 0.0)."),
        ({"head": "linear", "penalty": 1.0}, "--penalty applies to --head logistic only. Use --weight-decay, or remove it."),
    ],
)
def test_settings_that_contradict_the_head_are_rejected(value: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Config(**{"head": "logistic"} | value)
    assert str(caught.value) == message


def test_settings_round_trip_through_yaml() -> None:
    config = Config(
        data_dir=Path("fötös"), epochs=3, lr=1e-5, unfreeze=("layer4",), cache_dir=Path("c"), augment=True, name="größe"
    )
    text = yaml.safe_dump(config.as_dict(), allow_unicode=True)
    assert settings.from_mapping(yaml.safe_load(text)) == config


@pytest.mark.parametrize("name", list(Config().as_dict()))
def test_every_setting_has_a_flag_in_the_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["train", "--help"])
    assert f"--{name.replace('_', '-')}" in capsys.readouterr().out


def test_the_cache_directory_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "finetune"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "finetune"


@pytest.mark.parametrize(("name", "default"), [("seed", "0"), ("min_delta", "0.0"), ("valid_fraction", "0.2")])
def test_the_help_shows_numeric_defaults_also_if_zero(name: str, default: str) -> None:
    parser = argparse.ArgumentParser()
    settings.add_flags(parser, [name])
    assert f"(default: {default})" in parser.format_help()
