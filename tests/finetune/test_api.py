"""The Python interface: the same results as the commands."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import finetune
from finetune.config import Config
from finetune.training import run_directory
from models.artifacts.reviews import Review, write_reviews
from models.errors import BundleError, ConfigError, DataError, ImageError, RunError
from tests.helpers.tiny_network import color_folder, registered, save_weights
from tests.helpers.tiny_network import finetune as command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folder(tmp_path_factory.mktemp("data") / "colours", train=6, valid=3)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with registered():
        yield save_weights(tmp_path_factory.mktemp("weights") / "tiny.pth")


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, data: Path, weights: Path, cache: Path) -> finetune.Classifier:
    run = tmp_path_factory.mktemp("api") / "run"
    return finetune.train(data, backbone="tiny", weights=weights, epochs=2, output_dir=run, cache_dir=cache)


def test_importing_the_package_does_not_import_torch() -> None:
    code = "import sys, finetune; print('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "False\n"
    with pytest.raises(AttributeError, match="module 'finetune' has no attribute 'trian'"):
        finetune.trian  # noqa: B018


def test_a_trained_classifier_describes_itself(classifier: finetune.Classifier) -> None:
    assert classifier.classes == ("blue", "red")
    assert classifier.metrics["photos"] == 6
    assert repr(classifier) == f"Classifier({str(classifier.path)!r}, classes=['blue', 'red'])"
    assert finetune.load(str(classifier.path)).name == classifier.name


def test_predictions_are_those_of_the_command(classifier: finetune.Classifier, data: Path) -> None:
    code, printed, _ = command("predict", "--bundle", classifier.path, data / "valid", "--json")
    assert code == 0
    rows = [json.loads(line) for line in printed.splitlines()]
    predictions = classifier.predict(data / "valid")
    assert [str(p.image) for p in predictions] == [row["file"] for row in rows]
    assert [(p.label, p.confidence, p.probabilities) for p in predictions] == [
        (row["label"], row["confidence"], row["probabilities"]) for row in rows
    ]


def test_files_folders_and_images_in_memory_can_be_mixed(classifier: finetune.Classifier, data: Path) -> None:
    file = data / "valid" / "red" / "red.000.jpg"
    with Image.open(file) as image:
        image.load()
    in_memory, from_file, *folder = classifier.predict([image, str(file), data / "valid" / "blue"])
    assert in_memory.image is image
    assert in_memory.probabilities == from_file.probabilities
    assert len(folder) == 3
    gray = Image.fromarray(np.full((40, 50), 7, np.uint8))
    (unlike,) = classifier.predict(gray)
    assert (unlike.label, unlike.because) == (None, "unlike the training images")
    (labeled,) = classifier.predict(gray, abstain=False)
    assert labeled.label in classifier.classes
    assert labeled.because_code == unlike.because_code == "unlike_training"


def test_evaluations_are_those_of_the_command(classifier: finetune.Classifier, data: Path, tmp_path: Path) -> None:
    evaluation = finetune.evaluate(classifier, data, output_dir=tmp_path / "api")
    code, printed, _ = command(
        "evaluate", "--bundle", classifier.path, "--data-dir", data, "--output-dir", tmp_path / "command"
    )
    assert code == 0
    assert evaluation.summary() in printed
    assert evaluation.path == tmp_path / "api"
    assert evaluation.metrics == json.loads((tmp_path / "command" / "metrics.json").read_text(encoding="utf-8"))
    assert len(evaluation.predictions.image_names) == 6


def test_an_interrupted_run_is_resumed_with_its_saved_settings(
    data: Path, weights: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    save = run_directory.save_checkpoint

    def save_then_interrupt(*args: Any, **options: Any) -> None:
        save(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(run_directory, "save_checkpoint", save_then_interrupt)
    with pytest.raises(KeyboardInterrupt):
        finetune.train(data, backbone="tiny", weights=weights, epochs=2, lr=0.01, seed=3, output_dir=run, cache_dir=cache)
    monkeypatch.undo()
    resumed = finetune.train(data, resume=True, output_dir=run)
    whole = finetune.train(
        data, backbone="tiny", weights=weights, epochs=2, lr=0.01, seed=3, output_dir=tmp_path / "whole", cache_dir=cache
    )
    assert resumed.metrics == whole.metrics
    saved = run_directory.read_config(run)
    assert (saved["backbone"], saved["lr"], saved["seed"], saved["epochs"]) == ("tiny", 0.01, 3, 2)


def test_a_finished_run_is_opened(classifier: finetune.Classifier, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = classifier.path.parent
    assert finetune.train(data, resume=True, output_dir=run).path == classifier.path
    assert f"The run in {run} is already finished." in capsys.readouterr().out
    assert finetune.train(data, backbone="tiny", epochs=None, resume=True, output_dir=str(run)).path == classifier.path
    assert command("train", "--resume", "--output-dir", run)[0] == 0


def test_resume_rejects_other_settings_and_names_arguments(classifier: finetune.Classifier, data: Path, tmp_path: Path) -> None:
    run = classifier.path.parent

    def error_of(**config: Any) -> str:
        with pytest.raises(RunError) as error:
            finetune.train(data, **config)
        return str(error.value)

    assert error_of(resume=True, output_dir=run, backbone="vgg16") == (
        f"The run in {run} was started with backbone tiny, not vgg16. Remove backbone, or start another run."
    )
    assert error_of(resume=True, output_dir=run, batch_size=7) == (
        f"The run in {run} was started with batch_size 5, not 7. Remove batch_size, or start another run."
    )
    assert error_of(resume=True) == "resume=True requires the run directory. Pass output_dir."
    missing = tmp_path / "missing"
    assert error_of(resume=True, output_dir=missing) == f"No run to resume in {missing}. Start it without resume=True."
    assert error_of(output_dir=run) == (
        f"{run} already contains a run. Choose another output_dir (make: RUN=), or continue with resume=True."
    )


def test_a_new_run_starts_from_vgg16(monkeypatch: pytest.MonkeyPatch, data: Path) -> None:
    class StartedError(Exception):
        pass

    def train(config: Config, *, resume: bool) -> None:
        assert (config.backbone, config.data_dir, resume) == ("vgg16", data, False)
        raise StartedError

    monkeypatch.setattr("finetune.pipeline.train", train)
    with pytest.raises(StartedError):
        finetune.train(data)


def test_cross_validation_uses_the_weights_and_the_reviews(
    classifier: finetune.Classifier, data: Path, weights: Path, cache: Path, tmp_path: Path
) -> None:
    photo = "train/red/red.000.jpg"
    sha256 = hashlib.sha256((data / photo).read_bytes()).hexdigest()
    review = Review(sha256, photo, "red", "label", "blue", "", "ana", "2026-01-01T00:00:00+00:00")
    (tmp_path / "reviews.csv").write_bytes(write_reviews([review]))
    evaluation = finetune.evaluate(
        classifier,
        data,
        folds=3,
        weights=str(weights),
        reviews=tmp_path / "reviews.csv",
        output_dir=tmp_path / "folds",
        workers=1,
        cache_dir=cache,
    )
    row = evaluation.predictions.sha256s.index(sha256)
    assert evaluation.predictions.classes[evaluation.predictions.labels[row]] == "blue"
    assert len(evaluation.predictions.image_names) == 18
    other = save_weights(tmp_path / "other.pth", seed=1)
    with pytest.raises(BundleError, match=r"was trained on other base weights\. Pass their file with weights\.$"):
        finetune.evaluate(classifier, data, folds=3, weights=other, output_dir=tmp_path / "other", cache_dir=cache)


def test_evaluations_reject_options_that_exclude_each_other(classifier: finetune.Classifier, data: Path) -> None:
    with pytest.raises(ConfigError, match=r"^weights requires folds\."):
        finetune.evaluate(classifier, data, weights="weights.pth")
    for options in ({"folds": 1}, {"folds": 3, "split": "train"}):
        with pytest.raises(ConfigError, match=r"^folds must be at least 2, and cannot be combined with split: "):
            finetune.evaluate(classifier, data, **options)


def test_errors_name_what_to_fix(classifier: finetune.Classifier, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown setting 'epoch'\. Did you mean 'epochs'"):
        finetune.train(data, epoch=3)
    with pytest.raises(ConfigError, match=r"^batch_size must be at least 1 \(got 0\)\.$"):
        finetune.train(data, batch_size=0)
    with pytest.raises(DataError, match=r"No such photo or folder: nowhere\.jpg"):
        classifier.predict("nowhere.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.jpg: "):
        classifier.predict(tmp_path / "broken.jpg")
