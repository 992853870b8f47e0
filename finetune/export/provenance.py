"""Provenance of a bundle for its manifest: images, weights, settings, code and libraries."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from finetune.config import Config
from finetune.data.audit import AuditReport
from finetune.data.inspection import ImageRecord
from finetune.data.label_table import LabelTable
from finetune.training.trainer import Progress
from models.networks.spec import ModelSpec
from models.networks.weights import Weights

LIBRARIES = ("torch", "torchvision", "timm", "numpy", "pillow", "openvino", "onnx", "onnxscript")
# Bundles are shared, so local paths are left out.
PRIVATE_SETTINGS = ("data_dir", "output_dir", "cache_dir", "weights", "labels", "extra_data", "reviews", "reviews_from")


def training_manifest(
    *,
    name: str,
    spec: ModelSpec,
    base: Weights | None,
    last_frozen: str,
    classes: Sequence[str],
    metrics: Mapping[str, Any],
    config: Config,
    compute: str,
    progress: Progress,
    penalty: float | None = None,
    folds: int | None = None,
    audit_report: AuditReport,
    records: Sequence[ImageRecord],
    labels: LabelTable | None = None,
    reviews: Mapping[str, Any] | None = None,
    class_balance: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build the training entries of the manifest. ``folds`` is set if the metrics are those of a cross-validation."""
    return {
        "name": name,
        "backbone": spec.name,
        "title": spec.title,
        "paper": spec.paper,
        "classes": list(classes),
        "last_frozen": last_frozen,
        "permute_pixels": config.permute_pixels,
        "normalizes_embedding": config.normalizes_embedding,
        "base": base_manifest(spec, base),
        "metrics": dict(metrics),
        "class_balance": None if class_balance is None else dict(class_balance),
        "provenance": {
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "config": {key: value for key, value in config.as_dict().items() if key not in PRIVATE_SETTINGS},
            "compute": compute,
            "epochs": progress.epoch,
            "best_epoch": progress.best_epoch,
            "penalty": penalty,
            "folds": folds,
            "dataset": {
                "sha256": dataset_sha256(records),
                "photos": audit_report.counts,
                "evaluated_split": "validation" if not audit_report.split_from_train else "held-out",
                "excluded": len(audit_report.damaged) + len(audit_report.dropped_extra),
                "problems": audit_report.problems,
                "labels": labels and labels.as_dict(),
                "extra_folders": len(config.extra_data),
                "reviews": None if reviews is None else dict(reviews),
            },
            "git_commit": git_commit(),
            "python": platform.python_version(),
            "libraries": {library: importlib.metadata.version(library) for library in LIBRARIES},
        },
    }


def base_manifest(spec: ModelSpec, base: Weights | None) -> dict[str, Any] | None:
    if base is None:
        return None
    license = spec.weights.license if spec.weights and base.published else "unknown license"
    return {"sha256": base.sha256, "origin": base.origin, "published": base.published, "license": license}


def dataset_sha256(records: Sequence[ImageRecord]) -> str:
    """Hash the names, contents, labels and splits of a dataset's images."""
    rows = sorted([s.sample.name, s.sample.split, s.sample.label, s.sha256] for s in records)
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def git_commit() -> str | None:
    """Return the commit of this code, with ``-dirty`` for local changes, or None outside a checkout."""
    folder = Path(__file__).parent
    try:
        result = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--match", ""],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
