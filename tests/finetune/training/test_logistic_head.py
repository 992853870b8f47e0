"""``--head logistic``: the guarantees of training, export and evaluation hold for it as well."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from finetune.training.scaled_embeddings import scale_embeddings
from models.artifacts.bundle import open_bundle
from models.artifacts.evaluation import open_predictions
from models.artifacts.predictions import Predictions
from models.errors import ConfigError
from models.networks.classifier import Classifier, load_classifier
from models.networks.head_logits import require_logistic_head
from models.networks.head_replacement import NormalizedLinear
from models.networks.registry import get_spec
from models.runtime.openvino_engine import OpenVINOEngine
from tests.finetune.compute.test_distributed import largest_difference, train_in_ranks
from tests.finetune.training.test_resume import train_until
from tests.helpers.tiny_network import color_folder, finetune

pytestmark = pytest.mark.slow

HEAD = "classifier.4"


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 blue, 20 green and 5 red photos for training."""
    root = color_folder(tmp_path_factory.mktemp("data") / "colours", train=20, valid=5, classes=("blue", "green", "red"))
    for photo in sorted((root / "train" / "red").iterdir())[5:]:
        photo.unlink()
    return root


def train(data: Path, weights: Path, out: Path, *more: object) -> SimpleNamespace:
    flags = ("--data-dir", data, "--backbone", "tiny", "--weights", weights, "--output-dir", out, "--head", "logistic")
    code, printed, err = finetune("train", *flags, *more)
    assert (code, err) == (0, "")
    return SimpleNamespace(folder=out, printed=printed, bundle=open_bundle(out / "bundle"), flags=flags)


@pytest.fixture(scope="module")
def run(data: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A head-only bundle, with thresholds."""
    more = ("--export", "head", "--target-precision", 0.6)
    return train(data, tiny_weights, tmp_path_factory.mktemp("logistic") / "run", *more)


@pytest.fixture(scope="module")
def merged(run: SimpleNamespace, tiny_weights: Path) -> Path:
    out = run.folder.parent / "merged"
    assert finetune("merge", run.bundle.path, out, "--weights", tiny_weights)[0] == 0
    return out


def test_the_run_describes_the_head(run: SimpleNamespace) -> None:
    provenance = run.bundle.manifest["provenance"]
    penalty = provenance["penalty"]
    assert provenance["config"]["head"] == "logistic"
    assert {provenance["config"][name] for name in ("epochs", "optimizer", "lr", "momentum")} == {None}
    assert run.bundle.normalizes_embedding
    assert f"L2 penalty of the logistic head: {penalty:.3g}. Validation results:" in run.printed
    assert "These photos also selected the temperature.\n" in run.printed
    assert "training     45 photos in " in run.printed
    card = (run.bundle.path / "README.md").read_text(encoding="utf-8")
    assert (
        f"Logistic regression on embeddings of unit length: L-BFGS to convergence, L2 penalty {penalty:.3g}, selected by "
        "cross-validation of the training photos; seed 0; cpu, fp32." in card
    )
    assert "These photos also selected the temperature (" in card
    assert not (run.folder / "plots" / "learning_curves.png").exists()


def test_the_weights_are_the_minimum_for_normalized_embeddings(merged: Path, data: Path) -> None:
    """The gradient of the penalized loss is zero at the exported weights, from embeddings of the exported graph."""
    assert_minimum(merged, data, ["train"])


def assert_minimum(path: Path, data: Path, splits: list[str]) -> None:
    bundle = open_bundle(path)
    head = load_file(path / "model.safetensors")
    weight, bias = head[f"{HEAD}.weight"].double().numpy(), head[f"{HEAD}.bias"].double().numpy()
    files = [
        (label, file)
        for label, name in enumerate(bundle.classes)
        for split in splits
        for file in data.glob(f"{split}/{name}/*")
    ]
    pixels = np.stack([bundle.preprocessing.pixels(file.read_bytes()) for _, file in files])
    served = OpenVINOEngine(path / "model.onnx", outputs=["embedding"]).run(pixels)[0]
    embeddings = scale_embeddings(served, "unit")[0].dense()
    labels = np.array([label for label, _ in files])
    logits = embeddings @ weight.T + bias
    errors = np.exp(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)) - np.eye(3)[labels]
    gradient = errors.T @ embeddings + bundle.manifest["provenance"]["penalty"] * weight
    assert np.abs(gradient).max() < 1e-3
    assert np.abs(errors.T @ embeddings).max() > 10 * np.abs(gradient).max()


def test_the_merged_bundle_has_the_head_in_torch_and_in_the_graph(merged: Path, data: Path) -> None:
    bundle = open_bundle(merged)
    classifier = load_classifier(bundle)
    assert isinstance(classifier.net.get_submodule(HEAD), NormalizedLinear)
    pixels, expected, tolerance = bundle.golden()
    with torch.inference_mode():
        probabilities = torch.softmax(classifier(torch.from_numpy(pixels)) / bundle.manifest["temperature"], dim=1)
    np.testing.assert_allclose(probabilities.numpy(), expected, atol=tolerance)
    assert bundle.has_ood_score
    points = bundle.manifest["operating_points"]  # from heads that were trained without the photos
    assert (points["source"], points["folds"], points["photos"]) == ("out-of-fold", 5, 60)


def test_an_evaluation_by_the_graph_repeats_the_metrics(run: SimpleNamespace, merged: Path, data: Path, tmp_path: Path) -> None:
    flags = ("--bundle", merged, "--data-dir", data, "--output-dir", tmp_path / "out")
    code, _, err = finetune("evaluate", *flags)
    assert (code, err) == (0, "")
    measured = json.loads((tmp_path / "out" / "metrics.json").read_text())
    for name in ("accuracy", "log_loss"):
        assert measured[name]["value"] == pytest.approx(run.bundle.manifest["metrics"][name]["value"], abs=1e-4)


def test_cross_validation_predicts_each_photo_by_a_head_without_it(
    run: SimpleNamespace, data: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    out = tmp_path / "folds"
    flags = ("--bundle", run.bundle.path, "--data-dir", data, "--weights", tiny_weights, "--output-dir", out)
    code, _, err = finetune("evaluate", "--folds", 3, *flags)
    assert (code, err) == (0, "")
    with (out / "predictions.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 45 + 15
    assert json.loads((out / "metrics.json").read_text())["accuracy"]["value"] > 0.9


def test_class_weights_are_corrected_and_compared_with_a_plain_head(data: Path, tiny_weights: Path, tmp_path: Path) -> None:
    weighted = train(data, tiny_weights, tmp_path / "run", "--class-weights", "balanced", "--class-frequencies", "equal")
    balance = weighted.bundle.manifest["class_balance"]
    assert balance["weights"]["red"] == pytest.approx(4 * balance["weights"]["blue"])
    assert set(balance["comparison"]) == {"blue", "green", "red"}
    assert "comparison, penalty " in weighted.printed


@pytest.fixture(scope="module")
def alone(data: Path, tiny_weights: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A run whose head is fitted to the validation photos as well."""
    run = train(data, tiny_weights, tmp_path_factory.mktemp("alone") / "run", "--refit")
    return SimpleNamespace(**{**vars(run), "flags": (*run.flags, "--refit")})


def test_a_refit_head_is_fitted_to_all_photos_and_evaluated_out_of_fold(
    alone: SimpleNamespace, data: Path, tiny_weights: Path, tmp_path: Path
) -> None:
    assert_minimum(alone.bundle.path, data, ["train", "valid"])
    manifest = alone.bundle.manifest
    assert (manifest["provenance"]["folds"], manifest["metrics"]["photos"], manifest["ood"]["images"]) == (5, 60, 60)
    assert manifest["ood"]["limit"]["source"] == "training and validation, out of fold"
    out = tmp_path / "folds"
    flags = ("--bundle", alone.bundle.path, "--data-dir", data, "--weights", tiny_weights, "--output-dir", out)
    code, _, err = finetune("evaluate", "--folds", 5, *flags)
    assert (code, err) == (0, "")
    ours, theirs = (Predictions.read_csv(folder / "predictions.csv") for folder in (alone.folder, out))
    assert ours.image_names == theirs.image_names
    np.testing.assert_allclose(ours.probabilities, theirs.probabilities, atol=1e-6)
    source = open_predictions(alone.bundle.path)
    assert (source.kind, source.folds) == ("bundle", 5)


def test_a_refit_head_is_described(alone: SimpleNamespace, data: Path, tmp_path: Path) -> None:
    penalty = alone.bundle.manifest["provenance"]["penalty"]
    assert f"L2 penalty of the logistic head: {penalty:.3g}. Results of cross-validation (5 folds):" in alone.printed
    assert (
        "Each photo was predicted by a head that was fitted without it. The bundle's own head was fitted to all photos.\n"
        "These photos also selected the temperature.\n"
    ) in alone.printed
    card = (alone.bundle.path / "README.md").read_text(encoding="utf-8")
    assert "On 60 photos of training and validation, each predicted by a head that was fitted without it (5 folds):\n" in card
    assert "The head of this bundle was fitted to all of them. These photos also selected the temperature (" in card
    code, _, err = finetune("quantize", alone.bundle.path, "--data-dir", data, "--output-dir", tmp_path / "int8")
    assert code == 2
    assert (
        f"The head of {alone.bundle.path} was fitted to its validation photos too (--refit), so they cannot test int8. Train "
        "it again without --no-int8." in err
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--head", "linear"), "--refit applies to --head logistic only: a linear head needs validation photos. Remove it."),
        (("--no-feature-cache",), "--refit needs the feature cache. Remove --no-feature-cache or --refit."),
    ],
)
def test_a_refit_needs_a_logistic_head_on_cached_features(more: tuple[str, ...], message: str, alone: SimpleNamespace) -> None:
    code, _, err = finetune("train", *alone.flags, *more)
    assert code == 2
    assert message in err


def test_a_class_with_one_photo_cannot_be_refit(data: Path, tiny_weights: Path, tmp_path: Path) -> None:
    few = tmp_path / "few"
    shutil.copytree(data, few)
    for photo in [*sorted((few / "train" / "red").iterdir())[1:], *(few / "valid" / "red").iterdir()]:
        photo.unlink()
    flags = ("--data-dir", few, "--backbone", "tiny", "--weights", tiny_weights, "--allow-class-mismatch", "--refit")
    code, _, err = finetune("train", *flags, "--output-dir", tmp_path / "run")
    assert code == 2
    assert (
        "--refit needs at least two photos of every class, not near duplicates or of one group, for cross-validation. Add "
        "photos or remove it." in err
    )


def test_a_killed_run_is_resumed_with_the_same_weights(alone: SimpleNamespace, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    flags = (*alone.flags, "--output-dir", folder)
    started = (folder / "config.yaml").is_file
    code, _, _ = train_until(started, *flags, hold_at=1, by=signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert finetune("train", "--resume", "--output-dir", folder)[0] == 0
    ours, theirs = (load_file(path / "bundle" / "model.safetensors") for path in (folder, alone.folder))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    shutil.rmtree(folder / "bundle")  # as if it had been killed during the export
    code, printed, _ = finetune("train", "--resume", "--output-dir", folder)
    assert code == 0
    assert "The head is already fitted.\n" in printed
    exported = load_file(folder / "bundle" / "model.safetensors")
    assert all(torch.equal(exported[name], theirs[name]) for name in theirs)
    code, _, err = finetune("train", "--resume", "--output-dir", folder, "--epochs", 3)
    assert code == 2
    assert "--epochs does not apply to --head logistic, which has no epochs. Remove one of the two." in err


def test_several_processes_give_the_weights_of_one(alone: SimpleNamespace, tmp_path: Path) -> None:
    words = (*alone.flags, "--output-dir", tmp_path / "two", "--cache-dir", tmp_path / "cache")
    codes, out, err = train_in_ranks(2, *words)
    assert codes == [0, 0], err
    assert out.count("L2 penalty of the logistic head") == 1
    assert largest_difference(tmp_path / "two", alone.folder) < 1e-4  # of weights of up to 10


@pytest.mark.parametrize("case", ["two heads", "convolution", "ReLU after the head"])
def test_other_heads_are_rejected(case: str) -> None:
    """Logistic regression would not find the minimum of what such a network computes."""
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.Linear(4, 2))
    spec = get_spec("lenet_cifar")
    heads: dict[str, object] = {"head": "2"}
    if case == "two heads":
        heads["extra_heads"] = ("1",)
    if case == "convolution":
        net[2] = nn.Conv2d(4, 2, 1)
    if case == "ReLU after the head":
        net.append(nn.ReLU())
    spec = replace(spec, name="odd", **heads)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        require_logistic_head(Classifier(net, spec.preprocessing), spec)
    assert str(caught.value) == (
        "--head logistic needs a network whose last layer is Linear and outputs the logits, and that of odd does not. Use "
        "--head linear."
    )
