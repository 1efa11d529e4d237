from __future__ import annotations

import numpy as np
import pytest

import simfluence as sf
from simfluence.errors import InvalidInput
from simfluence.recording.engines.base import Training


@pytest.fixture(scope="module")
def digits():
    return sf.tasks.digits(n_train=30, n_test=8)


@pytest.fixture(scope="module")
def some():
    return sf.random_curricula(n_train=30, runs=4, steps=11, batch_size=4, seed=0)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_every_k_steps(digits, some, engine, tmp_path):
    full = sf.record(digits, sf.Recipe(), some, engine=engine)
    sparse = sf.record(digits, sf.Recipe(), some, tmp_path, engine=engine, observe=sf.Observe(every=4))
    for run in (*sparse, *sf.RunStore(tmp_path).load()):
        expected = next(other for other in full if other.curriculum == run.curriculum)
        assert run.times.tolist() == [0, 4, 8, 11]
        assert np.array_equal(run.losses[run.times], expected.losses[run.times])
        assert np.isnan(np.delete(run.losses, run.times, axis=0)).all()
        assert not run.diverged


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_measures(digits, some, engine, tmp_path):
    observe = sf.Observe(measures=["correct", "margin"], every=5)
    runs = sf.record(digits, sf.Recipe(), some, tmp_path, engine=engine, observe=observe)
    plain = sf.record(digits, sf.Recipe(), some, engine=engine, observe=sf.Observe(every=5))
    assert np.array_equal(runs.losses, plain.losses, equal_nan=True)
    for run in (*runs, *sf.RunStore(tmp_path).load()):
        correct, margin = run.measures["correct"][run.times], run.measures["margin"][run.times]
        assert np.array_equal(correct, margin > 0)
        assert set(np.unique(correct)) == {0, 1}
        bound = np.log1p(np.exp(-margin.astype(float)))  # the loss is at least that of two classes
        assert (run.losses[run.times] >= bound - 1e-4).all()


def test_a_selected_measure_feeds_simulators_and_evaluation(digits, some, tmp_path):
    runs = sf.record(digits, sf.Recipe(), some, tmp_path, observe=sf.Observe(measures=["margin"]))
    margins = sf.RunStore(tmp_path).load().select("margin")
    assert np.array_equal(margins.losses, np.stack([run.measures["margin"] for run in sf.RunStore(tmp_path).load()]))
    fit, held = margins.split(held_out=1)
    table = sf.evaluate({"linear": sf.LinearSimulator(l2=10).fit(fit)}, held, fit)
    assert np.isfinite(table.loc["linear", "mse"])
    assert np.array_equal(runs.select("margin").select("loss").losses, runs.losses)
    assert np.array_equal(runs.select("loss").losses, runs.losses)
    with pytest.raises(InvalidInput, match="no measure 'margins', did you mean 'margin'"):
        runs.select("margins")


def test_a_selected_measure_of_a_diverged_run_is_still_diverged(digits, some):
    runs = sf.record(digits, sf.Recipe(lr=1e38, momentum=0.9), some, observe=sf.Observe(measures=["correct"]))
    assert np.isfinite(runs.select("correct").losses).all()
    assert all(run.diverged for run in runs.select("correct"))


def test_asking_later_for_more_keeps_what_was_there(digits, some, tmp_path):
    store = sf.RunStore(tmp_path)
    sf.record(digits, sf.Recipe(), some, store, observe=sf.Observe(every=4, measures=["margin"]))
    sf.record(digits, sf.Recipe(), some, store, observe=sf.Observe(every=3, measures=["correct"], checkpoints=[2]))
    full = sf.record(digits, sf.Recipe(), some)
    for run in store.load():
        assert run.times.tolist() == [0, 3, 4, 6, 8, 9, 11]
        assert set(run.measures) == {"margin", "correct"}
        assert np.isfinite(run.measures["margin"][run.times]).all()
        assert list(run.checkpoints) == [2]
        expected = next(other for other in full if other.curriculum == run.curriculum)
        assert np.array_equal(run.losses[run.times], expected.losses[run.times])


def test_asking_later_for_less_trains_nothing(digits, some, tmp_path, monkeypatch):
    sf.record(digits, sf.Recipe(), some, tmp_path, observe=sf.Observe(measures=["margin"]))
    monkeypatch.setattr(Training, "advance", lambda self: pytest.fail("trained again"))
    runs = sf.record(digits, sf.Recipe(), some, tmp_path, observe=sf.Observe(every=5))
    assert len(runs) == 4


def test_simulators_on_runs_with_gaps(digits, some):
    runs = sf.record(digits, sf.Recipe(), some, observe=sf.Observe(every=4))
    full = sf.record(digits, sf.Recipe(), some)
    mean = sf.MeanTrajectorySimulator().fit(runs).mean_
    assert np.allclose(mean[runs[0].times], full.losses.mean(0)[runs[0].times], rtol=1e-5)
    assert np.allclose(mean[2], (mean[0] + mean[4]) / 2)  # between readings, a straight line
    for simulator in (sf.LinearSimulator(), sf.MultiplicativeSimulator()):
        with pytest.raises(InvalidInput, match="losses at every step"):
            simulator.fit(runs)
    additive = sf.AdditiveSimulator(l2=0.1).fit(runs[1:])
    table = sf.evaluate({"additive": additive}, runs[:1], runs[1:])
    assert np.isfinite(table.loc["additive", "mse"])


def test_additive_effects_from_gaps_are_those_of_the_sums(known):
    rng = np.random.default_rng(0)
    effects = rng.normal(size=(8, 4))
    curricula = sf.random_curricula(8, 30, 40, 3, subset=0.75)
    losses = [np.cumsum([np.ones(4), *(effects[batch].sum(0) for batch in c)], axis=0) for c in curricula]
    recorded = sf.Observe(every=3).times(40)
    sparse = [np.where(recorded[:, None], run, np.nan) for run in losses]
    runs = sf.Runs(
        sf.Run(f"{i}", c, run, recorded=recorded) for i, (c, run) in enumerate(zip(curricula, sparse, strict=True))
    )
    assert np.abs(sf.AdditiveSimulator(l2=1e-8).fit(runs).B_ - effects).max() < 1e-5


def test_a_measure_must_be_one_number_per_example(digits, some):
    import dataclasses

    odd = dataclasses.replace(digits, measures={"logits": lambda outputs, targets: outputs})
    with pytest.raises(InvalidInput, match="logits of task 'digits' has shape"):
        sf.record(odd, sf.Recipe(), some, observe=sf.Observe(measures=["logits"]))
    with pytest.raises(InvalidInput, match="'loss' is the name of the loss itself"):
        dataclasses.replace(digits, measures={"loss": lambda outputs, targets: targets})


def test_frozen_and_checked():
    with pytest.raises(InvalidInput, match="every"):
        sf.Observe(every=0)
    with pytest.raises(Exception, match="frozen"):
        sf.Observe().every = 3
