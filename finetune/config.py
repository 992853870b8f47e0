"""Training settings: one typed dataclass that defines the command-line flags and is read from and saved as YAML."""

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
from models.artifacts.tuning_result import PRESETS, SELECTED_BY_PRESET
from models.errors import ConfigError, did_you_mean
from models.networks.spec import EPOCH_SETTINGS, LINEAR, LOGISTIC, PLAIN, STANDARD, UNIT, Recipe

BALANCED, NONE, TRAINING, EQUAL = "balanced", "none", "training", "equal"
HUB = "hf://"  # begins the name of a dataset of the Hugging Face Hub
DATASETS = ("mnist", "fashion-mnist", "cifar10", "digits")
# Settings of commands that train several networks or heads: those of the data and of the machine.
SHARED_SETTINGS = (
    "labels",
    "valid_fraction",
    "allow_leakage",
    "allow_class_mismatch",
    "device",
    "precision",
    "seed",
    "workers",
    "cache_dir",
    "cache_limit_mb",
)


def _setting(default: Any, help: str, **extra: Any) -> Any:
    return field(default=default, metadata={"help": help, **extra})


@dataclass(frozen=True)
class Config:
    """All settings of a training run. None means the default of the backbone's recipe."""

    data_dir: Path = _setting(Path("data"), "folder with train/CLASS/*.jpg and valid/CLASS/*.jpg")
    backbone: str = _setting("vgg16", "pretrained network to start from; see `finetune models`")
    dataset: str | None = _setting(
        None,
        "built-in dataset, made in --data-dir (default: data/DATASET) from files on this machine or a download; --data-dir "
        "may also be a folder with its idx files, or with train/CLASS and test/CLASS",
        choices=DATASETS,
    )
    labels: str | None = _setting(
        None,
        "table of labels (.csv, .tsv, .parquet or .jsonl) with the columns image and label, instead of class folders; "
        "--data-dir, by default the table's folder, is the folder that its paths are relative to. "
        "hf://NAME saves a dataset of the Hugging Face Hub to --data-dir (default: data/NAME) first",
    )
    extra_data: tuple[str, ...] = _setting(
        (), "further folders or tables with the same classes, whose photos are added to training; repeatable", metavar="DIR"
    )
    reviews: Path | None = _setting(None, "reviews.csv from a gallery; its decisions override the folders' labels")
    reviews_from: str | None = _setting(
        None, "reviews from a gallery's URL (API key in REVIEWS_KEY) or its database (sqlite:///FILE, postgresql://...)"
    )
    preset: str | None = _setting(None, "take the network and the head from the results of `finetune tune`", choices=PRESETS)
    tuning: Path | None = _setting(None, "tune.json to take the --preset from (default: runs/DATA-tune/tune.json)")
    output_dir: Path | None = _setting(None, "run directory (default: runs/DATA-BACKBONE)")
    weights: str | None = _setting(None, "initial state dict (.pth or .safetensors); `none` for random weights")
    head: str | None = _setting(
        None,
        "how the new last layer is trained: in epochs (linear), or by logistic regression on the embeddings of frozen layers "
        "(logistic). Settings of epochs, such as --lr, select linear",
        choices=(LINEAR, LOGISTIC),
    )
    penalty: float | None = _setting(
        None, "L2 penalty of --head logistic (default: selected by cross-validation of the training photos)", low=1e-9
    )
    refit: bool | None = _setting(
        None,
        "fit the logistic head to the validation photos as well. The metrics are then those of cross-validation "
        "(default: only with --preset)",
    )
    normalization: str = _setting(
        UNIT,
        "embeddings of --head logistic: each of length 1 (unit), each dimension of the same deviation (standard), or neither",
        choices=(UNIT, STANDARD, PLAIN),
    )
    epochs: int | None = _setting(None, "number of epochs", low=1)
    batch_size: int | None = _setting(None, "photos per optimizer step", low=1)
    optimizer: str | None = _setting(None, "optimizer", choices=("sgd", "adam"))
    lr: float | None = _setting(None, "learning rate", low=0)
    momentum: float | None = _setting(None, "SGD momentum", low=0, high=1)
    weight_decay: float | None = _setting(None, "weight decay", low=0)
    lr_schedule: str | None = _setting(None, "learning rate schedule", choices=("constant", "cosine"))
    patience: int = _setting(0, "early stopping: epochs without a better validation loss; 0 disables it", low=0)
    min_delta: float = _setting(0.0, "minimum decrease in validation loss that counts as better", low=0)
    class_weights: str = _setting(
        NONE,
        "weight of each class in the loss: balanced (in inverse proportion to its photos), none, or a JSON or CSV file with a "
        "positive weight for every class; only the ratios matter",
    )
    sampling: str = _setting(
        NONE, "photos of an epoch: all once (none), or equally many of each class (balanced)", choices=(BALANCED, NONE)
    )
    class_frequencies: str = _setting(
        TRAINING,
        "how often the classes occur where the model is used: as among the training photos, or equally often; other "
        "frequencies cannot be set",
        choices=(TRAINING, EQUAL),
    )
    unfreeze: tuple[str, ...] = _setting(
        (), "also train these layers, such as features.28 or layer4; disables the feature cache", metavar="LAYER"
    )
    unfreeze_lr_scale: float = _setting(0.1, "learning rate of unfrozen layers, as a fraction of --lr", low=0)
    augment: bool = _setting(False, "random resized crop, flip and color jitter; disables the feature cache")
    permute_pixels: int | None = _setting(
        None, "shuffle pixel positions with a fixed permutation (this seed), in training and in serving", low=0
    )
    valid_fraction: float = _setting(
        0.2, "fraction of the photos to hold out if there is no validation folder", low=0.01, high=0.9
    )
    allow_leakage: bool = _setting(False, "allow duplicates across training and validation")
    allow_class_mismatch: bool = _setting(False, "allow training and validation to have different classes")
    target_precision: str | float | None = _setting(
        None,
        "precision to keep, for all classes (0.99) or by class (dogs=0.99,cats=0.95); less certain photos get no label. "
        "Classes that are not named have no threshold",
        metavar="X|CLASS=X,...",
    )
    device: str = _setting("auto", "device", choices=("auto", "cpu", "cuda", "mps"))
    precision: str = _setting(
        "auto",
        "numeric precision of the frozen layers, or of all layers with random weights; auto: mixed on a GPU, fp32 on a CPU",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    seed: int = _setting(0, "random seed; the same seed gives the same weights on the same machine", low=0)
    workers: int = _setting(0, "decoding threads; 0: one per CPU", low=0)
    feature_cache: bool = _setting(True, "compute the features of the frozen layers once and cache them")
    cache_dir: Path | None = _setting(None, "feature cache directory (default: ~/.cache/finetune)")
    cache_limit_mb: int = _setting(4096, "feature cache size in MB; the least recently used files are deleted first", low=1)
    export: str = _setting(
        "full",
        "contents of the bundle: weights and serving graph (full), serving graph only, or trained layers only (head)",
        choices=("full", "graph", "head"),
    )
    false_alarms: float = _setting(
        0.01, "fraction of photos of the classes that may count as unlike the training photos", low=0.0001, high=0.5
    )
    int8: bool = _setting(True, "add a graph in int8 if the validation photos show that it is accurate enough")
    max_accuracy_loss: float = _setting(
        0.01,
        "accuracy that int8 may lose, with 95% confidence; 0.01: one percentage point",
        low=0.0001,
        high=0.5,
    )
    name: str | None = _setting(None, "bundle name (default: DATA-BACKBONE)")
    tensorboard: bool = _setting(False, "write TensorBoard events to the run directory")

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            _check(f.name, getattr(self, f.name), f.metadata)
        if self.export == "head" and self.weights == "none":
            raise ConfigError("--export head omits the pretrained weights, and --weights none has none. Remove one of the two.")
        if self.labels and self.dataset:
            raise ConfigError("--labels and --dataset cannot be combined. Use one of them.")
        if self.class_weights == self.sampling == BALANCED:
            raise ConfigError(
                "--class-weights balanced and --sampling balanced both make the classes equal, and together favor rare ones. "
                "Use one of them."
            )
        self._check_head()
        if self.reviews and self.reviews_from:
            raise ConfigError("--reviews and --reviews-from cannot be combined. Use one of them.")
        if self.name is not None and (problem := name_problem(self.name)):
            raise ConfigError(f"--name is {self.name!r}, {problem}. Use a plain name, as it becomes part of paths.")

    def _check_head(self) -> None:
        if self.head != LOGISTIC:
            if self.penalty is not None and self.head == LINEAR:
                raise ConfigError("--penalty applies to --head logistic only. Use --weight-decay, or remove it.")
            if self.refit and self.head == LINEAR:
                raise ConfigError("--refit applies to --head logistic only: a linear head needs validation photos. Remove it.")
            return
        if settings := self._changed_epoch_settings():
            flag = f"--{settings[0].replace('_', '-')}"
            raise ConfigError(f"{flag} does not apply to --head logistic, which has no epochs. Remove one of the two.")
        if self.refit and not self.feature_cache:
            raise ConfigError("--refit needs the feature cache. Remove --no-feature-cache or --refit.")
        if not self.has_frozen_layers:
            option = "--weights none" if self.weights == "none" else "--unfreeze" if self.unfreeze else "--augment"
            raise ConfigError(f"--head logistic needs frozen layers before the last one, and {option} trains or varies them.")

    @property
    def normalizes_embedding(self) -> bool:
        """Whether the last layer scales each embedding to unit length."""
        return self.head == LOGISTIC and self.normalization == UNIT

    def _changed_epoch_settings(self) -> list[str]:
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        return [name for name in EPOCH_SETTINGS if getattr(self, name) != defaults[name]]

    @property
    def has_frozen_layers(self) -> bool:
        """Whether the layers before the last one compute the same features throughout the training."""
        return not (self.weights == "none" or self.unfreeze or self.augment)

    def with_recipe(self, recipe: Recipe) -> Config:
        """Return a copy in which settings that are None take the recipe's values.

        A logistic head of the recipe needs frozen layers. Settings of epochs select the linear head, and remain None if the
        head is logistic.
        """
        is_linear = not self.has_frozen_layers or bool(self._changed_epoch_settings())
        is_logistic = self.penalty is not None or bool(self.refit)
        head = self.head or (LOGISTIC if is_logistic else LINEAR if is_linear else recipe.head)
        skipped = EPOCH_SETTINGS if head == LOGISTIC else ()
        defaults = {
            key: value
            for key, value in {**dataclasses.asdict(recipe), "head": head}.items()
            if getattr(self, key) is None and key not in skipped
        }
        return dataclasses.replace(self, **defaults)

    def as_dict(self) -> dict[str, Any]:
        """Return the settings as plain values for JSON and YAML."""
        return {key: _plain(value) for key, value in dataclasses.asdict(self).items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--config`` and a flag for every setting but the data folder. Flags that are not used stay out of the namespace."""
    parser.add_argument("--config", type=Path, metavar="FILE.yaml", help="settings file; flags override it")
    add_flags(parser, [f.name for f in dataclasses.fields(Config) if f.name != "data_dir"])


def add_flags(parser: argparse.ArgumentParser, names: Sequence[str]) -> None:
    """Add a flag for each setting in ``names``."""
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
                options["metavar"] = f.metadata.get("metavar") or {int: "N", float: "X", Path: "PATH"}.get(kind, "NAME")
        parser.add_argument(f"--{f.name.replace('_', '-')}", **options)


def from_arguments(args: argparse.Namespace) -> Config:
    """Build the Config from defaults, the config file and flags, in this order. Raises ConfigError."""
    return from_mapping(explicit_settings(args))


def explicit_settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the settings of the config file and the flags by name; flags override the file. Raises ConfigError."""
    known = {f.name for f in dataclasses.fields(Config)}
    flags = {key: value for key, value in vars(args).items() if key in known and value is not None}
    file = getattr(args, "config", None)
    return {**(read_yaml(file) if file else {}), **flags}


def from_mapping(values: Mapping[str, Any]) -> Config:
    """Build a Config from plain values by name. Raises ConfigError for an unknown name or a value of the wrong type."""
    hints = typing.get_type_hints(Config)
    converted: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            raise ConfigError(f"Unknown setting {name!r}.{did_you_mean(name, hints)} See `finetune train --help`.")
        converted[name] = _convert(name, value, hints[name])
    if converted.get("preset") and (others := [name for name in SELECTED_BY_PRESET if converted.get(name) is not None]):
        raise ConfigError(f"--preset and --{others[0]} cannot be combined, as the preset chooses both. Remove one of the two.")
    if converted.get("labels") and "data_dir" not in converted:
        converted["data_dir"] = default_data_dir(converted["labels"])
    return Config(**converted)


def default_data_dir(labels: str) -> Path:
    """Return the folder that the paths in a table are relative to: its own, or data/NAME for hf://NAME."""
    if labels.startswith(HUB):
        return Path("data") / labels.removeprefix(HUB).rstrip("/").rpartition("/")[2].replace(":", "-")
    return Path(labels).expanduser().parent


def read_yaml(file: Path) -> dict[str, Any]:
    """Read settings from a YAML file, with ``-`` in names replaced by ``_``. Raises ConfigError if it cannot be read."""
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"Cannot read the config file {file} ({reason}). Use YAML with one setting per line.") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"The config file {file} contains a {type(values).__name__}. Write one setting per line, such as `epochs: 10`."
        )
    return {str(key).replace("-", "_"): value for key, value in values.items()}


def _kind(hint: Any) -> type:
    """Return the runtime type of a hint: ``int`` of ``int | None``, ``tuple`` of ``tuple[str, ...]``."""
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
            return float(value)  # YAML reads 1e-3 as a string
        except ValueError:
            pass
    elif kind is int and isinstance(value, bool):
        pass
    elif kind is str and float in typing.get_args(hint) and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    elif isinstance(value, kind):
        return value
    raise ConfigError(f"The setting {name} must be {_KINDS.get(kind, kind.__name__)} (got {value!r}).")


_KINDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a string",
    Path: "a path",
    tuple: "a list of names",
}


def _check(name: str, value: Any, limits: Mapping[str, Any]) -> None:
    flag = f"--{name.replace('_', '-')}"
    if value is None:
        return
    if "choices" in limits and value not in limits["choices"]:
        hint = did_you_mean(str(value), limits["choices"])
        raise ConfigError(f"{flag} must be one of {', '.join(limits['choices'])} (got {value!r}).{hint}")
    low, high = limits.get("low"), limits.get("high")
    if (low is not None and not value >= low) or (high is not None and not value <= high):
        bounds = f"at least {low}" if high is None else f"between {low} and {high}"
        raise ConfigError(f"{flag} must be {bounds} (got {value}).")


def _help(f: dataclasses.Field[Any]) -> str:
    if f.name in {field.name for field in dataclasses.fields(Recipe)}:
        default = getattr(Recipe(), f.name)
        return f"{f.metadata['help']} (default: the backbone's recipe; vgg16: {default})".replace("%", "%%")
    default = "" if f.default in (None, ()) or isinstance(f.default, bool) else f" (default: {f.default})"
    return f"{f.metadata['help']}{default}".replace("%", "%%")


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
