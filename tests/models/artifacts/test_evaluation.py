"""What a model said of photos, opened in one way whether a bundle or an evaluation holds it."""

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


@pytest.fixture(scope="module")
def measured(tiny_bundle: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An evaluation of the training photos, two of which are the same and one of which is no photo."""
    root = tmp_path_factory.mktemp("measured")
    data = Path(shutil.copytree(tiny_bundle.data, root / "data"))
    train = data / "train"
    shutil.copyfile(train / "blue" / "blue.000.jpg", train / "red" / "again.jpg")
    (train / "red" / "broken.jpg").write_bytes(b"no photo")
    out = root / "out"
    flags = ("--bundle", tiny_bundle.path, "--data-dir", data, "--split", "train", "--output-dir", out)
    with registered():
        code, said, _ = finetune("evaluate", *flags)
    assert code == 0, said
    return out


def test_a_bundle_opens_with_what_its_run_wrote(tiny_bundle: SimpleNamespace) -> None:
    for path in (tiny_bundle.path, tiny_bundle.head):
        results, bundle = open_predictions(path), open_bundle(path)
        assert (results.name, results.version, results.kind) == (bundle.name, bundle.version, "bundle")
        assert (results.classes, results.temperature) == (("blue", "green", "red"), bundle.manifest["temperature"])
        wanted = Predictions.read_csv(tiny_bundle.predictions)
        assert results.predictions().sha256s == results.similarity().sha256s == wanted.sha256s
        assert results.similarity().embeddings.shape == (18, 18)  # as many as photos, which are fewer than numbers


def test_the_embeddings_of_training_tell_who_is_like_whom(tiny_bundle: SimpleNamespace) -> None:
    results = open_predictions(tiny_bundle.path)
    labels, similarity = results.predictions().labels, results.similarity()
    nearest = [similarity.nearest(row, 1)[0][0] for row in range(len(labels))]
    assert (labels[nearest] == labels).mean() > 0.9


def test_an_evaluation_opens_with_what_it_measured(measured: Path, tiny_bundle: SimpleNamespace) -> None:
    results, bundle = open_predictions(measured), open_bundle(tiny_bundle.path)
    assert (results.name, results.kind, results.split, results.folds) == (bundle.name, "evaluation", "train", None)
    assert (results.bundle_version, results.backbone) == (bundle.version, "tiny")
    assert len(results.version) == 12
    assert results.version != bundle.version
    predictions, similarity = results.predictions(), results.similarity()
    assert len(predictions.image_names) == 37
    assert similarity.sha256s == predictions.sha256s
    same = similarity.duplicates_of("train/red/again.jpg")
    assert [(d.photo, d.label, d.split) for d in same] == [
        ("train/blue/blue.000.jpg", "blue", "train"),
        ("train/red/again.jpg", "red", "train"),
    ]
    row = predictions.image_names.index("train/red/again.jpg")
    (nearest,) = similarity.nearest(row, 1)
    assert predictions.image_names[nearest[0]] == "train/blue/blue.000.jpg"
    assert nearest[1] == pytest.approx(1, abs=2e-3)


def test_measuring_the_same_again_gives_the_same_version(measured: Path, tiny_bundle: SimpleNamespace, tmp_path: Path) -> None:
    for split in ("train", "valid"):
        flags = ("--bundle", tiny_bundle.path, "--data-dir", measured.parent / "data", "--split", split)
        with registered():
            assert finetune("evaluate", *flags, "--output-dir", tmp_path / split)[0] == 0
    assert open_predictions(tmp_path / "train").version == open_predictions(measured).version
    assert open_predictions(tmp_path / "valid").version != open_predictions(measured).version


def test_older_bundles_have_no_lookalikes(tiny_bundle: SimpleNamespace) -> None:
    shipped = open_predictions(Path(__file__).resolve().parents[3] / "models" / "shipped" / "dogs-vs-cats")
    assert len(shipped.predictions().image_names) == 400
    if not (shipped.path / SIMILARITY_FILES[0]).exists():
        assert shipped.similarity().nearest(0, 3) == []


def test_what_is_neither_or_was_changed_is_refused(measured: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"has neither manifest\.json nor evaluation\.json"):
        open_predictions(tmp_path)
    info = json.loads((measured / "evaluation.json").read_text())
    for number, (changes, said) in enumerate(
        [
            ({"split": "valid"}, "was changed after it was written"),
            ({"format": 2}, "has format 2, and this version reads up to 1"),
            ({"sha256": None}, "was changed after it was written"),
        ]
    ):
        copy = Path(shutil.copytree(measured, tmp_path / str(number)))
        (copy / "evaluation.json").write_text(json.dumps(info | changes))
        with pytest.raises(BundleError, match=said):
            open_predictions(copy)
    copy = Path(shutil.copytree(measured, tmp_path / "table"))
    SimilarityIndex(("a" * 64,), np.ones((1, 1), np.float16)).write(copy)
    with pytest.raises(BundleError, match=r"embeddings\.npz was changed or damaged"):
        open_predictions(copy)
    (copy / "evaluation.json").write_text("[]")
    with pytest.raises(BundleError, match="cannot be read as an evaluation"):
        open_predictions(copy)
