"""Any of timm's networks, as ``timm:NAME`` (Wightman 2019, https://github.com/huggingface/pytorch-image-models).

Everything comes from timm's own account of the network (``pretrained_cfg``): input size, mean, deviation, interpolation, crop,
head, weights and their license. NAME may name one of several trainings: ``timm:convnext_tiny.fb_in22k``.
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
IMAGENET_CLASSES = 1000  # the size of the head that is replaced, where timm publishes a network without one


@register_library("timm")
def find_timm_model(name: str) -> tuple[ModelSpec, Callable[..., nn.Module]]:
    """The spec and the builder of one of timm's networks. Raises UnknownModelError, which proposes the nearest name."""
    import timm  # here, as it takes a second to import and most commands do not need it
    from timm.layers.drop import DropPath

    cfg = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if cfg is None:
        known = timm.list_models() + timm.list_models(pretrained=True)
        raise UnknownModelError(
            f"timm has no network named {name!r}.{did_you_mean(name, known)} Its own names follow `timm:`, as in "
            f"timm:convnext_tiny."
        )

    def build(num_classes: int, in_channels: int = 3) -> nn.Module:
        net = timm.create_model(name, num_classes=num_classes, in_chans=in_channels)
        for layer in net.modules():
            if isinstance(layer, DropPath):
                layer.drop_prob = 0.0  # for training all of a network: here it would make the frozen part random
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
    """As timm evaluates the network: resized to the input's size over ``crop_pct``, cropped in the middle."""
    _, height, width = cfg.input_size
    if height != width:
        raise ConfigError(f"timm:{name} takes pictures of {height} x {width} px, and only squares are served; choose another.")
    return Preprocessing(
        input_px=height,
        resize_px=math.floor(height / cfg.crop_pct),
        interpolation=cfg.interpolation if cfg.interpolation in INTERPOLATIONS else "bicubic",
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
    )


def weights_source(name: str, classes: int, cfg: Any) -> WeightsSource | None:
    """Where timm has the weights: on the Hugging Face Hub, or at an address; None where it has none."""
    convert = partial(load_timm_state_dict, name, classes)
    license = cfg.license or "unknown license"
    if cfg.hf_hub_id and cfg.custom_load != "hf":  # a custom load is for files at the address, such as NumPy's
        repository = cfg.hf_hub_id if not cfg.hf_hub_id.endswith("/") else f"{cfg.hf_hub_id}{name}"
        file = {"hub_file": cfg.hf_hub_filename} if cfg.hf_hub_filename else {}
        return WeightsSource(sha256="", license=license, hub_id=repository, convert=convert, **file)
    if cfg.url and not cfg.custom_load:
        return WeightsSource(sha256="", license=license, url=cfg.url, convert=convert)
    return None


def load_timm_state_dict(name: str, classes: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors as the network has them: timm knows how each of its checkpoints has to be read."""
    import timm

    overlay = {"state_dict": dict(tensors), "num_classes": classes, "custom_load": False}
    net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=classes)
    return dict(net.state_dict())


def paper_url(cfg: Any) -> str:
    """The paper where timm names it, else where the network comes from, else timm itself."""
    papers = [cfg.paper_ids] if isinstance(cfg.paper_ids, str) else list(cfg.paper_ids or ())
    if papers:
        return f"https://arxiv.org/abs/{papers[0].removeprefix('arXiv:')}"
    return cfg.origin_url or TIMM_URL


def find_heads(net: nn.Module, known: str | tuple[str, ...] | None) -> list[str]:
    """The names of the layers that classify: timm's own account, or the last such layer of what ``get_classifier`` gives."""
    named = [known] if isinstance(known, str) else list(known or ())
    layers = dict(net.named_modules())
    if named and all(isinstance(layers.get(name), nn.Linear | nn.Conv2d) for name in named):
        return named
    classifier = net.get_classifier()  # type: ignore[operator]
    parts = classifier if isinstance(classifier, tuple | list | nn.ModuleList) else [classifier]
    heads = []
    for part in parts:
        inside = [layer for layer in part.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        heads += [name for name, layer in layers.items() if inside and layer is inside[-1]]
    if not heads:
        raise ConfigError("This network of timm's ends in no layer that could be replaced for new classes; choose another.")
    return heads


def find_cam_layer(net: nn.Module, preprocessing: Preprocessing) -> str:
    """The last layer that gives a map (N, C, h, w) with h = w > 1; for a transformer that is its patch embedding.

    Dropout is no such layer: in a transformer it gives maps of which place looks at which.
    """
    from models.networks.classifier import Classifier  # here, as they know the registry that this file registers with
    from models.networks.split_point import traced_layers

    maps: list[str] = []
    known = traced_layers(Classifier(net, preprocessing))

    def note(name: str, given: Any, result: Any) -> None:
        if isinstance(result, Tensor) and result.dim() == 4 and result.shape[2] == result.shape[3] > 1:
            maps.append(name)

    silent = layer_names(net, nn.Dropout, nn.Identity, nn.Softmax)
    names = [name for name, _ in net.named_modules() if name in known and name not in silent]
    side = preprocessing.input_px
    with warnings.catch_warnings(), forward_hooks(net, names, note), torch.no_grad():
        warnings.simplefilter("ignore")
        net(torch.zeros(1, preprocessing.channels, side, side, device="meta"))
    if not maps:
        raise ConfigError("This network of timm's has no layer that gives a map of features; choose another.")
    return maps[-1]
