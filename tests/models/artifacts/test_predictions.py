from __future__ import annotations

import csv
import dataclasses
import os
from pathlib import Path

import numpy as np
import pytest

from models.artifacts.predictions import Predictions, cross_entropy
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


def test_what_follows_from_the_probabilities() -> None:
    predictions = some_predictions()
    assert predictions.predicted.tolist() == [0, 1, 1]
    assert predictions.correct.tolist() == [True, True, False]
    np.testing.assert_allclose(predictions.confidence, [0.9, 0.8, 0.7], rtol=1e-6)
    np.testing.assert_allclose(predictions.losses, -np.log([0.9, 0.8, 0.3]), rtol=1e-6)


def test_losses_stay_finite_and_are_never_minus_zero() -> None:
    losses = cross_entropy(np.array([0, 1]), np.array([[1.0, 0.0], [1.0, 0.0]]))
    assert losses.tolist() == [0.0, pytest.approx(-np.log(1e-12))]
    assert not np.signbit(losses[0])


def test_csv_brings_everything_back(tmp_path: Path) -> None:
    predictions = some_predictions()
    predictions.write_csv(tmp_path / "new" / "predictions.csv")
    again = Predictions.read_csv(tmp_path / "new" / "predictions.csv")
    for field in dataclasses.fields(Predictions):
        wanted, got = getattr(predictions, field.name), getattr(again, field.name)
        if isinstance(wanted, np.ndarray):
            assert got.dtype == wanted.dtype
            np.testing.assert_allclose(got, wanted, rtol=1e-8)
        else:
            assert got == wanted


def test_csv_brings_every_float32_back_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.full(5, 0.05), size=500).astype(np.float32)
    texts = tuple(str(i) for i in range(500))
    predictions = Predictions(tuple("abcde"), texts, rng.integers(5, size=500), probabilities.astype(np.float64), texts, texts)
    predictions.write_csv(tmp_path / "p.csv")
    again = Predictions.read_csv(tmp_path / "p.csv")
    np.testing.assert_array_equal(again.probabilities.astype(np.float32), probabilities)


def test_csv_columns_are_what_other_tools_expect(tmp_path: Path) -> None:
    some_predictions().write_csv(tmp_path / "p.csv")
    with (tmp_path / "p.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["photo", "label", "predicted", "p_cats", "p_dogs", "loss", "split", "sha256"]
    assert (rows[2]["label"], rows[2]["predicted"], rows[2]["split"]) == ("cats", "dogs", "test")
    assert float(rows[2]["loss"]) == pytest.approx(-np.log(0.3), rel=1e-6)


@pytest.mark.parametrize("name", ["a,b", 'say "cat"', "猫", "p_", " cats ", "two\nlines", "=1+1", "é;\t'"])
def test_odd_class_and_file_names_survive(tmp_path: Path, name: str) -> None:
    image_names = (f"valid/{name}/1.jpg", "x", os.fsdecode(b"valid/\xff.jpg"))
    predictions = some_predictions(classes=(name, "dogs"), image_names=image_names)
    predictions.write_csv(tmp_path / "p.csv")
    again = Predictions.read_csv(tmp_path / "p.csv")
    assert (again.classes, again.image_names, again.labels.tolist()) == ((name, "dogs"), image_names, [0, 1, 0])


def test_csv_saved_by_a_spreadsheet_is_read(tmp_path: Path) -> None:
    some_predictions().write_csv(tmp_path / "p.csv")
    text = (tmp_path / "p.csv").read_text(encoding="utf-8")
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode())
    assert Predictions.read_csv(tmp_path / "p.csv").sha256s == some_predictions().sha256s


def test_no_photos_are_a_table_too(tmp_path: Path) -> None:
    empty = Predictions(("cats", "dogs"), (), np.zeros(0, dtype=np.int64), np.zeros((0, 2)), (), ())
    empty.write_csv(tmp_path / "p.csv")
    assert Predictions.read_csv(tmp_path / "p.csv").probabilities.shape == (0, 2)


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("photo,label", "photo,lable", "row 1"),
        ("p_dogs", "dogs", "row 1"),
        ("p_dogs", "p_cats", "row 1"),
        ("dog.1.jpg,dogs", "dog.1.jpg,wolves", "row 3, column 'label' is 'wolves'"),
        ("0.800000012", "much", "row 3, column 'p_dogs' is 'much'"),
        ("0.800000012", "nan", "row 3, column 'p_dogs' is 'nan'"),
        ("0.800000012", "1.8", "row 3, column 'p_dogs' is '1.8'"),
        ("0.800000012", "0.5", "row 3, columns 'p_cats' to 'p_dogs' sum to 0.7"),
        (",test," + "c" * 64, "", "row 4 has 6 columns, up to 'loss'"),
        (",test,", ",test,,", "row 4 has 9 columns"),
        ('valid/cats/cat.2', '"valid/cats/cat.2', "cannot be read"),
    ],
)  # fmt: skip
def test_a_malformed_csv_is_named_by_row_and_column(tmp_path: Path, old: str, new: str, named: str) -> None:
    path = tmp_path / "p.csv"
    some_predictions().write_csv(path)
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises(BundleError) as caught:
        Predictions.read_csv(path)
    assert named in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", [None, b"", b"\xff\xfep\x00h\x00"])
def test_a_file_that_is_no_table_is_refused(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "p.csv").write_bytes(content)
    with pytest.raises(BundleError, match="evaluate again"):
        Predictions.read_csv(tmp_path / "p.csv")


@pytest.mark.parametrize(
    "changes",
    [
        {"image_names": ("only one",)},
        {"splits": ("valid",) * 4},
        {"labels": np.array([0, 1])},
        {"labels": np.array([[0, 1, 0]]).T},
        {"labels": np.array([0, 1, 2])},
        {"labels": np.array([0, 1, -1])},
        {"probabilities": np.full((3, 3), 1 / 3)},
        {"probabilities": np.full((3, 2), 0.7)},
        {"probabilities": np.array([[1.5, -0.5]] * 3)},
        {"probabilities": np.full((3, 2), np.nan)},
        {"classes": ("cats", "cats")},
        {"classes": ()},
    ],
)
def test_what_does_not_fit_together_is_refused(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=r"arrived|Labels run|no distribution"):
        some_predictions(**changes)
