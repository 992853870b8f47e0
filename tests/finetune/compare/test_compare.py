"""``finetune compare``: several networks are trained and compared on the same photos, and finished runs are reused."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import binomtest

from finetune.compare.benchmark import BenchmarkResult
from finetune.compare.comparison_report import markdown
from finetune.compare.runner import select_networks
from finetune.metrics.significance import compare_pairs, holm_correction
from models.artifacts.bundle import open_bundle
from models.errors import ConfigError, UnknownModelError
from tests.helpers.tiny_network import color_folder, finetune, paint

pytestmark = pytest.mark.slow

FLAGS = ("--epochs", 6, "--batch-size", 4)
NAMES = "lenet_cifar,resnet18,cnn_mnist,efficientnet_lite0"


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError("no network here")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("compare")
    color_folder(home / "colours", train=12, valid=8)
    return home


def compare(home: Path, *flags: object, backbones: str = NAMES) -> tuple[int, str, str]:
    return finetune("compare", home / "colours", "--backbones", backbones, "--output-dir", home / "out", *flags)


class TestComparison:
    """The first test trains the networks. The others check its results and run it again."""

    def test_networks_are_trained_measured_and_compared(self, home: Path) -> None:
        code, out, err = compare(home, *FLAGS)
        assert code == 0, err
        assert "[4 of 4] efficientnet_lite0" in out
        assert "Features are computed once per photo, up to" in out
        text = (home / "out" / "compare.md").read_text()
        assert text in out
        assert "Comparison on colours: 16 validation photos" in text
        assert "## Skipped\n\n- resnet18: The weights of resnet18 are not on this machine" in text
        assert "| lenet_cifar * | " in text
        assert "lenet_cifar and cnn_mnist" in text or "cnn_mnist and lenet_cifar" in text or "is better than" in text

    def test_the_numbers_match_the_bundles(self, home: Path) -> None:
        report = json.loads((home / "out" / "compare.json").read_text())
        assert report["photos"] == 16
        assert set(report["skipped"]) == {"resnet18"}
        rows = {row["backbone"]: row for row in report["networks"]}
        assert set(rows) == {"lenet_cifar", "cnn_mnist", "efficientnet_lite0"}
        for name, row in rows.items():
            bundle = open_bundle(home / "out" / name / "bundle")
            metrics = bundle.manifest["metrics"]
            if row["precision"] == "fp32":
                assert row["accuracy"] == metrics["accuracy"]
                assert row["log_loss"]["value"] == pytest.approx(metrics["log_loss"]["value"], abs=2e-3)
            assert row["graph_mb"] == pytest.approx(bundle.manifest["files"]["model.onnx"]["bytes"] / 1e6)
            assert row["ms_per_image"] > 0
            assert row["training_s"] > 0
            assert row["epochs"] == 6
        assert rows["lenet_cifar"]["parameters"] == 62_006 - 8 * 85
        assert not rows["lenet_cifar"]["pretrained"]
        assert rows["efficientnet_lite0"]["pretrained"]
        assert len(report["pairs"]) == 3

    def test_the_table_is_written_as_csv(self, home: Path) -> None:
        with (home / "out" / "compare.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["network"] for row in rows] == [
            row["backbone"] for row in json.loads((home / "out" / "compare.json").read_text())["networks"]
        ]
        values = [float(row["accuracy_value"]) for row in rows]
        assert values == sorted(values, reverse=True)

    def test_the_plot_is_not_blank(self, home: Path) -> None:
        pixels = np.asarray(Image.open(home / "out" / "compare.png").convert("RGB")).astype(int)
        assert pixels.std() > 10
        assert np.ptp(pixels, axis=2).max() > 100  # colored points

    def test_a_finished_run_is_reused(self, home: Path) -> None:
        before = {file: file.stat().st_mtime_ns for file in (home / "out").glob("*/checkpoint.pt")}
        seconds = [row["training_s"] for row in json.loads((home / "out" / "compare.json").read_text())["networks"]]
        code, out, err = compare(home, *FLAGS)
        assert code == 0, err
        assert out.count("Reusing the finished run") == 3
        assert before == {file: file.stat().st_mtime_ns for file in (home / "out").glob("*/checkpoint.pt")}
        again = [row["training_s"] for row in json.loads((home / "out" / "compare.json").read_text())["networks"]]
        assert again == seconds

    def test_other_settings_or_photos_are_rejected(self, home: Path) -> None:
        code, _, err = compare(home, "--epochs", 2, "--batch-size", 4)
        assert code == 2
        assert "was trained with --epochs 6, not 2" in err
        extra = paint(home / "colours" / "train" / "red" / "more.jpg", (250, 30, 30), seed=77)
        code, _, err = compare(home, *FLAGS)
        extra.unlink()
        assert code == 2
        assert "was trained on other photos" in err

    def test_an_interrupted_run_is_resumed(self, home: Path) -> None:
        """Simulate a kill between the last epoch and the export."""
        shutil.rmtree(home / "out" / "cnn_mnist" / "bundle")
        code, out, err = compare(home, *FLAGS)
        assert code == 0, err
        assert "Resuming after epoch 6" in out
        assert out.count("Reusing the finished run") == 2


@pytest.mark.parametrize(
    ("backbones", "message"),
    [
        ("lenet_cifar", "must name at least two networks (got only lenet_cifar)"),
        ("lenet_cifar,lenet6", "no network named 'lenet6'. Did you mean 'lenet5'?"),
        (",", "takes comma-separated network names, `small` or `all`"),
    ],
)
def test_invalid_backbones_are_rejected(backbones: str, message: str, home: Path) -> None:
    code, _, err = compare(home, backbones=backbones)
    assert code == 2
    assert message in err


def test_no_report_is_written_if_nothing_can_be_trained(home: Path, tmp_path: Path) -> None:
    code, _, err = finetune("compare", home / "colours", "--backbones", "vgg11,resnet18", "--output-dir", tmp_path / "out")
    assert code == 2
    assert "None of the networks could be trained" in err
    assert not (tmp_path / "out" / "compare.md").exists()


def test_groups_of_networks() -> None:
    small = select_networks("small")
    cnns = {"cnn_mnist", "cnn_selu", "cnn_separable", "cnn_two_conv"}
    assert set(small) == {"lenet5", "lenet_cifar", "mlp", "vgg_cifar", "vgg_mnist"} | cnns
    assert select_networks("mlp, small")[0] == "mlp"
    assert len(select_networks("mlp,small")) == len(small)
    local = select_networks("all")
    assert {"efficientnet_lite0", "efficientnet_lite2"} <= set(local)
    assert not {"vgg16", "lenet5"} & set(local)
    with pytest.raises(UnknownModelError):
        select_networks("smal")
    with pytest.raises(ConfigError):
        select_networks("")


def test_weights_in_the_hub_cache_count_as_local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    (tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth").touch()
    assert "resnet18" in select_networks("all")


@pytest.mark.parametrize(
    ("epochs", "text"),
    [
        ((6, 6), "These photos also selected the best epoch and the calibration of each network. Latency"),
        ((0, 6), "the calibration of each network, and the best epoch of networks trained in epochs. Latency"),
        ((0, 0), "These photos also selected the calibration of each network. Latency"),
    ],
)
def test_the_report_states_what_its_photos_selected(epochs: tuple[int, int], text: str) -> None:
    interval = {"value": 0.9, "low": 0.8, "high": 0.95}
    rows = [
        BenchmarkResult(
            name, True, "fp32", interval, interval, interval, interval, 1.0, 1.0, 10, 1.0, count, np.ones(4, dtype=bool)
        )
        for name, count in zip(("a", "b"), epochs, strict=True)
    ]
    assert text in markdown(rows, [], name="photos", skipped={})


def test_pairs_are_compared_on_the_photos_that_only_one_gets_right() -> None:
    correct = {"a": [1] * 12 + [0] * 1 + [1] * 87, "b": [0] * 12 + [1] * 1 + [1] * 87, "c": [0] * 10 + [1] * 90}
    pairs = compare_pairs({name: np.array(values, dtype=bool) for name, values in correct.items()})
    by_names = {frozenset((pair.better, pair.worse)): pair for pair in pairs}
    ab, ac, bc = (by_names[frozenset(pair)] for pair in ("ab", "ac", "bc"))
    assert (ab.better, ab.only_better, ab.only_worse) == ("a", 12, 1)
    assert (bc.better, bc.only_better, bc.only_worse) == ("c", 2, 0)
    assert ab.p == pytest.approx(3 * binomtest(1, 13, 0.5).pvalue)
    assert ab.p == pytest.approx(3 * 28 / 8192)
    assert ac.p == pytest.approx(2 * binomtest(1, 11, 0.5).pvalue)
    assert ab.is_significant
    assert not bc.is_significant
    assert ab.text() == "a is better than b (p = 0.010; photos that only one gets right: a 12, b 1)."
    assert bc.text() == "No significant difference between c and b (p = 0.500; photos that only one gets right: c 2, b 0)."


def test_networks_on_photos_in_groups_are_compared_by_group() -> None:
    a, b = np.ones(60, dtype=bool), np.array([False] * 12 + [True] * 48)
    assert compare_pairs({"a": a, "b": b})[0].p < 0.001
    one_patient = np.repeat(np.arange(5), 12)  # all differences are photos of one patient
    assert compare_pairs({"a": a, "b": b}, groups=one_patient)[0].p == 1.0
    twelve_patients = np.concatenate([np.arange(12), np.repeat(np.arange(12), 4)])
    assert compare_pairs({"a": a, "b": b}, groups=twelve_patients)[0].p == pytest.approx(2 / 2**12, abs=6e-4)
    (pair,) = compare_pairs({"a": a, "b": a}, groups=one_patient)
    assert (pair.p, pair.is_significant) == (1.0, False)


def test_equal_networks_do_not_differ() -> None:
    correct = np.array([True, False, True])
    (pair,) = compare_pairs({"a": correct, "b": correct})
    assert (pair.p, pair.is_significant) == (1.0, False)


def test_holm_keeps_the_order_of_p_values() -> None:
    assert holm_correction([0.01, 0.011, 0.5]) == pytest.approx([0.03, 0.03, 0.5])
    assert holm_correction([0.4, 0.9]) == pytest.approx([0.8, 0.9])


def test_networks_are_compared_on_a_table(tmp_path: Path) -> None:
    data = color_folder(tmp_path / "colours", train=6, valid=3)
    files = sorted(data.rglob("*.jpg"))
    rows = [f"{path.relative_to(data).as_posix()},{path.parent.name},{path.parts[-3]},g{i}" for i, path in enumerate(files)]
    table = data / "labels.csv"
    table.write_text("\n".join(["image,label,split,group", *rows, "lost.jpg,red,train,", ""]), encoding="utf-8")
    flags = ("--backbones", "lenet_cifar,cnn_mnist", "--epochs", 1, "--output-dir", tmp_path / "out")
    code, out, err = finetune("compare", "--labels", table, *flags)
    assert code == 0, err
    assert "Comparison on colours: 6 validation photos" in out
    assert "Test of the differences between the groups of the photos, with random signs, corrected" in out
    code, _, err = finetune("compare", *flags)
    assert (code, err) == (2, "finetune: No data. Pass the data folder, or a table of labels with --labels.\n")
