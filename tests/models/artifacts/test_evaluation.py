"""Opening stored predictions of bundles and evaluations."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from models.artifacts.bundle import open_bundle
from models.artifacts.evaluation import open_predictions
from models.artifacts.predictions import Predictions
from models.artifacts.similarity import SIMILARITY_FILES, SimilarityIndex
from models.errors import BundleError
from tests.helpers.tiny_network import finetune, registered

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def evaluation(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of the training images, which include one duplicate and one broken file."""
    root = tmp_path_factory.mktemp("evaluation")
    data = Path(shutil.copytree(tiny_bundle.data, root / "data"))
    train = data / "train"
    shutil.copyfile(train / "blue" / "blue.000.jpg", train / "red" / "again.jpg")
    (train / "red" / "broken.jpg").write_bytes(b"no photo")
    out = root / "out"
    flags = ("--bundle", tiny_bundle.path, "--data-dir", data, "--split", "train", "--output-dir", out)
    with registered():
        code, output, _ = finetune("evaluate", *flags)
    assert code == 0, output
    return out


def test_bundle_predictions_match_its_run(tiny_bundle: SimpleNamespace) -> None:
    for path in (tiny_bundle.path, tiny_bundle.head):
        source, bundle = open_predictions(path), open_bundle(path)
        assert (source.name, source.version, source.kind) == (bundle.name, bundle.version, "bundle")
        assert (source.classes, source.temperature) == (("blue", "green", "red"), bundle.manifest["temperature"])
        expected = Predictions.read_csv(tiny_bundle.predictions)
        assert source.predictions().sha256s == source.similarity().sha256s == expected.sha256s
        assert source.similarity().embeddings.shape == (18, 18)  # 18 images allow at most 18 principal components


def test_nearest_embeddings_mostly_share_the_class(tiny_bundle: SimpleNamespace) -> None:
    source = open_predictions(tiny_bundle.path)
    labels, similarity = source.predictions().labels, source.similarity()
    nearest = [similarity.nearest(row, 1)[0][0] for row in range(len(labels))]
    assert (labels[nearest] == labels).mean() > 0.9


def test_evaluation_has_its_predictions_and_duplicates(evaluation: Path, tiny_bundle: SimpleNamespace) -> None:
    source, bundle = open_predictions(evaluation), open_bundle(tiny_bundle.path)
    assert (source.name, source.kind, source.split, source.folds) == (bundle.name, "evaluation", "train", None)
    assert (source.bundle_version, source.backbone) == (bundle.version, "tiny")
    assert len(source.version) == 12
    assert source.version != bundle.version
    predictions, similarity = source.predictions(), source.similarity()
    assert len(predictions.image_names) == 37
    assert similarity.sha256s == predictions.sha256s
    duplicates = similarity.duplicates_of("train/red/again.jpg")
    assert [(d.photo, d.label, d.split) for d in duplicates] == [
        ("train/blue/blue.000.jpg", "blue", "train"),
        ("train/red/again.jpg", "red", "train"),
    ]
    row = predictions.image_names.index("train/red/again.jpg")
    (nearest,) = similarity.nearest(row, 1)
    assert predictions.image_names[nearest[0]] == "train/blue/blue.000.jpg"
    assert nearest[1] == pytest.approx(1, abs=2e-3)


def test_repeated_evaluation_has_the_same_version(evaluation: Path, tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        flags = ("--bundle", tiny_bundle.path, "--data-dir", evaluation.parent / "data", "--split", split)
        with registered():
            assert finetune("evaluate", *flags, "--output-dir", tmp_path / split)[0] == 0
    assert open_predictions(tmp_path / "train").version == open_predictions(evaluation).version
    assert open_predictions(tmp_path / "valid").version != open_predictions(evaluation).version


def test_older_bundles_have_an_empty_similarity_index(tiny_bundle: SimpleNamespace) -> None:
    shipped = open_predictions(Path(__file__).resolve().parents[3] / "models" / "shipped" / "dogs-vs-cats")
    assert len(shipped.predictions().image_names) == 1400
    if not (shipped.path / SIMILARITY_FILES[0]).exists():
        assert shipped.similarity().nearest(0, 3) == []


def test_other_folders_and_modified_evaluations_are_rejected(evaluation: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has neither manifest\.json nor evaluation\.json"):
        open_predictions(tmp_path)
    info = json.loads((evaluation / "evaluation.json").read_text())
    for number, (changes, message) in enumerate(
        [
            ({"split": "valid"}, "was changed after it was written"),
            ({"format": 2}, "has format 2, but this version supports formats up to 1"),
            ({"sha256": None}, "was changed after it was written"),
        ]
    ):
        copy = Path(shutil.copytree(evaluation, tmp_path / str(number)))
        (copy / "evaluation.json").write_text(json.dumps(info | changes))
        with pytest.raises(BundleError, match=message):
            open_predictions(copy)
    copy = Path(shutil.copytree(evaluation, tmp_path / "table"))
    SimilarityIndex(("a" * 64,), np.ones((1, 1), np.float16)).write(copy)
    with pytest.raises(BundleError, match=r"embeddings\.npz was changed or damaged"):
        open_predictions(copy)
    (copy / "evaluation.json").write_text("[]")
    with pytest.raises(BundleError, match="cannot be read as an evaluation"):
        open_predictions(copy)
