"""What a model said of photos, wherever that lies: in a bundle, or in the folder of an evaluation.

An evaluation's folder says in ``evaluation.json`` which bundle was measured on what, and names its tables with their sha256.
Nothing here imports torch.
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
    """The predictions of a bundle or an evaluation, opened and checked.

    ``kind`` is "bundle" (its validation photos), "evaluation" (other photos) or "out-of-fold" (every photo by a head that was
    trained without it). ``version`` identifies these results, ``bundle_version`` the bundle that they are of; the two are the
    same for a bundle's own. ``split`` and ``folds`` are an evaluation's.
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

    def predictions(self) -> Predictions:
        """Read the table. Raises BundleError where it is missing or malformed."""
        return Predictions.read_csv(self.path / PREDICTIONS)

    def similarity(self) -> SimilarityIndex:
        """Read what looks alike; empty where an older version wrote none. Raises BundleError for what is malformed."""
        return SimilarityIndex.read(self.path)


def open_predictions(path: Path) -> PredictionSource:
    """Open a bundle's or an evaluation's folder and check its tables. Raises BundleError for neither, and for changed files."""
    if (path / MANIFEST).is_file():
        return _of_bundle(path)
    if (path / EVALUATION).is_file():
        return _of_evaluation(path)
    raise BundleError(
        f"{path} has neither {MANIFEST} nor {EVALUATION}; give a bundle (runs/NAME/bundle), or a folder that "
        "`finetune evaluate` wrote."
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
    """Say in ``folder``, beside tables that are there already, what they are; ``fold_training`` is how the heads of folds were.

    The sha256 is of all but the time, so that measuring the same again gives the same one.
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
        "files": {name: files[name] for name in DATA_FILES},
    }
    info = {**info, "sha256": manifest_sha256(info), "created": datetime.now(timezone.utc).isoformat(timespec="seconds")}
    atomic_write_text(folder / EVALUATION, json.dumps(info, indent=2, ensure_ascii=False) + "\n")


def _of_bundle(path: Path) -> PredictionSource:
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
        temperature=float(bundle.manifest["temperature"]),
        created=bundle.manifest.get("provenance", {}).get("created"),
    )


def _of_evaluation(path: Path) -> PredictionSource:
    file = path / EVALUATION
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        if info["format"] > FORMAT_VERSION:
            raise BundleError(f"{file} has format {info['format']}, and this version reads up to {FORMAT_VERSION}; upgrade it.")
        if info["sha256"] != manifest_sha256({key: value for key, value in info.items() if key != "created"}):
            raise BundleError(f"{file} was changed after it was written; evaluate again.")
        results = PredictionSource(
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
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(f"{file} cannot be read as an evaluation ({error!r}); evaluate again.") from None
    for name in DATA_FILES:
        check_file(path, name, info["files"])
    return results
