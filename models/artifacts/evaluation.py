"""Read stored predictions from a bundle or an evaluation folder, and write evaluation folders.

``evaluation.json`` in an evaluation folder describes the evaluated bundle and the data, and lists the tables with their
SHA-256. This module does not import torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from models.artifacts.atomic_io import atomic_write_text
from models.artifacts.bundle import MANIFEST, PREDICTIONS, Bundle, check_file, hash_files, manifest_sha256, open_bundle
from models.artifacts.predictions import Predictions
from models.artifacts.similarity import SIMILARITY_FILES, SimilarityIndex
from models.errors import BundleError

FORMAT_VERSION = 1
EVALUATION = "evaluation.json"
BUNDLE_KIND, EVALUATED, OUT_OF_FOLD = "bundle", "evaluation", "out-of-fold"
DATA_FILES = (PREDICTIONS, *SIMILARITY_FILES)


@dataclass(frozen=True)
class PredictionSource:
    """The verified predictions of a bundle or an evaluation.

    Attributes:
        path: The folder.
        name: The bundle's name.
        version: Identifies these results. For a bundle's own predictions it equals ``bundle_version``.
        kind: "bundle" (validation images), "evaluation" (other images) or "out-of-fold" (each image predicted by a head
            that was trained without it).
        classes: The class names.
        backbone: The network's name.
        bundle_version: Identifies the bundle that made the predictions.
        split: The evaluated split; None for a bundle.
        folds: The number of cross-validation folds of out-of-fold predictions, which a bundle may have as well.
        temperature: The calibration temperature.
        created: Creation time, ISO 8601 in UTC.
        max_ood_score: The limit of the OOD score, if the bundle has one.
    """

    path: Path
    name: str
    version: str
    kind: str
    classes: tuple[str, ...]
    backbone: str
    bundle_version: str
    split: str | None = None
    folds: int | None = None
    temperature: float | None = None
    created: str | None = None
    max_ood_score: float | None = None

    def predictions(self) -> Predictions:
        """Read the predictions table. Raises BundleError if it is missing or malformed."""
        return Predictions.read_csv(self.path / PREDICTIONS)

    def similarity(self) -> SimilarityIndex:
        """Read the similarity index, which is empty if an older version wrote none. Raises BundleError if it is malformed."""
        return SimilarityIndex.read(self.path)


def open_predictions(path: Path) -> PredictionSource:
    """Open a bundle or an evaluation folder and verify its tables.

    Raises:
        BundleError: The folder is neither of the two, or a file is missing or was modified.
    """
    if (path / MANIFEST).is_file():
        return _open_bundle_predictions(path)
    if (path / EVALUATION).is_file():
        return _open_evaluation(path)
    raise BundleError(
        f"{path} has neither {MANIFEST} nor {EVALUATION}. Use a bundle (runs/NAME/bundle) or a folder written by "
        "`finetune evaluate`."
    )


def write_evaluation(
    folder: Path,
    bundle: Bundle,
    *,
    kind: str,
    classes: Sequence[str],
    split: str,
    temperature: float,
    folds: int | None = None,
    fold_training: Mapping[str, Any] | None = None,
) -> None:
    """Write ``evaluation.json`` for the tables that already exist in ``folder``.

    The SHA-256 excludes the creation time, so repeating an evaluation gives the same version.

    Args:
        folder: The evaluation folder.
        bundle: The evaluated bundle.
        kind: ``EVALUATED`` or ``OUT_OF_FOLD``.
        classes: The class names.
        split: The evaluated split.
        temperature: The calibration temperature of the probabilities.
        folds: The number of folds of a cross-validation.
        fold_training: The training settings of the folds' heads.
    """
    files = hash_files(folder)
    info = {
        "format": FORMAT_VERSION,
        "kind": kind,
        "bundle": {"name": bundle.name, "version": bundle.version},
        "backbone": bundle.backbone,
        "classes": list(classes),
        "split": split,
        "folds": folds,
        "fold_training": None if fold_training is None else dict(fold_training),
        "temperature": temperature,
        "max_ood_score": bundle.decision_rule.max_ood_score,
        "files": {name: files[name] for name in DATA_FILES},
    }
    info = {**info, "sha256": manifest_sha256(info), "created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    atomic_write_text(folder / EVALUATION, json.dumps(info, indent=2, ensure_ascii=False) + "\n")


def _open_bundle_predictions(path: Path) -> PredictionSource:
    bundle = open_bundle(path, files=())
    open_bundle(path, files=[PREDICTIONS, *(name for name in SIMILARITY_FILES if name in bundle.manifest["files"])])
    return PredictionSource(
        path=path,
        name=bundle.name,
        version=bundle.version,
        kind=BUNDLE_KIND,
        classes=bundle.classes,
        backbone=bundle.backbone,
        bundle_version=bundle.version,
        folds=bundle.manifest.get("provenance", {}).get("folds"),
        temperature=float(bundle.manifest["temperature"]),
        created=bundle.manifest.get("provenance", {}).get("created"),
        max_ood_score=bundle.decision_rule.max_ood_score,
    )


def _open_evaluation(path: Path) -> PredictionSource:
    file = path / EVALUATION
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        if info["format"] > FORMAT_VERSION:
            raise BundleError(
                f"{file} has format {info['format']}, but this version supports formats up to {FORMAT_VERSION}. "
                "Upgrade this program."
            )
        if info["sha256"] != manifest_sha256({key: value for key, value in info.items() if key != "created"}):
            raise BundleError(f"{file} was changed after it was written. Run `finetune evaluate` again.")
        source = PredictionSource(
            path=path,
            name=str(info["bundle"]["name"]),
            version=str(info["sha256"])[:12],
            kind=str(info["kind"]),
            classes=tuple(info["classes"]),
            backbone=str(info["backbone"]),
            bundle_version=str(info["bundle"]["version"]),
            split=info["split"],
            folds=info["folds"],
            temperature=float(info["temperature"]),
            created=info["created"],
            max_ood_score=info.get("max_ood_score"),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{file} cannot be read as an evaluation ({error!r}). Run `finetune evaluate` again.") from None
    for name in DATA_FILES:
        check_file(path, name, info["files"])
    return source
