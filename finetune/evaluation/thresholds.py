"""Write a new version of a bundle with other thresholds. Nothing is trained, and the network is the same."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Mapping
from pathlib import Path

from finetune.evaluation.held_out import HeldOutPredictions
from finetune.io.output_folder import require_empty_folder
from finetune.metrics.operating_points import min_probabilities
from finetune.reports.model_card import write_model_card
from models.artifacts.bundle import HELD_OUT, MODEL_CARD, Bundle, open_bundle, write_bundle


def write_thresholds(bundle: Bundle, held_out: HeldOutPredictions | None, targets: Mapping[str, float], out: Path) -> Bundle:
    """Copy a bundle to ``out`` with the operating points for ``targets``, which may be empty.

    Args:
        bundle: The bundle, which does not change.
        held_out: The predictions to select the operating points from. None keeps none in the new bundle.
        targets: The target precision by class.
        out: A new or empty folder.

    Raises:
        RunError: ``out`` is not empty.
        BundleError: A file of the bundle was modified.
    """
    require_empty_folder(out)
    open_bundle(bundle.path)  # verifies every file
    points = held_out.manifest_fields(targets, bundle.classes) if held_out else None
    rule = bundle.decision_rule
    rule = dataclasses.replace(rule, min_probability=min_probabilities(points) if points else {})
    manifest = {
        **{name: value for name, value in bundle.manifest.items() if name not in ("format", "files", "sha256")},
        "decision": rule.as_dict(),
        "operating_points": points,
        "thresholds_from": bundle.version,
    }

    def write_files(folder: Path) -> None:
        for name in bundle.manifest["files"]:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, folder / name)
        if held_out:
            held_out.write(folder / HELD_OUT)
        write_model_card(folder / MODEL_CARD, manifest)

    return write_bundle(out, manifest, write_files=write_files)
