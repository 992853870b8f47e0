"""The bundle: one folder that holds a classifier and all that is known about it, and says so in ``manifest.json``.

The manifest names every other file with its sha256 and carries its own, so that a changed file, or a manifest edited to
other classes or another preprocessing, is refused by name. Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifacts.atomic_io import sha256_of
from models.errors import BundleError
from models.preprocess import Preprocessing

FORMAT_VERSION = 1
MANIFEST, GRAPH, WEIGHTS, HEAD = "manifest.json", "model.onnx", "model.safetensors", "head.safetensors"
PREDICTIONS, GOLDEN, MODEL_CARD = "predictions.csv", "golden.npz", "README.md"

Golden = tuple[NDArray[np.uint8], NDArray[np.float32], float]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. ``manifest`` is the whole manifest; what code needs of it has a name of its own."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def version(self) -> str:
        """The first 12 digits of the manifest's sha256: it changes when anything in the bundle does."""
        return str(self.manifest["sha256"])[:12]

    @property
    def backbone(self) -> str:
        return str(self.manifest["backbone"])

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest["classes"])

    @property
    def preprocessing(self) -> Preprocessing:
        given = dict(self.manifest["preprocessing"])
        return Preprocessing(**given | {"mean": tuple(given["mean"]), "std": tuple(given["std"])})

    @property
    def permute_pixels(self) -> int | None:
        """The seed of the places that the network's first layer gives to the pixels; None where it leaves them alone."""
        seed = self.manifest.get("permute_pixels")
        return None if seed is None else int(seed)

    @property
    def merged_from(self) -> str | None:
        """The version of the head-only bundle that this one was made of, where it was."""
        found: str | None = self.manifest.get("merged_from")
        return found

    @property
    def is_head_only(self) -> bool:
        return bool(self.manifest["kind"] == "head")

    def model_card(self) -> str | None:
        """The model card, as Markdown, where the bundle has one."""
        file = self.path / MODEL_CARD
        return file.read_text(encoding="utf-8") if file.is_file() else None

    def golden(self) -> Golden:
        """The golden pixels (N, H, W, C), the probabilities (N, classes) that they must give, and the tolerance."""
        with np.load(self.path / GOLDEN) as arrays:
            return arrays["pixels"], arrays["probabilities"], float(self.manifest["golden"]["tolerance"])


def open_bundle(path: Path, *, files: Iterable[str] | None = None) -> Bundle:
    """Open the bundle in the folder ``path`` and check the manifest and the named ``files`` (all, where none are named).

    Raises BundleError: no bundle, a newer format, a file that is missing or was changed, an edited manifest.
    """
    manifest = _read_manifest(path)
    if manifest["format"] > FORMAT_VERSION:
        raise BundleError(
            f"The bundle {path} has format {manifest['format']} and this version reads up to {FORMAT_VERSION}; "
            "upgrade this program."
        )
    if manifest.get("sha256") != manifest_sha256(manifest):
        raise BundleError(f"{path / MANIFEST} was changed after it was written; export the bundle again.")
    known: Mapping[str, Mapping[str, Any]] = manifest["files"]
    for named in map(PurePosixPath, known):
        if named.is_absolute() or ".." in named.parts:
            raise BundleError(f"{path / MANIFEST} names {str(named)!r}, which lies outside the bundle; do not trust it.")
    for name in known if files is None else files:
        check_file(path, name, known)
    return Bundle(path, manifest)


def write_bundle(path: Path, fields: Mapping[str, Any], *, write_files: Callable[[Path], None]) -> Bundle:
    """Write a bundle whole or not at all: ``write_files(folder)`` writes its files beside ``path``, then it takes its place.

    The manifest is ``fields`` with the format, the files and its own sha256 added. An older bundle at ``path`` is replaced.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        write_files(part)
        manifest = {"format": FORMAT_VERSION, **fields, "files": hash_files(part)}
        manifest["sha256"] = manifest_sha256(manifest)
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (part / MANIFEST).write_text(text + "\n", encoding="utf-8")
        part.chmod(0o755)  # mkdtemp gives 0700 and safetensors 0600; a bundle is read by the service's user too
        for file in part.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        _put_in_place(part, path)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Bundle(path, json.loads(text))


def preprocessing_fields(preprocessing: Preprocessing) -> dict[str, Any]:
    """The preprocessing as the manifest holds it, with its own sha256 beside it."""
    return {"preprocessing": asdict(preprocessing), "preprocessing_sha256": preprocessing.sha256()}


def check_golden(
    bundle: Bundle,
    run: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    *,
    tolerance: float | None = None,
    golden: Golden | None = None,
) -> float:
    """Run the golden pixels through ``run`` and give the largest difference from what they must give.

    ``run`` may answer for the first few alone; ``golden`` is what was read already, by who checks in several threads.
    Raises BundleError where the difference is over the bundle's own tolerance, or over ``tolerance``, as for a coarser
    precision.
    """
    pixels, wanted, own = golden or bundle.golden()
    answers = run(pixels)
    difference = float(np.abs(answers - wanted[: len(answers)]).max())
    limit = own if tolerance is None else tolerance
    if not difference <= limit:  # also where it is not a number
        raise BundleError(
            f"The bundle {bundle.path} does not give its golden answers: they differ by {difference:.2g}, "
            f"{limit:.2g} is allowed; export it again with the libraries that are installed here."
        )
    return difference


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(
            f"{path} is not a bundle: it has no {MANIFEST}; give a folder that `finetune train` wrote (runs/NAME/bundle)."
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not isinstance(manifest["format"], int):
            raise ValueError("no format number")
    except (ValueError, KeyError) as error:
        raise BundleError(f"{file} cannot be read ({error}); export the bundle again.") from None
    return manifest


def check_file(path: Path, name: str, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise BundleError where the file ``name`` of the folder ``path`` is not as ``known`` says: {name: {sha256, bytes}}."""
    if name not in known:
        raise BundleError(f"The bundle {path} has no {name}; export it again with what needs it.")
    file = path / name
    if not file.is_file():
        raise BundleError(f"The bundle {path} lacks {name}, which its manifest names; copy the whole folder again.")
    if file.stat().st_size != known[name]["bytes"] or sha256_of(file) != known[name]["sha256"]:
        raise BundleError(f"{file} was changed or damaged: its sha256 is not the manifest's; copy or export the bundle again.")


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The size and the sha256 of every file below ``folder``, by its name from there."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): {"sha256": sha256_of(file), "bytes": file.stat().st_size} for file in files}


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """The sha256 of a manifest, but for the one that it carries itself."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _put_in_place(part: Path, path: Path) -> None:
    """Rename ``part`` to ``path``; an older folder there moves aside first, and comes back if the second step fails."""
    if not path.exists():
        part.rename(path)
        return
    aside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent)) / path.name
    os.rename(path, aside)
    try:
        part.rename(path)
    except OSError:
        os.rename(aside, path)
        raise
    finally:
        shutil.rmtree(aside.parent, ignore_errors=True)
