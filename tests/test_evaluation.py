from __future__ import annotations

import numpy as np
import pytest
import scipy.stats

import simfluence as sf
from simfluence.errors import DivergedWarning, InvalidInput
from simfluence.evaluation import metrics as ev

RNG = np.random.default_rng(0)
TRUE = RNG.normal(size=(9, 6, 7))
SIMULATED = TRUE + RNG.normal(size=TRUE.shape)
MEAN = np.broadcast_to(TRUE.mean(0), TRUE.shape)


def test_all_steps_mse_leaves_out_the_start():
    expected = [np.mean((SIMULATED[r, 1:] - TRUE[r, 1:]) ** 2) for r in range(9)]
    assert np.allclose(ev.all_steps_mse(SIMULATED, TRUE), expected)
    start = SIMULATED.copy()
    start[:, 0] += 100
    assert np.allclose(ev.all_steps_mse(start, TRUE), expected)


def test_final_spearman():
    expected = [scipy.stats.spearmanr(SIMULATED[r, -1], TRUE[r, -1]).statistic for r in range(9)]
    assert np.allclose(ev.final_spearman(SIMULATED, TRUE), expected)


def test_skill_is_against_the_mean_trajectory():
    ours, theirs = ((SIMULATED - TRUE)[:, 1:] ** 2).sum(), ((MEAN - TRUE)[:, 1:] ** 2).sum()
    assert ev.skill(SIMULATED, TRUE, MEAN) == pytest.approx(1 - ours / theirs)
    assert ev.skill(MEAN, TRUE, MEAN) == 0
    assert ev.skill(TRUE, TRUE, MEAN) == 1
    ours, theirs = ((SIMULATED - TRUE)[:, -1] ** 2).sum(), ((MEAN - TRUE)[:, -1] ** 2).sum()
    assert ev.final_skill(SIMULATED, TRUE, MEAN) == pytest.approx(1 - ours / theirs)


def test_run_correlation():
    each = [scipy.stats.spearmanr(SIMULATED[:, -1, z], TRUE[:, -1, z]).statistic for z in range(7)]
    assert ev.run_correlation(SIMULATED, TRUE) == pytest.approx(np.mean(each))
    assert np.isnan(ev.run_correlation(MEAN, TRUE))  # a constant forecast has none
    partly = SIMULATED.copy()
    partly[:, -1, 0] = 3.0
    assert ev.run_correlation(partly, TRUE) == pytest.approx(np.mean(each[1:]))


def test_delta_correlation():
    one, two = RNG.normal(size=(2, 20))
    assert ev.delta_correlation(one, two) == pytest.approx(scipy.stats.pearsonr(one, two).statistic)
    assert np.isnan(ev.delta_correlation(np.zeros(20), two))


def test_what_the_edited_group_alone_has():
    labels, test = np.array([0, 0, 1, 2, 2, 2]), np.array([0, 1, 1, 2, 2, 0, 3])
    actual = RNG.normal(size=7)
    removed = np.where(labels == 1, 4.0, 0.0)
    indicator = np.array([0, 1, 1, 0, 0, 0, 0])
    expected = abs(np.corrcoef(indicator, actual)[0, 1])
    assert ev.group_correlation(removed, labels, test, actual) == pytest.approx(expected)
    assert ev.group_correlation(-3 * removed, labels, test, -actual) == pytest.approx(expected)  # size, sign: fitted
    assert ev.group_correlation(removed, labels, test, 7.0 + 2 * indicator) == pytest.approx(1)
    several = np.array([1.0, 2.0, 0.0, 1.0, 0.0, 0.0])  # 3 showings of group 0, 1 of group 2
    shares = np.array([0.75, 0, 0, 0.25, 0.25, 0.75, 0])
    fitted = np.polyval(np.polyfit(shares, actual, 1), shares)  # least squares
    share_explained = 1 - ((actual - fitted) ** 2).sum() / ((actual - actual.mean()) ** 2).sum()
    assert ev.group_correlation(several, labels, test, actual) == pytest.approx(np.sqrt(share_explained))
    assert np.isnan(ev.group_correlation(np.zeros(6), labels, test, actual))
    assert np.isnan(ev.group_correlation(removed, labels, test, np.ones(7)))


def test_correlation_within_groups():
    groups = np.array([5, 5, 5, -1, -1, 2])
    predicted, actual = RNG.normal(size=(2, 6))
    rest = [values - np.array([values[groups == group].mean() for group in groups]) for values in (predicted, actual)]
    expected = scipy.stats.pearsonr(*rest).statistic
    assert ev.within_correlation(predicted, actual, groups) == pytest.approx(expected)
    shifted = predicted + np.where(groups == 5, 1e3, 0)  # what is said of a group as a whole does not count
    assert ev.within_correlation(shifted, actual, groups) == pytest.approx(expected)
    one = np.zeros(6, int)
    assert ev.within_correlation(predicted, actual, one) == pytest.approx(ev.delta_correlation(predicted, actual))
    means = np.array([0.1, 0.1, 0.1, 0.7, 0.7, 3.3])
    assert ev.delta_correlation(means, means + 0.01 * actual) > 0.99
    assert np.isnan(ev.within_correlation(means, means + 0.01 * actual, groups))  # no rounding error is a forecast
    assert np.isnan(ev.within_correlation(predicted, actual, np.arange(6)))
    order = RNG.permutation(6)
    assert ev.within_correlation(predicted[order], actual[order], groups[order]) == pytest.approx(expected)


def test_the_most_harmful_examples():
    actual = RNG.normal(size=(4, 40))
    worst = np.argsort(actual.mean(0))
    predicted = np.zeros((4, 40))
    predicted[:, worst[[1, 2, 30, 31]]] = -1  # 40 examples: 4 are a tenth
    assert ev.harmful_hit_rate(predicted, actual) == 0.5
    assert ev.harmful_hit_rate(actual, actual) == 1
    assert ev.harmful_hit_rate(-actual, actual) == 0
    assert ev.harmful_hit_rate(actual, actual + 10.0, k=1) == 1  # all of them help, some least
    assert ev.harmful_hit_rate(predicted[:, :7] - np.eye(4, 7), actual[:, :7]) in (0, 1)  # of 7, one
    assert np.isnan(ev.harmful_hit_rate(np.zeros((4, 40)), actual))


def test_no_skill_beyond_the_mean_trajectory():
    short = MEAN.copy()
    short[4:, 3:] = np.nan  # five of nine runs are longer than every fitting run
    ours = ((SIMULATED - TRUE)[:4, 1:] ** 2).sum() + ((SIMULATED - TRUE)[4:, 1:3] ** 2).sum()
    theirs = ((MEAN - TRUE)[:4, 1:] ** 2).sum() + ((MEAN - TRUE)[4:, 1:3] ** 2).sum()
    assert ev.skill(SIMULATED, TRUE, short) == pytest.approx(1 - ours / theirs)
    assert ev.final_skill(SIMULATED, TRUE, short) == pytest.approx(ev.final_skill(SIMULATED[:4], TRUE[:4], MEAN[:4]))
    assert np.isnan(ev.final_skill(SIMULATED[4:], TRUE[4:], short[4:]))
    assert ev.skill(np.where(np.isnan(short), 1e9, TRUE), TRUE, short) == 1
    for trajectory in (MEAN[0, :4], MEAN[0], np.concatenate([MEAN[0]] * 2)):
        beside = ev.baseline_losses(trajectory, TRUE)
        known = min(len(trajectory), 6)
        assert np.array_equal(beside[:, :known], MEAN[:, :known])
        assert np.isnan(beside[:, known:]).all()


def test_steps_not_recorded_do_not_count():
    sparse = TRUE.copy()
    sparse[:, 1::2] = np.nan  # recorded at 0, 2, 4
    assert np.allclose(ev.all_steps_mse(SIMULATED, sparse), ((SIMULATED - TRUE)[:, [2, 4]] ** 2).mean((1, 2)))
    assert np.allclose(ev.final(SIMULATED, sparse), SIMULATED[:, 4])
    errors = ((SIMULATED - TRUE)[:, 4] ** 2).sum(1)
    assert np.allclose(ev.final_errors(SIMULATED, sparse), errors)


@pytest.fixture(scope="module")
def parts(runs):
    return runs.split(held_out=3, seed=0)


#: The three fitting runs of half the examples each miss some.
MISSES_SOME = pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")


@MISSES_SOME
def test_table(parts):
    fit, held = parts
    simulators = {
        "mean": sf.MeanTrajectorySimulator().fit(fit),
        "linear": sf.LinearSimulator(l2=10).fit(fit),
        "same": sf.LinearSimulator(l2=10).fit(fit),
    }
    table = sf.evaluate(simulators, held, baseline_runs=fit)
    assert list(table.index) == ["mean", "linear", "same"]
    assert table.loc["linear"].equals(table.loc["same"])
    assert (table["runs"] == 3).all()
    assert (table["test_examples"] == 5).all()
    simulated = simulators["linear"].simulate(held.curricula, held.initial_losses)
    mean = simulators["mean"].simulate(held.curricula, held.initial_losses)
    true = held.losses.astype(np.float64)
    row = table.loc["linear"]
    assert row["mse"] == pytest.approx(ev.all_steps_mse(simulated, true).mean())
    assert row["mse_sd"] == pytest.approx(ev.all_steps_mse(simulated, true).std(ddof=1))
    assert row["skill"] == pytest.approx(ev.skill(simulated, true, mean))
    assert row["final_skill"] == pytest.approx(ev.final_skill(simulated, true, mean))
    assert row["run_correlation"] == pytest.approx(ev.run_correlation(simulated, true))
    for name in ("skill", "final_skill", "run_correlation"):
        assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert table.loc["mean", "skill"] == 0
    assert np.isnan(table.loc["mean", "run_correlation"])


@MISSES_SOME
def test_intervals_are_of_the_bootstrap_over_runs(parts):
    fit, held = parts
    table = sf.evaluate({"linear": sf.LinearSimulator().fit(fit)}, held, fit, bootstrap=200, confidence=0.8, seed=5)
    simulated = sf.LinearSimulator().fit(fit).simulate(held.curricula, held.initial_losses)
    mean = sf.MeanTrajectorySimulator().fit(fit).simulate(held.curricula, held.initial_losses)
    true = held.losses.astype(np.float64)
    draws = {"skill": [], "run_correlation": []}
    for rows in np.random.default_rng(5).integers(3, size=(200, 3)):
        draws["skill"].append(ev.skill(simulated[rows], true[rows], mean[rows]))
        draws["run_correlation"].append(ev.run_correlation(simulated[rows], true[rows]))
    for name, values in draws.items():
        low, high = np.nanquantile(values, [0.1, 0.9])
        assert table.loc["linear", f"{name}_low"] == pytest.approx(low)
        assert table.loc["linear", f"{name}_high"] == pytest.approx(high)


def test_chosen_metrics(parts):
    fit, held = parts
    table = sf.evaluate({"mean": sf.MeanTrajectorySimulator().fit(fit)}, held, fit, metrics=["skill"])
    assert list(table.columns) == ["skill", "skill_low", "skill_high", "runs", "test_examples"]


def test_bad_requests(parts, runs):
    fit, held = parts
    fitted = {"mean": sf.MeanTrajectorySimulator().fit(fit)}
    with pytest.raises(InvalidInput, match="unknown metric 'skil', did you mean 'skill'"):
        sf.evaluate(fitted, held, fit, metrics=["skil"])
    with pytest.raises(InvalidInput, match="in both held and baseline_runs"):
        sf.evaluate(fitted, runs, fit)
    with pytest.raises(InvalidInput, match="no run to evaluate on"):
        sf.evaluate(fitted, held[:0], fit)
    with pytest.raises(InvalidInput, match="differ in shape"):
        ev.squared_errors(TRUE, TRUE[:, 1:])


def test_diverged_held_out_runs_are_left_out(parts):
    fit, held = parts
    broken = sf.Run("broken", held[0].curriculum, np.full_like(held[0].losses, np.nan))
    fitted = {"mean": sf.MeanTrajectorySimulator().fit(fit)}
    with pytest.warns(DivergedWarning, match="broken"):
        table = sf.evaluate(fitted, sf.Runs([*held, broken]), fit)
    assert table.loc["mean", "runs"] == 3


@pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")
def test_coverage_of_intervals(parts):
    fit, held = parts
    wide = sf.ConformalSimulator(sf.LinearSimulator(around="mean"), members=2, folds=3).fit(fit)
    table = sf.evaluate({"wide": wide, "linear": sf.LinearSimulator().fit(fit)}, held, fit, metrics=["skill"])
    low, high = wide.interval(held.curricula, held.initial_losses, 0.9)
    inside = [low[run, -1, z] <= held.losses[run, -1, z] <= high[run, -1, z] for run in range(3) for z in range(5)]
    assert table.loc["wide", "coverage"] == pytest.approx(np.mean(inside))
    assert np.isnan(table.loc["linear", "coverage"])
