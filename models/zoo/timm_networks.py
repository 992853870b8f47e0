"""All networks of the timm library, as ``timm:NAME`` (Wightman 2019, https://github.com/huggingface/pytorch-image-models).

The preprocessing, the head, the weights and their license come from timm's ``pretrained_cfg``. NAME can include the tag of
specific weights: ``timm:convnext_tiny.fb_in22k``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from models.errors import ConfigError, UnknownModelError, did_you_mean
from models.networks.hooks import forward_hooks, layer_names
from models.networks.registry import register_library
from models.networks.spec import ModelSpec, Recipe, WeightsSource
from models.preprocess import INTERPOLATIONS, Preprocessing

TIMM_URL = "https://github.com/huggingface/pytorch-image-models"
IMAGENET_CLASSES = 1000  # size of the replaced head if timm publishes a network without one


@register_library("timm")
def find_timm_model(name: str) -> tuple[ModelSpec, Callable[..., nn.Module]]:
    """Return the spec and the builder of a timm network. Raises UnknownModelError, which suggests the closest name."""
    import timm  # imported here because it takes a second, and most commands do not need it
    from timm.layers.drop import DropPath

    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None:
        known = timm.list_models() + timm.list_models(pretrained=True)
        raise UnknownModelError(
            f"timm has no network named {name!r}.{did_you_mean(name, known)} Use timm:NAME with a name from timm, for example "
            f"timm:convnext_tiny."
        )

    def build(num_classes: int, in_channels: int = 3) -> nn.Module:
        net = timm.create_model(name, num_classes=num_classes, in_chans=in_channels)
        for layer in net.modules():
            if isinstance(layer, DropPath):
                layer.drop_prob = 0.0  # stochastic depth would make the frozen layers random
        return net

    classes = cfg.num_classes or IMAGENET_CLASSES
    preprocessing = preprocessing_from_cfg(name, cfg)
    with torch.device("meta"):
        net = build(classes).eval()
    heads = find_heads(net, cfg.classifier)
    spec = ModelSpec(
        name=f"timm:{name}",
        title=f"{name} (timm)",
        year=None,
        paper=paper_url(cfg),
        head=heads[0],
        extra_heads=tuple(heads[1:]),
        cam_layer=find_cam_layer(net, preprocessing),
        weights=weights_source(name, classes, cfg),
        preprocessing=preprocessing,
        recipe=Recipe(epochs=30, lr=0.01, lr_schedule="cosine"),
        pretrained_classes=classes,
    )
    return spec, build


def preprocessing_from_cfg(name: str, cfg: Any) -> Preprocessing:
    """Convert timm's evaluation preprocessing: resize to the input size divided by ``crop_pct``, then center crop.

    Raises:
        ConfigError: The network's input is not square.
    """
    _, height, width = cfg.input_size
    if height != width:
        raise ConfigError(
            f"timm:{name} takes images of {height} x {width} pixels, but only square inputs are supported. "
            "Choose another network."
        )
    return Preprocessing(
        input_px=height,
        resize_px=math.floor(height / cfg.crop_pct),
        interpolation=cfg.interpolation if cfg.interpolation in INTERPOLATIONS else "bicubic",
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
    )


def weights_source(name: str, classes: int, cfg: Any) -> WeightsSource | None:
    """Return the source of timm's weights: the Hugging Face Hub or a URL; None if timm has no weights."""
    convert = partial(load_timm_state_dict, name, classes)
    license = cfg.license or "unknown license"
    if cfg.hf_hub_id and cfg.custom_load != "hf":  # a custom load applies to files of the URL, such as NumPy archives
        repository = cfg.hf_hub_id if not cfg.hf_hub_id.endswith("/") else f"{cfg.hf_hub_id}{name}"
        file = {"hub_file": cfg.hf_hub_filename} if cfg.hf_hub_filename else {}
        return WeightsSource(sha256="", license=license, hub_id=repository, convert=convert, **file)
    if cfg.url and not cfg.custom_load:
        return WeightsSource(sha256="", license=license, url=cfg.url, convert=convert)
    return None


def load_timm_state_dict(name: str, classes: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Convert a file's tensors to those of the network with timm's own loader, which depends on the checkpoint."""
    import timm

    overlay = {"state_dict": dict(tensors), "num_classes": classes, "custom_load": False}
    net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes)
    return dict(net.state_dict())


def paper_url(cfg: Any) -> str:
    """Return the URL of the network's paper, of its origin, or of timm, whichever is known first."""
    papers = [cfg.paper_ids] if isinstance(cfg.paper_ids, str) else list(cfg.paper_ids or ())
    if papers:
        return f"https://arxiv.org/abs/{papers[0].removeprefix('arXiv:')}"
    return cfg.origin_url or TIMM_URL


def find_heads(net: nn.Module, known: str | tuple[str, ...] | None) -> list[str]:
    """Find the names of the layers that classify.

    Args:
        net: The network.
        known: The names in timm's ``pretrained_cfg``. If they are not Linear or Conv2d layers, the last such layer of each
            module of ``get_classifier`` is used.

    Raises:
        ConfigError: No layer can be replaced for new classes.
    """
    names = [known] if isinstance(known, str) else list(known or ())
    layers = dict(net.named_modules())
    if names and all(isinstance(layers.get(name), nn.Linear | nn.Conv2d) for name in names):
        return names
    classifier = net.get_classifier()  # type: ignore[operator]
    modules = classifier if isinstance(classifier, tuple | list | nn.ModuleList) else [classifier]
    heads = []
    for module in modules:
        candidates = [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        heads += [name for name, layer in layers.items() if candidates and layer is candidates[-1]]
    if not heads:
        raise ConfigError("This timm network has no final layer that can be replaced for new classes. Choose another network.")
    return heads


def find_cam_layer(net: nn.Module, preprocessing: Preprocessing) -> str:
    """Find the last layer with a feature map (N, C, h, w), h = w > 1; in a transformer, this is the patch embedding.

    Dropout, Identity and Softmax layers are ignored, because in a transformer their maps are attention weights.

    Args:
        net: The network, on the meta device.
        preprocessing: Determines the input's shape.

    Raises:
        ConfigError: No layer has a feature map.
    """
    from models.networks.classifier import Classifier  # imported here because both import the registry
    from models.networks.split_point import traced_layers

    maps: list[str] = []
    known = traced_layers(Classifier(net, preprocessing))

    def collect(name: str, layer_input: Any, layer_output: Any) -> None:
        if isinstance(layer_output, Tensor) and layer_output.dim() == 4 and layer_output.shape[2] == layer_output.shape[3] > 1:
            maps.append(name)

    ignored = layer_names(net, nn.Dropout, nn.Identity, nn.Softmax)
    names = [name for name, _ in net.named_modules() if name in known and name not in ignored]
    side = preprocessing.input_px
    with warnings.catch_warnings(), forward_hooks(net, names, collect), torch.no_grad():
        warnings.simplefilter("ignore")
        net(torch.zeros(1, preprocessing.channels, side, side, device="meta"))
    if not maps:
        raise ConfigError("This timm network has no layer with a feature map. Choose another network.")
    return maps[-1]
