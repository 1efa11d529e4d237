"""Removals of many groups take little memory, trees are LightGBM's to the bit, and damaged trials are refused."""

from __future__ import annotations

import sqlite3
import tracemalloc

import lightgbm
import numpy as np
import pytest

import simfluence as sf
from simfluence.errors import InvalidInput, StoreError
from simfluence.evaluation import metrics, search
from simfluence.simulators.markov import dynamics
from simfluence.simulators.trees import Trees


@pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")
@pytest.mark.parametrize("kind", [sf.AdditiveSimulator, sf.LinearSimulator])
def test_leaving_out_each_of_many_examples_takes_little_memory(kind):
    """Booleans for 5,000 removals of 5,000 examples would be 25 MB, and 8 bytes for each 200 MB."""
    rng = np.random.default_rng(0)
    curricula = sf.random_curricula(n_train=5_000, runs=1, steps=20, batch_size=8, seed=0)
    runs = sf.Runs.from_arrays(curricula, 5 + rng.normal(size=(1, 21, 4)), n_train=5_000)
    fitted = kind(l2=10.0).fit(runs)
    tracemalloc.start()
    changes = np.asarray(sf.leave_one_out(fitted, runs[0]))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert changes.shape == (4, 5_000)
    assert peak < 15e6
    example = int(curricula[0].indices[0])
    edited = sf.Remove(rows=[example]).apply(curricula[0])
    expected = fitted.changes(curricula[0], [edited], runs[0].initial_losses)[0]
    assert np.allclose(changes[:, example], expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "simulator", [sf.LinearSimulator(l2=5.0, order=2), sf.MeanTrajectorySimulator(), sf.PersistenceSimulator()]
)
def test_groups_are_lists_of_rows_or_booleans(simulator, runs, monkeypatch):
    fitted, run = simulator.fit(runs), runs[0]
    groups = [[0, 3], [], [5], [1, 2, 4, 4]]
    mask = np.array([np.isin(np.arange(12), group) for group in groups])
    changes = fitted.changes_without(run.curriculum, groups, run.initial_losses)
    assert np.array_equal(fitted.changes_without(run.curriculum, mask, run.initial_losses), changes)
    monkeypatch.setattr(dynamics, "_BLOCK_SLOTS", 1)  # a block for each group
    blocks = fitted.changes_without(run.curriculum, groups, run.initial_losses)
    assert np.allclose(blocks, changes, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "groups", [[0, 1], [["a"]], [[0.5]], [[99]], [[-1]], [[[0], [1, 2]]], None, "label == 0", [None]]
)
def test_groups_that_are_none(groups, runs):
    fitted = sf.LinearSimulator(l2=5.0).fit(runs)
    with pytest.raises(InvalidInput):
        fitted.changes_without(runs[0].curriculum, groups, runs[0].initial_losses)


@pytest.mark.parametrize(("leaves", "rounds"), [(2, 3), (31, 20), (300, 3)])
def test_trees_predict_what_lightgbm_does_to_the_bit(leaves, rounds):
    rng = np.random.default_rng(leaves)
    X = rng.normal(size=(3000, 5))
    y = X[:, 0] * X[:, 1] + np.sin(3 * X[:, 2])
    booster = lightgbm.train(
        {"num_leaves": leaves, "min_data_in_leaf": 2, "verbose": -1, "num_threads": 1}, lightgbm.Dataset(X, y), rounds
    )
    other = np.concatenate([rng.normal(size=(500, 5)), X[:500]])
    trees = Trees.from_lightgbm(booster.model_to_string())
    assert trees.leaves.max() == leaves
    for count in (0, 1, 7, 1000):
        expected = booster.predict(other[:count], num_threads=1) if count else np.zeros(count)
        assert np.array_equal(trees.predict(other[:count]), expected)


def test_a_tree_of_one_leaf():
    X = np.zeros((50, 2))
    booster = lightgbm.train({"verbose": -1, "num_threads": 1}, lightgbm.Dataset(X, np.arange(50.0)), 3)
    trees = Trees.from_lightgbm(booster.model_to_string())
    assert np.array_equal(trees.predict(X), booster.predict(X, num_threads=1))


SOUND = {
    "leaves": [3], "features": [0, 1], "thresholds": [0.5, 0.5], "children": [[1, -1], [-2, -3]],
    "values": [1.0, 2.0, 3.0],
}  # fmt: skip


@pytest.mark.parametrize(
    "changed",
    [
        {"children": [[0, -1], [-2, -3]]},  # a loop
        {"children": [[1, -1], [-2, -2]]},  # a leaf twice
        {"children": [[1, -1], [-2, -4]]},  # no such leaf
        {"children": [[2, -1], [-2, -3]]},  # no such split
        {"leaves": [2, 1]},
        {"leaves": [2**62, 2**62]},
        {"leaves": [-1]},
        {"features": [0, -1]},
        {"thresholds": [0.5]},
        {"values": [1.0, 2.0]},
        {"values": [1, 2, 3]},
    ],
)
def test_arrays_that_are_no_trees(changed):
    assert Trees(**{name: np.array(values) for name, values in SOUND.items()}).predict(np.zeros((1, 2))) == 2.0
    with pytest.raises(ValueError, match=r"tree|leaves"):
        Trees(**{name: np.array(values) for name, values in (SOUND | changed).items()})


@pytest.mark.parametrize(
    "damage",
    [
        "DELETE FROM trial_user_attributes WHERE key = 'parameters'",
        "UPDATE trial_user_attributes SET value_json = 'x'",
        "UPDATE trial_user_attributes SET value_json = '[]'",
        "UPDATE trial_params SET distribution_json = '{}'",
        "UPDATE trials SET state = 'x'",
        "UPDATE trial_values SET value = 'x'",
    ],
)
def test_damaged_trials_are_refused_by_name(damage, runs, tmp_path):
    path = tmp_path / "trials.db"
    search("additive", runs, trials=2, folds=2, storage=path)
    with sqlite3.connect(path) as database:
        database.execute(damage)
    with pytest.raises(StoreError, match=r"trials\.db"):
        search("additive", runs, trials=3, folds=2, storage=path)


def test_wrong_calls_are_refused_by_name(runs, task):
    losses = np.random.default_rng(0).normal(size=(5, 3))
    for wrong in ({"confidence": -1}, {"confidence": 1.0}, {"bootstrap": 0}, {"bootstrap": 10**9}, {"seed": -1}):
        with pytest.raises(InvalidInput, match=f"correlation_over_runs: {next(iter(wrong))} must be"):
            metrics.correlation_over_runs(losses, losses, **wrong)
    for wrong in (None, runs[0], [1], "x", 3):
        with pytest.raises(InvalidInput, match=r"fit: runs(\[0\])? must be a (Runs or a sequence of )?Run"):
            sf.LinearSimulator().fit(wrong)
    fitted = sf.LinearSimulator(l2=5.0).fit(runs)
    for wrong in (None, runs[0].curriculum, [[0]], "x"):
        with pytest.raises(InvalidInput, match="simulate: curricula"):
            fitted.simulate(wrong, runs.initial_losses)
    with pytest.raises(InvalidInput, match="initial losses must be finite"):
        fitted.simulate(runs.curricula, runs.initial_losses * np.nan)


def test_brittleness_of_chosen_tests(runs, task):
    """One test example has no standard error, in every shape of k; test examples are chosen as everywhere."""
    scores = np.random.default_rng(0).normal(size=(5, 12))
    for k, test in ((1, [0]), ((1,), [0]), ((1, 2), ["0"]), ((2, 1), [0, 1])):
        table = sf.brittleness(scores, task, runs[0], k, test=test)
        assert table.index.tolist() == ([k] if isinstance(k, int) else list(k))
        assert table["rise_se"].isna().all() == (len(test) == 1)
        assert (table["test_examples"] == len(test)).all()
    for wrong in ({"k": ()}, {"k": 0}, {"k": 1.5}, {"k": 99}, {"test": [99]}, {"test": []}, {"seed": -1}):
        with pytest.raises(InvalidInput):
            sf.brittleness(scores, task, runs[0], **wrong)
