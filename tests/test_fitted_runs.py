"""A simulator knows the runs that it was fitted on, and no evaluation judges it by them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest

import simfluence as sf
from simfluence.errors import InvalidInput, NotFittedError
from simfluence.evaluation import skill_over_steps
from simfluence.evaluation.learning_curves import learning_curve
from simfluence.simulators.folds import fold_of, refitted_forecasts

pytestmark = pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")


@pytest.fixture(scope="module")
def parts(known):
    """Fitting and held-out runs of one split, and the held-out runs of another one."""
    runs = known.runs
    fit, held = runs.split(held_out=4, seed=0)
    return fit, held, runs.split(held_out=4, seed=1)[1]


def test_files_carry_the_ids_of_the_fitting_runs(parts, tmp_path):
    fit, held, _ = parts
    sf.LinearSimulator().fit(fit).save(tmp_path / "linear.safetensors")
    loaded = sf.Simulator.load(tmp_path / "linear.safetensors")
    assert loaded.fitted_ids_ == sorted(fit.ids)
    assert all(loaded.was_fitted_on(run) is True for run in fit)
    assert all(loaded.was_fitted_on(run) is False for run in held)
    with pytest.raises(NotFittedError):
        sf.LinearSimulator().was_fitted_on(fit[0])


def test_of_older_files_nothing_is_known(parts, tmp_path):
    fit, held, _ = parts
    old = sf.LinearSimulator().fit(fit)
    expected = sf.evaluate({"linear": old}, held, fit)
    del old.fitted_ids_
    old.save(tmp_path / "old.safetensors")
    loaded = sf.Simulator.load(tmp_path / "old.safetensors")
    assert loaded.was_fitted_on(fit[0]) is None
    assert sf.evaluate({"linear": loaded}, held, fit).equals(expected)


@pytest.mark.parametrize("judge", [sf.evaluate, skill_over_steps])
def test_fitting_runs_are_left_out_of_an_evaluation(parts, judge):
    """The table is that of the runs that are left, for all simulators, also for those that saw none of the runs."""
    fit, _, other = parts
    fresh = sf.Runs(run for run in other if run.id not in fit.ids)
    baseline = sf.Runs(run for run in fit if run.id not in other.ids)
    assert 0 < len(fresh) < len(other)
    simulators = {"linear": sf.LinearSimulator().fit(fit), "mean": sf.MeanTrajectorySimulator().fit(baseline)}
    with pytest.warns(UserWarning, match=f"{len(other) - len(fresh)} of the 4 held-out runs .* 'linear' was fitted on"):
        table = judge(simulators, other, baseline)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert table.equals(judge(simulators, fresh, baseline))


def test_no_run_is_left(parts):
    fit, held, _ = parts
    fitted = sf.LinearSimulator().fit(fit)
    with pytest.raises(InvalidInput, match="so no run is left to evaluate on"):
        sf.evaluate({"linear": fitted}, fit[:2], held)
    with pytest.raises(InvalidInput, match="so no run is left"):
        fitted.score(fit)


def test_score_leaves_them_out_too(parts):
    fit, held, _ = parts
    fitted = sf.LinearSimulator().fit(fit)
    with pytest.warns(UserWarning, match="1 of the 5 held-out runs"):
        score = fitted.score([*held, fit[0]])
    assert score == fitted.score(held)


def test_wrappers_carry_the_runs_of_their_parts(parts, tmp_path):
    fit, held, _ = parts
    inner = sf.LinearSimulator().fit(held)  # only its parameters are used
    conformal = sf.ConformalSimulator(inner, members=2).fit(fit)
    conformal.save(tmp_path / "conformal.safetensors")
    assert sf.Simulator.load(tmp_path / "conformal.safetensors").fitted_ids_ == sorted(fit.ids)

    scores = sf.attribution.TracInIdeal().fit(held[:1])
    scores.fitted_ids_ = held.ids[:1]
    attributed = sf.AttributedSimulator(scores).fit(fit)
    attributed.save(tmp_path / "attributed.safetensors")
    assert sf.Simulator.load(tmp_path / "attributed.safetensors").fitted_ids_ == sorted({*fit.ids, held[0].id})
    with pytest.raises(
        InvalidInput, match=f"run {held[0].id} is held out, but a part of 'attributed' was fitted on it"
    ):
        learning_curve(sf.AttributedSimulator(scores), sf.Runs([*fit, *held]), held_out=4, seed=0)


class Stacked(sf.Simulator):
    """A wrapper of one's own around a fitted simulator."""

    name = "stacked"
    is_wrapper = True

    def __init__(self, inner: sf.Simulator | None = None) -> None:
        self.inner = inner

    def _fit(self, runs):
        self.offset_ = runs.losses[:, -1].mean()

    def _simulate(self, curricula, initial):
        return self.inner.simulate(curricula, initial)


def test_a_wrapper_of_ones_own_carries_them_without_a_word(parts):
    fit, _, _ = parts
    assert Stacked(sf.LinearSimulator().fit(fit[:2])).fit(fit[2:4]).fitted_ids_ == sorted(fit.ids[:4])


def test_copies_of_a_run_are_calibrated_on_together(parts):
    """The residuals of cross-validation are of runs that the fold did not fit, also where a run is given twice."""
    fit, _, _ = parts
    doubled = sf.Runs([*fit[:4], *fit[:4]])
    mean = sf.MeanTrajectorySimulator()
    once, twice = (refitted_forecasts(mean, runs, fold_of(runs, 4, seed=0)) for runs in (fit[:4], doubled))
    assert np.allclose(twice[:4], once)
    assert np.array_equal(twice[:4], twice[4:])
    with pytest.raises(InvalidInput, match="3 runs cannot be split into 4 folds"):
        sf.ConformalSimulator(members=2).fit(sf.Runs([*fit[:3], *fit[:3]]))
