"""Published numbers of the networks: parameters, shapes, MACs and initialization."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from models.networks.flops import count_macs, count_parameters, get_cost, input_shape, measure_cost
from models.networks.registry import create_model, get_spec, list_models
from models.zoo import inception_blocks
from models.zoo.mobilenet import separable_cost_ratio
from models.zoo.vgg import DEPTHS, vgg_layers

pytestmark = pytest.mark.slow

PARAMETERS = {
    "alexnet": 61_100_840,
    "alexnet_2012": 46_764_746,
    "cnn_mnist": 6_422,
    "cnn_selu": 435_306,
    "cnn_separable": 184_234,
    "cnn_two_conv": 8_490,
    "densenet121": 7_978_856,
    "efficientnet_lite0": 4_652_008,
    "efficientnet_lite1": 5_416_680,
    "efficientnet_lite2": 6_092_072,
    "googlenet": 6_624_904,
    "inception_v3": 23_834_568,
    "inception_v4": 42_679_816,
    "lenet5": 61_706,
    "lenet_cifar": 62_006,
    "mlp": 6_442,
    "mobilenet_v1": 4_231_976,
    "mobilenet_v1_025": 470_072,
    "mobilenet_v1_050": 1_331_592,
    "mobilenet_v1_075": 2_585_560,
    "mobilenet_v2": 3_504_872,
    "mobilenet_v3_large": 5_483_032,
    "mobilenet_v3_small": 2_542_856,
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "squeezenet1_1": 1_235_496,
    "vgg11": 132_863_336,
    "vgg13": 133_047_848,
    "vgg16": 138_357_544,
    "vgg19": 143_667_240,
    "vgg11_bn": 132_868_840,
    "vgg13_bn": 133_053_736,
    "vgg16_bn": 138_365_992,
    "vgg19_bn": 143_678_248,
}
"""From the tables of torchvision, timm and Keras (MobileNetV1); those of the small networks can be counted by hand."""
BY_HAND = {"vgg_cifar", "vgg_mnist"}
# Each convolution has 9 * inputs * outputs + outputs parameters, and each BatchNorm two per feature map.
VGG_CIFAR = [(3, 64), (64, 128), (128, 256), (256, 256), (256, 512), (512, 512), (512, 512), (512, 512)]


@pytest.mark.parametrize("name", list_models())
def test_recorded_cost_matches_the_measured_one(name: str) -> None:
    assert get_spec(name).cost == measure_cost(get_spec(name))


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameter_count_matches_the_published_one(name: str) -> None:
    assert get_cost(get_spec(name)).parameters == PARAMETERS[name]


def test_cost_is_measured_if_none_is_recorded() -> None:
    spec = get_spec("lenet5")
    assert get_cost(replace(spec, cost=None)) == spec.cost


def test_every_network_has_a_published_or_hand_counted_number() -> None:
    assert set(list_models()) == set(PARAMETERS) | BY_HAND


def test_vgg_cifar_parameters_counted_by_hand() -> None:
    by_hand = sum(9 * a * b + b + 2 * b for a, b in VGG_CIFAR) + 512 * 10 + 10
    assert count_parameters(create_model("vgg_cifar")) == by_hand == 9_231_114


def test_vgg_mnist_has_the_convolutions_of_vgg16() -> None:
    widths = [width for width in vgg_layers(16) if isinstance(width, int)]
    by_hand = sum(9 * a * b + b + 2 * b for a, b in pairwise([1, *widths])) + 512 * 10 + 10
    assert count_parameters(create_model("vgg_mnist")) == by_hand == 14_727_114


def test_parameter_counts_with_auxiliary_heads() -> None:
    with torch.device("meta"):
        assert count_parameters(create_model("inception_v3", aux=True)) == 27_161_264
        assert count_parameters(create_model("googlenet", aux=True)) == 13_004_888


def test_perceptron_with_any_number_of_units() -> None:
    for units in (8, 30, 100):
        net = create_model("mlp", num_classes=10, units=units)
        assert count_parameters(net) == 784 * units + units + units * units + units + 10 * units + 10


# Shapes


def shapes(net: nn.Module, *shape: int) -> list[tuple[int, ...]]:
    """The output shape of each layer of a sequential network for one image."""
    outputs: list[tuple[int, ...]] = []
    x = torch.zeros(1, *shape)
    for layer in net.eval():  # type: ignore[attr-defined]
        x = layer(x)
        outputs.append(tuple(x.shape[1:]))
    return outputs


@torch.inference_mode()
def test_alexnet_2012_shapes() -> None:
    with torch.device("cpu"):
        net = create_model("alexnet_2012")
    actual = dict(zip([name for name, _ in net.named_children()], shapes(net, 1, 224, 224), strict=True))
    expected = {
        "conv1": (96, 54, 54),
        "pool1": (96, 26, 26),
        "conv2": (256, 26, 26),
        "pool2": (256, 12, 12),
        "conv3": (384, 12, 12),
        "conv4": (384, 12, 12),
        "conv5": (256, 12, 12),
        "pool5": (256, 5, 5),
        "flatten": (6400,),
        "hidden6": (4096,),
        "hidden7": (4096,),
        "output": (10,),
    }
    assert {name: actual[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("name", "before_flatten"),
    [("lenet5", (16, 5, 5)), ("lenet_cifar", (16, 5, 5)), ("cnn_mnist", (6, 4, 4)), ("cnn_two_conv", (20, 4, 4))],
)
@torch.inference_mode()
def test_small_network_shapes(name: str, before_flatten: tuple[int, ...]) -> None:
    net = create_model(name)
    actual = shapes(net, *input_shape(get_spec(name)))
    index = [child for child, _ in net.named_children()].index("flatten")
    assert actual[index - 1] == before_flatten
    assert actual[index] == (math.prod(before_flatten),)
    assert actual[-1] == (10,)


def test_vgg_layers_match_the_papers_table() -> None:
    assert {depth: sum(counts) + 3 for depth, counts in DEPTHS.items()} == {depth: depth for depth in DEPTHS}
    assert vgg_layers(11) == [64, "M", 128, "M", 256, 256, "M", 512, 512, "M", 512, 512, "M"]


# Channels and classes


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels_and_classes(name: str, channels: int) -> None:
    _, height, width = input_shape(get_spec(name))
    with torch.device("meta"):
        net = create_model(name, num_classes=7, in_channels=channels).eval()
        assert net(torch.zeros(2, channels, height, width)).shape == (2, 7)


# Initialization


@pytest.mark.parametrize("name", ["lenet5", "alexnet_2012"])
def test_xavier_initialization(name: str) -> None:
    torch.manual_seed(0)
    net = create_model(name)
    for layer in net.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and layer.weight.numel() > 1000:
            area = layer.weight[0, 0].numel()
            bound = (6 / (area * (layer.weight.shape[0] + layer.weight.shape[1]))) ** 0.5
            assert 0.95 * bound < layer.weight.abs().max() <= bound
            assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)


def test_selu_keeps_mean_and_variance_through_the_network() -> None:
    """Self-normalization (Klambauer et al. 2017, https://arxiv.org/abs/1706.02515)."""
    torch.manual_seed(0)
    net = create_model("cnn_selu").eval()
    captured = {}
    net.get_submodule("features.selu6").register_forward_hook(lambda *a: captured.update(map=a[2]))
    with torch.no_grad():
        net(torch.randn(16, 1, 28, 28))
    assert abs(captured["map"].mean().item()) < 0.25
    assert captured["map"].std().item() == pytest.approx(1, abs=0.35)


# Costs


def test_inception_block_costs_match_the_documented_ones() -> None:
    costs = inception_blocks.compare_costs(28)
    assert costs == {"naive": (387_296, 303_464_448), "reduced": (163_696, 128_049_152), "factorized": (164_752, 128_851_968)}
    for number in (number for pair in costs.values() for number in pair):
        assert f"{number:,}" in (inception_blocks.__doc__ or "")


@torch.inference_mode()
def test_only_the_naive_block_adds_many_channels() -> None:
    x = torch.zeros(1, 192, 28, 28)
    builders = (inception_blocks.naive, inception_blocks.reduced, inception_blocks.factorized)
    assert [build()(x).shape[1] for build in builders] == [416, 256, 256]


def test_two_3x3_convolutions_cover_5x5_at_18_25ths_of_its_cost() -> None:
    five = nn.Conv2d(64, 64, 5, padding=2, bias=False)
    two = inception_blocks.stacked_3x3(64, 64)
    assert count_macs(two, 64, 28, 28) / count_macs(five, 64, 28, 28) == pytest.approx(18 / 25)
    image = torch.zeros(1, 64, 9, 9, requires_grad=True)
    two(image + torch.randn(1, 64, 9, 9))[0, :, 4, 4].sum().backward()
    receptive_field = (image.grad[0].abs().sum(0) > 0).nonzero()  # type: ignore[index]
    assert (receptive_field.min().item(), receptive_field.max().item()) == (2, 6)


def test_reduction_makes_the_inception_block_cheaper() -> None:
    (_, naive), (_, reduced) = (inception_blocks.compare_costs(14)[form] for form in ("naive", "reduced"))
    assert reduced < 0.45 * naive


def test_separable_convolution_cost_relative_to_a_standard_one() -> None:
    for inputs, outputs in ((32, 64), (512, 512)):
        standard = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
        pointwise = nn.Conv2d(inputs, outputs, 1, bias=False)
        ratio = count_macs(nn.Sequential(depthwise, pointwise), inputs, 14, 14) / count_macs(standard, inputs, 14, 14)
        assert ratio == pytest.approx(separable_cost_ratio(outputs, 3)) == pytest.approx(1 / outputs + 1 / 9)


def test_mobilenet_v1_costs_with_separable_and_standard_convolutions() -> None:
    """Howard et al. 2017, table 4: 569 and 4,866 million MACs; the standard network has 29.3 million parameters."""
    with torch.device("meta"):
        separable, standard = create_model("mobilenet_v1"), create_model("mobilenet_v1", block="standard")
    assert count_macs(separable, 3, 224, 224) == pytest.approx(569e6, rel=0.001)
    assert count_macs(standard, 3, 224, 224) == pytest.approx(4866e6, rel=0.005)
    assert count_parameters(standard) == pytest.approx(29.3e6, rel=0.005)


def test_mobilenet_v1_costs_by_width_multiplier() -> None:
    """The same paper, table 6: 325, 149 and 41 million MACs at 0.75, 0.5 and 0.25."""
    for suffix, width, millions in (("_075", 0.75, 325), ("_050", 0.5, 149), ("_025", 0.25, 41)):
        with torch.device("meta"):
            registered, scaled = create_model(f"mobilenet_v1{suffix}"), create_model("mobilenet_v1", width=width)
        assert round(count_macs(registered, 3, 224, 224) / 1e6) == millions
        assert count_parameters(registered) == count_parameters(scaled)
