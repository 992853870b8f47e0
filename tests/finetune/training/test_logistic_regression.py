"""The numbers of logistic regression: the minimum, the selection of the penalty, and the folds."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression as Reference

from finetune.training import logistic_regression
from finetune.training.logistic_regression import (
    DEFAULT_PENALTY,
    FOLDS,
    PENALTIES,
    fit_logistic_regression,
    select_penalty,
    split_folds,
)
from finetune.training.scaled_embeddings import ScaledEmbeddings, scale_embeddings


def noisy(
    count: int, *, classes: int = 3, dimensions: int = 12, spread: float = 1.0, seed: int = 0
) -> tuple[ScaledEmbeddings, np.ndarray]:
    """Unit vectors around one center per class, far from the origin, and their labels."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % classes
    centers = 3 + np.random.default_rng(7).normal(size=(classes, dimensions))
    return scale_embeddings(centers[labels] + spread * rng.normal(size=(count, dimensions)), "unit")[0], labels


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("penalty", [0.01, 1.0])
def test_the_coefficients_are_those_of_scikit_learn(classes: int, penalty: float) -> None:
    embeddings, labels = noisy(60, classes=classes)
    weights = np.where(labels == 0, 2.0, 0.5)
    ours = fit_logistic_regression(embeddings, labels, num_classes=classes, penalty=penalty, weights=weights)
    # scikit-learn's model of two classes has one vector, the difference of ours, which halves its penalty
    c = 2 / penalty if classes == 2 else 1 / penalty
    reference = Reference(C=c, tol=1e-10, max_iter=100_000).fit(embeddings.dense(), labels, sample_weight=weights)
    np.testing.assert_allclose(np.exp(ours.log_probs(embeddings)), reference.predict_proba(embeddings.dense()), atol=1e-5)
    np.testing.assert_allclose(ours.weight.sum(axis=0), 0, atol=1e-5)


def test_another_start_has_the_same_minimum() -> None:
    embeddings, labels = noisy(60)
    start = fit_logistic_regression(embeddings, labels, num_classes=3, penalty=10.0)
    warm, cold = (
        fit_logistic_regression(embeddings, labels, num_classes=3, penalty=0.01, start=first) for first in (start, None)
    )
    np.testing.assert_allclose(warm.log_probs(embeddings), cold.log_probs(embeddings), atol=1e-4)


def test_a_weight_of_two_counts_as_two_images() -> None:
    embeddings, labels = noisy(30)
    twice = np.concatenate([np.arange(30), np.flatnonzero(labels == 1)])
    weighted = fit_logistic_regression(embeddings, labels, num_classes=3, penalty=0.1, weights=np.where(labels == 1, 2.0, 1.0))
    repeated = fit_logistic_regression(embeddings[twice], labels[twice], num_classes=3, penalty=0.1)
    np.testing.assert_allclose(weighted.log_probs(embeddings), repeated.log_probs(embeddings), atol=1e-5)


def test_a_class_without_images_is_never_predicted() -> None:
    embeddings, labels = noisy(30, classes=2)
    fit = fit_logistic_regression(embeddings, labels, num_classes=3, penalty=0.1)
    assert np.isfinite(fit.weight).all()
    assert fit.log_probs(embeddings)[:, 2].max() < -10


def test_noise_needs_a_stronger_penalty() -> None:
    clear, noise = noisy(120, spread=0.3), noisy(120, spread=6.0)
    groups = np.arange(120)
    weak, strong = (select_penalty(*data, groups, num_classes=3, seed=0) for data in (clear, noise))
    assert weak.penalty < strong.penalty
    assert len(strong.losses) < len(PENALTIES)  # the selection ended early


def test_the_strongest_penalty_within_one_standard_error_of_the_lowest_loss_is_selected() -> None:
    embeddings, labels = noisy(240, spread=2.0)
    groups = np.arange(240)
    selection = select_penalty(embeddings, labels, groups, num_classes=3, seed=0)
    best = min(selection.losses, key=selection.losses.__getitem__)
    losses = np.zeros(240)
    for train, held_out in split_folds(labels, groups, folds=FOLDS, seed=0):
        fit = fit_logistic_regression(embeddings[train], labels[train], num_classes=3, penalty=best)
        losses[held_out] = -fit.log_probs(embeddings[held_out])[np.arange(len(held_out)), labels[held_out]]
    limit = losses.mean() + losses.std() / np.sqrt(240)
    assert selection.losses[best] == pytest.approx(losses.mean(), abs=1e-4)
    assert selection.penalty > best
    assert next(penalty for penalty, loss in selection.losses.items() if loss <= limit) == selection.penalty


def test_the_selected_loss_is_that_of_new_images() -> None:
    embeddings, labels = noisy(300, spread=2.0)
    selection = select_penalty(embeddings, labels, np.arange(300), num_classes=3, seed=0)
    fit = fit_logistic_regression(embeddings, labels, num_classes=3, penalty=selection.penalty)
    new, new_labels = noisy(3000, spread=2.0, seed=1)
    loss = -fit.log_probs(new)[np.arange(3000), new_labels].mean()
    assert selection.losses[selection.penalty] == pytest.approx(loss, rel=0.2)


def test_copies_of_an_image_do_not_make_the_penalty_weaker() -> None:
    embeddings, labels = noisy(60, spread=4.0)
    four_times = np.repeat(np.arange(60), 4)
    copied, copied_labels = embeddings[four_times], labels[four_times]
    linked = select_penalty(copied, copied_labels, four_times, num_classes=3, seed=0)
    unlinked = select_penalty(copied, copied_labels, np.arange(240), num_classes=3, seed=0)
    assert linked.penalty > unlinked.penalty


def test_many_images_are_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    embeddings, labels = noisy(90)
    monkeypatch.setattr(logistic_regression, "MAX_IMAGES", 60)
    sampled = select_penalty(embeddings, labels, np.arange(90), num_classes=3, seed=0)
    kept = np.sort(np.random.default_rng(0).choice(90, 60, replace=False))
    assert sampled == select_penalty(embeddings[kept], labels[kept], kept, num_classes=3, seed=0)


@pytest.mark.parametrize(
    ("labels", "groups", "folds"),
    [
        ([0, 1] * 10, range(20), 5),
        ([0, 0, 0, 0, 1, 1, 1], range(7), 3),
        ([0, 1, 1, 1], range(4), 0),  # one image of a class cannot be both in training and held out
        ([0, 1] * 4, [0] * 8, 0),
        ([2, 2, 2, 2], range(4), 4),
    ],
)
def test_the_number_of_folds_follows_the_smallest_class(labels: list[int], groups: range, folds: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        splits = list(split_folds(np.array(labels), np.array(groups), folds=5, seed=0))
    assert len(splits) == folds
    if folds:
        assert sorted(np.concatenate([held_out for _, held_out in splits])) == list(range(len(labels)))
    else:
        selection = select_penalty(
            ScaledEmbeddings(np.eye(len(labels))), np.array(labels), np.array(groups), num_classes=3, seed=0
        )
        assert (selection.penalty, selection.losses) == (DEFAULT_PENALTY, {})
