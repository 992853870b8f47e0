"""Bundles as earlier versions wrote them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx

from models.artifacts.bundle import GOLDEN, GRAPH, open_bundle, write_bundle
from models.artifacts.ood_score import OOD_FILE, OOD_SCORE, OOD_SCORES_FILE


def without_ood_score(path: Path, out: Path) -> Path:
    """Write a copy of a bundle as an older version did, without the output, its file and its manifest entries."""
    bundle = open_bundle(path)
    pixels, probabilities, _ = bundle.golden()

    def write_files(folder: Path) -> None:
        for name in set(bundle.manifest["files"]) - {OOD_FILE, OOD_SCORES_FILE, GOLDEN}:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path / name, folder / name)
        model = onnx.load(folder / GRAPH)
        assert model.graph.output[-1].name == OOD_SCORE
        del model.graph.output[-1]
        onnx.save(model, folder / GRAPH)
        np.savez_compressed(folder / GOLDEN, pixels=pixels, probabilities=probabilities)

    new = ("format", "files", "sha256", "ood", "decision")
    return write_bundle(out, {k: v for k, v in bundle.manifest.items() if k not in new}, write_files=write_files).path


def without_ood_scores(path: Path, out: Path) -> Path:
    """Write a copy of a bundle as an older version did, without the scores from which the limit was chosen."""
    bundle = open_bundle(path)

    def write_files(folder: Path) -> None:
        for name in set(bundle.manifest["files"]) - {OOD_SCORES_FILE}:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path / name, folder / name)

    new = ("format", "files", "sha256")
    return write_bundle(out, {k: v for k, v in bundle.manifest.items() if k not in new}, write_files=write_files).path
