from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune.data.embeddings import reduce_dimensions
from models.artifacts.similarity import DUPLICATES, EMBEDDINGS, DuplicateRow, SimilarityIndex
from models.errors import BundleError


def make_index() -> SimilarityIndex:
    angles = np.array([0.0, 0.1, 1.0, 3.0])
    return SimilarityIndex(
        tuple(letter * 64 for letter in "abcd"),
        np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float16),
        (
            DuplicateRow(1, "train/cats/1.jpg", "cats", "train", "a" * 64),
            DuplicateRow(1, "valid/dogs/1, or so.jpg", "dogs", "valid", "e" * 64),
            DuplicateRow(2, "train/cats/2.jpg", "cats", "train", "f" * 64),
            DuplicateRow(2, "train/cats/3.jpg", "cats", "train", "f" * 64),
        ),
    )


def test_index_round_trip(tmp_path: Path) -> None:
    index = make_index()
    index.write(tmp_path)
    again = SimilarityIndex.read(tmp_path)
    assert again.sha256s == index.sha256s
    np.testing.assert_array_equal(again.embeddings, index.embeddings)
    assert again.duplicates == index.duplicates
    with np.load(tmp_path / EMBEDDINGS) as arrays:
        assert (arrays["sha256"].dtype, arrays["embedding"].dtype) == (np.dtype("S64"), np.float16)
    assert (tmp_path / DUPLICATES).read_text().splitlines()[0] == "group,photo,label,split,sha256"


def test_nearest_rows_have_the_smallest_angles() -> None:
    nearest = make_index().nearest(0, 2)
    assert [row for row, _ in nearest] == [1, 2]
    assert [similarity for _, similarity in nearest] == pytest.approx([np.cos(0.1), np.cos(1.0)], abs=2e-3)
    assert [row for row, _ in make_index().nearest(3, 99)] == [2, 1, 0]
    assert SimilarityIndex(("a",), np.ones((1, 1), np.float16)).nearest(0, 5) == []


def test_duplicates_are_found_by_sha256_and_by_name() -> None:
    index = make_index()
    assert index.duplicates_of("a" * 64) == index.duplicates_of("valid/dogs/1, or so.jpg") == index.duplicates[:2]
    assert index.duplicates_of("f" * 64) == index.duplicates[2:]
    assert index.duplicates_of("b" * 64) == ()


def test_missing_files_give_an_empty_index(tmp_path: Path) -> None:
    empty = SimilarityIndex.read(tmp_path)
    assert (empty.sha256s, empty.duplicates, empty.nearest(3, 5), empty.duplicates_of("x")) == ((), (), [], ())


@pytest.mark.parametrize(
    "arrays",
    [
        {"sha256": np.array([b"a"])},
        {"sha256": np.array([b"a"]), "embedding": np.ones((2, 3), np.float16)},
        {"sha256": np.array([b"a"]), "embedding": np.ones(1, np.float16)},
        {"sha256": np.array([b"a"]), "embedding": np.full((1, 3), np.nan, np.float16)},
        {"sha256": np.array([1]), "embedding": np.ones((1, 3), np.float16)},
        {"sha256": np.array([b"a"]), "embedding": np.array([[{}]])},
        b"no archive",
        b"PK\x03\x04 half of one",
        b"",
    ],
)
def test_malformed_embeddings_are_rejected(tmp_path: Path, arrays: dict[str, object] | bytes) -> None:
    if isinstance(arrays, bytes):
        (tmp_path / EMBEDDINGS).write_bytes(arrays)
    else:
        np.savez(tmp_path / EMBEDDINGS, **arrays)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=r"embeddings\.npz cannot be read as image embeddings"):
        SimilarityIndex.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "row 1: expected the columns"),
        ("group,photo,label\n", "row 1: expected the columns"),
        ("group,photo,label,split,sha256\n1,a,b,c\n", "row 2: expected a group number"),
        ("group,photo,label,split,sha256\n1,a,b,c,d\none,a,b,c,d\n", "row 3: expected a group number"),
        ('group,photo,label,split,sha256\n1,"a', "cannot be read"),
    ],
)
def test_malformed_duplicates_are_rejected(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / DUPLICATES).write_text(text)
    with pytest.raises(BundleError, match=message):
        SimilarityIndex.read(tmp_path)


def test_reduced_embeddings_preserve_neighbors() -> None:
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(3, 500))
    embeddings = centers[np.arange(90) % 3] + 0.3 * rng.normal(size=(90, 500))
    reduced = reduce_dimensions(embeddings)
    assert (reduced.shape, reduced.dtype) == ((90, 64), np.float16)
    np.testing.assert_allclose(np.linalg.norm(reduced.astype(np.float64), axis=1), 1, atol=2e-3)
    index = SimilarityIndex(tuple(map(str, range(90))), reduced)
    for row in range(90):
        assert {other % 3 for other, _ in index.nearest(row, 20)} == {row % 3}


@pytest.mark.parametrize(
    ("shape", "expected"), [((5, 3), (5, 3)), ((1, 500), (1, 1)), ((2, 500), (2, 2)), ((70, 64), (70, 64)), ((1, 1), (1, 1))]
)
def test_reducing_few_or_short_embeddings(shape: tuple[int, int], expected: tuple[int, int]) -> None:
    assert reduce_dimensions(np.random.default_rng(0).normal(size=shape)).shape == expected
    constant = reduce_dimensions(np.ones(shape))
    assert constant.shape == expected
    assert np.isfinite(constant).all()
