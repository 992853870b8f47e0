"""Built-in datasets: download, checks, folder layout, splits and training."""

from __future__ import annotations

import gzip
import json
import re
import shutil
from collections.abc import Callable
from http.server import ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST

from finetune.config import Config
from finetune.data.builtin_datasets import BUILTIN_DATASETS, BuiltinDataset, make_dataset, with_data_dir
from finetune.data.duplicates import find_duplicates
from finetune.data.image_folder import read_dataset
from finetune.data.inspection import fingerprint_context, inspect_images
from finetune.data.published_files import ArraySplit, Published
from finetune.io.array_store import ArrayStore
from models.artifacts.atomic_io import sha256_of
from models.artifacts.bundle import open_bundle
from models.errors import DataError
from models.networks.classifier import Normalize
from models.preprocess import Preprocessing
from tests.helpers.dataset_server import CIFAR_NAMES, TEST, TRAIN, mirror, pictures, write_class_folders, write_idx
from tests.helpers.tiny_network import finetune

pytestmark = pytest.mark.slow

__all__ = ["mirror"]


@pytest.mark.parametrize(("name", "shape"), [("mnist", (28, 28)), ("fashion-mnist", (28, 28)), ("cifar10", (32, 32, 3))])
def test_a_data_set_is_saved_as_folders_with_unchanged_pixels(
    name: str, shape: tuple[int, ...], mirror: ThreadingHTTPServer, tmp_path: Path
) -> None:
    make_dataset(name, tmp_path / name)
    dataset = read_dataset(tmp_path / name)
    counts = {split: len(list((tmp_path / name / split).rglob("*.png"))) for split in ("train", "valid", "test")}
    assert counts == {"train": 10 * (TRAIN - 1), "valid": 10, "test": 10 * TEST}
    assert len(dataset.in_split("train")) == 10 * (TRAIN - 1)
    assert len(dataset.in_split("valid")) == 10
    assert len(dataset.classes) == 10
    assert all(len(list((tmp_path / name / "valid" / label).iterdir())) == 1 for label in dataset.classes)
    seed = {"mnist": TEST, "fashion-mnist": 10 + TEST, "cifar10": 4}[name]
    expected, labels = pictures(TEST, shape, seed=seed)
    for file in (tmp_path / name / "test").rglob("*.png"):
        index = int(file.stem)
        assert np.array_equal(np.asarray(Image.open(file)), expected[index])
        if name == "cifar10":
            assert file.parent.name == CIFAR_NAMES[labels[index]]
    make_dataset(name, tmp_path / name)  # already there: nothing is read again


def test_existing_files_are_not_downloaded_again(
    mirror: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_dataset("mnist", tmp_path / "one")
    make_dataset("cifar10", tmp_path / "two")
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing")
    for name in ("mnist", "cifar10"):
        make_dataset(name, tmp_path / f"{name}-again")
        assert (tmp_path / f"{name}-again" / "test").is_dir()


def test_without_a_network_the_error_explains_the_manual_download(
    mirror: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(FashionMNIST, "mirrors", ["http://127.0.0.1:9/"])
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing")
    messages = {}
    for name in ("mnist", "fashion-mnist", "cifar10"):
        code, _, err = finetune("train", "--dataset", name, "--data-dir", tmp_path / name, "--output-dir", tmp_path / "run")
        assert code == 2
        messages[name] = " ".join(err.split())
        assert not (tmp_path / name).exists()
        assert not (tmp_path / "run").exists()
    assert re.fullmatch(
        r"finetune: MNIST is not on this machine and could not be downloaded \(.+\)\. Set --data-dir to a folder with "
        r"\{train,t10k\}-\{images-idx3,labels-idx1\}-ubyte\.gz\.",
        messages["mnist"],
    )
    assert re.fullmatch(
        r"finetune: Fashion-MNIST is not on this machine and could not be downloaded \(.+\)\. On Debian, run `apt-get "
        r"install dataset-fashion-mnist`\. Otherwise set --data-dir to a folder with "
        r"\{train,t10k\}-\{images-idx3,labels-idx1\}-ubyte\.gz\.",
        messages["fashion-mnist"],
    )
    assert re.fullmatch(
        r"finetune: CIFAR-10 is not on this machine and could not be downloaded \(.+\)\. Set --data-dir to a folder with "
        r"images in train/CLASS and test/CLASS, or put cifar-10-python\.tar\.gz into data/raw\.",
        messages["cifar10"],
    )


def test_a_damaged_download_is_rejected(mirror: ThreadingHTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MNIST, "resources", [(name, "0" * 32) for name, _ in MNIST.resources])
    with pytest.raises(DataError, match="MNIST is not on this machine and could not be downloaded"):
        make_dataset("mnist", tmp_path / "mnist")
    assert not (tmp_path / "mnist").exists()


def test_another_data_set_or_a_folder_of_photos_is_not_overwritten(mirror: ThreadingHTTPServer, tmp_path: Path) -> None:
    make_dataset("mnist", tmp_path / "here")
    with pytest.raises(DataError, match="contains the dataset mnist, not cifar10"):
        make_dataset("cifar10", tmp_path / "here")
    (tmp_path / "photos" / "train").mkdir(parents=True)
    with pytest.raises(DataError, match="not empty"):
        make_dataset("mnist", tmp_path / "photos")


def test_a_misspelled_name_gets_a_suggestion(tmp_path: Path) -> None:
    code, _, err = finetune("train", "--dataset", "minst")
    assert code == 2
    assert "Did you mean 'mnist'?" in err


def test_an_occupied_run_directory_is_reported_before_the_download(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    code, _, err = finetune("train", "--dataset", "digits", "--data-dir", tmp_path / "digits", "--output-dir", tmp_path / "run")
    assert code == 2
    assert "is not empty and does not contain a run" in err
    assert not (tmp_path / "digits").exists()


def test_small_images_are_duplicates_only_if_pixels_are_equal(tmp_path: Path) -> None:
    """Two similar digits are not duplicates. The same pixels in another file format are."""
    one = np.zeros((28, 28), np.uint8)
    one[4:24, 13:15] = 250
    other = one.copy()
    other[5, 13] = 245
    for split, name, pixels in (("train", "a.png", one), ("train", "b.png", other), ("valid", "c.bmp", one)):
        (tmp_path / split / "one").mkdir(parents=True, exist_ok=True)
        (tmp_path / split / "two").mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / split / "one" / name)
    store = ArrayStore(tmp_path / "cache", fingerprint_context(), limit_mb=10)
    found = find_duplicates(inspect_images(read_dataset(tmp_path).samples, store=store, quiet=True))
    assert [[s.sample.name for s in group] for group in found] == [["train/one/a.png", "valid/one/c.bmp"]]


def test_repeated_images_are_not_held_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pixels, labels = pictures(4, (28, 28), seed=0)
    pixels[10:] = np.concatenate([pixels[:10]] * 3)  # four copies of one image per class
    pixels[30:] = pictures(1, (28, 28), seed=9)[0]  # except for the last
    part = ArraySplit(pixels, labels.astype(np.int64))
    published = Published(part, part, "memory", {})
    monkeypatch.setitem(BUILTIN_DATASETS, "mnist", BuiltinDataset("Doubles", tuple("0123456789"), lambda raw: published))
    make_dataset("mnist", tmp_path / "doubles")
    held = sorted(int(file.stem) for file in (tmp_path / "doubles" / "valid").rglob("*.png"))
    assert held == list(range(30, 40))
    assert json.loads((tmp_path / "doubles" / "DATASET.json").read_text())["in_train_and_test"] == 20


def test_the_mirror_serves_valid_idx_files(mirror: ThreadingHTTPServer, tmp_path: Path) -> None:
    make_dataset("mnist", tmp_path / "mnist")
    head = gzip.decompress((tmp_path / "raw" / "MNIST" / "raw" / "train-images-idx3-ubyte.gz").read_bytes())[:16]
    assert head == bytes([0, 0, 8, 3, 0, 0, 0, 10 * TRAIN, 0, 0, 0, 28, 0, 0, 0, 28])


class TestFilesOnThisMachine:
    """Nothing is downloaded if the files are here, and no MD5 is required of them."""

    @pytest.fixture(autouse=True)
    def _no_network(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        for kind in (MNIST, FashionMNIST):
            monkeypatch.setattr(kind, "mirrors", ["http://127.0.0.1:9/"])
        monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:9/nothing")
        monkeypatch.setattr("finetune.data.builtin_datasets.DEBIAN", tmp_path / "datasets")
        monkeypatch.chdir(tmp_path)

    def record(self, folder: Path) -> dict[str, object]:
        return json.loads((folder / "DATASET.json").read_text())

    def test_the_package_of_debian(self, tmp_path: Path) -> None:
        write_idx(tmp_path / "datasets" / "fashion-mnist", seed=1)
        make_dataset("fashion-mnist", tmp_path / "data" / "fashion-mnist")
        record = self.record(tmp_path / "data" / "fashion-mnist")
        assert record["images"] == {"train": 10 * (TRAIN - 1), "valid": 10, "test": 10 * TEST}
        assert record["origin"] == str(tmp_path / "datasets" / "fashion-mnist")
        files = (tmp_path / "datasets" / "fashion-mnist").iterdir()
        assert record["sha256s"] == {file.name: sha256_of(file) for file in files}
        assert (tmp_path / "data" / "fashion-mnist" / "train" / "ankle-boot").is_dir()

    def test_the_package_of_another_data_set_is_not_used(self, tmp_path: Path) -> None:
        write_idx(tmp_path / "datasets", seed=1)
        with pytest.raises(DataError, match="MNIST is not on this machine"):
            make_dataset("mnist", tmp_path / "data" / "mnist")

    @pytest.mark.parametrize("root", ["data", "data/raw"])
    def test_files_that_torchvision_downloaded(self, root: str, tmp_path: Path) -> None:
        write_idx(tmp_path / root / "MNIST" / "raw", seed=1)
        make_dataset("mnist", tmp_path / "data" / "mnist")
        assert self.record(tmp_path / "data" / "mnist")["origin"] == str(tmp_path / root / "MNIST" / "raw")

    @pytest.mark.parametrize("is_compressed", [True, False])
    def test_a_folder_of_idx_files(self, is_compressed: bool, tmp_path: Path) -> None:
        files = tmp_path / "files"
        write_idx(files, seed=1)
        for file in [] if is_compressed else list(files.iterdir()):
            (files / file.stem.replace("-idx", ".idx")).write_bytes(gzip.decompress(file.read_bytes()))
            file.unlink()
        flags = ("--dataset", "mnist", "--data-dir", files, "--backbone", "cnn_mnist", "--epochs", 1)
        code, out, err = finetune("train", *flags, "--output-dir", tmp_path / "run")
        assert (code, err) == (0, "")
        assert f"Reading MNIST from {files}." in out.splitlines()
        assert json.loads((tmp_path / "run" / "test" / "metrics.json").read_text())["photos"] == 10 * TEST
        assert yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())["data_dir"] == "data/mnist"
        expected, labels = pictures(TEST, (28, 28), seed=1 + TEST)
        for file in (tmp_path / "data" / "mnist" / "test").rglob("*.png"):
            assert np.array_equal(np.asarray(Image.open(file)), expected[int(file.stem)])
            assert file.parent.name == str(labels[int(file.stem)])
        code, out, err = finetune("train", *flags, "--output-dir", tmp_path / "again")
        assert (code, err) == (0, "")
        assert "Reading MNIST" not in out

    def test_class_folders_are_copied_unchanged(self, tmp_path: Path) -> None:
        write_class_folders(tmp_path / "files")
        config = with_data_dir(Config(dataset="cifar10", data_dir=tmp_path / "files"))
        assert config.data_dir == Path("data/cifar10")
        make_dataset("cifar10", config.data_dir, source=tmp_path / "files")
        assert self.record(config.data_dir)["images"] == {"train": 10 * (TRAIN - 1), "valid": 10, "test": 10 * TEST}
        for split, folders in (("train", ("train", "valid")), ("test", ("test",))):
            before = sorted(file.read_bytes() for file in (tmp_path / "files" / split).rglob("*.jpg"))
            after = sorted(file.read_bytes() for folder in folders for file in (config.data_dir / folder).rglob("*.jpg"))
            assert before == after
        names = [path.name for path in sorted((config.data_dir / "test" / "cat").iterdir())]
        assert names == ["00006.jpg", "00007.jpg"]

    def test_another_copy_does_not_silently_stand_for_an_earlier_one(self, tmp_path: Path) -> None:
        for seed in (1, 2):
            write_idx(tmp_path / f"files{seed}", seed=seed)
        make_dataset("mnist", tmp_path / "mnist", source=tmp_path / "files1")
        make_dataset("mnist", tmp_path / "mnist", source=tmp_path / "files1")
        with pytest.raises(
            DataError, match=r"mnist was made from other files than those in .*files2\. Delete it to make it again\."
        ):
            make_dataset("mnist", tmp_path / "mnist", source=tmp_path / "files2")

    def test_a_class_without_images_is_named(self, tmp_path: Path) -> None:
        write_class_folders(tmp_path / "files")
        shutil.rmtree(tmp_path / "files" / "test" / "frog")
        with pytest.raises(
            DataError, match=r"files/test/frog has no images\. Expected images of each class \(airplane, .*\) in test\."
        ):
            make_dataset("cifar10", tmp_path / "cifar10", source=tmp_path / "files")

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda data: data[:-5], r"could not be read \(.*\)\. Replace it with another copy\."),
            (lambda data: gzip.compress(gzip.decompress(data)[:-5]), "is truncated or damaged. Replace it"),
            (lambda data: gzip.compress(b"\0\0\x0d" + gzip.decompress(data)[3:]), "is not an idx file of bytes. Replace it"),
            (lambda data: b"<html>", r"could not be read \(Not a gzipped file"),
        ],
    )
    def test_a_damaged_idx_file_is_named(self, damage: Callable[[bytes], bytes], message: str, tmp_path: Path) -> None:
        write_idx(tmp_path / "files", seed=1)
        file = tmp_path / "files" / "t10k-images-idx3-ubyte.gz"
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(DataError, match=rf"t10k-images-idx3-ubyte\.gz {message}"):
            make_dataset("mnist", tmp_path / "mnist", source=tmp_path / "files")
        assert not (tmp_path / "mnist").exists()

    def test_images_and_labels_of_different_numbers_are_rejected(self, tmp_path: Path) -> None:
        write_idx(tmp_path / "files", seed=1)
        shutil.copy(tmp_path / "files" / "t10k-labels-idx1-ubyte.gz", tmp_path / "files" / "train-labels-idx1-ubyte.gz")
        with pytest.raises(DataError, match=r"have the shapes \(60, 28, 28\) and \(20,\)"):
            make_dataset("mnist", tmp_path / "mnist", source=tmp_path / "files")


def test_permuted_pixels_are_the_same_values_in_another_order() -> None:
    preprocessing = Preprocessing(input_px=4, resize_px=4, mean=(0.5,), std=(0.5,))
    pixels = torch.arange(32, dtype=torch.uint8).reshape(2, 4, 4, 1)
    plain = Normalize(preprocessing)(pixels)
    mixed, again, other = (Normalize(preprocessing, permute_pixels=seed)(pixels) for seed in (0, 0, 1))
    assert torch.equal(mixed, again)
    assert not torch.equal(mixed, other)
    assert not torch.equal(mixed, plain)
    assert torch.equal(mixed.flatten(1).sort(1).values, plain.flatten(1))
    assert torch.equal((mixed[1] - mixed[0]).unique(), (plain[1] - plain[0]).unique())  # the same permutation for both images


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("digits")


class TestDigits:
    """Training on scikit-learn's digits through the command line."""

    def learn(self, home: Path, backbone: str, *flags: object) -> dict[str, dict[str, float]]:
        out = home / "-".join(map(str, [backbone, *flags]))
        words = ("train", "--dataset", "digits", "--data-dir", home / "digits", "--backbone", backbone, "--output-dir", out)
        code, message, err = finetune(*words, "--epochs", 15, "--batch-size", 16, *flags)
        assert code == 0, err
        assert re.search(r"training     15 epochs of 1,[0-9]{3} photos in [0-9.]+ s, including validation", message)
        assert "Test results, on images that were not used in training:" in message
        metrics = json.loads((out / "test" / "metrics.json").read_text())
        assert metrics["photos"] == 359
        return metrics

    def test_lenet5_learns_the_digits(self, home: Path) -> None:
        assert self.learn(home, "lenet5")["accuracy"]["value"] > 0.93

    def test_permuted_pixels_hurt_only_the_convolutional_network(self, home: Path) -> None:
        seed = ("--permute-pixels", 1)
        mlp, mlp_permuted = self.learn(home, "mlp"), self.learn(home, "mlp", *seed)
        cnn, cnn_permuted = self.learn(home, "cnn_mnist"), self.learn(home, "cnn_mnist", *seed)
        assert min(mlp["accuracy"]["value"], mlp_permuted["accuracy"]["value"]) > 0.85
        assert mlp["accuracy"]["low"] < mlp_permuted["accuracy"]["high"]
        assert mlp_permuted["accuracy"]["low"] < mlp["accuracy"]["high"]
        assert cnn["accuracy"]["value"] > 0.95
        assert cnn_permuted["accuracy"]["value"] < cnn["accuracy"]["value"]
        assert cnn_permuted["log_loss"]["value"] > 1.2 * cnn["log_loss"]["value"]
        bundle = open_bundle(home / "cnn_mnist---permute-pixels-1" / "bundle")
        assert bundle.permute_pixels == 1
        assert "shuffles the pixel positions" in (bundle.path / "README.md").read_text()
        assert open_bundle(home / "cnn_mnist" / "bundle").permute_pixels is None

    def test_resuming_a_finished_run_only_opens_it(self, home: Path) -> None:
        code, message, err = finetune("train", "--resume", "--output-dir", home / "lenet5")
        assert (code, err) == (0, "")
        assert "is already finished" in message
