"""The settings of a training run in the studio: check what a form sends, and build the ``finetune train`` command."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from models.errors import ConfigError
from models.networks.spec import EPOCH_SETTINGS, LINEAR, LOGISTIC, PLAIN, STANDARD, UNIT
from service.studio.data_source import resolve_table

NETWORK = re.compile(r"[A-Za-z0-9][\w.:/+-]{0,199}", re.ASCII)
LAYERS = re.compile(r"[A-Za-z0-9][\w.]*(?: [A-Za-z0-9][\w.]*)*", re.ASCII)
TABLE = re.compile(r"[^\0-\x1f]{1,400}")
PRECISIONS = re.compile(r"[\w][^\0-\x1f]{0,399}")
RUN_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,59}")
NETWORKS = {  # the ones that the form offers; any other that `finetune models` lists can be entered
    "efficientnet_lite0": "EfficientNet-Lite0: fast, weights included",
    "efficientnet_lite1": "EfficientNet-Lite1: weights included",
    "efficientnet_lite2": "EfficientNet-Lite2: more accurate, weights included",
    "mobilenet_v3_large": "MobileNetV3 Large: fast, downloads 22 MB once",
    "resnet50": "ResNet-50: downloads 98 MB once",
    "vgg16": "VGG16: downloads 528 MB once",
}


@dataclass(frozen=True)
class TrainingField:
    """A setting of ``finetune train`` in the form.

    Attributes:
        label: How the form names it.
        kind: int, float, bool or str.
        hint: A short explanation.
        low: Smallest value of a number.
        high: Largest value of a number.
        choices: The allowed values and their texts.
        pattern: What a text has to match.
        is_main: Whether the form shows it at once, not under "More settings".
    """

    label: str
    kind: type
    hint: str = ""
    low: float | None = None
    high: float | None = None
    choices: Mapping[str, str] | None = None
    pattern: re.Pattern[str] | None = None
    is_main: bool = False


RECIPE = "Leave empty for the value of the network's recipe."
UNFROZEN_FIELDS = ("unfreeze", "augment")  # with these, every epoch runs the complete network
LOGISTIC_FIELDS = ("penalty", "normalization")  # a linear head does not have these
DEFAULTS: dict[str, Any] = {  # defaults of `finetune train`; other fields have none, or that of the network's recipe
    "normalization": UNIT,
    "augment": False,
    "patience": 0,
    "class_weights": "none",
    "sampling": "none",
    "class_frequencies": "training",
    "seed": 0,
    "allow_leakage": False,
    "allow_class_mismatch": False,
}
FIELDS: dict[str, TrainingField] = {
    "backbone": TrainingField(
        "Network",
        str,
        "Any name that `finetune models` lists, timm:NAME, or joined networks such as A+B.",
        pattern=NETWORK,
        is_main=True,
    ),
    "head": TrainingField(
        "Last layer",
        str,
        choices={
            "": "As in the recipe",
            LOGISTIC: "Logistic regression: fast, no epochs",
            LINEAR: "Linear layer, SGD or Adam",
        },
        is_main=True,
    ),
    "epochs": TrainingField(
        "Epochs",
        int,
        f"{RECIPE} Setting epochs selects the linear head if the last layer is left to the recipe.",
        low=1,
        high=10_000,
        is_main=True,
    ),
    "labels": TrainingField(
        "Table of labels",
        str,
        "Path below the data folder, such as labels.csv. It replaces the class folders.",
        pattern=TABLE,
    ),
    "penalty": TrainingField(
        "L2 penalty", float, "Of logistic regression. Leave empty to select it by cross-validation.", low=1e-9, high=1e9
    ),
    "normalization": TrainingField(
        "Embeddings of logistic regression",
        str,
        choices={UNIT: "Of length 1", STANDARD: "Each dimension with the same deviation", PLAIN: "Not scaled"},
    ),
    "unfreeze": TrainingField(
        "Also train these layers",
        str,
        "For example layer4 or features.28, separated by spaces. Slower: every epoch runs the complete network.",
        pattern=LAYERS,
    ),
    "augment": TrainingField("Random crops, flips and colors", bool, "Slower: every epoch runs the complete network."),
    "patience": TrainingField(
        "Early stopping patience", int, "Epochs without a better validation loss. 0: never stop early.", low=0, high=10_000
    ),
    "class_weights": TrainingField(
        "Class weights", str, choices={"none": "Equal", "balanced": "Balanced: higher for rarer classes"}
    ),
    "sampling": TrainingField(
        "Sampling", str, choices={"none": "Each photo once per epoch", "balanced": "Balanced: each class equally often"}
    ),
    "class_frequencies": TrainingField(
        "Class frequencies where the model is used",
        str,
        choices={"training": "As among the training photos", "equal": "Equally often"},
    ),
    "target_precision": TrainingField(
        "Target precision",
        str,
        "For example 0.99, or dogs=0.99,cats=0.95. Less certain photos get no label.",
        pattern=PRECISIONS,
    ),
    "optimizer": TrainingField("Optimizer", str, RECIPE, choices={"": "As in the recipe", "sgd": "SGD", "adam": "Adam"}),
    "lr": TrainingField("Learning rate", float, RECIPE, low=1e-9, high=100),
    "lr_schedule": TrainingField(
        "Learning rate schedule",
        str,
        choices={"": "As in the recipe", "constant": "Constant", "cosine": "Cosine decay"},
    ),
    "batch_size": TrainingField("Batch size", int, RECIPE, low=1, high=100_000),
    "momentum": TrainingField("Momentum", float, RECIPE, low=0, high=1),
    "weight_decay": TrainingField("Weight decay", float, RECIPE, low=0, high=100),
    "seed": TrainingField("Seed", int, "The same seed gives the same weights.", low=0, high=2**31 - 1),
    "valid_fraction": TrainingField(
        "Fraction for validation", float, "Of data without a validation folder. Leave empty for 0.2.", low=0.01, high=0.9
    ),
    "allow_leakage": TrainingField("Allow duplicates in training and validation", bool),
    "allow_class_mismatch": TrainingField("Allow different classes in training and validation", bool),
}


def parse_settings(values: Mapping[str, str]) -> dict[str, Any]:
    """Check and convert the fields of a form. Empty ones and defaults are left out.

    Raises:
        ConfigError: A value is invalid.
    """
    settings = {name: _parse(name, FIELDS[name], text.strip()) for name, text in values.items() if text.strip()}
    settings = {name: value for name, value in settings.items() if name not in DEFAULTS or value != DEFAULTS[name]}
    if "backbone" not in settings:
        raise ConfigError("Network: choose one.")
    if settings.get("class_weights") == settings.get("sampling") == "balanced":
        raise ConfigError("Class weights and Sampling both balance the classes. Use one of them.")
    _check_head(settings)
    return settings


def chosen_head(settings: Mapping[str, Any]) -> str:
    """Return the head that the result of ``parse_settings`` selects, or "" for that of the network's recipe."""
    if "head" in settings:
        return str(settings["head"])
    if any(name in settings for name in LOGISTIC_FIELDS):
        return LOGISTIC
    return LINEAR if any(name in settings for name in (*EPOCH_SETTINGS, *UNFROZEN_FIELDS)) else ""


def form_values(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return settings as a form shows them; the inverse of ``parse_settings``. Other settings are left out."""
    shown = {}
    for name, value in settings.items():
        if name in FIELDS and value is not False and value not in (None, (), []):
            shown[name] = "1" if value is True else " ".join(value) if isinstance(value, list) else str(value)
    return shown


def training_command(
    settings: Mapping[str, Any], *, run: str, data_dir: Path, output_dir: Path, reviews: Path | None, progress_file: Path
) -> list[str]:
    """Return the command that starts a training run. Every value is one word with its flag, and cannot become another flag.

    Args:
        settings: The result of ``parse_settings``.
        run: The name of the run and its bundle.
        data_dir: The photos.
        output_dir: The run directory.
        reviews: A table of reviews to apply.
        progress_file: Where the progress is written.

    Raises:
        ConfigError: There is no table of labels where the settings name one.
    """
    flags = {"data-dir": data_dir, "output-dir": output_dir, "name": run, "progress-file": progress_file}
    if "labels" in settings:
        flags["labels"] = table = resolve_table(data_dir, settings["labels"])
        flags["data-dir"] = table.parent  # which the paths of the table are relative to
    if reviews:
        flags["reviews"] = reviews
    words = [sys.executable, "-m", "finetune", "train", *(f"--{name}={value}" for name, value in flags.items())]
    for name, value in settings.items():
        flag = f"--{name.replace('_', '-')}"
        if name == "unfreeze":
            words += [f"{flag}={layer}" for layer in str(value).split()]
        elif name != "labels":
            words.append(flag if value is True else f"{flag}={value}")
    return words


def resume_command(output_dir: Path, progress_file: Path) -> list[str]:
    """Return the command that continues an interrupted training run."""
    flags = [f"--output-dir={output_dir}", f"--progress-file={progress_file}"]
    return [sys.executable, "-m", "finetune", "train", "--resume", *flags]


def _check_head(settings: dict[str, Any]) -> None:
    """Raise ConfigError for settings of the other head, and add the head that a setting of logistic regression selects."""
    head = chosen_head(settings)
    conflicts: Mapping[str, tuple[str, ...]] = {}
    if head == LOGISTIC:
        conflicts = {
            "logistic regression has no epochs": EPOCH_SETTINGS,
            "logistic regression needs frozen layers": UNFROZEN_FIELDS,
        }
    elif head == LINEAR:
        conflicts = {"the linear layer is not trained by logistic regression": LOGISTIC_FIELDS}
    for reason, names in conflicts.items():
        if labels := [f'"{FIELDS[name].label}"' for name in names if name in settings]:
            other = (FIELDS["head"].choices or {})[LINEAR if head == LOGISTIC else LOGISTIC]
            raise ConfigError(f'Last layer: {reason}. Reset {" and ".join(labels)}, or select "{other}".')
    if head == LOGISTIC:
        settings["head"] = LOGISTIC


def _parse(name: str, field: TrainingField, text: str) -> Any:
    if field.kind is bool:
        if text not in ("0", "1", "true", "false", "True", "False"):
            raise ConfigError(f"{field.label}: expected 0 or 1 (got {text[:80]!r}).")
        return text in ("1", "true", "True")
    if field.kind is str:
        is_valid = text in field.choices if field.choices else bool(field.pattern and field.pattern.fullmatch(text))
        if not is_valid:
            expected = f"Use {', '.join(filter(None, field.choices))}." if field.choices else field.hint
            raise ConfigError(f"{field.label}: {text[:80]!r} is not valid. {expected}")
        return text
    try:
        value = field.kind(text)
    except ValueError:
        raise ConfigError(
            f"{field.label}: expected {'a whole number' if field.kind is int else 'a number'} (got {text[:80]!r})."
        ) from None
    assert field.low is not None
    assert field.high is not None
    if not field.low <= value <= field.high:
        raise ConfigError(f"{field.label}: expected {field.low:g} to {field.high:,g} (got {text[:80]}).")
    return value
