"""The model card: what a bundle is, how good it is and where its limits are, for a person to read."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from models.artifacts.atomic_io import atomic_write_text
from models.runtime.precision import describe_bf16, is_bf16_acceptable

TITLES = {"accuracy": "accuracy", "log_loss": "log loss", "roc_auc": "ROC AUC", "calibration_error": "calibration error"}


def write_model_card(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write the card of a bundle from its manifest."""
    metrics, provenance = manifest["metrics"], manifest["provenance"]
    dataset = provenance["dataset"]
    config = provenance["config"]
    sections = [
        f"# {manifest['name']}\n",
        f"An image classifier for {_and(manifest['classes'])}: {manifest['title']} ([paper]({manifest['paper']})), "
        f"{_how(manifest)}, made on {provenance['created'][:10]}.\n",
        "## How good it is\n",
        f"On {metrics['photos']:,} photos of the {dataset['evaluated_split']} split:\n",
        _table(metrics),
        "How each was measured:\n",
        "\n".join(f"- {TITLES.get(name, name)}: {method}" for name, method in metrics["methods"].items()) + "\n",
        f"The best epoch ({provenance['best_epoch']}) and the temperature ({manifest['temperature']:.3f}) were chosen on"
        " these same photos, so a figure from photos that had no part in it is the one to trust:"
        " `finetune evaluate --bundle DIR --data-dir DATA --split NAME`.\n",
        "## What it was trained on\n",
        f"{_counts(dataset['photos'])} The labels are the folders' names{_reviewed(dataset)}."
        " It knows only these classes: a photo of anything else"
        " gets one of them all the same, often with confidence. Photos of other kinds (drawings, other cameras, crops) are"
        " outside of what was measured.\n",
        "## How it was trained\n",
        f"{_base(manifest)} {_trained(manifest)} {_permuted(manifest)}"
        f"Epochs: {provenance['epochs']}. Batch size: {config['batch_size']}."
        f" {_optimizer(config)} with learning rate {config['lr']:g} ({config['lr_schedule']}), weight decay"
        f" {config['weight_decay']:g}; NLLLoss on log-probabilities; seed {config['seed']}; {provenance['compute']}.\n",
        "## What is in the folder\n",
        _contents(manifest),
    ]
    atomic_write_text(path, "\n".join(sections))


def _how(manifest: Mapping[str, Any]) -> str:
    if manifest["base"] is None:
        return "trained from random weights"
    return f"fine-tuned from pretrained weights ({manifest['base']['license']})"


def _base(manifest: Mapping[str, Any]) -> str:
    base = manifest["base"]
    if base is None:
        return "All weights were random at the start and all of them were trained."
    return f"The pretrained weights came from {base['origin']}, sha256 `{base['sha256'][:16]}...`."


def _trained(manifest: Mapping[str, Any]) -> str:
    if manifest["base"] is None:
        return ""
    return f"Everything was frozen but {_and([manifest['head'], *manifest['provenance']['config']['unfreeze']])}."


def _permuted(manifest: Mapping[str, Any]) -> str:
    seed = manifest.get("permute_pixels")
    if seed is None:
        return ""
    return f"The pixels of every picture change places in the network's first layer, always in the same way (seed {seed}). "


def _optimizer(config: Mapping[str, Any]) -> str:
    if config.get("optimizer") == "adam":
        return "Adam"
    return f"SGD (momentum {config['momentum']:g})"


def _table(metrics: Mapping[str, Any]) -> str:
    rows = ["| measure | value | 95 % interval |", "| --- | --- | --- |"]
    rows += [_row(title, metrics[name]) for name, title in TITLES.items()]
    for measure in ("precision", "recall"):
        rows += [_row(f"{measure} of {name}", value) for name, value in metrics[measure].items()]
    return "\n".join(rows) + "\n"


def _row(title: str, measure: Mapping[str, float] | None) -> str:
    if measure is None:
        return f"| {title} | not defined | |"
    return f"| {title} | {measure['value']:.4f} | {measure['low']:.4f} to {measure['high']:.4f} |"


def _counts(photos: Mapping[str, Mapping[str, int]]) -> str:
    parts = [f"{split}: {', '.join(f'{n:,} {name}' for name, n in row.items())}" for split, row in photos.items()]
    return "Photos, " + "; ".join(parts) + "."


def _reviewed(dataset: Mapping[str, Any]) -> str:
    reviews = dataset.get("reviews")
    if not reviews:
        return ""
    dropped = reviews["neither"] + reviews["bad"] + reviews["other_copies"]
    return (
        f", but for what people decided in a review: {reviews['relabeled']:,} labels were changed, {reviews['confirmed']:,}"
        f" confirmed, and {dropped:,} photos left out, in training and validation alike, so that the figures above are on"
        " corrected labels"
    )


def _contents(manifest: Mapping[str, Any]) -> str:
    lines = [
        "`manifest.json` names every file with its sha256. `predictions.csv` has a row for each evaluated photo,"
        " `embeddings.npz` numbers that are alike for photos that are, and `duplicates.csv` the photos that are the same."
    ]
    if manifest["kind"] == "head":
        lines.append(
            "`head.safetensors` holds only what was trained; `finetune merge` makes the whole bundle of it and the pretrained"
            " weights."
        )
    else:
        lines.append(
            "`model.safetensors` is the network's state dict. `model.onnx` takes pixels (N, H, W, C) uint8, resized and cropped"
            " as the manifest says, and gives calibrated probabilities."
        )
    if manifest["bf16"]:
        use = (
            "The service uses it where the processor has it"
            if is_bf16_acceptable(manifest["bf16"])
            else "The service does not use it"
        )
        lines.append(f"In bfloat16: {describe_bf16(manifest['bf16'])}. {use}.")
    return " ".join(lines) + "\n"


def _and(words: list[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
