"""The OOD score and its limit on synthetic embeddings."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.stats import norm
from sklearn.covariance import ledoit_wolf
from sklearn.covariance import ledoit_wolf_shrinkage as reference_shrinkage

from finetune.metrics import ood_detection
from finetune.metrics.ood_detection import (
    OODLimit,
    StackedRows,
    assign_groups_to_folds,
    fit_limit,
    fit_ood,
    format_ood,
    ledoit_wolf_shrinkage,
    measure_ood,
    out_of_fold_scores,
    to_unit_length,
)
from models.artifacts.ood_score import OODParameters
from models.networks.onnx_export import OODScore

DIMENSIONS, CLASSES = 40, 3
Array = NDArray[np.float64]


def clusters(count: int, *, seed: int, classes: int = CLASSES, dimensions: int = DIMENSIONS) -> tuple[Array, NDArray[np.int64]]:
    """Draw embeddings around a center per class, with more variance in the first directions."""
    centers = np.random.default_rng(99).normal(0, 1, (classes, dimensions)) + 3
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    spread = np.linspace(0.5, 0.05, dimensions)
    return centers[labels] + rng.normal(0, 1, (count, dimensions)) * spread, labels


def strangers(count: int, *, seed: int, dimensions: int = DIMENSIONS) -> Array:
    """Draw embeddings around other centers."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 1, (count, dimensions)) + 3


def fitted(count: int = 600) -> OODParameters:
    parameters = fit_ood(*clusters(count, seed=0))
    assert parameters is not None
    return parameters


def test_score_is_the_mahalanobis_distance_to_the_nearest_mean() -> None:
    embeddings, labels = clusters(600, seed=0)
    unit = to_unit_length(embeddings).astype(np.float64)
    means = np.stack([unit[labels == k].mean(axis=0) for k in range(CLASSES)])
    covariance, _ = ledoit_wolf(unit - means[labels], assume_centered=True)
    others = to_unit_length(strangers(50, seed=1))
    differences = others[:, None] - means
    distances = np.einsum("ncd,de,nce->nc", differences, np.linalg.inv(covariance), differences).min(axis=1)
    np.testing.assert_allclose(fitted().scores(others), np.sqrt(distances / DIMENSIONS), rtol=1e-3)


@pytest.mark.parametrize("count", [2, 30, 500])
def test_the_shrinkage_is_that_of_scikit_learn(count: int) -> None:
    embeddings, _ = clusters(count, seed=3)
    differences = embeddings - embeddings.mean(axis=0)
    assert ledoit_wolf_shrinkage(differences) == pytest.approx(reference_shrinkage(differences, assume_centered=True), rel=1e-9)


def test_the_graph_computes_the_score_of_classes_without_variation_in_most_directions() -> None:
    """With 23 components of 84 dimensions, the other directions vary by nothing but rounding."""
    rng = np.random.default_rng(0)
    labels = np.arange(24) % 2
    embeddings = (rng.normal(0, 1, (2, 84)) + 1)[labels] + rng.normal(0, 0.005, (24, 84))
    parameters = fit_ood(embeddings, labels)
    assert parameters is not None
    embeddings[:, :8] += rng.normal(0, 0.01, (24, 8))
    scores = parameters.scores(embeddings)
    in_float32 = OODScore(parameters)(torch.from_numpy(embeddings).float()).numpy()
    assert np.abs(in_float32 - scores).max() <= 5e-4


def test_embeddings_that_vary_by_little_more_than_rounding_have_no_score() -> None:
    rng = np.random.default_rng(0)
    assert fit_ood(np.ones((50, 512)) + rng.normal(0, 1e-5, (50, 512)), np.arange(50) % 10) is None


def test_score_ignores_the_length_and_the_shape_of_an_embedding() -> None:
    embeddings, _ = clusters(20, seed=5)
    scores = fitted().scores(embeddings)
    np.testing.assert_allclose(fitted().scores(7.5 * embeddings), scores, rtol=1e-5)
    np.testing.assert_array_equal(fitted().scores(embeddings.reshape(20, 10, 2, 2)), scores)
    assert fitted().scores(embeddings[:0]).shape == (0,)


def test_few_components_still_separate_many_dimensions() -> None:
    embeddings, labels = clusters(400, seed=0, dimensions=500)
    parameters = fit_ood(embeddings, labels)
    assert parameters is not None
    assert parameters.directions.shape == (64 + CLASSES, 500)
    known = parameters.scores(clusters(300, seed=1, dimensions=500)[0])
    assert np.median(known) == pytest.approx(1, abs=0.3)
    assert parameters.scores(strangers(300, seed=2, dimensions=500)).min() > known.max()


def test_a_class_of_one_image_and_many_classes_are_supported() -> None:
    embeddings, labels = clusters(121, seed=0, classes=24)
    keep = (labels != 0) | (np.arange(121) == 0)
    parameters = fit_ood(embeddings[keep], labels[keep])
    assert parameters is not None
    assert len(parameters.coordinates) == 24
    single = parameters.scores(embeddings[:1])
    assert single < parameters.scores(strangers(100, seed=2)).min()


@pytest.mark.parametrize("count", [CLASSES, 2 * CLASSES])
def test_images_that_do_not_vary_within_their_class_give_no_score(count: int) -> None:
    embeddings, labels = clusters(CLASSES, seed=0)
    assert fit_ood(np.tile(embeddings, (count // CLASSES, 1)), np.tile(labels, count // CLASSES)) is None


def test_out_of_fold_scores_are_not_optimistic() -> None:
    """In few images of many dimensions the images that were fitted score far lower than new ones."""
    embeddings, labels = clusters(60, seed=0, dimensions=200)
    every = np.ones(60, np.bool_)
    folds = assign_groups_to_folds(np.arange(60))
    out_of_fold = out_of_fold_scores(embeddings, labels, folds, is_training=every)
    parameters = fit_ood(embeddings, labels)
    assert out_of_fold is not None
    assert parameters is not None
    new = np.median(parameters.scores(clusters(500, seed=7, dimensions=200)[0]))
    assert np.median(parameters.scores(embeddings)) < 0.8 * new
    assert np.median(out_of_fold) == pytest.approx(new, rel=0.15)


def test_duplicates_share_a_fold() -> None:
    groups = np.array([0, 1, 2, 0, 4, 5, 1, 7, 8, 9, 0])
    for seed in range(5):
        folds = assign_groups_to_folds(groups, seed=seed)
        assert len({folds[0], folds[3], folds[10]}) == 1
        assert folds[1] == folds[6]
        assert len(set(folds)) == 8  # eight different groups in ten folds


def test_validation_images_are_scored_but_not_fitted() -> None:
    embeddings, labels = clusters(90, seed=0)
    is_training = np.arange(90) < 60
    folds = assign_groups_to_folds(np.arange(90))
    scores = out_of_fold_scores(embeddings, labels, folds, is_training=is_training)
    changed = embeddings.copy()
    changed[60:] = strangers(30, seed=3)
    others = out_of_fold_scores(changed, labels, folds, is_training=is_training)
    assert scores is not None
    assert others is not None
    np.testing.assert_array_equal(scores[:60], others[:60])
    assert others[60:].min() > scores[60:].max()


def test_stacked_rows_are_those_of_all_arrays() -> None:
    arrays = [np.random.default_rng(n).normal(size=(n, 2, 3)).astype(np.float32) for n in (4, 1, 7)]
    stacked, rows = StackedRows(*arrays), np.array([11, 0, 4, 3, 5, 5])
    assert len(stacked) == 12
    assert stacked[rows].dtype == np.float32
    np.testing.assert_array_equal(stacked[rows], np.concatenate(arrays)[rows])


def test_the_memory_of_the_fits_does_not_grow_with_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ood_detection, "MAX_IMAGES", 500)
    embeddings, labels = clusters(20_000, seed=0, dimensions=128)
    rows = StackedRows(*np.split(embeddings.astype(np.float32), [15_000]))  # 10 MB
    folds = assign_groups_to_folds(np.arange(20_000))
    tracemalloc.start()
    try:
        scores = out_of_fold_scores(rows, labels, folds, is_training=np.arange(20_000) < 15_000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert scores is not None
    assert peak < 10 << 20


# The limit


def test_limit_is_an_order_statistic() -> None:
    scores = np.random.default_rng(0).permutation(np.arange(1.0, 1401.0))
    limit = fit_limit(scores, 0.01)
    assert limit.max_score == 1387  # 14 scores of 1,401, including that of the new image, may be higher
    assert limit.expected == pytest.approx(14 / 1401)
    assert limit.is_reached
    assert limit.text() == (
        "1.00% of new photos are expected to be false alarms, by the scores of 1,400 photos. 95% interval: 0.55% to 1.58% in "
        "the long run, 0.36% to 1.86% in a sample of 1,400."
    )
    assert OODLimit.from_dict({**limit.as_dict(), "source": "validation"}) == limit


def test_limit_of_few_images_guarantees_less() -> None:
    limit = fit_limit(np.arange(40.0), 0.01)
    assert limit.max_score == 39
    assert not limit.is_reached
    assert limit.text() == (
        "1.00% false alarms cannot be guaranteed with the scores of 40 photos. With the highest of them as the limit, 2.44% of "
        "new photos are expected to be false alarms. 95% interval: 0.06% to 8.81% in the long run, 0.00% to 12.50% in a sample "
        "of 40."
    )
    assert fit_limit(np.arange(99.0), 0.01).is_reached  # 1 of 100


@pytest.mark.parametrize(("count", "rate"), [(1400, 0.01), (200, 0.05), (30, 0.01)])
def test_interval_contains_the_rate_for_new_images(count: int, rate: float) -> None:
    rng = np.random.default_rng(1)
    limits = [fit_limit(rng.random(count), rate) for _ in range(2000)]
    rates = np.array([1 - limit.max_score for limit in limits])  # of uniform scores
    assert rates.mean() == pytest.approx(limits[0].expected, rel=0.05)
    covered = np.mean([limit.low <= 1 - limit.max_score <= limit.high for limit in limits])
    assert covered == pytest.approx(0.95, abs=0.02)
    sampled = rng.binomial(count, rates) / count
    assert np.mean([limit.sample_low <= rate <= limit.sample_high for limit, rate in zip(limits, sampled, strict=True)]) > 0.94


def test_interval_allows_for_groups() -> None:
    """Scores are uniform, and correlated within 60 groups of 10 images."""
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(60), 10)

    def scores() -> NDArray[np.float64]:
        common, own = rng.normal(size=60)[groups], rng.normal(size=600)
        return norm.cdf(np.sqrt(0.5) * common + np.sqrt(0.5) * own)

    def coverage(limits: list[OODLimit]) -> float:
        return float(np.mean([limit.low <= 1 - limit.max_score <= limit.high for limit in limits]))

    samples = [scores() for _ in range(500)]
    independent = [fit_limit(sample, 0.05) for sample in samples]
    grouped = [fit_limit(sample, 0.05, groups=groups) for sample in samples]
    assert [limit.max_score for limit in grouped] == [limit.max_score for limit in independent]
    assert coverage(independent) < 0.8
    assert coverage(grouped) > 0.9
    assert grouped[0].text().endswith(" The intervals allow for 60 groups of photos.")
    assert OODLimit.from_dict(grouped[0].as_dict()) == grouped[0]
    older = {name: value for name, value in independent[0].as_dict().items() if name != "groups"}
    assert OODLimit.from_dict(older) == independent[0]


def test_images_of_their_own_group_are_independent() -> None:
    scores = np.random.default_rng(0).random(200)
    alone, grouped = fit_limit(scores, 0.05), fit_limit(scores, 0.05, groups=np.arange(200))
    assert (grouped.low, grouped.high, grouped.sample_high) == (alone.low, alone.high, alone.sample_high)


# Measuring


def test_measurement_counts_both_kinds_of_images() -> None:
    measured = measure_ood(np.array([0.5, 1.0, 1.0, 2.5]), {"none": np.array([1.9, 2.0, 2.1, 3.0, 9.0])}, max_score=2.0)
    assert (measured["photos"], measured["neither_photos"]) == (4, 5)
    assert measured["false_alarms"]["value"] == 0.25
    assert measured["caught"]["value"] == 0.6
    assert measured["auroc"]["value"] == pytest.approx(17 / 20)
    assert format_ood(measured).splitlines() == [
        "false alarms       25.00% (4.6 to 69.9%), 1 of 4 photos of the classes count as unlike the training photos",
        "none of these      60.00% (23.1 to 88.2%), 3 of 5 photos of none of the classes are caught",
        f"none, ROC AUC      0.8500 ({measured['auroc']['low']:.4f} to {measured['auroc']['high']:.4f})",
    ]


def test_measured_false_alarms_allow_for_groups() -> None:
    scores, groups = np.repeat([0.5, 3.0, 0.5, 0.5, 0.5], 8), np.repeat(np.arange(5), 8)
    independent = measure_ood(scores, {}, max_score=2.0)["false_alarms"]
    grouped = measure_ood(scores, {}, max_score=2.0, groups=groups)["false_alarms"]
    assert grouped["value"] == independent["value"] == 0.2
    assert grouped["low"] < independent["low"] < independent["high"] < grouped["high"]


def test_measurement_without_other_images_has_the_false_alarms_only() -> None:
    measured = measure_ood(np.array([0.5, 1.0]), {}, max_score=2.0)
    assert (measured["caught"], measured["auroc"]) == (None, None)
    assert format_ood(measured).count("\n") == 0


def test_each_folder_of_other_images_is_measured_as_well_as_all_of_them() -> None:
    teapots, wolves = np.array([2.1, 3.0, 9.0]), np.array([1.9, 2.0])
    inside = np.array([0.5, 1.0, 1.0, 2.5])
    measured = measure_ood(inside, {"teapots": teapots, "empty": np.empty(0), "wolves": wolves}, max_score=2.0)
    assert list(measured["folders"]) == ["teapots", "wolves"]
    for name, scores in (("teapots", teapots), ("wolves", wolves)):
        alone = measure_ood(inside, {name: scores}, max_score=2.0)
        assert measured["folders"][name] == {key: alone[key] for key in ("neither_photos", "caught", "auroc")}
    assert measured["neither_photos"] == 5
    assert measured["caught"]["value"] == 0.6
    lines = format_ood(measured).splitlines()
    assert lines[3].startswith("  teapots: 100.00% (43.9 to 100.0%), 3 of 3 photos are caught, ROC AUC 0.9167 (")
    assert lines[4].startswith("  wolves: 0.00% (0.0 to 65.8%), 0 of 2 photos are caught, ROC AUC 0.7500 (")
