from __future__ import annotations

import csv
import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from models.artifacts.predictions import RERUN_HINT, Predictions, cross_entropy
from models.errors import BundleError


def some_predictions(**changes: object) -> Predictions:
    probabilities = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7]], dtype=np.float32).astype(np.float64)
    fields = {
        "classes": ("cats", "dogs"),
        "image_names": ("valid/cats/cat.1.jpg", "valid/dogs/dog.1.jpg", "valid/cats/cat.2.jpg"),
        "labels": np.array([0, 1, 0]),
        "probabilities": probabilities,
        "splits": ("valid", "valid", "test"),
        "sha256s": ("a" * 64, "b" * 64, "c" * 64),
    }
    return Predictions(**(fields | changes))  # type: ignore[arg-type]


def test_predicted_class_confidence_and_loss() -> None:
    predictions = some_predictions()
    assert predictions.predicted.tolist() == [0, 1, 1]
    assert predictions.correct.tolist() == [True, True, False]
    np.testing.assert_allclose(predictions.confidence, [0.9, 0.8, 0.7], rtol=1e-6)
    np.testing.assert_allclose(predictions.losses, -np.log([0.9, 0.8, 0.3]), rtol=1e-6)


def test_losses_are_finite_and_never_negative_zero() -> None:
    losses = cross_entropy(np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert losses.tolist() == [0.0, pytest.approx(-np.log(1e-12))]
    assert not np.signbit(losses[0])


def test_csv_round_trip(tmp_path: Path) -> None:
    predictions = some_predictions()
    predictions.write_csv(tmp_path / "new" / "predictions.csv")
    again = Predictions.read_csv(tmp_path / "new" / "predictions.csv")
    for field in dataclasses.fields(Predictions):
        expected, actual = getattr(predictions, field.name), getattr(again, field.name)
        if isinstance(expected, np.ndarray):
            assert actual.dtype == expected.dtype
            np.testing.assert_allclose(actual, expected, rtol=1e-8)
        else:
            assert actual == expected


def test_csv_preserves_every_float32_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(5, 0.05), size=500).astype(np.float32)
    texts = tuple(str(i) for i in range(500))
    predictions = Predictions(tuple("abcde"), texts, rng.integers(5, size=500), probabilities.astype(np.float64), texts, texts)
    predictions.write_csv(tmp_path / "p.csv")
    again = Predictions.read_csv(tmp_path / "p.csv")
    np.testing.assert_array_equal(again.probabilities.astype(np.float32), probabilities)


def test_csv_columns(tmp_path: Path) -> None:
    some_predictions().write_csv(tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["photo", "label", "predicted", "p_cats", "p_dogs", "loss", "split", "sha256"]
    assert (rows[2]["label"], rows[2]["predicted"], rows[2]["split"]) == ("cats", "dogs", "test")
    assert float(rows[2]["loss"]) == pytest.approx(-np.log(0.3), rel=1e-6)


@pytest.mark.parametrize("name", ["a,b", 'say "cat"', "猫", "p_", " cats ", "two\nlines", "cr\rlf\r\n", "=1+1", "é;\t'"])
def test_unusual_class_and_file_names_round_trip(tmp_path: Path, name: str) -> None:
    image_names = (f"valid/{name}/1.jpg", "x", os.fsdecode(b"valid/\xff.jpg"))
    predictions = some_predictions(classes=(name, "dogs"), image_names=image_names)
    predictions.write_csv(tmp_path / "p.csv")
    again = Predictions.read_csv(tmp_path / "p.csv")
    assert (again.classes, again.image_names, again.labels.tolist()) == ((name, "dogs"), image_names, [0, 1, 0])


def test_csv_with_byte_order_mark_and_crlf_is_read(tmp_path: Path) -> None:
    some_predictions().write_csv(tmp_path / "p.csv")
    text = (tmp_path / "p.csv").read_text(encoding="utf-8")
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert Predictions.read_csv(tmp_path / "p.csv").sha256s == some_predictions().sha256s


def test_empty_predictions_round_trip(tmp_path: Path) -> None:
    empty = Predictions(("cats", "dogs"), (), np.zeros(0, dtype=np.int64), np.zeros((0, 2)), (), ())
    empty.write_csv(tmp_path / "p.csv")
    assert Predictions.read_csv(tmp_path / "p.csv").probabilities.shape == (0, 2)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("photo,label", "photo,lable", "row 1"),
        ("p_dogs", "dogs", "row 1"),
        ("p_dogs", "p_cats", "row 1"),
        ("dog.1.jpg,dogs", "dog.1.jpg,wolves", "row 3, column 'label': 'wolves' has no column 'p_wolves'"),
        ("0.800000012", "much", "row 3, column 'p_dogs': expected a probability from 0 to 1, got 'much'"),
        ("0.800000012", "nan", "row 3, column 'p_dogs': expected a probability from 0 to 1, got 'nan'"),
        ("0.800000012", "1.8", "row 3, column 'p_dogs': expected a probability from 0 to 1, got '1.8'"),
        ("0.800000012", "0.5", "row 3: columns 'p_cats' to 'p_dogs' sum to 0.7"),
        (",test," + "c" * 64, "", "row 4: expected 8 columns, got 6 (up to 'loss')"),
        (",test,", ",test,,", "row 4: expected 8 columns, got 9"),
        ('valid/cats/cat.2', '"valid/cats/cat.2', "cannot be read"),
    ],
)  # fmt: skip
def test_malformed_csv_error_names_row_and_column(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "p.csv"
    some_predictions().write_csv(path)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        Predictions.read_csv(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfep\x00h\x00"])
def test_missing_or_unparsable_file_is_rejected(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(BundleError, match="Run `finetune evaluate` again to recreate the file"):
        Predictions.read_csv(tmp_path / "p.csv")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_names": ("only one",)}, "one label, split and sha256 per image; got 1 images, 3 labels"),
        ({"splits": ("valid",) * 4}, "one label, split and sha256 per image; got 3 images, 3 labels, 4 splits"),
        ({"labels": np.array([0, 1])}, "one label, split and sha256 per image; got 3 images, 2 labels"),
        ({"labels": np.array([[0, 1, 0]]).T}, r"Expected labels of shape \(N,\)"),
        ({"labels": np.array([0, 1, 2])}, "Labels must be from 0 to 1, got 0 to 2"),
        ({"labels": np.array([0, 1, -1])}, "Labels must be from 0 to 1, got -1 to 1"),
        ({"probabilities": np.full((3, 3), 1 / 3)}, r"probabilities of shape \(N, 2\)"),
        ({"probabilities": np.full((3, 2), 0.7)}, "Row 0 is not a probability distribution"),
        ({"probabilities": np.array([[1.5, -0.5]] * 3)}, "Row 0 is not a probability distribution"),
        ({"probabilities": np.full((3, 2), np.nan)}, "Row 0 is not a probability distribution"),
        ({"classes": ("cats", "cats")}, "Expected one or more distinct class names"),
        ({"classes": ()}, "Expected one or more distinct class names"),
    ],
)
def test_inconsistent_values_are_rejected(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        some_predictions(**changes)


def test_groups_and_facets_follow_in_columns_of_their_own(tmp_path: Path) -> None:
    facets = {"camera": ("left", "", "left"), "p_x": ('"quoted", text', "2", ""), "group": ("x", "y", "z")}
    table = some_predictions(groups=("p1", "", "p1"), facets=facets)
    table.write_csv(tmp_path / "p.csv")
    header = (tmp_path / "p.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header.endswith(",sha256,group,facet_camera,facet_p_x,facet_group")
    other = Predictions.read_csv(tmp_path / "p.csv")
    assert (other.classes, other.groups, dict(other.facets)) == (table.classes, table.groups, facets)
    assert other.group_numbers is not None
    assert other.group_numbers.tolist() == [0, 1, 0]
    some_predictions(facets={"camera": ("left", "right", "")}).write_csv(tmp_path / "q.csv")
    other = Predictions.read_csv(tmp_path / "q.csv")
    assert (other.groups, other.group_numbers, dict(other.facets)) == ((), None, {"camera": ("left", "right", "")})
    with pytest.raises(ValueError, match=r"^Expected one camera per image, got 1 for 3 images\.$"):
        some_predictions(facets={"camera": ("left",)})


# OOD scores


def test_ood_scores_are_an_optional_column(tmp_path: Path) -> None:
    predictions = some_predictions()
    scores = np.linspace(0.1, 2.7, len(predictions.labels)).astype(np.float32)
    dataclasses.replace(predictions, ood_scores=scores).write_csv(tmp_path / "p.csv")
    header = (tmp_path / "p.csv").read_text(encoding="utf-8").splitlines()[0]
    assert header.endswith(",ood_score,loss,split,sha256")
    again = Predictions.read_csv(tmp_path / "p.csv")
    assert again.ood_scores is not None
    np.testing.assert_array_equal(again.ood_scores, scores)
    np.testing.assert_allclose(again.probabilities, predictions.probabilities, rtol=1e-8)
    predictions.write_csv(tmp_path / "p.csv")
    assert Predictions.read_csv(tmp_path / "p.csv").ood_scores is None


@pytest.mark.parametrize("text", ["", "-1", "nan", "inf", "far"])
def test_a_malformed_ood_score_is_rejected(tmp_path: Path, text: str) -> None:
    predictions = some_predictions()
    dataclasses.replace(predictions, ood_scores=np.full(len(predictions.labels), 0.5, np.float32)).write_csv(tmp_path / "p.csv")
    content = (tmp_path / "p.csv").read_text(encoding="utf-8")
    (tmp_path / "p.csv").write_text(content.replace(",0.5,", f",{text},", 1), encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        Predictions.read_csv(tmp_path / "p.csv")
    assert str(caught.value) == (
        f"{tmp_path / 'p.csv'}, row 2, column 'ood_score': expected a number of 0 or more, got {text!r}. {RERUN_HINT}"
    )


def test_one_ood_score_per_image_is_required() -> None:
    with pytest.raises(ValueError, match=r"Expected one OOD score per image, got \(1,\) for"):
        dataclasses.replace(some_predictions(), ood_scores=np.zeros(1, np.float32))
