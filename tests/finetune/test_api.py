"""The Python interface: the same results as the commands."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import finetune
from models.errors import ConfigError, DataError, ImageError
from tests.helpers.tiny_network import color_folder, registered, save_weights
from tests.helpers.tiny_network import finetune as command

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folder(tmp_path_factory.mktemp("data") / "colours", train=6, valid=3)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory: pytest.TempPathFactory, data: Path) -> finetune.Classifier:
    folder = tmp_path_factory.mktemp("api")
    with registered():
        weights = save_weights(folder / "tiny.pth")
        return finetune.train(
            data, backbone="tiny", weights=weights, epochs=2, output_dir=folder / "run", cache_dir=folder / "cache"
        )


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
    assert [str(p.image) for p in predictions] == [row["photo"] for row in rows]
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
    (gray,) = classifier.predict(Image.fromarray(np.full((40, 50), 7, np.uint8)))
    assert gray.label in classifier.classes


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


def test_errors_name_what_to_fix(classifier: finetune.Classifier, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Unknown setting 'epoch'\. Did you mean 'epochs'"):
        finetune.train(data, epoch=3)
    with pytest.raises(DataError, match=r"No such photo or folder: nowhere\.jpg"):
        classifier.predict("nowhere.jpg")
    (tmp_path / "broken.jpg").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.jpg: "):
        classifier.predict(tmp_path / "broken.jpg")
