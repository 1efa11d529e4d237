from __future__ import annotations

import numpy as np
import pytest

import simfluence as sf
from simfluence.errors import InvalidInput
from simfluence.simulators.featurized import FeaturizedSimulator


def some(examples, chosen):
    ids = [examples.ids[index] for index in chosen]
    return sf.Examples(ids, None, examples.features[chosen], examples.targets[chosen])


def test_equals_the_dense_solution(runs):
    """The regression of all test examples, written out: rows (batch's h) ⊗ h_z, a and a' not penalised."""
    fitted = FeaturizedSimulator(l2=0.5, components=1).fit(runs)
    losses, mean = runs.losses.astype(np.float64), runs.losses.astype(np.float64).mean(0)
    weights = np.array([[np.bincount(batch, minlength=12) for batch in run.curriculum] for run in runs])
    h = (weights - weights.mean((0, 1))) @ fitted.train_h_  # [runs, steps, h]
    X, y = [], []
    for run in range(6):
        for t in range(10):
            for z in range(5):
                pair = np.outer(h[run, t], fitted.test_h_[z]).ravel()
                before, deviation = losses[run, t, z], losses[run, t, z] - mean[t, z]
                X.append(np.concatenate([before * pair, pair, t / 10 * before * pair, t / 10 * pair,
                                         [deviation, t / 10 * deviation]]))  # fmt: skip
                y.append(losses[run, t + 1, z] - mean[t + 1, z] - deviation)
    X, penalty = np.array(X), np.full(len(X[0]), 0.5)
    penalty[-2:] = 0
    solution = np.linalg.solve(X.T @ X + np.diag(penalty), X.T @ np.array(y))
    assert np.linalg.norm(fitted.W_.ravel() - solution[:-2]) <= 1e-3 * np.linalg.norm(solution[:-2])
    assert np.allclose(fitted.lasting_, solution[-2:], atol=1e-3)


def test_h_is_the_products_of_targets_and_components(runs):
    fitted = FeaturizedSimulator(components=2).fit(runs)
    features = runs.train.features.astype(float) - runs.train.features.astype(float).mean(0)
    components = fitted.train_h_.reshape(12, 3, 3)[:, 0, 1:]
    assert np.allclose((components**2).sum(1).mean(), 1)
    assert np.allclose(components.T @ components, np.diag((components**2).sum(0)), atol=1e-9)
    ratio = np.linalg.norm(features @ np.linalg.svd(features)[2][:2].T, axis=1) / np.linalg.norm(components, axis=1)
    assert np.allclose(ratio, ratio[0])
    label = runs.train.targets
    assert np.allclose(fitted.train_h_.reshape(12, 3, 3)[:, 1 + label.max(), 0], label == label.max())


def test_the_same_examples_in_another_order(runs):
    """Known examples under other places: the effects go with the example."""
    fitted = FeaturizedSimulator().fit(runs)
    order = np.random.default_rng(0).permutation(12)
    moved = fitted.for_examples(train=some(runs.train, order))
    place = np.argsort(order)
    curricula = [sf.Curriculum([place[batch] for batch in run.curriculum], n_train=12) for run in runs]
    expected = fitted.simulate(runs.curricula, runs.initial_losses)
    assert np.allclose(moved.simulate(curricula, runs.initial_losses), expected, atol=1e-10)
    assert fitted.n_train_ == 12  # the original is as it was
    few = fitted.for_examples(train=some(runs.train, order[:4]), test=some(runs.test, [1]))
    assert few.simulate([sf.Curriculum([[0, 3], [1, 2]], n_train=4)], np.ones(1)).shape == (1, 3, 1)


def test_examples_of_no_run_are_simulated():
    """20 test digits and 15 training digits that no fitting run has, against the mean of the other trajectories."""
    task, recipe = sf.tasks.digits(n_train=150, n_test=60), sf.Recipe(lr=0.1)
    drawn = sf.random_curricula(n_train=135, runs=10, steps=60, batch_size=8, subset=0.5, seed=5)
    curricula = [sf.Curriculum(curriculum.tolist(), n_train=150) for curriculum in drawn]
    unseen = sf.random_curricula(n_train=150, runs=4, steps=60, batch_size=8, subset=0.5, seed=6)
    runs = sf.record(task, recipe, [*curricula, *unseen])
    known, new = np.arange(40), np.arange(40, 60)
    fit = sf.Runs.from_arrays(curricula, runs[:10].losses[:, :, known], train=task.train, test=some(task.test, known))
    fitted = FeaturizedSimulator(components=3).fit(fit).for_examples(test=some(task.test, new))
    true = runs[10:].losses[:, :, new].astype(np.float64)
    simulated = fitted.simulate(unseen, true[:, 0])
    others = fit.losses.astype(np.float64).mean((0, 2))[:, None]  # [steps + 1, 1]
    skill = 1 - ((simulated - true)[:, 1:] ** 2).sum() / ((others - true)[:, 1:] ** 2).sum()
    assert skill > 0.3
    predicted = 1 - ((fitted.mean_ - true)[:, 1:] ** 2).sum() / ((others - true)[:, 1:] ** 2).sum()
    assert skill > predicted + 0.1  # the effects of the curriculum, not only a better mean


def test_bad_input(runs, known):
    with pytest.raises(InvalidInput, match="train examples of these runs have no features"):
        FeaturizedSimulator().fit(known.runs)
    fitted = FeaturizedSimulator().fit(runs)
    with pytest.raises(InvalidInput, match="test features have 2 columns, not 3"):
        fitted.for_examples(test=runs.test.with_features(runs.test.features[:, :2]))
    with pytest.raises(InvalidInput, match="target 7 is none of the classes"):
        fitted.for_examples(test=runs.test.with_features(runs.test.features, [0, 1, 7, 0, 1]))
    with pytest.raises(InvalidInput, match="have no features or targets"):
        fitted.for_examples(train=sf.Examples.numbered(3))
    for name, value in (("l2", 0.0), ("components", -1)):
        with pytest.raises(InvalidInput, match=f"{name} must be"):
            FeaturizedSimulator(**{name: value}).fit(runs)
