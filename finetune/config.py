"""The settings of a training: one flat, typed table. The command line is made from it, a YAML file fills it, a run keeps it."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from models.artifacts.bundle import name_problem
from models.errors import ConfigError, did_you_mean
from models.networks.spec import Recipe

DATASETS = ("mnist", "fashion-mnist", "cifar10", "digits")


def _setting(default: Any, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True)
class Config:
    """Everything that decides how a training goes. None stands for "as the backbone's recipe says"."""

    data_dir: Path = _setting(Path("data"), "folder with train/CLASS/*.jpg and valid/CLASS/*.jpg (or val, validation, test)")
    backbone: str = _setting("vgg16", "the network to start from; `finetune models` lists them")
    dataset: str | None = _setting(
        None, "fetch these pictures into --data-dir (default: data/DATASET) where they are not yet", choices=DATASETS
    )
    extra_data: tuple[str, ...] = _setting(
        (), "further folders, of the same classes, whose training photos are added; may be given again", metavar="DIR"
    )
    reviews: Path | None = _setting(None, "table of a gallery's decisions (reviews.csv), which come before the folders' names")
    reviews_from: str | None = _setting(
        None, "the same from a gallery's address (key in REVIEWS_KEY) or its database (sqlite:///FILE, postgresql://...)"
    )
    output_dir: Path | None = _setting(None, "folder of the run (default: runs/DATA-BACKBONE)")
    weights: str | None = _setting(None, "state dict to start from, .pth or .safetensors; `none` trains from random weights")
    epochs: int | None = _setting(None, "passes over the training photos", low=1)
    batch_size: int | None = _setting(None, "photos a step", low=1)
    optimizer: str | None = _setting(None, "how weights take a step", choices=("sgd", "adam"))
    lr: float | None = _setting(None, "learning rate", low=0)
    momentum: float | None = _setting(None, "momentum of SGD", low=0, high=1)
    weight_decay: float | None = _setting(None, "weight decay", low=0)
    lr_schedule: str | None = _setting(None, "learning rate over the epochs", choices=("constant", "cosine"))
    patience: int = _setting(0, "stop after so many epochs without a better validation loss; 0 never stops early", low=0)
    min_delta: float = _setting(0.0, "a validation loss counts as better if it is lower by more than this", low=0)
    unfreeze: tuple[str, ...] = _setting(
        (), "also train these layers, such as features.28 or layer4; no feature cache then", metavar="LAYER"
    )
    unfreeze_lr_scale: float = _setting(0.1, "learning rate of unfrozen layers, as a part of --lr", low=0)
    augment: bool = _setting(False, "random resized crop, flip and colour jitter; no feature cache then")
    permute_pixels: int | None = _setting(
        None, "a seed: every picture's pixels change places, always in the same way, in training and when served", low=0
    )
    valid_fraction: float = _setting(
        0.2, "share of the photos held out where there is no validation folder", low=0.01, high=0.9
    )
    allow_leakage: bool = _setting(False, "go on where the same photo is in training and validation")
    allow_class_mismatch: bool = _setting(False, "go on where training and validation do not have the same classes")
    device: str = _setting("auto", "where to compute", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = _setting(
        "auto",
        "numbers of the frozen part; auto: mixed on a GPU, fp32 on a CPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    seed: int = _setting(0, "fixes every random number; the same seed gives the same weights on the same machine", low=0)
    workers: int = _setting(0, "threads that decode photos; 0: as many as there are processors", low=0)
    feature_cache: bool = _setting(True, "run the frozen part once and keep its output")
    cache_dir: Path | None = _setting(None, "folder of the feature cache (default: ~/.cache/finetune)")
    cache_limit_mb: int = _setting(4096, "size of the feature cache; the least recently used part goes first", low=1)
    export: str = _setting("full", "what the bundle holds: everything, or only what was trained", choices=("full", "head"))
    name: str | None = _setting(None, "name of the bundle (default: DATA-BACKBONE)")
    tensorboard: bool = _setting(False, "write TensorBoard events into the run")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check(f.name, getattr(self, f.name), f.metadata)
        if self.export == "head" and self.weights == "none":
            raise ConfigError("--export head leaves the pretrained weights out, and --weights none has none; drop one of them.")

        if self.reviews and self.reviews_from:
            raise ConfigError("--reviews and --reviews-from both name reviews; give one of them.")
        if self.name is not None and (problem := name_problem(self.name)):
            raise ConfigError(f"--name is {self.name!r}, {problem}; give a plain name, as it becomes a part of paths.")

    def with_recipe(self, recipe: Recipe) -> Config:
        """Fill what was left open from the backbone's own recipe."""
        given = {key: value for key, value in dataclasses.asdict(recipe).items() if getattr(self, key) is None}
        return dataclasses.replace(self, **given)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON and YAML."""
        plain = dataclasses.asdict(self)
        return {key: _plain(value) for key, value in plain.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` a flag for every setting, and ``--config``. What is not given stays out of the namespace."""
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings by name; a flag beats them")
    add_flags(parser, [f.name for f in dataclasses.fields(Config)])


def add_flags(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Give ``parser`` a flag for each of the settings named."""
    hints = typing.get_type_hints(Config)
    for f in dataclasses.fields(Config):
        if f.name not in names:
            continue
        kind = _kind(hints[f.name])
        options: dict[str, Any] = {"dest": f.name, "default": argparse.SUPPRESS, "help": _help(f)}
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            options |= {"nargs": "+", "action": "extend", "metavar": f.metadata["metavar"]}
        else:
            options["type"] = kind
            if "choices" in f.metadata:
                options["metavar"] = "|".join(f.metadata["choices"])
            else:
                options["metavar"] = {int: "N", float: "X", Path: "PATH"}.get(kind, "NAME")
        parser.add_argument(f"--{f.name.replace('_', '-')}", **options)


def from_arguments(args: argparse.Namespace) -> Config:
    """The Config that a parsed command line asks for: defaults, then the config file, then flags. Raises ConfigError."""
    return from_mapping(explicit_settings(args))


def explicit_settings(args: argparse.Namespace) -> dict[str, Any]:
    """What the config file and the flags say, by name; a flag beats the file. Raises ConfigError."""
    known = {f.name for f in dataclasses.fields(Config)}
    flags = {key: value for key, value in vars(args).items() if key in known}
    file = getattr(args, "config", None)
    return {**(read_yaml(file) if file else {}), **flags}


def from_mapping(values: Mapping[str, Any]) -> Config:
    """A Config from plain values by name. Raises ConfigError for an unknown name or a value of another kind."""
    hints = typing.get_type_hints(Config)
    converted: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"There is no setting {name!r}.{did_you_mean(name, hints)} `finetune train --help` lists them.")
        converted[name] = _convert(name, value, hints[name])
    return Config(**converted)


def read_yaml(file: Path) -> dict[str, Any]:
    """The settings in a YAML file, by name as they are in Config. Raises ConfigError where it is none."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The config file {file} cannot be read ({reason}); give a YAML file of settings, one a line."
        ) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"The config file {file} holds a {type(values).__name__}; write one setting a line, as `epochs: 10`.")
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _kind(hint: Any) -> type:
    """``int`` of ``int | None``, ``tuple`` of ``tuple[str, ...]``."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    kind: type = typing.get_origin(hint) or hint
    return kind


def _convert(name: str, value: Any, hint: Any) -> Any:
    kind = _kind(hint)
    optional = isinstance(hint, types.UnionType)
    if value is None and optional:
        return None
    if kind is Path and isinstance(value, str | Path):
        return Path(value).expanduser()
    if kind is tuple and isinstance(value, str | list | tuple):
        return tuple(str(part) for part in (value.split(",") if isinstance(value, str) else value) if part)
    if kind is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            return float(value)  # YAML reads 1e-3 as text
        except ValueError:
            pass
    elif kind is int and isinstance(value, bool):
        pass
    elif isinstance(value, kind):
        return value
    raise ConfigError(
        f"The setting {name} is {value!r}, and should be {_KINDS.get(kind, kind.__name__)}; mend it and try again."
    )


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a word",
    Path: "a path",
    tuple: "a list of names",
}


def _check(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    flag = f"--{name.replace('_', '-')}"
    if value is None:
        return
    if "choices" in limits and value not in limits["choices"]:
        near = did_you_mean(str(value), limits["choices"])
        raise ConfigError(f"{flag} is {value!r}, and takes {', '.join(limits['choices'])}.{near}")
    low, high = limits.get("low"), limits.get("high")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"{low} or more" if high is None else f"{low} to {high}"
        raise ConfigError(f"{flag} is {value}, and takes {bounds}.")


def _help(f: dataclasses.Field[Any]) -> str:
    if f.name in {field.name for field in dataclasses.fields(Recipe)}:
        default = getattr(Recipe(), f.name)
        return f"{f.metadata['help']} (default: the backbone's recipe; vgg16: {default})".replace("%", "%%")
    shown = "" if f.default in (None, (), False, True) else f" (default: {f.default})"
    return f"{f.metadata['help']}{shown}".replace("%", "%%")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
