"""The default simulator: weights of its members, intervals, and what it knows of its own errors."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.optimize
import sklearn.base

import simfluence as sf
from simfluence.errors import InvalidInput, RunawayWarning
from simfluence.queries.judgement import Judgement
from simfluence.simulators import Simulator
from simfluence.simulators.folds import fold_of, refitted_forecasts
from simfluence.simulators.intervals import UsualErrors, half_widths
from simfluence.simulators.stacking import stacking_weights
from simfluence.simulators.trust import Trust

MEMBERS = [sf.LinearSimulator(l2=1.0, around="mean"), sf.AdditiveSimulator(l2=0.1)]
pytestmark = pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")


class Wild(Simulator):
    """Forecasts that double at every step."""

    name = "wild"

    def _fit(self, runs):
        pass

    def _simulate(self, curricula, initial):
        return initial[:, None] * 2.0 ** np.arange(max(map(len, curricula)) + 1)[:, None]


class Broken(Simulator):
    """Cannot be fitted."""

    name = "broken"

    def _fit(self, runs):
        raise InvalidInput("these runs are no good: give others")

    def _simulate(self, curricula, initial):
        raise NotImplementedError


def made_runs(count=10, noise=0.0, seed=0):
    """Runs whose losses change by the sum of the effects of a batch."""
    rng = np.random.default_rng(seed)
    curricula = sf.random_curricula(n_train=12, runs=count, steps=20, batch_size=3, subset=0.5, seed=seed)
    effects = np.random.default_rng(1).normal(-0.03, 0.05, size=(12, 6))
    counts = np.stack([curriculum.counts.toarray() for curriculum in curricula])
    changes = np.cumsum(counts @ effects, axis=1)
    losses = 3 + np.concatenate([np.zeros((count, 1, 6)), changes], axis=1)
    losses[:, 1:] += noise * rng.normal(size=losses[:, 1:].shape)
    return sf.Runs.from_arrays(curricula, losses)


@pytest.fixture(scope="module")
def runs():
    return made_runs()


@pytest.fixture(scope="module")
def best(runs):
    return sf.BestSimulator(members=MEMBERS).fit(runs[:8])


def test_weights_are_those_of_non_negative_least_squares():
    rng = np.random.default_rng(0)
    deviations = rng.normal(size=(3, 4, 5, 6))  # [members, runs, times, test]
    actual = 0.7 * deviations[0] - 0.4 * deviations[1] + 0.1 * rng.normal(size=(4, 5, 6))
    weights = stacking_weights(deviations, actual, 1)
    expected = scipy.optimize.nnls(deviations.reshape(3, -1).T, actual.ravel())[0]
    assert np.allclose(weights, np.tile(expected, (5, 1)), atol=2e-3)
    assert np.array_equal(weights[:, 1], np.zeros(5))  # it forecasts the wrong way round


def test_weights_change_in_straight_lines_along_training():
    deviations = np.random.default_rng(0).normal(size=(2, 4, 9, 6))
    expected = np.stack([np.linspace(0.2, 1.0, 9), np.linspace(0.9, 0.1, 9)], axis=1)  # [times, members]
    actual = np.einsum("tm,mrtz->rtz", expected, deviations)
    assert np.allclose(stacking_weights(deviations, actual, 2), expected, atol=3e-3)
    actual[1, 3:] = np.nan  # not recorded
    assert np.allclose(stacking_weights(deviations, actual, 3), expected, atol=3e-3)


def test_it_is_the_mean_and_the_weighted_deviations_of_its_members(best, runs):
    simulated = best.simulate(runs.curricula, runs.initial_losses)
    parts = [sklearn.base.clone(member).fit(runs[:8]) for member in MEMBERS]
    mean = runs[:8].losses.mean(axis=0)
    expected = mean + sum(
        best.weights_[:, k, None] * (part.simulate(runs.curricula, runs.initial_losses) - mean)
        for k, part in enumerate(parts)
    )
    assert np.allclose(simulated[:, 1:], expected[:, 1:])
    assert sf.evaluate({"best": best}, runs[8:], runs[:8]).loc["best", "skill"] > 0.7


def test_what_is_of_no_use_has_no_weight(runs):
    noise = made_runs()
    shuffled = sf.Runs.from_arrays(
        noise.curricula, np.random.default_rng(0).normal(3, 1, size=noise.losses.shape)
    )  # losses that have nothing to do with the curricula
    fitted = sf.BestSimulator(members=[*MEMBERS, Wild(), Broken()]).fit(shuffled)
    mean = shuffled.losses.mean(axis=0)
    simulated = fitted.simulate(shuffled.curricula, shuffled.initial_losses)
    assert ((simulated - mean)[:, 1:] ** 2).mean() < 0.1 * shuffled.losses.var()
    assert "these runs are no good" in fitted.left_out_["broken"]
    assert "adds nothing" in fitted.left_out_["wild"]


def test_changes_without_examples_are_those_of_simulated_curricula(best, runs):
    base = runs[9]
    changes = best.changes_without(base.curriculum, [[0], [1, 2]], base.initial_losses)
    for group, change in zip(([0], [1, 2]), changes, strict=True):
        edited = sf.Remove(rows=group).apply(base.curriculum)
        before, after = best.simulate([base.curriculum, edited], base.initial_losses)[:, -1]
        assert np.allclose(change, after - before)


def test_a_single_run_is_simulated_by_the_first_that_can_be_fitted(runs):
    fitted = sf.BestSimulator(members=[Broken(), sf.AdditiveSimulator(l2=1.0)]).fit(runs[:1])
    alone = sf.AdditiveSimulator(l2=1.0).fit(runs[:1])
    expected = alone.simulate(runs.curricula, runs.initial_losses)
    assert np.allclose(fitted.simulate(runs.curricula, runs.initial_losses), expected)
    assert not fitted.gives_intervals
    assert fitted.trust is None
    with pytest.raises(InvalidInput, match="fitted on a single run, it knows nothing of its errors"):
        fitted.interval(runs.curricula, runs.initial_losses)


def test_the_order_of_the_runs_makes_no_difference(best, runs):
    reversed_ = sf.BestSimulator(members=MEMBERS).fit(sf.Runs(runs[:8][::-1]))
    assert np.allclose(reversed_.weights_, best.weights_)
    assert reversed_.trust.skill == pytest.approx(best.trust.skill)


def test_a_file_holds_the_members_and_the_trust(best, runs, tmp_path):
    best.save(tmp_path / "best.safetensors")
    loaded = Simulator.load(tmp_path / "best.safetensors")
    assert loaded.trust == best.trust
    for ends, expected in zip(
        loaded.interval(runs.curricula, runs.initial_losses),
        best.interval(runs.curricula, runs.initial_losses),
        strict=True,
    ):
        assert np.array_equal(ends, expected)
    assert loaded.fitted_ids_ == sorted(runs.ids[:8])
    assert "skill" in str(loaded)


def test_intervals_cover_nine_in_ten_and_widen_far_away():
    fit, held = made_runs(24, noise=0.1), made_runs(40, noise=0.1, seed=5)
    fitted = sf.BestSimulator(members=MEMBERS).fit(fit)
    low, high = fitted.interval(held.curricula, held.initial_losses)
    inside = (low[:, 1:] <= held.losses[:, 1:]) & (held.losses[:, 1:] <= high[:, 1:])
    assert 0.86 < inside.mean() < 0.94
    assert 0.8 < fitted.trust.coverage < 0.97
    unusual = sf.Curriculum([[0, 0, 0]] * 20, n_train=12)  # one example, again and again
    far, usual = (
        np.subtract(*fitted.interval([curriculum], held.initial_losses[0])[::-1])[0, -1].mean()
        for curriculum in (unusual, held.curricula[0])
    )
    assert far > 3 * usual


def test_usual_errors_leave_out_the_run_itself():
    errors = np.array([[[0.0], [1.0]], [[0.0], [2.0]], [[0.0], [np.nan]]])  # [runs, times, test]
    usual = UsualErrors.of(errors)
    assert np.allclose(usual.variance[1], (0.5 * 2.5 + 5) / 2.5)
    assert np.allclose(usual.without[:, 1, 0], [(1.25 + 4) / 1.5, (1.25 + 1) / 1.5, (1.25 + 5) / 1.5])
    quantiles = usual.quantiles(np.ones((3, 2, 1)))
    assert quantiles[1, 0] == 1.5  # the median of 1 and 2
    half = half_widths(quantiles, np.full((1, 2, 1), 4.0), 0.5)
    assert np.allclose(half, [[[0.0], [3.0]]])
    with pytest.raises(InvalidInput, match=r"confidence must be from 0.5 to 0.99, got 0.2"):
        half_widths(quantiles, np.ones((1, 2, 1)), 0.2)


def test_trust_is_counted_by_hand():
    true = np.array([[[1.0, 1.0], [3.0, 1.0]], [[1.0, 1.0], [1.0, 2.0]], [[1.0, 1.0], [2.0, 5.0]]])
    forecasts, means = true.copy(), np.full_like(true, 2.0)
    forecasts[0, 1] = [3.5, 1.0]
    trust = Trust.of(forecasts, true, means)
    assert trust.skill == trust.final_skill == pytest.approx(1 - 0.25 / (1 + 1 + 1 + 0 + 0 + 9))
    assert trust.run_correlation == 1.0
    pairs = [0.25 / np.sqrt((2.5**2 + 1) / 2), 0.25 / np.sqrt((1.5**2 + 16) / 2), 0.0]
    assert trust.change_error == pytest.approx(np.quantile(pairs, 0.9))
    assert np.isnan(trust.coverage)


def test_cross_fit_fits_on_all_and_learns_from_held_out_runs(runs):
    fitted = sf.LinearSimulator(l2=1.0, around="mean").cross_fit(runs, folds=5, seed=3)
    plain = sf.LinearSimulator(l2=1.0, around="mean").fit(runs)
    assert np.array_equal(fitted.effects_, plain.effects_)
    assert plain.trust is None
    forecasts = refitted_forecasts(plain, runs, fold_of(runs, 5, 3))
    assert fitted.trust.final_skill < 1
    mean_of_others = np.stack([runs.losses[fold_of(runs, 5, 3) != fold].mean(axis=0) for fold in fold_of(runs, 5, 3)])
    error, baseline = (((losses - runs.losses)[:, 1:] ** 2).sum() for losses in (forecasts, mean_of_others))
    assert fitted.trust.skill == pytest.approx(1 - error / baseline, rel=1e-6)
    with pytest.raises(InvalidInput, match="one run cannot be held out"):
        plain.cross_fit(runs[:1])


def test_forecasts_stop_at_ten_times_the_largest_loss(runs):
    wild = Wild().fit(runs)
    largest = runs.losses.max()
    with pytest.warns(RunawayWarning, match="1 of 1 forecasts of wild ran away"):
        losses = wild.simulate(runs.curricula[:1], runs.initial_losses[0])
    assert losses.max() == pytest.approx(10 * largest)
    assert np.allclose(losses[0, :4], 3.0 * 2.0 ** np.arange(4)[:, None])  # below the bound nothing changes
    with pytest.warns(RunawayWarning):
        assert (wild.changes(runs.curricula[0], runs.curricula[1:2], runs.initial_losses[0]) == 0).all()
    falling = sf.Runs.from_arrays(runs.curricula, runs.losses - 10)
    assert falling.losses.max() < 0
    assert Wild().fit(falling).bounds_ == pytest.approx([10 * falling.losses.min(), -10 * falling.losses.min()])


@pytest.mark.parametrize(
    ("change", "error", "far", "said"),
    [
        (0.5, 0.04, 1.0, "Trusted: the change is right to within 0.04"),
        (0.1, 0.06, 1.0, "Not to be trusted: the error may be 60 % of the change"),
        (0.5, float("nan"), 1.0, "Its error is not known"),
        (0.0, 0.1, 1.0, "many times"),
    ],
)
def test_a_judgement_says_what_it_means(change, error, far, said):
    judgement = Judgement(change, error, far, ran_away=False, longer=False)
    assert said in str(judgement)
    assert judgement.trusted == said.startswith("Trusted")


def test_a_forecast_is_judged_by_errors_of_held_out_differences(best, runs):
    base, edited = np.zeros(6), np.array([0.3, 0.1, 0.2, 0.0, 0.0, 0.0])
    mean = best.baseline_[-1]
    judgement = Judgement.of(best, mean + base, mean + edited, 20)
    size = np.sqrt((edited**2).mean())
    assert judgement.change == pytest.approx(0.1)
    assert judgement.error == pytest.approx(best.trust.change_error * size)
    assert judgement.distance == pytest.approx(size / np.sqrt(best.spread_of_runs_[-1]))
    far = Judgement.of(best, mean, mean + 100 * edited, 20)
    assert far.error > 100 * judgement.error  # errors grow faster than changes there
    assert far.ran_away or far.distance > 3
    assert Judgement.of(best, mean, mean + edited, 21).longer


def test_bad_parameters_are_refused():
    for parameters, said in (
        ({"members": []}, "members is empty"),
        ({"folds": 1}, "folds must be"),
    ):
        with pytest.raises(InvalidInput, match=said):
            sf.BestSimulator(**parameters).fit(made_runs(4))
    wrong = {"members must be a list": {"members": ["linear"]}, "task must be a Task": {"task": "digits"}}
    for said, parameters in wrong.items():
        with pytest.raises(InvalidInput, match=said):
            sf.BestSimulator().set_params(**parameters).fit(made_runs(4))


def test_the_tangent_kernels_are_taken_once(task_runs):
    """Each fold is forecast by the references of the other folds, as if fitted on these alone."""
    task, runs = task_runs
    folds = np.array([0, 1, 0, 1, 2, 2])
    fitted = sf.TangentKernelSimulator(task, n_references=2, n_checkpoints=2)
    forecasts = fitted._cross_fit(runs, folds)
    for fold, reference in ((0, 1), (1, 0)):
        others = [runs[reference], *(run for run, number in zip(runs, folds, strict=True) if number != fold)]
        alone = sf.TangentKernelSimulator(task, n_references=1, n_checkpoints=2)
        alone.fit(sf.Runs([runs[reference], *(run for run in others[1:] if run.id != runs[reference].id)]))
        held = runs.take(np.flatnonzero(folds == fold))
        assert np.allclose(forecasts[folds == fold], alone.simulate(held.curricula, held.initial_losses), rtol=1e-4)
    whole = sf.TangentKernelSimulator(task, n_references=2, n_checkpoints=2).fit(runs)
    assert np.array_equal(whole.kernels_, fitted.kernels_)


@pytest.fixture(scope="module")
def task_runs():
    task = sf.tasks.digits(n_train=20, n_test=6)
    curricula = sf.random_curricula(n_train=20, runs=6, steps=8, batch_size=4, subset=0.5)
    return task, sf.record(task, sf.Recipe(lr=0.1), curricula)


def test_targets_of_two_whole_numbers_are_classes():
    from simfluence.simulators.surrogates import Sides

    rng = np.random.default_rng(0)

    def side(targets):
        return sf.Examples.numbered(len(targets), None, rng.normal(size=(len(targets), 2)), targets)

    labels = np.array([0, 1, 1, 0])
    for targets in (labels.astype(np.float32), labels[:, None].astype(np.float64), labels):
        sides = Sides.of(side(targets), side(targets), "a test")
        assert sides.classes
        assert np.array_equal(sides.train_targets, np.eye(2)[labels])
    assert not Sides.of(side(labels + 0.5), side(labels + 0.5), "a test").classes
    assert not Sides.of(side(np.arange(4.0)), side(np.arange(4.0)), "a test").classes


def test_the_ids_of_copies_count_once(runs):
    doubled = sf.Runs([*runs[:4], *(dataclasses.replace(run) for run in runs[:4])])
    assert fold_of(doubled, 3, 0)[:4].tolist() == fold_of(doubled, 3, 0)[4:].tolist()
