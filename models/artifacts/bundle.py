"""The bundle: a folder with a trained classifier, its metadata and its evaluation, described by ``manifest.json``.

The manifest lists every other file with its SHA-256 and also contains its own. A modified file or manifest (for example other
classes or different preprocessing) is therefore rejected with an error that names it. This module does not import torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from models.artifacts.atomic_io import sha256_of
from models.artifacts.decision_rule import DecisionRule
from models.artifacts.ood_score import OOD_SCORE
from models.errors import BundleError
from models.preprocess import Preprocessing

FORMAT_VERSION = 1
MANIFEST, GRAPH, WEIGHTS, HEAD = "manifest.json", "model.onnx", "model.safetensors", "head.safetensors"
MAX_NAME_BYTES = 200  # names of files may have 255, and some add a version or a suffix
UNSAFE_IN_NAME = re.compile("[/\\\\\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # surrogates stand for bytes that are not UTF-8
PREDICTIONS, GOLDEN, MODEL_CARD = "predictions.csv", "golden.npz", "README.md"
INT8_GRAPH = "model.int8.onnx"
HELD_OUT = "held_out.npz"  # predictions of photos that were not used in training, to select thresholds from

Golden = tuple[NDArray[np.uint8], NDArray[np.float32], float]


@dataclass(frozen=True)
class Bundle:
    """An opened bundle. ``manifest`` is the parsed manifest; properties give access to its common fields."""

    path: Path
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return str(self.manifest["name"])

    @property
    def version(self) -> str:
        """The first 12 hex digits of the manifest's SHA-256, which changes whenever any file in the bundle changes."""
        return str(self.manifest["sha256"])[:12]

    @property
    def backbone(self) -> str:
        return str(self.manifest["backbone"])

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.manifest["classes"])

    @property
    def preprocessing(self) -> Preprocessing:
        params = dict(self.manifest["preprocessing"])
        return Preprocessing(**params | {"mean": tuple(params["mean"]), "std": tuple(params["std"])})

    @property
    def permute_pixels(self) -> int | None:
        """The seed of the fixed pixel permutation in the network's first layer, or None without one."""
        seed = self.manifest.get("permute_pixels")
        return None if seed is None else int(seed)

    @property
    def normalizes_embedding(self) -> bool:
        """Whether the last layer scales the embedding to unit length first."""
        return bool(self.manifest.get("normalizes_embedding"))

    @cached_property
    def decision_rule(self) -> DecisionRule:
        """When the model abstains. Raises BundleError if the manifest's rule is malformed or too new."""
        return DecisionRule.from_manifest(self.manifest)

    @property
    def has_ood_score(self) -> bool:
        """Whether the graph computes an OOD score. Older bundles have none."""
        return bool(self.manifest.get("ood"))

    @property
    def has_int8(self) -> bool:
        """Whether the bundle has a graph in int8. Older bundles have none."""
        return INT8_GRAPH in self.manifest["files"]

    def graph(self, precision: str) -> Path:
        """Return the graph to run in a precision. Its file may not have been verified."""
        return self.path / (INT8_GRAPH if precision == "int8" else GRAPH)

    @property
    def engine_outputs(self) -> tuple[str, ...]:
        """The outputs of the graph that decide about an image: the probabilities, and the OOD score if there is one."""
        return ("probabilities", OOD_SCORE) if self.has_ood_score else ("probabilities",)

    @property
    def merged_from(self) -> str | None:
        """The version of the head-only bundle that this one was merged from, or None."""
        version: str | None = self.manifest.get("merged_from")
        return version

    @property
    def is_head_only(self) -> bool:
        """Whether the bundle has no graph, so that it cannot serve before it is merged with its pretrained weights."""
        return bool(self.manifest["kind"] == "head")

    @property
    def lacks_weights(self) -> bool:
        """Whether the bundle has the trained layers' weights only, so that PyTorch cannot run it before it is merged."""
        return WEIGHTS not in self.manifest["files"]

    def model_card(self) -> str | None:
        """Read and verify the model card (Markdown). Returns None if the bundle has none.

        Raises:
            BundleError: The file was modified.
        """
        if MODEL_CARD not in self.manifest["files"]:
            return None
        return read_small_file(self.path, MODEL_CARD, self.manifest["files"]).decode("utf-8", "replace")

    def golden(self, precision: str = "fp32") -> Golden:
        """Read the golden pixels (N, H, W, C), the expected probabilities (N, classes), and float32's tolerance.

        The graph in int8 has its own expected outputs. bfloat16 has those of float32, with a larger tolerance.
        """
        with np.load(self.path / GOLDEN) as arrays:
            probabilities = arrays[golden_array("probabilities", precision)]
            return arrays["pixels"], probabilities, float(self.manifest["golden"]["tolerance"])

    def golden_ood_scores(self, precision: str = "fp32") -> NDArray[np.float32] | None:
        """Read the expected OOD scores (N,) of the golden pixels. None if the bundle has no score."""
        with np.load(self.path / GOLDEN) as arrays:
            return arrays[golden_array(OOD_SCORE, precision)] if self.has_ood_score else None


def golden_array(output: str, precision: str) -> str:
    """Return the name of the array of golden outputs in a precision."""
    return f"int8_{output}" if precision == "int8" else output


def open_bundle(path: Path, *, files: Iterable[str] | None = None) -> Bundle:
    """Open a bundle after verifying its manifest and files.

    Args:
        path: The bundle's folder.
        files: Names of the files to verify; None verifies all of them.

    Raises:
        BundleError: The folder is not a bundle, its format is newer than this version supports, the manifest was edited, or
            a file is missing or was modified.
    """
    manifest = _read_manifest(path)
    if manifest["format"] > FORMAT_VERSION:
        raise BundleError(
            f"The bundle {path} has format {manifest['format']}, but this version supports formats up to {FORMAT_VERSION}. "
            "Upgrade this program."
        )
    if manifest.get("sha256") != manifest_sha256(manifest):
        raise BundleError(f"{path / MANIFEST} was changed after it was written. Export the bundle again.")
    if problem := name_problem(str(manifest.get("name", ""))):
        raise BundleError(f"{path / MANIFEST} has the name {str(manifest.get('name'))[:80]!r}, {problem}. Export it again.")
    known: Mapping[str, Mapping[str, Any]] = manifest["files"]
    for named in map(PurePosixPath, known):
        if named.is_absolute() or ".." in named.parts:
            raise BundleError(f"{path / MANIFEST} lists {str(named)!r}, which is outside the bundle. Do not use this bundle.")
    DecisionRule.from_manifest(manifest)
    for name in known if files is None else files:
        check_file(path, name, known)
    return Bundle(path, manifest)


def write_bundle(path: Path, fields: Mapping[str, Any], *, write_files: Callable[[Path], None]) -> Bundle:
    """Write a bundle atomically: build it in a temporary folder, then move it to ``path``, replacing an older bundle.

    Args:
        path: The bundle's folder.
        fields: Fields of the manifest. The format version, the file list and the manifest's SHA-256 are added.
        write_files: Called with the temporary folder to write all files except the manifest.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temp = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".part", dir=path.parent))
    try:
        write_files(temp)
        manifest = {"format": FORMAT_VERSION, **fields, "files": hash_files(temp)}
        manifest["sha256"] = manifest_sha256(manifest)
        text = json.dumps(manifest, indent=2, ensure_ascii=False)
        (temp / MANIFEST).write_text(text + "\n", encoding="utf-8")
        temp.chmod(0o755)  # mkdtemp sets 0700 and safetensors 0600, but the service may run as another user
        for file in temp.rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)
        _replace_folder(temp, path)
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    return Bundle(path, json.loads(text))


def preprocessing_fields(preprocessing: Preprocessing) -> dict[str, Any]:
    """Build the manifest fields for a preprocessing: its parameters and their SHA-256."""
    return {"preprocessing": asdict(preprocessing), "preprocessing_sha256": preprocessing.sha256()}


def check_golden(
    bundle: Bundle,
    run: Callable[[NDArray[np.uint8]], NDArray[np.float32]],
    *,
    tolerance: float | None = None,
    golden: Golden | None = None,
) -> float:
    """Compare the outputs of ``run`` on the golden pixels with the expected probabilities.

    Args:
        bundle: The bundle to check.
        run: Maps pixels (N, H, W, C) to probabilities. It may return only the first rows.
        tolerance: Max absolute difference, for a lower numeric precision. Defaults to the bundle's own tolerance.
        golden: The result of ``bundle.golden()``, to avoid reading it again.

    Returns:
        The largest absolute difference.

    Raises:
        BundleError: The difference exceeds the tolerance or is NaN.
    """
    pixels, expected, bundle_tolerance = golden or bundle.golden()
    outputs = run(pixels)
    difference = float(np.abs(outputs - expected[: len(outputs)]).max())
    limit = bundle_tolerance if tolerance is None else tolerance
    if not difference <= limit:  # also true for NaN
        raise BundleError(
            f"The bundle {bundle.path} does not reproduce its golden outputs: max difference {difference:.2g}, "
            f"tolerance {limit:.2g}. Export it again with the library versions that are installed here."
        )
    return difference


def check_golden_ood_scores(
    bundle: Bundle, scores: NDArray[np.float32], *, tolerance: float | None = None, expected: NDArray[np.float32] | None = None
) -> float:
    """Compare the OOD scores of the golden pixels with the expected ones, relative to these (or to 1 if they are smaller).

    Args:
        bundle: The bundle to check.
        scores: (M,) the scores of the first golden pixels.
        tolerance: See ``check_golden``.
        expected: The result of ``bundle.golden_ood_scores()``, to avoid reading it again.

    Returns:
        The largest relative difference.

    Raises:
        BundleError: The difference exceeds the tolerance or is NaN.
    """
    golden = bundle.golden_ood_scores() if expected is None else expected
    assert golden is not None
    golden = golden[: len(scores)]
    difference = float((np.abs(scores - golden) / np.maximum(golden, 1)).max())
    limit = float(bundle.manifest["golden"]["tolerance"]) if tolerance is None else tolerance
    if not difference <= limit:  # also true for NaN
        raise BundleError(
            f"The bundle {bundle.path} does not reproduce its golden OOD scores: max relative difference {difference:.2g}, "
            f"tolerance {limit:.2g}. Export it again with the library versions that are installed here."
        )
    return difference


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not file.is_file():
        raise BundleError(
            f"{path} is not a bundle: it has no {MANIFEST}. Use a folder written by `finetune train` (runs/NAME/bundle)."
        )
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(manifest, dict) or not isinstance(manifest["format"], int):
            raise ValueError("no format number")
    except (ValueError, KeyError) as error:
        raise BundleError(f"{file} cannot be read ({error}). Export the bundle again.") from None
    return manifest


def name_problem(name: str) -> str | None:
    """Return why a name is not allowed for a bundle, as names become parts of paths and URLs, or None if it is allowed."""
    if not name or name.startswith("."):
        return "which is empty or begins with a dot"
    if len(name.encode("utf-8", "surrogatepass")) > MAX_NAME_BYTES:
        return f"which has more than {MAX_NAME_BYTES} bytes"
    return "which contains a slash, a backslash or a control character" if UNSAFE_IN_NAME.search(name) else None


def read_small_file(path: Path, name: str, known: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Read a small file of a bundle and verify the bytes that were read. Raises BundleError as ``check_file``."""
    check_file(path, name, known)
    with (path / name).open("rb") as file:
        data = file.read(known[name]["bytes"] + 1)
    if hashlib.sha256(data).hexdigest() != known[name]["sha256"]:
        raise _modified(path / name)
    return data


def check_file(path: Path, name: str, known: Mapping[str, Mapping[str, Any]]) -> None:
    """Verify the size and the SHA-256 of one file. A link may lead to another place in the same folder only.

    Args:
        path: The folder.
        name: The file's name in ``path``.
        known: The listed files: {name: {"sha256": ..., "bytes": ...}}.

    Raises:
        BundleError: The file is not listed, missing, modified, or a link out of the folder.
    """
    if name not in known:
        raise BundleError(f"The bundle {path} has no {name}. Export it again so that it includes this file.")
    file = path / name
    if not file.is_file():
        raise BundleError(f"The bundle {path} lacks {name}, which its manifest lists. Copy the complete folder again.")
    if not file.resolve().is_relative_to(path.resolve()):
        raise BundleError(f"{file} is a link that leads out of the bundle. Copy the file itself into it.")
    if file.stat().st_size != known[name]["bytes"] or sha256_of(file) != known[name]["sha256"]:
        raise _modified(file)


def _modified(file: Path) -> BundleError:
    return BundleError(f"{file} was changed or damaged: its sha256 is not the manifest's. Copy or export the bundle again.")


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Hash all files under ``folder``: {relative POSIX path: {"sha256": ..., "bytes": ...}}."""
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return {file.relative_to(folder).as_posix(): {"sha256": sha256_of(file), "bytes": file.stat().st_size} for file in files}


def manifest_sha256(manifest: Mapping[str, Any]) -> str:
    """Compute the SHA-256 of a manifest without its own ``sha256`` field."""
    rest = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _replace_folder(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``. An existing folder is moved away first and restored if the rename fails."""
    if not path.exists():
        new.rename(path)
        return
    backup = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".old", dir=path.parent)) / path.name
    os.rename(path, backup)
    try:
        new.rename(path)
    except OSError:
        os.rename(backup, path)
        raise
    finally:
        shutil.rmtree(backup.parent, ignore_errors=True)
