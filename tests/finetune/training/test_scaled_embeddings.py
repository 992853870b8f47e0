"""Scaled embeddings: their values, a few rows at a time, and the memory of a fit."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from finetune.training import scaled_embeddings
from finetune.training.logistic_regression import fit_logistic_regression
from finetune.training.scaled_embeddings import ScaledEmbeddings, compact, mean_embedding, scale_embeddings

EMBEDDINGS = (5 + np.random.default_rng(0).normal(size=(50, 6)) * np.arange(6)).astype(np.float32)


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_embeddings, "CHUNK_BYTES", 8 * 6 * 8)  # eight rows
    monkeypatch.setattr(scaled_embeddings, "MAX_DENSE_BYTES", 0)


def test_every_normalization_divides_by_its_scale(small_chunks: None) -> None:
    exact = EMBEDDINGS.astype(np.float64)
    lengths = np.linalg.norm(exact, axis=1, keepdims=True)
    np.testing.assert_allclose(scale_embeddings(EMBEDDINGS, "unit")[0].dense(), exact / lengths)
    scaled, divisor = scale_embeddings(EMBEDDINGS, "none")
    np.testing.assert_allclose(scaled.dense(), exact / divisor)
    assert np.mean((scaled.dense() ** 2).sum(axis=1)) == pytest.approx(1)
    scaled, divisor = scale_embeddings(EMBEDDINGS, "standard")
    np.testing.assert_allclose(scaled.dense(), exact / divisor)
    np.testing.assert_allclose(scaled.dense()[:, 1:].std(axis=0), 1 / np.sqrt(6))
    assert np.isfinite(scaled.dense()).all()  # the first dimension does not vary


def test_chunks_are_all_rows_in_order(small_chunks: None) -> None:
    scaled = scale_embeddings(EMBEDDINGS, "unit")[0]
    some = scaled[np.array([40, 3, 3, 17, *range(20)])][np.arange(1, 24)]
    for embeddings in (scaled, some):
        positions, chunks = zip(*embeddings.chunks(), strict=True)
        assert max(map(len, chunks)) == 8
        assert [row for chunk in positions for row in range(chunk.start, chunk.stop)] == list(range(len(embeddings)))
        np.testing.assert_array_equal(np.concatenate(chunks), embeddings.dense())
    np.testing.assert_array_equal(some.dense()[:2], scaled.dense()[[3, 3]])
    np.testing.assert_allclose(mean_embedding(some), some.dense().mean(axis=0))


@pytest.mark.parametrize("normalization", ["unit", "standard", "none"])
def test_a_fit_in_chunks_is_that_of_all_rows(normalization: str, small_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    labels, weights = np.arange(50) % 3, np.linspace(0.5, 2, 50)
    scaled = scale_embeddings(EMBEDDINGS, normalization)[0]
    chunked = fit_logistic_regression(scaled, labels, num_classes=3, penalty=0.01, weights=weights)
    monkeypatch.setattr(scaled_embeddings, "CHUNK_BYTES", 1 << 20)
    dense = fit_logistic_regression(ScaledEmbeddings(scaled.dense()), labels, num_classes=3, penalty=0.01, weights=weights)
    np.testing.assert_allclose(chunked.log_probs(scaled), dense.log_probs(scaled), atol=1e-5)


def test_compact_embeddings_have_the_same_products() -> None:
    wide = ScaledEmbeddings(np.random.default_rng(0).normal(size=(8, 40)))
    narrow = compact(wide)
    assert narrow.dimensions == 8
    np.testing.assert_allclose(narrow.dense() @ narrow.dense().T, wide.dense() @ wide.dense().T, atol=1e-9)
    assert compact(ScaledEmbeddings(EMBEDDINGS)).dimensions == 6


def test_the_memory_of_a_fit_does_not_grow_with_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaled_embeddings, "CHUNK_BYTES", 1 << 18)
    monkeypatch.setattr(scaled_embeddings, "MAX_DENSE_BYTES", 1 << 20)
    labels = np.arange(10_000) % 2
    embeddings = np.random.default_rng(0).normal(labels[:, None], 3, size=(10_000, 256)).astype(np.float32)  # 10 MB
    tracemalloc.start()
    try:
        scaled, _ = scale_embeddings(embeddings, "unit")
        fit = fit_logistic_regression(scaled[np.arange(9_000)], labels[:9_000], num_classes=2, penalty=1.0, tolerance=1e-5)
        log_probs = fit.log_probs(scaled)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 << 20
    assert (log_probs.argmax(axis=1) == labels).mean() > 0.9
