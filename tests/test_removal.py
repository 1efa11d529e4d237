from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

import simfluence as sf
from simfluence.errors import InvalidInput


@pytest.fixture(scope="module")
def additive(runs):
    return sf.AdditiveSimulator(l2=0.3).fit(runs)


@pytest.fixture(scope="module")
def linear(runs):
    return sf.LinearSimulator(l2=0.5).fit(runs)


def loss_without(simulator, run, removed, tests):
    edited = sf.Remove(list(removed)).apply(run.curriculum) if len(removed) else run.curriculum
    return simulator.simulate([edited], run.initial_losses)[0, -1, tests].mean()


def by_brute_force(simulator, run, tests, size):
    """The loss without each set of so many examples that the run shows."""
    shown = np.unique(run.curriculum.indices)
    return {some: loss_without(simulator, run, some, tests) for some in combinations(shown.tolist(), size)}


def test_forecasts_of_removals(linear, runs):
    one = sf.forecast_removal(linear, runs[0], "group == 'a'", fill="resample", seed=3)
    assert one.curriculum == sf.Remove("group == 'a'", "resample", 3).apply(runs[0].curriculum, runs[0].train)
    many = sf.forecast_removal(linear, runs[:2], {"a": "group == 'a'", "0": [0]})
    assert np.allclose(many.change[0, 1], sf.what_if(linear, runs[1], sf.Remove("group == 'a'")).change)


@pytest.mark.filterwarnings("ignore::simfluence.errors.RunawayWarning")  # additive effects have no floor
@pytest.mark.parametrize("test", [2, [0, 3]])
@pytest.mark.parametrize("run", [0, 3])
def test_the_smallest_removal_is_proved(additive, runs, test, run):
    """Against every subset. Batches shrink, so the effects of removals do not simply add up."""
    base, tests = runs[run], np.atleast_1d(test)
    losses = [by_brute_force(additive, base, tests, size) for size in range(4)]
    most = [max(each.values()) for each in losses]
    for size in (1, 2, 3):
        past = (most[size - 1] + most[size]) / 2
        if most[size] <= most[size - 1] + 1e-6:
            continue
        found = sf.smallest_removal(additive, base, test, past, exact=True)
        assert found.exact
        assert found.reached
        assert len(found.examples) == size
        truth = loss_without(additive, base, found.examples, tests)
        assert truth >= past - 1e-6
        path = [loss_without(additive, base, found.examples[:count], tests) for count in range(size + 1)]
        assert found.losses == pytest.approx(path, rel=1e-6)
        assert found.losses[[0, -1]] == pytest.approx([losses[0][()], truth], rel=1e-6)
        greedy = sf.smallest_removal(additive, base, test, past)
        assert not greedy.exact
        assert len(greedy.examples) >= size


@pytest.mark.filterwarnings("ignore::simfluence.errors.RunawayWarning")  # additive effects have no floor
@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_best_removal_is_proved(additive, runs, k):
    every = {some: loss for size in range(k + 1) for some, loss in by_brute_force(additive, runs[0], [1], size).items()}
    best = min(every.values())
    found = sf.best_removal(additive, runs[0], 1, k, exact=True)
    assert found.losses[-1] == pytest.approx(best, rel=1e-6)
    assert loss_without(additive, runs[0], found.examples, [1]) == pytest.approx(best, rel=1e-6)
    assert found.reached == (best < every[()])
    greedy = sf.best_removal(additive, runs[0], 1, k)
    assert greedy.losses[-1] >= best - 1e-9


@pytest.mark.parametrize("name", ["additive", "linear"])
def test_greedy_takes_the_best_step_each_time(name, request, runs):
    simulator = request.getfixturevalue(name)
    found = sf.best_removal(simulator, runs[1], [0, 2], k=3)
    removed = []
    for index, loss in zip(found.examples, found.losses[1:], strict=True):
        others = [i for i in np.unique(runs[1].curriculum.indices) if i not in removed]
        each = {i: loss_without(simulator, runs[1], [*removed, i], [0, 2]) for i in others}
        assert index == min(each, key=each.get)
        assert loss == pytest.approx(each[index])
        removed.append(index)
    assert found.change == pytest.approx(found.losses[-1] - found.losses[0])
    assert found.edit == sf.Remove(rows=found.examples)
    assert "not proved best" in str(found)


def test_where_it_does_not_get_there(additive, runs):
    for exact in (False, True):
        far = sf.smallest_removal(additive, runs[0], 0, past=1e6, exact=exact)
        assert not far.reached
        assert "goal not reached" in str(far)
        few = sf.smallest_removal(additive, runs[0], 0, past=1e6, most=1, exact=exact)
        assert len(few.examples) <= 1
        there = sf.smallest_removal(additive, runs[0], 0, past=-1e6, exact=exact)
        assert there.reached
        assert len(there.examples) == 0
        with pytest.raises(InvalidInput, match="nothing to remove"):
            _ = there.edit


def test_bad_questions(additive, linear, runs):
    with pytest.raises(InvalidInput, match="exact=True is for AdditiveSimulator"):
        sf.smallest_removal(linear, runs[0], 0, 1.0, exact=True)
    with pytest.raises(InvalidInput, match="not around the mean"):
        sf.best_removal(sf.AdditiveSimulator(around="mean").fit(runs), runs[0], 0, 1, exact=True)
    with pytest.raises(InvalidInput, match="no example 9"):
        sf.best_removal(additive, runs[0], 9, 1)
    for k in (0, 1.5, np.nan, True, "2"):
        with pytest.raises(InvalidInput, match=r"k must be (at least 1|a whole number), got"):
            sf.best_removal(additive, runs[0], 0, k)
    for past in (np.nan, np.inf, "much"):
        with pytest.raises(InvalidInput, match="past must be a number, got"):
            sf.smallest_removal(additive, runs[0], 0, past)
