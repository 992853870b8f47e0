"""Bundles of the network ``tiny`` for rollouts: compatible, contradicting, with other classes, and broken."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from models.artifacts.bundle import GOLDEN, GRAPH, MANIFEST, Bundle, open_bundle, write_bundle
from tests.helpers import tiny_network

CLASSES = ("blue", "red", "green")


@dataclass(frozen=True)
class Bundles:
    """The bundles and photos in a folder of ``make_bundles``. ``one`` and ``two`` predict the same labels."""

    root: Path

    @property
    def folder(self) -> Path:
        return self.root / "bundles"

    @property
    def photos(self) -> Path:
        return self.root / "data" / "valid"

    def path(self, name: str) -> Path:
        return self.folder / name

    def version(self, name: str) -> str:
        return open_bundle(self.path(name), files=()).version

    def photo(self, label: str = "red", number: int = 0) -> bytes:
        return sorted((self.photos / label).iterdir())[number].read_bytes()

    def all_photos(self) -> list[bytes]:
        return [file.read_bytes() for file in sorted(self.photos.rglob("*.jpg"))]


def make_bundles(root: Path) -> None:
    """Train all bundles and break some. ``contrary`` predicts other labels, ``fewer`` has only two classes."""
    folder, data = root / "bundles", tiny_network.color_folder(root / "data", train=8, valid=6, classes=CLASSES)
    with tiny_network.registered():
        for seed, name in enumerate(("one", "two")):
            _train(root, folder / name, data, seed=seed)
        turned = tiny_network.color_folder(root / "turned", train=8, valid=4, classes=(*CLASSES[1:], CLASSES[0]))
        _train(root, folder / "contrary", turned, seed=0)
        _train(root, folder / "fewer", tiny_network.color_folder(root / "fewer", train=8, valid=4, classes=CLASSES[:2]), seed=0)
    changed = shutil.copytree(folder / "two", folder / "changed")
    graph = bytearray((changed / GRAPH).read_bytes())
    graph[len(graph) // 2] ^= 1
    (changed / GRAPH).write_bytes(graph)
    edited = shutil.copytree(folder / "two", folder / "edited")
    manifest = json.loads((edited / MANIFEST).read_text(encoding="utf-8"))
    (edited / MANIFEST).write_text(json.dumps(manifest | {"backbone": "another"}), encoding="utf-8")
    rewritten(folder / "two", folder / "wrong-golden", wrong_golden=True)
    rewritten(folder / "one", folder / "other-crop", resize_px=40)
    (folder / "nothing").mkdir()


def rewritten(source: Path, target: Path, *, wrong_golden: bool = False, resize_px: int | None = None) -> Bundle:
    """Write a valid copy of a bundle with other golden outputs or preprocessing."""
    bundle = open_bundle(source)
    pixels, probabilities, _ = bundle.golden()

    def write_files(folder: Path) -> None:
        for name in bundle.manifest["files"]:
            (folder / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(source / name, folder / name)
        if wrong_golden:
            scores = {"ood_score": bundle.golden_ood_scores()} if bundle.has_ood_score else {}
            np.savez_compressed(folder / GOLDEN, pixels=pixels, probabilities=probabilities[:, ::-1], **scores)

    manifest = {key: value for key, value in bundle.manifest.items() if key not in ("format", "files", "sha256")}
    if resize_px:
        manifest["preprocessing"] = dict(manifest["preprocessing"]) | {"resize_px": resize_px}
    return write_bundle(target, manifest, write_files=write_files)


def _train(root: Path, target: Path, data: Path, *, seed: int) -> None:
    weights = tiny_network.save_weights(root / f"tiny-{seed}.pth", seed=seed)
    words: Sequence[object] = ("train", "--data-dir", data, "--backbone", "tiny", "--weights", weights, "--epochs", 6)
    run = root / f"run-{target.name}"
    code, _, message = tiny_network.finetune(*words, "--output-dir", run)
    assert code == 0, message
    shutil.copytree(run / "bundle", target)
