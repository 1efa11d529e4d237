"""Surrogate learners against explicit training, and the boosted simulator built on them."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from torch import nn

import simfluence as sf
from simfluence.errors import InvalidInput
from simfluence.evaluation import metrics as ev
from simfluence.evaluation.tuning import search
from simfluence.simulators.surrogates import SPEEDS, Batches, Kernel, Sides, best_speed, surrogate_losses

RNG = np.random.default_rng(0)
X, Z = RNG.normal(size=(10, 4)), RNG.normal(size=(6, 4))
RAGGED = [
    sf.Curriculum([[0, 1], [], [2, 3, 3], [9]], n_train=10),
    sf.Curriculum([[4], [5, 6, 7, 8], [0, 0], [1, 2], [3], [9, 8]], n_train=10),
]
RATES = 0.3 * np.linspace(1, 0.5, 6)


def sides(targets, test_targets):
    train = sf.Examples.numbered(10, None, X, targets)
    return Sides.of(train, sf.Examples.numbered(6, None, Z, test_targets), "the test")


CLASSES = sides(RNG.integers(3, size=10), np.array([0, 1, 2, 2, 1, 0]))
NUMBERS = sides(RNG.normal(size=10), RNG.normal(size=6))


@pytest.mark.parametrize("examples", [CLASSES, NUMBERS], ids=["classes", "numbers"])
def test_a_linear_surrogate_is_gradient_descent_on_a_linear_model(examples):
    """Kernel x·x' + 0.1 is a linear layer on (x, √0.1) that starts at 0."""
    losses = surrogate_losses(Kernel("linear", examples), examples, Batches.of(RAGGED), RATES)
    train, test = (
        torch.tensor(np.column_stack([side, np.full(len(side), np.sqrt(0.1))]))
        for side in (examples.train, examples.test)
    )
    targets, test_targets = torch.tensor(examples.train_targets), torch.tensor(examples.test_targets)

    def loss(outputs, wanted):
        if examples.classes:
            return nn.functional.cross_entropy(outputs, wanted, reduction="none")
        return ((outputs - wanted) ** 2).mean(1)

    for run, curriculum in enumerate(RAGGED):
        weights = torch.zeros(train.shape[1], targets.shape[1], dtype=torch.float64, requires_grad=True)
        assert np.allclose(losses[run, 0], loss(test @ weights, test_targets).detach())
        for t, batch in enumerate(curriculum):
            if len(batch):
                chosen = torch.tensor(batch.astype(np.int64))
                (gradient,) = torch.autograd.grad(loss(train[chosen] @ weights, targets[chosen]).mean(), weights)
                with torch.no_grad():
                    weights -= RATES[t] * gradient
            expected = loss(test @ weights, test_targets).detach().numpy()
            assert np.allclose(losses[run, t + 1], expected, atol=1e-12)


def test_arccos_is_the_tangent_kernel_of_a_wide_network():
    """f = √(2/m) Σ_j v_j relu(u_j·(x, √0.1)), with u and v standard normal: gradients' inner products."""
    width, rng = 200_000, np.random.default_rng(1)
    points = np.column_stack([np.concatenate([CLASSES.train, CLASSES.test]), np.full(16, np.sqrt(0.1))])
    inside = points @ rng.normal(size=(5, width))
    v = rng.normal(size=width)
    hidden, active = np.maximum(inside, 0), inside > 0
    explicit = 2 / width * (hidden @ hidden.T + (points @ points.T) * ((active * v**2) @ active.T))
    found = Kernel("arccos", CLASSES).rows(np.arange(10))
    assert np.allclose(found, explicit[:10], atol=0.02 * explicit.max())


def test_rbf_has_the_median_distance_as_its_width():
    between = np.linalg.norm(CLASSES.train[:, None] - np.concatenate([CLASSES.train, CLASSES.test]), axis=2)
    width = np.median(between[:, :10][np.triu_indices(10, 1)])
    assert np.allclose(Kernel("rbf", CLASSES).rows(np.arange(10)), np.exp(-(between**2) / (2 * width**2)))


def test_a_kernel_too_large_to_keep_is_the_same(monkeypatch):
    kept = [Kernel(kind, CLASSES).rows(np.array([[3, 1], [0, 0]])) for kind in ("arccos", "linear", "rbf")]
    monkeypatch.setattr("simfluence.simulators.surrogates._CACHED_ENTRIES", 0)
    again = [Kernel(kind, CLASSES).rows(np.array([[3, 1], [0, 0]])) for kind in ("arccos", "linear", "rbf")]
    assert kept[0].shape == (2, 2, 16)
    assert np.allclose(kept, again, rtol=1e-13)


def test_the_speed_of_a_surrogate_is_found_again():
    kernel = Kernel("linear", NUMBERS)
    curricula = sf.random_curricula(n_train=10, runs=5, steps=30, batch_size=3, seed=0)
    rates = np.ones(30)
    losses = surrogate_losses(kernel, NUMBERS, Batches.of(curricula), SPEEDS[3] * rates)
    assert best_speed(kernel, NUMBERS, sf.Runs.from_arrays(curricula, losses), rates) == SPEEDS[3]


@pytest.fixture(scope="module")
def digits():
    """The first 100 steps and 30 test examples of recorded runs."""
    recorded = sf.RunStore("runs/digits").load()
    test = sf.Examples(recorded.test.ids[:30], None, recorded.test.features[:30], recorded.test.targets[:30])
    curricula = [sf.Curriculum(run.curriculum.tolist()[:100], n_train=300) for run in recorded]
    runs = sf.Runs.from_arrays(curricula, recorded.losses[:, :101, :30], train=recorded.train, test=test)
    fit, held = (runs.take(np.flatnonzero(np.isin(recorded.ids, part.ids))) for part in recorded.split(8, seed=0))
    return sf.BoostedSimulator(rounds=60).fit(fit[:4]), fit[:4], held[:4]


def test_four_runs_are_enough_to_beat_the_mean_by_a_lot(digits):
    boosted, fit, held = digits
    simulated = boosted.simulate(held.curricula, held.initial_losses)
    mean = sf.MeanTrajectorySimulator().fit(fit).simulate(held.curricula, held.initial_losses)
    true = held.losses.astype(np.float64)
    assert ev.skill(simulated, true, mean) > 0.88
    assert ev.final_skill(simulated, true, mean) > 0.80


def test_a_forecast_depends_on_the_past_of_the_curriculum_alone(digits):
    boosted, _, held = digits
    one = held[0].curriculum.tolist()
    other = one[:50] + [[0, 1, 2]] * 50
    first, second = boosted.simulate([sf.Curriculum(c, n_train=300) for c in (one, other)], held[0].losses[0])
    assert np.allclose(first[:51], second[:51], rtol=1e-12)
    assert not np.allclose(first[51:], second[51:])


def test_without_trees_it_is_a_ridge_regression(runs):
    """Written out for all rows: deviations of the losses on deviations of the surrogates'."""
    boosted = sf.BoostedSimulator(rounds=0).fit(runs)
    said = boosted._surrogates(runs.curricula)
    S = (said - said.mean(0))[:, 1:].reshape(-1, 9)
    y = (runs.losses - runs.losses.astype(float).mean(0))[:, 1:].ravel()
    w = np.linalg.solve(S.T @ S + 1e-3 * np.diag((S**2).sum(0)), S.T @ y)
    expected = runs.losses.astype(float).mean(0)[1:] + ((said - said.mean(0)) @ w)[:, 1:]
    assert np.allclose(boosted.simulate(runs.curricula, runs.initial_losses)[:, 1:], expected, atol=1e-6)


def test_losses_recorded_with_gaps(runs):
    gaps = np.arange(11) % 5 == 0
    sparse = sf.Runs(
        dataclasses.replace(run, losses=np.where(gaps[:, None], run.losses, np.nan), recorded=gaps) for run in runs
    )
    losses = sf.BoostedSimulator(rounds=5).fit(sparse).simulate(runs.curricula, runs.initial_losses)
    assert np.isfinite(losses).all()


def test_the_schedule_is_the_recipes(task, curricula):
    recipe = sf.Recipe(lr=0.3, schedule="linear", horizon=10)
    fitted = sf.BoostedSimulator(rounds=5).fit(sf.record(task, recipe, curricula))
    assert np.allclose(fitted.schedule_, np.linspace(1, 0.1, 10))


def test_bad_input(runs, known):
    with pytest.raises(InvalidInput, match="train examples of these runs have no features"):
        sf.BoostedSimulator().fit(known.runs)
    plain = sf.Examples(runs.test.ids, None, runs.test.features)
    with pytest.raises(InvalidInput, match="test examples of these runs have no targets"):
        sf.BoostedSimulator().fit(sf.Runs.from_arrays(runs.curricula, runs.losses, train=runs.train, test=plain))
    narrow = runs.test.with_features(runs.test.features[:, :2])
    with pytest.raises(InvalidInput, match="differ in width"):
        sf.BoostedSimulator().fit(runs.with_examples(test=narrow))
    with pytest.raises(InvalidInput, match="3 test examples for runs of 5"):
        runs.with_examples(test=sf.Examples.numbered(3))
    for name, value in (("rounds", -1), ("leaves", 1), ("min_rows", 0), ("seed", True), ("learning_rate", 0.0)):
        with pytest.raises(InvalidInput, match=f"{name} must be"):
            sf.BoostedSimulator(**{name: value}).fit(runs)


def test_the_order_of_runs_does_not_matter(runs):
    one, other = (sf.BoostedSimulator(rounds=5).fit(order) for order in (runs, runs[::-1]))
    args = runs.curricula, runs.initial_losses
    assert np.array_equal(one.simulate(*args), other.simulate(*args))


def test_only_the_start_was_read(runs):
    start = np.arange(11) == 0
    unread = sf.Runs(
        dataclasses.replace(run, losses=np.where(start[:, None], run.losses, np.nan), recorded=start) for run in runs
    )
    with pytest.raises(InvalidInput, match="none of these runs recorded a loss after time 0"):
        sf.BoostedSimulator().fit(unread)


def test_targets_of_two_kinds(runs):
    mixed = runs.test.with_features(runs.test.features, runs.test.targets + 0.5)
    with pytest.raises(InvalidInput, match="use integers in both for classes"):
        sf.BoostedSimulator().fit(runs.with_examples(test=mixed))


def test_other_features_are_another_search(runs, tmp_path):
    options = {"trials": 1, "folds": 2, "fixed": {"rounds": 0}, "storage": tmp_path / "memory.sqlite"}
    first = search("boosted", runs, **options)
    other = runs.with_examples(runs.train.with_features(runs.train.features[::-1]))
    again = search("boosted", other, **options)
    assert again.skill != first.skill
    assert again.skill == search("boosted", other, **{**options, "storage": None}).skill
