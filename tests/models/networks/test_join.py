"""Networks joined by name: their common pixels, their weights and their embeddings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from models.errors import UnknownModelError, WeightsError
from models.networks.classifier import build_classifier
from models.networks.flops import measure_cost
from models.networks.join import InputView, Join, joined_preprocessing, resampling_matrix
from models.networks.registry import create_model, get_spec
from models.networks.split_point import split_model
from models.networks.weights import has_local_weights, load_weights
from models.preprocess import Preprocessing
from tests.helpers.tiny_network import registered_with_local_weights

LITE0, LITE2 = (get_spec(f"efficientnet_lite{n}").preprocessing for n in (0, 2))
VGG16 = get_spec("vgg16").preprocessing


@pytest.fixture
def tiny() -> Iterator[None]:
    with registered_with_local_weights():
        yield


def smooth_photo() -> Image.Image:
    """A photo-like image: noise at several scales. It is square, as crops of others begin at rounded positions."""
    rng = np.random.default_rng(0)
    sides = (6, 24, 96)
    layers = [Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).resize((480, 480)) for side in sides]
    return Image.fromarray(np.mean([np.asarray(layer, np.float32) for layer in layers], axis=0).astype(np.uint8))


# The common pixels


def test_the_crop_is_that_of_the_network_with_the_largest_input() -> None:
    assert joined_preprocessing([LITE0, LITE2]) == joined_preprocessing([LITE2, LITE0]) == LITE2


def test_a_wider_crop_of_another_network_fits_into_it() -> None:
    wide, large = Preprocessing(input_px=32, resize_px=32), Preprocessing(input_px=224, resize_px=256)
    joined = joined_preprocessing([wide, large])
    assert (joined.input_px, joined.resize_px) == (256, 256)


@pytest.mark.parametrize("own", [LITE0, VGG16, Preprocessing(input_px=200, resize_px=230)])
def test_a_view_shows_a_network_almost_its_own_pixels(own: Preprocessing) -> None:
    photo = smooth_photo()
    joined = joined_preprocessing([own, LITE2])
    pixels = torch.tensor(joined.crop(photo)).permute(2, 0, 1)[None].float() / 255
    mean, std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (joined.mean, joined.std))
    view = InputView(joined, own)((pixels - mean) / std)
    own_mean, own_std = (torch.tensor(values).reshape(1, 3, 1, 1) for values in (own.mean, own.std))
    shown = (view * own_std + own_mean)[0].permute(1, 2, 0).numpy() * 255
    expected = own.crop(photo).astype(np.float32)
    assert shown.shape == expected.shape
    difference = np.abs(shown - expected)
    assert difference.mean() < 1.5  # of 255 levels
    assert np.abs(np.roll(expected, 1, axis=0) - expected).mean() > 3 * difference.mean()  # less than a shift by one pixel


def test_the_largest_network_sees_its_own_pixels() -> None:
    matrix = resampling_matrix(LITE2, LITE2)
    assert np.array_equal(matrix, np.eye(260))
    images = torch.randn(1, 3, 260, 260)
    assert InputView(LITE2, LITE2)(images) is images


def test_resampling_is_that_of_pillow() -> None:
    matrix = resampling_matrix(LITE2, LITE0)
    assert matrix.shape == (224, 260)
    np.testing.assert_allclose(matrix.sum(axis=1), 1.0, atol=1e-5)
    row = np.random.default_rng(0).random((1, 260)).astype(np.float32)
    width = 224 * 292 / 256
    begin = (260 - width) / 2
    expected = Image.fromarray(row).resize((224, 1), Image.Resampling.BICUBIC, (begin, 0, begin + width, 1))
    np.testing.assert_allclose(row @ matrix.T, np.asarray(expected), atol=1e-4)


# The network


@pytest.mark.parametrize("flips", [False, True])
def test_a_join_concatenates_embeddings_of_unit_length(tiny: None, flips: bool) -> None:
    spec = get_spec("tiny+tiny_large+flip" if flips else "tiny+tiny_large")
    base = load_weights(spec)
    classifier = build_classifier(spec, num_classes=3, base=base.tensors, normalize_embedding=True)
    split = split_model(classifier)
    pixels = torch.randint(0, 256, (4, 40, 40, 3), dtype=torch.uint8)
    with torch.inference_mode():
        features = split.frozen(pixels)
        mirrored = split.frozen(pixels.flip(2))
        torch.testing.assert_close(split.trainable(features), classifier(pixels))
    assert features.shape == (4, 32 + 32)  # the head of the tiny network gets 32 numbers, although dropout is before it
    torch.testing.assert_close(features.reshape(4, 2, 32).norm(dim=2), torch.ones(4, 2))
    if flips:
        torch.testing.assert_close(features, mirrored, atol=1e-4, rtol=1e-4)
    else:
        assert not torch.allclose(features, mirrored, atol=1e-2)
        alone = build_classifier(get_spec("tiny_large"), num_classes=2, base=load_weights(get_spec("tiny_large")).tensors)
        alone.net.set_submodule("classifier.4", nn.Identity())
        with torch.inference_mode():
            own = nn.functional.normalize(alone.net(alone.normalize(pixels)), dim=1)
        torch.testing.assert_close(features[:, 32:], own)


def test_only_the_head_is_trained(tiny: None) -> None:
    spec = get_spec("tiny+tiny_large")
    classifier = build_classifier(spec, num_classes=3, base=load_weights(spec).tensors)
    trained = [name for name, parameter in classifier.net.named_parameters() if parameter.requires_grad]
    assert trained == ["classifier.weight", "classifier.bias"]
    assert split_model(classifier).last_frozen == "cat"


def test_the_weights_are_those_of_the_networks_without_their_heads(tiny: None) -> None:
    spec = get_spec("tiny+tiny_large")
    assert has_local_weights(spec)
    joined = load_weights(spec)
    net = build_classifier(spec, num_classes=3, base=joined.tensors).net.state_dict()
    own = {"classifier.weight", "classifier.bias"}
    for number, name in enumerate(("tiny", "tiny_large")):
        tensors = load_weights(get_spec(name)).tensors
        for tensor in tensors.keys() - {"classifier.4.weight", "classifier.4.bias"}:
            assert torch.equal(net[f"networks.{number}.{tensor}"], tensors[tensor])
            own.add(f"networks.{number}.{tensor}")
    assert set(net) == own
    assert joined.sha256 != load_weights(get_spec("tiny_large+tiny")).sha256
    assert spec.weights is not None
    assert spec.weights.license == "license of tiny and license of tiny_large"
    again = build_classifier(spec, num_classes=3, base=net).net.state_dict()  # as from the weights of a bundle
    assert all(torch.equal(again[name], net[name]) for name in net if "classifier" not in name)


def test_a_port_of_one_of_the_networks_is_matched_by_order(tiny: None) -> None:
    spec = get_spec("tiny+tiny_large")
    base = load_weights(spec).tensors
    ported = {name.replace("networks.0.", "networks.0.ported_"): tensor for name, tensor in base.items()}
    nets = [build_classifier(spec, num_classes=3, base=tensors).net.state_dict() for tensors in (base, ported)]
    assert all(torch.equal(nets[0][name], nets[1][name]) for name in nets[0])


def test_weights_of_another_network_are_rejected_by_its_name(tiny: None) -> None:
    spec = get_spec("tiny+tiny_large")
    base = load_weights(spec).tensors
    base.pop("networks.1.features.0.weight")
    with pytest.raises(WeightsError, match=r"^The weights are not for tiny_large: 'features\.0\.weight' is missing among"):
        build_classifier(spec, num_classes=3, base=base)


def test_the_cost_is_that_of_all_networks(tiny: None) -> None:
    parts = [measure_cost(get_spec(name)).macs for name in ("tiny", "tiny_large")]
    assert measure_cost(get_spec("tiny+tiny_large")).macs == pytest.approx(sum(parts), rel=0.01)
    assert measure_cost(get_spec("tiny+flip")).macs == pytest.approx(2 * parts[0], rel=0.01)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("efficientnet_lite0+efficientnet_lite0", "contains a network twice. Name each network once."),
        ("efficientnet_lite0+lenet5", "lenet5 cannot be joined with other networks: it has no pretrained weights."),
        ("efficientnet_lite0+efficientnet_lite9", "There is no network named 'efficientnet_lite9'. Did you mean"),
        ("efficientnet_lite0+", "There is no network named ''."),
    ],
)
def test_networks_that_cannot_be_joined_are_rejected(name: str, message: str) -> None:
    with pytest.raises(UnknownModelError) as caught:
        get_spec(name)
    assert message in str(caught.value)


def test_a_network_with_a_convolution_as_its_head_is_rejected() -> None:
    with pytest.raises(UnknownModelError, match=r"squeezenet1_1 cannot be joined with other networks: its last layer is not"):
        create_model("efficientnet_lite0+squeezenet1_1")


def test_a_join_of_lite0_and_lite2_is_one_network() -> None:
    spec = get_spec("efficientnet_lite0+efficientnet_lite2")
    assert (spec.title, spec.preprocessing) == ("EfficientNet-Lite0 + EfficientNet-Lite2", LITE2)
    with torch.device("meta"):
        net = create_model(spec.name, num_classes=2)
    assert isinstance(net, Join)
    assert net.classifier.in_features == 2 * 1280
    net.get_submodule(spec.cam_layer)
