from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import simfluence as sf
from simfluence.errors import InvalidInput, UnseenWarning
from simfluence.simulators.batches import usual_batch_size
from simfluence.simulators.markov.simulators import L2_PATH


def dense_fit(runs, l2, slope, intercept, prior):
    """The paper's objective in float64, one test example at a time, written out batch by batch."""
    B, n = usual_batch_size(runs.curricula), runs.n_train
    A, b = np.full((n, runs.n_test), np.nan), np.full((n, runs.n_test), np.nan)
    for z in range(runs.n_test):
        rows, targets = [], []
        for run in runs:
            for t, batch in enumerate(run.curriculum):
                if len(batch) == 0:
                    continue
                w = np.bincount(batch, minlength=n) * B / len(batch)
                before, after = np.float64(run.losses[t, z]), np.float64(run.losses[t + 1, z])
                rows.append(np.concatenate([w * before] * slope + [w] * intercept))
                targets.append(after - before if prior == "identity" else after)
        X, y = np.array(rows), np.array(targets)
        solution = np.linalg.solve(X.T @ X + l2 * np.eye(X.shape[1]), X.T @ y)
        if slope:
            A[:, z] = solution[:n] + (1 / B if prior == "identity" else 0)
        if intercept:
            b[:, z] = solution[-n:]
    return A, b


CASES = [
    (sf.AdditiveSimulator(l2=0.5), False, True, "identity"),
    (sf.MultiplicativeSimulator(l2=0.5), True, False, "identity"),
    (sf.MultiplicativeSimulator(l2=0.5, prior="zero"), True, False, "zero"),
    (sf.LinearSimulator(l2=0.5), True, True, "identity"),
    (sf.LinearSimulator(l2=0.5, prior="zero"), True, True, "zero"),
]


@pytest.fixture(scope="module")
def ragged(runs, task, recipe):
    """Recorded runs, one with an empty batch, a short one and a repeated example."""
    odd = sf.Curriculum([[0, 1, 2], [], [5], [5, 5, 7], [3, 4, 8, 9]] * 2, n_train=12)
    return sf.Runs([*runs, *sf.record(task, recipe, [odd])])


@pytest.mark.parametrize(("simulator", "slope", "intercept", "prior"), CASES)
def test_equals_the_dense_solution(ragged, simulator, slope, intercept, prior):
    simulator.fit(ragged)
    A, B = dense_fit(ragged, 0.5, slope, intercept, prior)
    if slope:
        assert np.linalg.norm(simulator.A_ - A) <= 1e-6 * np.linalg.norm(A)
    if intercept:
        assert np.linalg.norm(simulator.B_ - B) <= 1e-6 * np.linalg.norm(B)


@pytest.mark.parametrize("prior", ["identity", "zero"])
def test_a_known_process_is_recovered_and_rolled_out(known, prior):
    fit, held = known.runs.split(held_out=5)
    assert known.runs.losses.min() < 0
    linear = sf.LinearSimulator(l2=1e-9, prior=prior).fit(fit)
    assert linear.effects(fit.curricula)[0].max() > 1
    assert np.abs(linear.A_ - known.A).max() < 1e-4
    assert np.abs(linear.B_ - known.B).max() < 1e-4
    simulated = linear.simulate(held.curricula, held.initial_losses)
    assert np.abs(simulated - held.losses).max() < 1e-4


def test_batches_of_other_sizes_weigh_their_examples(known):
    linear = sf.LinearSimulator(l2=1e-9).fit(known.runs)
    curriculum = sf.Curriculum([[0], [1, 2, 2, 3, 4], [], [5, 6, 7]], n_train=8)
    expected = known.roll(curriculum, np.ones(4))
    assert np.allclose(linear.simulate([curriculum], np.ones(4))[0], expected, atol=1e-4)
    alpha, beta = linear.effects([curriculum])
    assert alpha.shape == (1, 1, 4, 4)
    assert (alpha[0, 0, 2] == 1).all()
    assert (beta[0, 2] == 0).all()


def test_nothing_learned_nothing_changes(runs):
    still = sf.LinearSimulator(l2=1e15).fit(runs)
    simulated = still.simulate(runs.curricula, runs.initial_losses)
    assert np.allclose(simulated, runs.initial_losses[:, None], atol=1e-6)


def test_an_example_never_seen_has_the_prior(known):
    curricula = [sf.Curriculum([[0, 1], [1, 2]], n_train=4)] * 2
    losses = np.random.default_rng(0).normal(size=(2, 3, 3))
    fitted = sf.LinearSimulator(l2=1.0).fit(sf.Runs.from_arrays(curricula, losses))
    assert np.allclose(fitted.A_[3], 1 / 2)
    assert np.allclose(fitted.B_[3], 0)
    paper = sf.LinearSimulator(l2=1.0, prior="zero").fit(sf.Runs.from_arrays(curricula, losses))
    assert np.allclose(paper.A_[3], 0)


def test_order_of_runs_does_not_matter(runs):
    one, two = (sf.LinearSimulator().fit(order) for order in (runs, runs[::-1]))
    assert np.allclose(one.A_, two.A_, rtol=1e-9)


def test_usual_batch_size():
    assert usual_batch_size([sf.Curriculum([[0, 1], [1, 2], [], [], [], [0, 1, 2]])]) == 2


@pytest.mark.parametrize(
    ("simulator", "said"),
    [
        (sf.LinearSimulator(l2=0), "l2 must be a number above 0"),
        (sf.AdditiveSimulator(l2=-1), "l2 must be a number above 0"),
        (sf.LinearSimulator(l2=float("nan")), "l2 must be a number above 0"),
        (sf.LinearSimulator(prior="identiti"), "did you mean 'identity'"),
    ],
)
def test_bad_parameters(runs, simulator, said):
    with pytest.raises(InvalidInput, match=said):
        simulator.fit(runs)


def dense_fit_around_the_mean(runs, l2, slope, intercept):
    """The deviation form written out: centred weights, a free coefficient of the deviation, float64."""
    B, n = usual_batch_size(runs.curricula), runs.n_train
    losses = [run.losses.astype(np.float64) for run in runs]
    longest = max(run.steps for run in runs)
    mean = np.array([np.mean([each[t] for each in losses if len(each) > t], axis=0) for t in range(longest + 1)])
    rows = [
        (np.bincount(batch, minlength=n) * B / len(batch), each[t], each[t + 1], mean[t], mean[t + 1])
        for run, each in zip(runs, losses, strict=True)
        for t, batch in enumerate(run.curriculum)
        if len(batch)
    ]
    W, before, after, m, m_next = (np.array(column) for column in zip(*rows, strict=True))
    W = W - W.mean(0)
    solutions = []
    for z in range(runs.n_test):
        d = (before - m)[:, z]
        X = np.column_stack([W * before[:, [z]]] * slope + [W] * intercept + [d])
        penalty = l2 * np.diag([1.0] * (X.shape[1] - 1) + [0.0])
        solutions.append(np.linalg.solve(X.T @ X + penalty, X.T @ ((after - m_next)[:, z] - d)))
    return np.array(solutions).T  # [unknowns, test]


@pytest.mark.parametrize(
    ("simulator", "slope", "intercept"),
    [
        (sf.AdditiveSimulator(l2=0.5, around="mean"), False, True),
        (sf.MultiplicativeSimulator(l2=0.5, around="mean"), True, False),
        (sf.LinearSimulator(l2=0.5, around="mean"), True, True),
    ],
)
def test_around_the_mean_equals_the_dense_solution(ragged, simulator, slope, intercept):
    simulator.fit(ragged)
    expected = dense_fit_around_the_mean(ragged, 0.5, slope, intercept)
    learned = [simulator.A_] if slope else []
    learned += [simulator.B_] if intercept else []
    found = np.concatenate([*learned, simulator.deviation_slopes_])
    assert np.linalg.norm(found - expected) <= 1e-6 * np.linalg.norm(expected)


def test_around_the_mean_with_nothing_learned_is_the_mean_where_runs_start_there(runs):
    """With no effects and equal starts, deviations are 0 and the forecast is the mean trajectory."""
    still = sf.LinearSimulator(l2=1e15, around="mean").fit(runs)
    mean = sf.MeanTrajectorySimulator().fit(runs)
    args = runs.curricula, runs.initial_losses
    assert np.allclose(still.simulate(*args), mean.simulate(*args), atol=1e-5)


@pytest.mark.filterwarnings("ignore::simfluence.errors.BeyondReferenceWarning")
def test_around_the_mean_rolls_out_its_own_equation(runs):
    simulator = sf.LinearSimulator(l2=1.0, around="mean").fit(runs[:4])
    curriculum = sf.Curriculum([*runs[5].curriculum.tolist(), [], [0, 1], [2, 3, 3]], n_train=12)  # longer, ragged
    losses, expected = simulator.simulate([curriculum], runs[5].losses[0])[0], [runs[5].losses[0].astype(float)]
    held = np.concatenate([simulator.mean_, np.repeat(simulator.mean_[-1:], 3, axis=0)])
    for t, batch in enumerate(curriculum):
        if len(batch) == 0:
            expected.append(expected[-1])
            continue
        w = np.bincount(batch, minlength=12) * 3 / len(batch) - simulator.centre_
        deviation = (1 + simulator.deviation_slopes_[0]) * (expected[-1] - held[t])
        expected.append(held[t + 1] + deviation + (w @ simulator.A_) * expected[-1] + w @ simulator.B_)
    assert np.allclose(losses, expected, atol=1e-10)


def test_around_the_mean_beats_it_on_the_shipped_runs():
    """Measured: skill 0.65 at L2 3–30; the paper's form is below −1."""
    fit, held = sf.RunStore(Path(__file__).parent.parent / "runs" / "digits").load().split(held_out=8, seed=0)
    table = sf.evaluate({"around": sf.LinearSimulator(l2=10, around="mean").fit(fit)}, held, fit, bootstrap=50)
    assert table.loc["around", "skill"] > 0.5
    assert table.loc["around", "final_skill"] > 0


def test_bad_choices_around_the_mean(runs):
    with pytest.raises(InvalidInput, match="choose one"):
        sf.LinearSimulator(prior="zero", around="mean").fit(runs)
    with pytest.raises(InvalidInput, match="around must be None or 'mean'"):
        sf.LinearSimulator(around="median").fit(runs)


def dense_fit_of_higher_order(runs, l2, order, varying, around):
    """Written out: a column per lag and training example, and the same times the share of training gone by."""
    B, n, horizon = usual_batch_size(runs.curricula), runs.n_train, max(run.steps for run in runs)
    losses = [run.losses.astype(np.float64) for run in runs]
    mean = np.mean(losses, axis=0)
    rows = [
        (np.bincount(batch, minlength=n) * B / len(batch), each, t)
        for run, each in zip(runs, losses, strict=True)
        for t, batch in enumerate(run.curriculum)
    ]
    centre = np.mean([w for w, *_ in rows], axis=0) if around else np.zeros(n)
    solutions = []
    for z in range(runs.n_test):
        X, y = [], []
        for w, each, t in rows:
            lags = [each[max(t - j, 0), z] for j in range(order)]
            free = [lag - mean[max(t - j, 0), z] for j, lag in enumerate(lags)]
            columns = [lags[0], 1.0, *lags[1:]] + ([t / horizon * lags[0], t / horizon] if varying else [])
            free += [t / horizon * free[0]] if varying else []
            X.append(np.concatenate([(w - centre) * column for column in columns] + ([free] if around else [])))
            y.append(each[t + 1, z] - each[t, z] - (mean[t + 1, z] - mean[t, z] if around else 0.0))
        X = np.array(X)
        penalty = np.full(X.shape[1], l2)
        if around:
            penalty[-(order + varying) :] = 0
        solutions.append(np.linalg.solve(X.T @ X + np.diag(penalty), X.T @ np.array(y)))
    found = np.array(solutions).T
    unknowns = (order + 1 + 2 * varying) * n
    found[: n if not around else 0] += 1 / B
    return found[:unknowns].reshape(-1, n, runs.n_test), found[unknowns:]


@pytest.mark.parametrize("around", [None, "mean"])
@pytest.mark.parametrize(("order", "varying"), [(2, False), (3, False), (1, True), (2, True)])
def test_higher_orders_and_varying_effects_equal_the_dense_solution(runs, order, varying, around):
    simulator = sf.LinearSimulator(l2=0.5, order=order, varying=varying, around=around).fit(runs)
    effects, free = dense_fit_of_higher_order(runs, 0.5, order, varying, around)
    found = np.stack([simulator.A_, simulator.B_, *simulator.effects_[2:]])
    assert np.linalg.norm(found - effects) <= 1e-6 * np.linalg.norm(effects)
    if around:
        assert np.linalg.norm(simulator.deviation_slopes_ - free) <= 1e-6 * np.linalg.norm(free)


@pytest.mark.parametrize("around", [None, "mean"])
def test_higher_orders_roll_out_their_own_equation(runs, around):
    simulator = sf.LinearSimulator(l2=1.0, order=2, varying=True, around=around).fit(runs[:4])
    alphas, beta = simulator.effects(runs.curricula)
    losses = simulator.simulate(runs.curricula, runs.initial_losses)
    for t in range(10):
        expected = alphas[0, :, t] * losses[:, t] + alphas[1, :, t] * losses[:, max(t - 1, 0)] + beta[:, t]
        assert np.allclose(losses[:, t + 1], expected, atol=1e-12)
    w = np.bincount(runs[5].curriculum[7], minlength=12) - (simulator.centre_ if around else 0)
    older, late_slope, late_rest = (w @ effects for effects in simulator.effects_[2:])
    slopes = [w @ simulator.A_ + 0.7 * late_slope, older]
    free = simulator.deviation_slopes_ if around else np.zeros((3, 5))
    if around:
        slopes = [1 + slopes[0] + free[0] + 0.7 * free[2], slopes[1] + free[1]]
    assert np.allclose(alphas[:, 5, 7], slopes, atol=1e-12)
    if not around:
        assert np.allclose(beta[5, 7], w @ simulator.B_ + 0.7 * late_rest, atol=1e-12)


def test_order_two_follows_momentum():
    """AdamW's: where one earlier loss says little of what comes, two say where it is going."""
    recorded = sf.RunStore("runs/digits_adamw").load()
    runs = sf.Runs(dataclasses.replace(run, losses=run.losses[:, :30], test=None, measures={}) for run in recorded)
    fit, held = runs.split(8, seed=0)
    linear = {n: sf.LinearSimulator(l2=10, around="mean", order=n).fit(fit) for n in (1, 2)}
    table = sf.evaluate({f"order {n}": simulator for n, simulator in linear.items()}, held[:4], fit, metrics=["skill"])
    assert table.loc["order 1", "skill"] < 0.3
    assert table.loc["order 2", "skill"] > 0.45


@pytest.mark.parametrize("around", [None, "mean"])
def test_the_guard_bounds_rollouts_and_keeps_them_affine(known, around):
    free, guarded = (sf.LinearSimulator(l2=1e-9, around=around, guard=guard).fit(known.runs) for guard in (False, True))
    curricula = known.runs.curricula
    unbounded = np.abs(free.effects(curricula)[0]).sum(0)
    bounded = np.abs(guarded.effects(curricula)[0]).sum(0)
    assert unbounded.max() > 1
    assert np.allclose(bounded, np.minimum(unbounded, 1))
    one, two, between = (guarded.simulate(curricula, start) for start in (np.zeros(4), np.ones(4), np.full(4, 0.25)))
    assert np.allclose(between, 0.75 * one + 0.25 * two, atol=1e-8)


def test_training_on_rollouts_lowers_their_error(runs):
    """From true losses, five steps at a time, written out."""

    def objective(simulator):
        alphas, beta = simulator.effects(runs.curricula)
        total = 0.5 * ((simulator.A_ - 1 / 3) ** 2).sum() + 0.5 * (simulator.B_**2).sum()
        for start in (0, 5):
            loss = runs.losses[:, start].astype(np.float64)
            for t in range(start, start + 5):
                loss = alphas[0, :, t] * loss + beta[:, t]
                total += ((loss - runs.losses[:, t + 1]) ** 2).sum()
        return total

    one, five = (sf.LinearSimulator(l2=0.5, rollout=k).fit(runs) for k in (1, 5))
    assert objective(five) < objective(one)
    best = objective(five)
    for name in ("A_", "B_"):  # a minimum: no small step leads further down
        for sign in (-1, 1):
            learned = getattr(five, name).copy()
            getattr(five, name)[4, 2] += sign * 1e-2
            assert objective(five) > best
            getattr(five, name)[:] = learned


def test_one_step_rollouts_are_the_one_step_fit(ragged):
    """A window of one step is the ridge regression itself: where it starts is where it ends."""
    from simfluence.simulators.markov.dynamics import trained_on_rollouts

    simulator = sf.LinearSimulator(l2=0.5, around="mean").fit(ragged)
    again = trained_on_rollouts(simulator._dynamics(), ragged, simulator.l2_, simulator._prior, 1)
    assert np.allclose(again.effects.numpy(), np.stack([simulator.A_, simulator.B_]), atol=1e-5)


def test_l2_of_each_test_example_is_the_best_on_held_out_runs(known, monkeypatch):
    path = L2_PATH[::2]
    monkeypatch.setattr("simfluence.simulators.markov.simulators.L2_PATH", path)
    rng = np.random.default_rng(0)
    noisy = known.runs.losses + 0.3 * rng.normal(size=known.runs.losses.shape) * [0, 1, 3, 10]
    runs = sf.Runs.from_arrays(known.runs.curricula, noisy)[:4]
    chosen = sf.LinearSimulator(l2="auto", around="mean").fit(runs).l2_
    errors = np.zeros((len(path), 4))
    for fold in range(4):
        part = sf.Runs(runs[index] for index in range(4) if index != fold)
        for row, l2 in enumerate(path):
            fitted = sf.LinearSimulator(l2=l2, around="mean").fit(part)
            simulated = fitted.simulate([runs[fold].curriculum], noisy[fold, 0])[0]
            errors[row] += ((simulated - noisy[fold]) ** 2).sum(0)
    assert np.array_equal(chosen, np.array(path)[errors.argmin(0)])
    assert len(set(chosen)) > 1


def test_an_example_of_no_fitting_run_is_warned_of_once(known):
    curricula = [sf.Curriculum([[0, 1], [1, 2]], n_train=4)] * 2
    fitted = sf.LinearSimulator().fit(sf.Runs.from_arrays(curricula, np.random.default_rng(0).normal(size=(2, 3, 3))))
    fitted.simulate(curricula, np.ones(3))
    with pytest.warns(UnseenWarning, match="1 training examples of these curricula are in no run") as caught:
        fitted.simulate([sf.Curriculum([[3, 0], [3, 1]], n_train=4)] * 5, np.ones(3))
    assert len(caught) == 1


def test_a_loss_that_never_changes(runs):
    losses = runs.losses.astype(np.float64)
    losses[:, :, 2] = 0.7
    still = sf.Runs.from_arrays(runs.curricula, losses)
    for around in (None, "mean"):
        simulator = sf.LinearSimulator(l2=1.0, around=around, order=2).fit(still)
        assert np.allclose(simulator.simulate(runs.curricula, losses[:, 0])[:, :, 2], 0.7, atol=1e-12)


def test_bad_options(runs):
    for name, value in (("order", 0), ("rollout", 0), ("order", True)):
        with pytest.raises(InvalidInput, match=f"{name} must be a whole number from 1 to "):
            sf.LinearSimulator(**{name: value}).fit(runs)
    with pytest.raises(InvalidInput, match="give 2 runs or more"):
        sf.LinearSimulator(l2="auto").fit(runs[:1])
