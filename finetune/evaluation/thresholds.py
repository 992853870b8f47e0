"""Write a new version of a bundle with another decision rule. Nothing is trained, and the network is the same."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from finetune.evaluation.held_out import HeldOutPredictions, read_ood_scores
from finetune.io.output_folder import require_empty_folder
from finetune.metrics.ood_detection import OODLimit, measure_ood
from finetune.metrics.operating_points import min_probabilities
from finetune.reports.model_card import write_model_card
from finetune.reports.results import with_decision
from models.artifacts.bundle import HELD_OUT, MODEL_CARD, PREDICTIONS, Bundle, open_bundle, write_bundle
from models.artifacts.ood_score import OOD_SCORES_FILE
from models.artifacts.predictions import Predictions

OOD_PLOT = "plots/ood_scores.png"


@dataclasses.dataclass(frozen=True)
class LimitChange:
    """A new limit of the OOD score, and the images whose scores gave it."""

    limit: OODLimit
    source: str


def current_targets(bundle: Bundle) -> dict[str, float]:
    """Return the target precision of each class that has one."""
    points = bundle.manifest.get("operating_points") or {"classes": {}}
    return {name: float(point["target"]) for name, point in points["classes"].items()}


def write_thresholds(
    bundle: Bundle,
    held_out: HeldOutPredictions | None,
    targets: Mapping[str, float] | None,
    out: Path,
    *,
    ood: LimitChange | None = None,
) -> Bundle:
    """Copy a bundle to ``out`` with another decision rule, and measure the rule on the bundle's evaluated photos.

    Args:
        bundle: The bundle, which does not change.
        held_out: The predictions to select the operating points from. None keeps none in the new bundle.
        targets: The target precision by class, which may be empty. None keeps the operating points as they are.
        out: A new or empty folder.
        ood: The new limit of the OOD score. None keeps the limit as it is.

    Raises:
        RunError: ``out`` is not empty.
        BundleError: A file of the bundle was modified.
    """
    require_empty_folder(out)
    open_bundle(bundle.path)  # verifies every file
    manifest = {name: value for name, value in bundle.manifest.items() if name not in ("format", "files", "sha256")}
    rule = bundle.decision_rule
    if targets is not None:
        points = held_out.manifest_fields(targets, bundle.classes) if held_out else None
        rule = dataclasses.replace(rule, min_probability=min_probabilities(points) if points else {})
        manifest["operating_points"] = points
    if ood:
        rule = dataclasses.replace(rule, max_ood_score=ood.limit.max_score)
        manifest["ood"] = {**bundle.manifest["ood"], "limit": ood.limit.as_dict() | {"source": ood.source}}
    predictions = Predictions.read_csv(bundle.path / PREDICTIONS)
    metrics = with_decision(bundle.manifest["metrics"], predictions, rule)
    neither = read_ood_scores(bundle).neither if OOD_SCORES_FILE in bundle.manifest["files"] else {}
    if ood and predictions.ood_scores is not None:
        seed = int(bundle.manifest["provenance"]["config"]["seed"])
        metrics["ood"] = measure_ood(
            predictions.ood_scores, neither, max_score=ood.limit.max_score, groups=predictions.group_numbers, seed=seed
        )
    manifest |= {
        "metrics": metrics,
        "decision": rule.as_dict(),
        "thresholds_from": bundle.manifest.get("thresholds_from") or bundle.version,
    }

    def write_files(folder: Path) -> None:
        for name in bundle.manifest["files"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, folder / name)
        if held_out and targets is not None:
            held_out.write(folder / HELD_OUT)
        if ood and predictions.ood_scores is not None and OOD_PLOT in bundle.manifest["files"]:
            from finetune.reports.plots import plot_ood_scores, report_style  # slow to import

            others = np.concatenate(list(neither.values())) if neither else None
            with report_style():
                plot_ood_scores(predictions.ood_scores, others, ood.limit.max_score, folder / OOD_PLOT)
        write_model_card(folder / MODEL_CARD, manifest)

    return write_bundle(out, manifest, write_files=write_files)
