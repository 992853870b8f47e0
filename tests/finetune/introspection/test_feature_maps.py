"""``finetune visualize``: sheets of filters and feature maps for bundles of any network."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from finetune.introspection.feature_maps import (
    compute_feature_maps,
    draw_filters,
    first_layer_filters,
    map_layers,
    tile_sheet,
    to_gray_levels,
)
from models.networks.classifier import Classifier, build_classifier
from models.networks.flops import build_on_meta
from models.networks.registry import get_spec
from models.preprocess import Preprocessing
from tests.helpers.small_networks import made_small
from tests.helpers.tiny_network import color_folder, finetune, paint

pytestmark = pytest.mark.slow

SHIPPED = Path(__file__).resolve().parents[3] / "models" / "shipped" / "dogs-vs-cats"
GRAY_28 = Preprocessing(input_px=28, resize_px=28, mean=(0.5,), std=(0.5,))


def pixels_of(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def is_blank(path: Path) -> bool:
    """Return whether the sheet is blank below the title."""
    return float(pixels_of(path)[44:].std()) < 5


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a small color network for one epoch."""
    root = tmp_path_factory.mktemp("visualize")
    data = color_folder(root / "data")
    command = ("train", "--data-dir", data, "--backbone", "lenet_cifar", "--epochs", 1, "--permute-pixels", 3)
    code, _, err = finetune(*command, "--output-dir", root / "run")
    assert code == 0, err
    return root / "run" / "bundle"


def test_filters_and_maps_of_a_photo(bundle: Path, tmp_path: Path) -> None:
    photo = paint(tmp_path / "photo.jpg", (250, 40, 40), seed=1)
    out = tmp_path / "out"
    code, printed, err = finetune("visualize", "--bundle", bundle, "--photo", photo, "--output-dir", out, "--maps", 4)
    assert (code, err) == (0, "")
    assert f"filters      {out / 'filters.png'}" in printed
    files = sorted(file.relative_to(out).as_posix() for file in out.rglob("*.png"))
    assert files == ["filters.png", "maps/00-input.png", "maps/01-conv1.png", "maps/02-conv2.png"]
    assert not any(is_blank(out / file) for file in files)
    colors = pixels_of(out / "filters.png")[44:].astype(int)
    assert np.abs(colors[..., 0] - colors[..., 1]).max() > 50  # three channels: in color
    maps = pixels_of(out / "maps" / "01-conv1.png")[44:].astype(int)
    assert np.ptp(maps, axis=2).max() == 0  # maps: in gray


def test_without_a_photo_only_filters_are_drawn(bundle: Path, tmp_path: Path) -> None:
    code, _, err = finetune("visualize", "--bundle", bundle, "--output-dir", tmp_path / "out")
    assert (code, err) == (0, "")
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["filters.png"]


def test_a_head_only_bundle_of_a_large_network_is_shown_by_stage(tmp_path: Path) -> None:
    photo = paint(tmp_path / "photo.jpg", (40, 40, 250), seed=1, size=(320, 300))
    out = tmp_path / "out"
    code, _, err = finetune("visualize", "--bundle", SHIPPED, "--photo", photo, "--output-dir", out)
    assert code == 0, err
    names = sorted(file.name for file in (out / "maps").iterdir())
    assert names[:2] == ["00-input.png", "01-conv_stem.png"]
    assert names[-1].endswith("conv_head.png")
    assert 5 < len(names) < 17
    assert not any(is_blank(file) for file in out.rglob("*.png"))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--photo", "nothing.jpg"), "No such photo: nothing.jpg"),
        (("--maps", 0), "--maps must be at least 1 (got 0)"),
        (("--photo", __file__), "not a supported image"),
    ],
)
def test_invalid_arguments_are_rejected(flags: tuple[object, ...], message: str, bundle: Path, tmp_path: Path) -> None:
    code, _, err = finetune("visualize", "--bundle", bundle, "--output-dir", tmp_path / "out", *flags)
    assert code == 2
    assert message in err
    assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "out").exists()


def test_existing_files_are_not_overwritten(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    code, _, err = finetune("visualize", "--bundle", bundle, "--output-dir", tmp_path)
    assert code == 2
    assert "is not empty" in err


@pytest.mark.parametrize(
    ("name", "layer", "shape"),
    [("vgg11", "features.0", (64, 3, 3, 3)), ("alexnet_2012", "conv1", (96, 1, 11, 11)), ("mlp", "hidden1", (8, 1, 28, 28))],
)
def test_filters_of_any_size_fill_a_sheet(name: str, layer: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    with made_small(name, small_images=False):
        classifier = build_classifier(get_spec(name), num_classes=2, base=None)
    layer_name, weights = first_layer_filters(classifier)
    assert (layer_name, weights.shape) == (layer, shape)
    path = draw_filters(classifier, tmp_path / "filters.png", name=name)
    assert not is_blank(path)
    height, width, _ = pixels_of(path).shape
    assert height < 1500
    assert width < 1500


def test_other_channel_counts_are_drawn_in_gray(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(5, 4, 3), nn.Flatten(), nn.LazyLinear(2))
    path = draw_filters(Classifier(net, GRAY_28), tmp_path / "filters.png", name="five")
    tiles = pixels_of(path)[44:].astype(int)
    assert np.ptp(tiles, axis=2).max() == 0
    assert len(np.unique(tiles)) > 20


def test_filters_of_permuted_pixels_are_put_back_in_order() -> None:
    """A unit that responds to one pixel of the image shows that pixel, wherever the permutation moves it."""
    spec = get_spec("mlp")
    classifier = build_classifier(spec, num_classes=2, base=None, permute_pixels=5)
    image = torch.zeros(1, 28, 28, 1, dtype=torch.uint8)
    image[0, 20, 7, 0] = 255
    permuted = classifier.normalize(image).flatten()
    with torch.no_grad():
        classifier.net.get_parameter("hidden1.weight")[0] = (permuted > 0).float()
    _, weights = first_layer_filters(classifier)
    assert np.argwhere(weights[0, 0] == 1).tolist() == [[20, 7]]


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("alexnet", ["features.0", "features.3", "features.6", "features.8", "features.10"]),
        ("resnet18", ["conv1", "layer1", "layer2", "layer3", "layer4"]),
        ("mlp", ["hidden1", "hidden2", "output"]),
    ],
)
def test_layers_to_visualize(name: str, layers: list[str]) -> None:
    assert map_layers(build_on_meta(get_spec(name))) == layers


def test_maps_are_the_outputs_of_the_layers() -> None:
    classifier = build_classifier(get_spec("lenet5"), num_classes=3, base=None)
    image = np.random.default_rng(0).integers(0, 256, (28, 28, 1), dtype=np.uint8)
    maps = dict(compute_feature_maps(classifier, image))
    assert {name: layer_maps.shape for name, layer_maps in maps.items()} == {"conv1": (6, 28, 28), "conv2": (16, 10, 10)}
    with torch.inference_mode():
        expected = classifier.net.get_submodule("conv1")(classifier.normalize(torch.from_numpy(image[None])))[0]
    assert np.array_equal(maps["conv1"], expected.numpy())


def test_values_are_scaled_from_black_to_white(tmp_path: Path) -> None:
    assert to_gray_levels(np.array([[-2.0, 0.0], [1.0, 2.0]], np.float32)).tolist() == [[0, 128], [191, 255]]
    assert to_gray_levels(np.full((2, 2), 7.0, np.float32)).tolist() == [[128, 128], [128, 128]]
    path = tile_sheet([np.zeros((2, 2), np.uint8)], tmp_path / "one.png", title="one", tile_px=40)
    assert (pixels_of(path)[44:84, 12:52] == 0).all()
