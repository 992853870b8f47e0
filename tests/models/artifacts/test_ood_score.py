from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from models.artifacts import ood_score
from models.artifacts.ood_score import OODParameters
from models.errors import BundleError


def parameters(dimensions: int = 6) -> OODParameters:
    rng = np.random.default_rng(0)
    components = np.linalg.qr(rng.normal(size=(dimensions, 2)))[0].T
    means = rng.normal(0, 0.1, (3, dimensions))
    return OODParameters(
        center=np.full(dimensions, 0.1, np.float32),
        directions=np.concatenate([components, means]).astype(np.float32),
        variances=np.array([0.04, 0.01], np.float32),
        other_variance=np.array(0.005, np.float32),
    )


def test_score_of_a_class_mean_is_zero_and_grows_with_the_distance() -> None:
    score = parameters()
    direction = np.array([1.0, 0, 0, 0, 0, 0])
    center = np.full(6, 0.1)
    exact = OODParameters(score.center, np.concatenate([score.directions[:2], [direction - center]]).astype(np.float32),
                          score.variances, score.other_variance)  # fmt: skip
    turned = np.stack([np.cos([0, 0.1, 0.2, 0.4]), np.sin([0, 0.1, 0.2, 0.4]), *np.zeros((4, 4))], axis=1)
    scores = exact.scores(turned)
    assert scores[0] == pytest.approx(0, abs=1e-3)
    assert (np.diff(scores) > 0).all()


def test_a_written_file_gives_the_same_scores(tmp_path: Path) -> None:
    score, embeddings = parameters(), np.random.default_rng(1).normal(size=(9, 6))
    score.write(tmp_path / "ood.npz")
    read = OODParameters.read(tmp_path / "ood.npz")
    np.testing.assert_array_equal(read.scores(embeddings), score.scores(embeddings))
    assert (read.num_components, read.num_bytes) == (2, 4 * (6 + 5 * 6 + 2 + 1))


def test_chunks_do_not_change_the_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings = np.random.default_rng(1).normal(size=(10, 6))
    expected = parameters().scores(embeddings)
    monkeypatch.setattr(ood_score, "CHUNK_ROWS", 3)
    np.testing.assert_allclose(parameters().scores(embeddings), expected, rtol=1e-6)


def test_an_embedding_of_zeros_has_a_finite_score() -> None:
    assert np.isfinite(parameters().scores(np.zeros((1, 6)))).all()


def test_a_malformed_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "ood.npz"
    path.write_bytes(b"not an archive")
    with pytest.raises(BundleError, match=r"ood\.npz cannot be read as an OOD score \(.*\)\. Export the bundle again\."):
        OODParameters.read(path)
    arrays = {"center": np.zeros(4), "directions": np.zeros((3, 5)), "variances": np.ones(2), "other_variance": np.ones(())}
    np.savez(path, **arrays)
    with pytest.raises(BundleError, match=r"directions of shape \(3, 5\) for 2 variances and 4 dimensions"):
        OODParameters.read(path)
