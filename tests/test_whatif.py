from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import sklearn.base

import simfluence as sf
from simfluence.errors import InvalidInput


@pytest.fixture(scope="module")
def linear(runs):
    return sf.LinearSimulator(l2=1.0).fit(runs[:4])


def test_both_sides_are_simulated(linear, runs, task):
    forecast = sf.what_if(linear, runs[5], [sf.Remove("label == 1"), sf.Repeat([0], 3)], task=task)
    edited = sf.Repeat([0], 3).apply(sf.Remove("label == 1").apply(runs[5].curriculum, task.train))
    assert forecast.curriculum == edited
    base, changed = linear.simulate([runs[5].curriculum, edited], runs[5].initial_losses)
    assert np.array_equal(forecast.base, base)
    assert np.array_equal(forecast.what_if, changed)
    assert np.allclose(forecast.change, changed[-1] - base[-1])
    assert str(forecast).startswith("What if we remove examples where label == 1 and show examples 0 (1) 3 times")


def test_frame_is_tidy(linear, runs, task):
    forecast = sf.what_if(linear, runs[5], sf.Remove([0, 1]), task=task)
    frame = forecast.frame
    assert list(frame.columns) == ["step", "test", "base", "what_if", "delta"]
    assert len(frame) == 11 * 5
    row = frame[(frame["step"] == 7) & (frame["test"] == 3)].iloc[0]
    assert row["base"] == forecast.base[7, 3]
    assert row["what_if"] == forecast.what_if[7, 3]
    assert row["delta"] == forecast.what_if[7, 3] - forecast.base[7, 3]


def test_a_run_carries_its_metadata(linear, store):
    run = store.load()[0]
    assert sf.what_if(linear, run, sf.Remove("group == 'a'")).curriculum.counts.toarray()[:, ::3].sum() == 0


def test_verify_retrains(linear, runs, task, recipe):
    forecast = sf.what_if(linear, runs[5], sf.Remove(runs[5].curriculum[0]), task=task)
    verified = forecast.verify(recipe)
    truth = sf.record(task, recipe, [forecast.curriculum])[0].losses
    assert np.array_equal(verified.actual, truth)
    assert np.allclose(verified.actual_change, truth[-1] - runs[5].losses[-1])
    assert verified.delta_correlation == pytest.approx(np.corrcoef(forecast.change, verified.actual_change)[0, 1])
    assert verified.final_mse == pytest.approx(np.mean((forecast.what_if[-1] - truth[-1]) ** 2))
    assert list(verified.frame.columns)[5:] == ["actual_base", "actual", "actual_delta"]
    row = verified.frame.iloc[-1]
    assert row["actual_delta"] == pytest.approx(row["actual"] - row["actual_base"])
    assert row["actual"] == truth[-1, -1]
    assert np.array_equal(forecast.verify().actual, truth)  # the base run knows its recipe


def test_an_edit_that_changes_nothing_is_confirmed(linear, runs, task):
    unseen = [i for i in range(12) if i not in runs[5].curriculum.indices][:1]
    verified = sf.what_if(linear, runs[5], sf.Remove(unseen), task=task).verify()
    assert (verified.forecast.change == 0).all()
    assert (verified.actual_change == 0).all()
    assert np.isnan(verified.delta_correlation)


def test_bad_questions(linear, runs, task, known):
    with pytest.raises(InvalidInput, match="edits must be"):
        sf.what_if(linear, runs[5], [])
    with pytest.raises(InvalidInput, match="fitted on 12"):
        sf.what_if(linear, known.runs[0], sf.Remove([0]))
    digits = sf.tasks.digits(n_train=12, n_test=5)
    with pytest.raises(InvalidInput, match="another task than 'digits'"):
        sf.what_if(linear, runs[5], sf.Remove([0]), task=digits)
    forecast = sf.what_if(linear, runs[5], sf.Remove([0]))
    with pytest.raises(InvalidInput, match="give task="):
        forecast.verify()
    with pytest.raises(InvalidInput, match="another task than 'digits'"):
        forecast.verify(task=digits)
    with pytest.raises(InvalidInput, match="trained by another recipe"):
        forecast.verify(sf.Recipe(lr=9.0), task=task)
    bare = sf.Runs.from_arrays(runs.curricula, runs.losses)[0]
    with pytest.raises(InvalidInput, match="give recipe="):
        sf.what_if(linear, bare, sf.Remove([0])).verify(task=task)


LEFT_OUT = [
    sf.AdditiveSimulator(l2=0.5),
    sf.MultiplicativeSimulator(l2=0.5),
    sf.LinearSimulator(l2=0.5, prior="zero"),
    sf.LinearSimulator(l2=0.5, around="mean"),
    sf.LinearSimulator(l2=0.5, around="mean", order=3, varying=True),
    sf.LinearSimulator(l2=0.5, order=2, varying=True, guard=True),
    sf.MeanTrajectorySimulator(),
    sf.BoostedSimulator(rounds=5),
]


@pytest.mark.parametrize("simulator", LEFT_OUT, ids=str)
def test_leaving_each_example_out_is_removing_them_one_at_a_time(runs, task, simulator):
    """Repeated examples, batches that shrink to nothing, and examples that the base never saw."""
    fitted = sklearn.base.clone(simulator).fit(runs)
    odd = sf.Curriculum([[0, 1, 2], [], [5], [5, 5, 7], [3, 3, 4, 8], [5], [0, 1], [5, 5]], n_train=12)
    for run in (runs[0], dataclasses.replace(runs[0], curriculum=odd, losses=runs[0].losses[:9])):
        changes = sf.leave_one_out(fitted, run)
        assert changes.shape == (5, 12)
        for index in range(12):
            expected = np.zeros(5)
            if index in run.curriculum.indices:
                expected = sf.what_if(fitted, run, sf.Remove([index]), task=task).change
            assert np.allclose(changes[:, index], expected, rtol=1e-9, atol=1e-12)
