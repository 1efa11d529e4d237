"""Derivatives of final losses against finite differences of simulations in which a part of an example is removed."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.sparse
from torch import nn

import simfluence as sf
from simfluence.errors import BeyondReferenceWarning, InvalidInput
from simfluence.simulators.batches import batch_weights
from simfluence.simulators.tangent import adjoint, function_space
from simfluence.simulators.tangent import reference_weights as nearness

N_TRAIN, N_TEST, STEPS = 8, 3, 9
RECIPES = {
    "sgd": {},
    "momentum, decay": {"momentum": 0.8, "weight_decay": 0.05, "optimizer_args": {"dampening": 0.2}},
    "nesterov, schedule": {
        "momentum": 0.7, "optimizer_args": {"nesterov": True}, "schedule": "cosine", "horizon": 20, "warmup": 2,
    },
    "clipping": {"clip_norm": 0.3},
    "adam": {"optimizer": "adam", "lr": 0.02},
    "adamw": {"optimizer": "adamw", "lr": 0.02, "weight_decay": 0.1},
}  # fmt: skip


def small_task(model=lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))) -> sf.Task:
    rng = np.random.default_rng(3)
    X, y = rng.normal(size=(N_TRAIN + N_TEST, 4)), rng.integers(3, size=N_TRAIN + N_TEST)
    return sf.tasks.from_arrays(
        model, X[:N_TRAIN], y[:N_TRAIN], "cross_entropy", test=(X[N_TRAIN:], y[N_TRAIN:]), name="adjoint"
    )


def recorded(task: sf.Task, recipe: sf.Recipe, count: int) -> sf.Runs:
    """Record runs; the last is the base, with an empty batch, a batch of one and an example twice in a batch."""
    curricula = sf.random_curricula(N_TRAIN, count - 1, STEPS, batch_size=3, seed=1)
    base = sf.Curriculum([[0, 1, 2], [3, 4], [], [5], [1, 1, 3], [0, 4, 6], [2, 2], [6, 1], [3, 0, 5]], N_TRAIN)
    return sf.record(task, recipe, [*curricula, base])


def without_parts(removals: dict[int, tuple[int, float]]):
    """``batch_weights``, but a part of one example is removed from each curriculum whose id is in ``removals``."""

    def weights_without(curricula, longest, batch_size):
        weights, updates = batch_weights(curricula, longest, batch_size)
        dense = weights.toarray()
        for row, curriculum in enumerate(curricula):
            if id(curriculum) in removals:
                example, part = removals[id(curriculum)]
                without = batch_weights([sf.Remove([example]).apply(curriculum)], longest, batch_size)[0].toarray()
                steps = slice(row * longest, (row + 1) * longest)
                dense[steps] = (1 - part) * dense[steps] + part * without
        return scipy.sparse.csr_array(dense), updates

    return weights_without


def by_differences(fitted, run, monkeypatch, h=1e-4) -> np.ndarray:
    """Central differences, ``[test, train]``, from one simulation of all removals."""
    parts = [(example, part) for example in range(N_TRAIN) for part in (h, -h)]
    copies = [sf.Curriculum(run.curriculum.tolist(), N_TRAIN) for _ in parts]
    removals = {id(copy): part for copy, part in zip(copies, parts, strict=True)}
    for module in (function_space, nearness):
        monkeypatch.setattr(module, "batch_weights", without_parts(removals))
    final = fitted.simulate(copies, run.initial_losses)[:, -1]
    monkeypatch.undo()
    return ((final[::2] - final[1::2]) / (2 * h)).T


@pytest.mark.parametrize("name", RECIPES)
def test_derivatives_are_those_of_the_simulation(name, monkeypatch):
    """The base is not a reference."""
    task = small_task()
    runs = recorded(task, sf.Recipe(**{"lr": 0.2, "dtype": "float64", **RECIPES[name]}), 2)
    fitted = sf.TangentKernelSimulator(task, n_checkpoints=3, n_features=1).fit(runs[:1])
    fitted.scale_ = np.linspace(1.0, 0.7, STEPS + 1)
    fitted.correction_, fitted.centre_ = np.ones((2, STEPS + 1, N_TEST))
    derivatives = sf.leave_one_out(fitted, runs[1], "derivative")
    expected = by_differences(fitted, runs[1], monkeypatch)
    assert np.abs(expected).max() > 1e-2
    assert np.allclose(derivatives, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    assert (derivatives[:, 7] == 0).all()  # never shown


@pytest.mark.parametrize("base", [0, 3])
def test_several_references_whose_nearness_changes(base, monkeypatch):
    """The base is a reference, or it is not."""
    monkeypatch.setattr(  # in float64
        nearness, "_cumulative_weights", lambda *args: np.cumsum(nearness._weights(*args), axis=0)
    )
    task = small_task()
    runs = recorded(task, sf.Recipe(lr=0.2, dtype="float64"), 4)
    fitted = sf.TangentKernelSimulator(task, n_checkpoints=3, n_features=1, n_references=3).fit(runs[:3])
    derivatives = sf.leave_one_out(fitted, runs[base], "derivative")
    with pytest.MonkeyPatch.context() as patch:
        expected = by_differences(fitted, runs[base], patch)
    assert np.allclose(derivatives, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())
    if base == 3:
        changes = nearness.reference_weights_without(runs[3].curriculum, runs.curricula[:3])[1]
        assert np.abs(changes).max() > 1e-3  # otherwise the test would not cover them


@pytest.mark.filterwarnings("ignore::simfluence.errors.BeyondReferenceWarning")
def test_landmarks_no_head_longer_curricula_and_few_tests_at_once(monkeypatch):
    monkeypatch.setattr(adjoint, "_AT_ONCE", 2)  # of three test examples
    task = small_task(lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh()))
    runs = recorded(task, sf.Recipe(lr=0.2, momentum=0.5, dtype="float64"), 2)
    twice = sf.Curriculum(runs[1].curriculum.tolist() * 2, N_TRAIN)
    longer = dataclasses.replace(
        runs[1],
        curriculum=twice,
        losses=np.repeat(runs[1].losses, 2, axis=0)[1:],
        learning_rates=np.tile(runs[1].learning_rates, 2),
    )
    for landmarks in (None, 4):
        fitted = sf.TangentKernelSimulator(task, n_checkpoints=3, landmarks=landmarks).fit(runs[:1])
        with pytest.warns(BeyondReferenceWarning, match="18 steps, but no reference has more than 9"):
            derivatives = sf.leave_one_out(fitted, longer, "derivative")
        with pytest.MonkeyPatch.context() as patch:
            expected = by_differences(fitted, longer, patch)
        assert np.allclose(derivatives, expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max())


def test_a_model_that_is_all_head(monkeypatch):
    task = small_task(lambda: nn.Linear(4, 3))
    runs = recorded(task, sf.Recipe(lr=0.2, dtype="float64"), 2)
    fitted = sf.TangentKernelSimulator(task).fit(runs[:1])
    derivatives = sf.leave_one_out(fitted, runs[1], "derivative")
    assert np.allclose(derivatives, by_differences(fitted, runs[1], monkeypatch), rtol=1e-5, atol=1e-8)


def test_who_has_derivatives(task, runs):
    fitted = sf.TangentKernelSimulator(task, n_checkpoints=2).fit(runs[:1])
    expected = sf.leave_one_out(fitted, runs[1], "derivative")
    wrapped = sf.ConformalSimulator(sf.TangentKernelSimulator(task, n_checkpoints=2), members=2, folds=2).fit(runs[:3])
    assert sf.leave_one_out(wrapped, runs[1], "derivative").shape == expected.shape
    gains = sf.rank_suspects(fitted, runs[1], method="derivative")["gain"].sort_index()
    assert np.allclose(gains, -expected.values.mean(0))
    with pytest.raises(InvalidInput, match=r"'additive' has no derivatives: .* method='simulate'"):
        sf.leave_one_out(sf.AdditiveSimulator().fit(runs), runs[0], "derivative")
    with pytest.raises(InvalidInput, match="did you mean 'derivative'"):
        sf.leave_one_out(fitted, runs[0], "derivatives")
    alone = dataclasses.replace(runs[0], curriculum=sf.Curriculum([[3]] * 10, n_train=12))
    with pytest.raises(InvalidInput, match="would leave none"):
        sf.leave_one_out(fitted, alone, "derivative")
