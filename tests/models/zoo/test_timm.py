"""Networks of the timm library (``timm:NAME``), configured from timm's ``pretrained_cfg``."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

from models.errors import ConfigError, UnknownModelError
from models.networks.classifier import build_classifier, trainable_names
from models.networks.registry import create_model, get_spec, list_models
from models.networks.split_point import split_model, with_outputs
from models.networks.weights import load_weights
from tests.helpers.small_networks import random_state, some_pixels

# A convolutional network, one that fx can trace only in part, a transformer with a class token, one with two heads, one whose
# head is a 1x1 convolution, and one with stochastic depth and buffers that are not in its state dict.
HEADS = {
    "mobilenetv3_small_050": ("classifier",),
    "mobilevit_xxs": ("head.fc",),
    "vit_tiny_patch16_224": ("head",),
    "levit_128s": ("head.linear", "head_dist.linear"),
    "resnetv2_18": ("head.fc",),
    "swin_tiny_patch4_window7_224": ("head.fc",),
}
SPLITS = {
    "mobilenetv3_small_050": ("flatten", (1024,)),
    "mobilevit_xxs": ("head.drop", (320,)),
    "vit_tiny_patch16_224": ("head_drop", (192,)),
    "levit_128s": ("mean", (384,)),
    "resnetv2_18": ("head.drop", (512, 1, 1)),
    "swin_tiny_patch4_window7_224": ("head.drop", (768,)),
}


@pytest.mark.heavy
@pytest.mark.parametrize("name", HEADS)
def test_timm_network_is_split_and_trained_like_any_other(name: str) -> None:
    spec = get_spec(f"timm:{name}")
    classifier = build_classifier(spec, num_classes=3, base=random_state(spec.name))
    assert spec.heads == HEADS[name]
    assert set(trainable_names(classifier.net)) == {f"{h}.{tensor}" for h in spec.heads for tensor in ("weight", "bias")} | {
        key for key in classifier.net.state_dict() if key.startswith(tuple(f"{h}." for h in spec.heads))
    }
    split, pixels = split_model(classifier), some_pixels(spec)
    with torch.inference_mode():
        features = split.frozen(pixels)
        assert (split.last_frozen, tuple(features.shape[1:])) == SPLITS[name]
        assert torch.equal(split.trainable(features), classifier(pixels))
        log_probs, embedding, feature_map = with_outputs(classifier, [(spec.head, True), (spec.cam_layer, False)])(pixels)
    assert (log_probs.shape, embedding.dim()) == ((2, 3), 2)
    assert feature_map.shape[2] == feature_map.shape[3] > 1
    assert not any(parameter.is_meta for parameter in classifier.parameters())
    assert not any(buffer.is_meta for buffer in classifier.buffers())


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "convnext_atto", "efficientnet_b0", "inception_v4"])
def test_preprocessing_matches_timms_data_config(name: str) -> None:
    preprocessing, cfg = get_spec(f"timm:{name}").preprocessing, timm.get_pretrained_cfg(name)
    data = timm.data.resolve_data_config(pretrained_cfg=cfg.to_dict())
    assert (3, preprocessing.input_px, preprocessing.input_px) == data["input_size"]
    assert (preprocessing.mean, preprocessing.std, preprocessing.interpolation) == (
        data["mean"],
        data["std"],
        data["interpolation"],
    )
    assert preprocessing.resize_px == math.floor(preprocessing.input_px / data["crop_pct"])


def test_weights_and_license_come_from_timm() -> None:
    spec = get_spec("timm:convnext_atto")
    assert spec.weights is not None
    assert spec.weights.location == "hf.co/timm/convnext_atto.d2_in1k"
    assert spec.weights.license == "apache-2.0"
    assert get_spec("timm:convnext_tiny.fb_in22k").pretrained_classes == 21_841


def test_unknown_name_error_suggests_the_closest_one() -> None:
    with pytest.raises(UnknownModelError, match=r"timm has no network named 'convnexttiny'\. Did you mean 'convnext_tiny'\?"):
        get_spec("timm:convnexttiny")
    with pytest.raises(UnknownModelError, match=r"There is no network named 'tim:resnet18'\."):
        get_spec("tim:resnet18")


def test_untraceable_network_is_rejected() -> None:
    with pytest.raises(ConfigError, match=r"cannot be determined: torch\.fx cannot trace it.*--backbone"):
        get_spec("timm:crossvit_tiny_240")


def test_timm_networks_are_not_listed() -> None:
    assert not [name for name in list_models() if ":" in name]


def test_channels_and_classes_are_passed_to_timm() -> None:
    with torch.device("meta"):
        net = create_model("timm:convnext_atto", num_classes=4, in_channels=1)
        assert net(torch.zeros(1, 1, 64, 64)).shape == (1, 4)


def test_weights_file_is_converted_by_timm(tmp_path: Path) -> None:
    spec = get_spec("timm:mobilenetv3_small_050")
    state = random_state(spec.name)
    save_file(state, tmp_path / "model.safetensors")
    weights = load_weights(spec, file=tmp_path / "model.safetensors")
    assert not weights.published
    net = build_classifier(spec, num_classes=2, base=weights.tensors).net
    assert torch.equal(net.get_parameter("conv_stem.weight"), state["conv_stem.weight"])


def test_stochastic_depth_is_disabled() -> None:
    net = create_model("timm:swin_tiny_patch4_window7_224", num_classes=2).train()
    depths = [layer for layer in net.modules() if type(layer).__name__ == "DropPath"]
    assert depths
    assert all(layer.drop_prob == 0 for layer in depths)
    assert isinstance(net.get_submodule("head.fc"), nn.Linear)
