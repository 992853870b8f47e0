from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from finetune.data.embeddings import reduce_dimensions
from models.artifacts.similarity import DUPLICATES, EMBEDDINGS, DuplicateRow, SimilarityIndex
from models.errors import BundleError


def some_lookalikes() -> SimilarityIndex:
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


def test_both_files_bring_everything_back(tmp_path: Path) -> None:
    wanted = some_lookalikes()
    wanted.write(tmp_path)
    again = SimilarityIndex.read(tmp_path)
    assert again.sha256s == wanted.sha256s
    np.testing.assert_array_equal(again.embeddings, wanted.embeddings)
    assert again.duplicates == wanted.duplicates
    with np.load(tmp_path / EMBEDDINGS) as arrays:
        assert (arrays["sha256"].dtype, arrays["embedding"].dtype) == (np.dtype("S64"), np.float16)
    assert (tmp_path / DUPLICATES).read_text().splitlines()[0] == "group,photo,label,split,sha256"


def test_the_nearest_are_those_at_the_smallest_angle() -> None:
    near = some_lookalikes().nearest(0, 2)
    assert [row for row, _ in near] == [1, 2]
    assert [similarity for _, similarity in near] == pytest.approx([np.cos(0.1), np.cos(1.0)], abs=2e-3)
    assert [row for row, _ in some_lookalikes().nearest(3, 99)] == [2, 1, 0]
    assert SimilarityIndex(("a",), np.ones((1, 1), np.float16)).nearest(0, 5) == []


def test_a_group_is_found_by_sha256_and_by_name() -> None:
    lookalikes = some_lookalikes()
    assert (
        lookalikes.duplicates_of("a" * 64) == lookalikes.duplicates_of("valid/dogs/1, or so.jpg") == lookalikes.duplicates[:2]
    )
    assert lookalikes.duplicates_of("f" * 64) == lookalikes.duplicates[2:]
    assert lookalikes.duplicates_of("b" * 64) == ()


def test_where_there_are_no_files_nothing_looks_alike(tmp_path: Path) -> None:
    nothing = SimilarityIndex.read(tmp_path)
    assert (nothing.sha256s, nothing.duplicates, nothing.nearest(3, 5), nothing.duplicates_of("x")) == ((), (), [], ())


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
def test_malformed_embeddings_are_refused(tmp_path: Path, arrays: dict[str, object] | bytes) -> None:
    if isinstance(arrays, bytes):
        (tmp_path / EMBEDDINGS).write_bytes(arrays)
    else:
        np.savez(tmp_path / EMBEDDINGS, **arrays)  # type: ignore[arg-type]
    with pytest.raises(BundleError, match=r"embeddings\.npz cannot be read as embeddings of photos"):
        SimilarityIndex.read(tmp_path)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "row 1 has the columns"),
        ("group,photo,label\n", "row 1 has the columns"),
        ("group,photo,label,split,sha256\n1,a,b,c\n", "row 2 is"),
        ("group,photo,label,split,sha256\n1,a,b,c,d\none,a,b,c,d\n", "row 3 is"),
        ('group,photo,label,split,sha256\n1,"a', "cannot be read"),
    ],
)
def test_a_malformed_table_of_duplicates_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / DUPLICATES).write_text(text)
    with pytest.raises(BundleError, match=said):
        SimilarityIndex.read(tmp_path)


def test_shrunk_embeddings_keep_who_is_near_whom() -> None:
    rng = np.random.default_rng(0)
    centres = rng.normal(size=(3, 500))
    whole = centres[np.arange(90) % 3] + 0.3 * rng.normal(size=(90, 500))
    small = reduce_dimensions(whole)
    assert (small.shape, small.dtype) == ((90, 64), np.float16)
    np.testing.assert_allclose(np.linalg.norm(small.astype(np.float64), axis=1), 1, atol=2e-3)
    lookalikes = SimilarityIndex(tuple(map(str, range(90))), small)
    for row in range(90):
        assert {other % 3 for other, _ in lookalikes.nearest(row, 20)} == {row % 3}


@pytest.mark.parametrize(
    ("given", "wanted"), [((5, 3), (5, 3)), ((1, 500), (1, 1)), ((2, 500), (2, 2)), ((70, 64), (70, 64)), ((1, 1), (1, 1))]
)
def test_few_photos_and_few_numbers(given: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert reduce_dimensions(np.random.default_rng(0).normal(size=given)).shape == wanted
    same = reduce_dimensions(np.ones(given))
    assert same.shape == wanted
    assert np.isfinite(same).all()
