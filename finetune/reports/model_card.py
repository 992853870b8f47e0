"""The model card of a bundle: metrics, training data, training settings, limits and files, as Markdown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from finetune.metrics.abstention import describe_abstention
from finetune.metrics.head_comparison import format_head_comparison
from finetune.metrics.learning_curve import format_learning_curve
from finetune.metrics.ood_detection import OODLimit
from finetune.metrics.operating_points import format_operating_points
from finetune.metrics.slices import format_p
from models.artifacts.atomic_io import atomic_write_text
from models.runtime.precision import describe_bf16, describe_export, is_bf16_acceptable

TITLES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "macro_f1": "macro F1",
    "top_5_accuracy": "top-5 accuracy",
    "log_loss": "log loss",
    "roc_auc": "ROC AUC",
    "calibration_error": "calibration error",
}
MAX_LISTED_CLASSES = 30
MAX_LISTED_SLICES = 20


def write_model_card(path: Path, manifest: Mapping[str, Any]) -> None:
    """Write a bundle's model card from its manifest."""
    metrics, provenance = manifest["metrics"], manifest["provenance"]
    dataset = provenance["dataset"]
    config = provenance["config"]
    sections = [
        f"# {_escaped(manifest['name'])}\n",
        f"An image classifier for {_classes(manifest['classes'])}: {manifest['title']} ([paper]({manifest['paper']})), "
        f"{_origin(manifest)}, trained on {provenance['created'][:10]}.\n",
        "## Metrics\n",
        f"{_evaluated(manifest)}:\n",
        _table(metrics),
        *_slices(metrics),
        "Methods:\n",
        "\n".join(f"- {TITLES.get(name, name)}: {method}" for name, method in metrics["methods"].items()) + "\n",
        f"{_fitted(manifest)}These photos also selected {_selected(manifest)}the temperature ({manifest['temperature']:.3f})."
        " For an unbiased figure, evaluate on unseen photos: `finetune evaluate DIR --data-dir DATA --split NAME`.\n",
        *_learning_curve(metrics),
        "## None of these\n",
        _none_of_these(manifest),
        *_thresholds(manifest),
        *_without_label(metrics),
        "## Training data\n",
        f"{_counts(dataset['photos'])} {_labels(dataset)}{_reviewed(dataset)}"
        " Other kinds of images (drawings, other cameras, crops) were not evaluated.\n",
        "## Training\n",
        f"{_base(manifest)} {_trained(manifest)} {_permuted(manifest)}"
        f"{_method(manifest)}; seed {config['seed']}; {provenance['compute']}.\n",
        *_class_balance(manifest),
        "## Files\n",
        _contents(manifest),
    ]
    atomic_write_text(path, "\n".join(sections))


def _learning_curve(metrics: Mapping[str, Any]) -> list[str]:
    """State what more training photos would bring, if it was estimated."""
    curve = metrics.get("learning_curve")
    return [f"{format_learning_curve(curve)}\n"] if curve else []


def _none_of_these(manifest: Mapping[str, Any]) -> str:
    """Describe what the model does with photos of none of the classes, how well it recognizes them, and what that costs."""
    ood, measured = manifest.get("ood"), manifest["metrics"].get("ood")
    if not ood:
        return (
            "The model only knows these classes and has no OOD score. Any other photo is still labeled as one of them, often"
            " with high confidence.\n"
        )
    limit = OODLimit.from_dict(ood["limit"])
    lines = [
        "The model gives no label to a photo that is unlike the training photos. Its OOD score (out of distribution) is then"
        f" above {limit.max_score:.4g}. {limit.text()} They are photos of {ood['limit']['source']}.\n"
    ]
    if measured and measured["caught"]:
        rows = ["| measure | value | 95% interval |", "| --- | --- | --- |"]
        rows += [
            _row(f"caught, of {measured['neither_photos']:,} photos of none of the classes", measured["caught"]),
            _row(f"false alarms, of {measured['photos']:,} photos of the classes", measured["false_alarms"]),
            _row("ROC AUC of the two", measured["auroc"]),
        ]
        lines += ["\n".join(rows) + "\n", "Close relatives of the classes are recognized less often.\n"]
    else:
        lines.append("How many photos of none of the classes it recognizes was not measured.\n")
    lines.append(
        f"The score is the {ood['method']}, fitted to {ood['images']:,} photos. It takes {ood['bytes'] / 1e6:.2f} MB and"
        f" {ood['microseconds']:.0f} microseconds per image.\n"
    )
    return "\n".join(lines)


def _origin(manifest: Mapping[str, Any]) -> str:
    if manifest["base"] is None:
        return "trained from random weights"
    return f"fine-tuned from pretrained weights ({manifest['base']['license']})"


def _base(manifest: Mapping[str, Any]) -> str:
    base = manifest["base"]
    if base is None:
        return "All weights were initialized randomly and trained."
    return f"The pretrained weights came from {base['origin']}, sha256 `{base['sha256'][:16]}...`."


def _trained(manifest: Mapping[str, Any]) -> str:
    if manifest["base"] is None:
        return ""
    layers = [f"`{name}`" for name in (manifest["head"], *manifest["provenance"]["config"]["unfreeze"])]
    subject = f"the last layer ({layers[0]}) was" if len(layers) == 1 else f"{_and(layers)} were"
    return f"Only {subject} trained. All other layers were frozen."


def _permuted(manifest: Mapping[str, Any]) -> str:
    seed = manifest.get("permute_pixels")
    if seed is None:
        return ""
    return f"The network shuffles the pixel positions of every image with a fixed permutation (seed {seed}). "


def _evaluated(manifest: Mapping[str, Any]) -> str:
    """Name the photos of the metrics."""
    provenance, photos = manifest["provenance"], f"{manifest['metrics']['photos']:,} photos"
    if folds := provenance.get("folds"):
        return f"On {photos} of training and validation, each predicted by a head that was fitted without it ({folds} folds)"
    return f"On {photos} of the {provenance['dataset']['evaluated_split']} split"


def _fitted(manifest: Mapping[str, Any]) -> str:
    """State that the head was fitted to the photos of the metrics, if it was."""
    return "The head of this bundle was fitted to all of them. " if manifest["provenance"].get("folds") else ""


def _selected(manifest: Mapping[str, Any]) -> str:
    """Return what the validation photos selected besides the temperature."""
    provenance = manifest["provenance"]
    return "" if provenance.get("penalty") else f"the best epoch ({provenance['best_epoch']}) and "


def _method(manifest: Mapping[str, Any]) -> str:
    """Describe the optimization, without a final period."""
    provenance = manifest["provenance"]
    config = provenance["config"]
    if penalty := provenance.get("penalty"):
        origin = "" if config["penalty"] else ", selected by cross-validation of the training photos"
        embeddings = {"unit": "embeddings of unit length", "standard": "standardized embeddings", "none": "embeddings"}
        return (
            f"Logistic regression on {embeddings[config['normalization']]}: L-BFGS to convergence, L2 penalty"
            f" {penalty:.3g}{origin}"
        )
    optimizer = "Adam" if config.get("optimizer") == "adam" else f"SGD (momentum {config['momentum']:g})"
    return (
        f"Epochs: {provenance['epochs']}. Batch size: {config['batch_size']}. {optimizer} with learning rate"
        f" {config['lr']:g} ({config['lr_schedule']}), weight decay {config['weight_decay']:g}; NLLLoss on log-probabilities"
    )


def _escaped(name: str) -> str:
    """Escape the characters of a class name that Markdown would format."""
    return re.sub(r"([\\`*<\[|~])", r"\\\1", name)


def _thresholds(manifest: Mapping[str, Any]) -> list[str]:
    """Describe the minimum probabilities of the classes, if there are any."""
    points = manifest.get("operating_points")
    if not points or not points["classes"]:
        return []
    points_text = format_operating_points(points, manifest["classes"])
    sources = {
        "out-of-fold": f"{points['photos']:,} out-of-fold predictions of training and validation photos",
        "validation": f"{points['photos']:,} validation photos, which also selected the best epoch and the temperature",
        "evaluation": f"{points['photos']:,} photos of an evaluation",
    }
    return [
        "## Thresholds\n",
        "A photo whose most probable class is less probable than the threshold of that class gets no label. The thresholds"
        f" were selected from {sources[points['source']]}. Each precision is guaranteed with"
        f" {100 * points['confidence_level']:g}% confidence, for photos of the same kind (Clopper-Pearson, Bonferroni):\n",
        "\n".join(f"- {_escaped(line)}" for line in points_text) + "\n",
    ]


def _without_label(metrics: Mapping[str, Any]) -> list[str]:
    """Describe what the decision rule does to the evaluated photos, if it ever abstains."""
    measured = metrics.get("decision")
    if not measured:
        return []
    rows = ["| measure | value | 95% interval |", "| --- | --- | --- |", _row("accuracy of the rest", measured["accuracy"])]
    classes = measured["classes"]
    names = sorted(classes, key=lambda name: -(classes[name]["no_label"] or {"value": 0.0})["value"])[:MAX_LISTED_CLASSES]
    for title, key in (
        ("no label, of", "no_label"),
        ("precision of the rest,", "precision"),
        ("recall of the rest,", "recall"),
    ):
        rows += [_row(f"{title} {_escaped(name)}", classes[name][key]) for name in classes if name in names]
    if len(names) < len(classes):
        rows.append(f"\nOf {len(classes):,} classes, the {len(names)} with the most photos without a label.")
    return [
        "## Photos without a label\n",
        f"With the OOD score and the thresholds, {describe_abstention(measured)}\n",
        "\n".join(rows) + "\n",
    ]


def _class_balance(manifest: Mapping[str, Any]) -> list[str]:
    """Describe the weights of the classes, and the head that was trained the other way, if there are any."""
    balance = manifest.get("class_balance")
    if not balance:
        return []
    config = manifest["provenance"]["config"]
    sections = ["## Unequal classes\n"]
    if balance["weights"]:
        used = "equally frequent classes" if config["class_frequencies"] == "equal" else "classes as frequent as in training"
        sections.append(f"The probabilities are calibrated for {used}.\n")
        if set(balance["weights"].values()) != {1.0}:
            how = "drawn equally often" if config["sampling"] == "balanced" else "weighted in the loss"
            listed = [f"{_escaped(name)} {weight:.3g}" for name, weight in balance["weights"].items()]
            weights = f" (weight of one photo: {', '.join(listed)})" if len(listed) <= MAX_LISTED_CLASSES else ""
            sections.append(
                f"In training the classes were {how}{weights}. The probabilities are corrected for this, as far as photos that "
                f"were not trained on require it: {100 * balance['correction']:.0f}% of the weights.\n"
            )
    if balance["comparison"]:
        sections += [
            f"This head is {'balanced' if balance['weights'] else 'plain'}. Its recall on the validation photos, and that of a "
            "head that was trained the other way, with 95% Wilson score intervals and McNemar's exact test (Holm):\n",
            "```text\n" + "\n".join(format_head_comparison(balance["comparison"])) + "\n```\n",
        ]
    return sections


def _classes(classes: Sequence[str]) -> str:
    names = list(map(_escaped, classes))
    if len(names) <= MAX_LISTED_CLASSES:
        return _and(names)
    return f"{len(names):,} classes ({', '.join(names[:3])}, ..., {names[-1]})"


def _table(metrics: Mapping[str, Any]) -> str:
    rows = ["| measure | value | 95% interval |", "| --- | --- | --- |"]
    rows += [_row(title, metrics[name]) for name, title in TITLES.items() if name in metrics]
    names = metrics["classes"]
    if len(names) > MAX_LISTED_CLASSES:
        defined = [name for name in names if metrics["recall"][name]]
        names = sorted(defined, key=lambda name: metrics["recall"][name]["value"])[:MAX_LISTED_CLASSES]
    for measure in ("precision", "recall"):
        rows += [_row(f"{measure} of {_escaped(name)}", metrics[measure][name]) for name in names]
    if len(names) < len(metrics["classes"]):
        rows.append(f"\nOf {len(metrics['classes']):,} classes, the {len(names)} with the lowest recall. All: `manifest.json`.")
    return "\n".join(rows) + "\n"


def _slices(metrics: Mapping[str, Any]) -> list[str]:
    """Return the accuracy by slice, worst first, if the photos come from a table with further columns."""
    slices = metrics.get("slices")
    if not slices:
        return []
    rows = ["| slice | photos | accuracy | 95% interval | p |", "| --- | --- | --- | --- | --- |"]
    for row in slices[:MAX_LISTED_SLICES]:
        name = f"{row['column']} = {row['value']}".replace("|", "\\|")
        accuracy = row["accuracy"]
        p = "" if row["p"] is None else format_p(row["p"])
        interval = f"{accuracy['low']:.4f} to {accuracy['high']:.4f}"
        rows.append(f"| {name} | {row['photos']:,} | {accuracy['value']:.4f} | {interval} | {p} |")
    more = len(slices) - MAX_LISTED_SLICES
    rest = [f"{more:,} more slices are in `manifest.json`.\n"] if more > 0 else []
    return ["By slice, worst first:\n", "\n".join(rows) + "\n", *rest]


def _row(title: str, measure: Mapping[str, float] | None) -> str:
    if measure is None:
        return f"| {title} | not defined | |"
    return f"| {title} | {measure['value']:.4f} | {measure['low']:.4f} to {measure['high']:.4f} |"


def _counts(photos: Mapping[str, Mapping[str, int]]) -> str:
    splits = []
    for split, row in photos.items():
        counts = [f"{n:,} {_escaped(name)}" for name, n in row.items()]
        if len(counts) > MAX_LISTED_CLASSES:
            counts = [f"{sum(row.values()):,} of {len(row):,} classes, {min(row.values()):,} to {max(row.values()):,} each"]
        splits.append(f"{split}: {', '.join(counts)}")
    return "Photos: " + "; ".join(splits) + "."


def _labels(dataset: Mapping[str, Any]) -> str:
    table = dataset.get("labels")
    if not table:
        return "The labels are the folder names."
    groups = " Images of one group are in one split." if table["has_groups"] else ""
    return f"The labels come from a table of {table['rows']:,} rows (sha256 `{table['sha256'][:16]}...`).{groups}"


def _reviewed(dataset: Mapping[str, Any]) -> str:
    reviews = dataset.get("reviews")
    if not reviews:
        return ""
    dropped = reviews["neither"] + reviews["bad"] + reviews["other_copies"]
    return (
        f" In a review, {reviews['relabeled']:,} labels were changed, {reviews['confirmed']:,} confirmed and {dropped:,} photos"
        " excluded, in both training and validation. The metrics above use the corrected labels."
    )


def _contents(manifest: Mapping[str, Any]) -> str:
    lines = [
        "`manifest.json` lists every file with its sha256. `predictions.csv` has a row for each evaluated photo,"
        " `embeddings.npz` contains feature vectors for similarity search, and `duplicates.csv` lists near duplicates."
    ]
    if manifest["kind"] != "head":
        lines.append(
            "`model.onnx` maps pixels (N, H, W, C) uint8, resized and cropped as described in the manifest, to calibrated"
            " probabilities."
            + (" It also has the output `ood_score`, whose parameters are in `ood.npz`." if manifest.get("ood") else "")
        )
    if manifest["kind"] == "full":
        lines.append("`model.safetensors` is the network's state dict.")
    else:
        lines.append(
            "`head.safetensors` contains only the trained tensors. `finetune merge` combines it with the pretrained weights"
            " into a full bundle."
        )
    if manifest["bf16"]:
        use = (
            "The service uses it if the processor supports it"
            if is_bf16_acceptable(manifest["bf16"])
            else "The service does not use it"
        )
        lines.append(f"In bfloat16: {describe_bf16(manifest['bf16'])}. {use}.")
    if int8 := manifest.get("int8"):
        lines.append(f"{describe_export(int8)}{' `model.int8.onnx` is the same network in int8.' if int8['file'] else ''}")
    return " ".join(lines) + "\n"


def _and(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
