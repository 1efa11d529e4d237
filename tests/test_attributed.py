from __future__ import annotations

import numpy as np
import pytest
import sklearn.base
import torch

import simfluence as sf
from simfluence import attribution
from simfluence.attribution.exact import gradients
from simfluence.errors import InvalidInput


@pytest.fixture(scope="module")
def checkpoints(task, runs):
    return sf.replay(task, runs[0], [0, 4, 9])


@pytest.fixture(scope="module")
def tracin(task, checkpoints):
    pairs = [(checkpoint, 0.3) for checkpoint in checkpoints.values()]
    return attribution.TracInCP(pairs).fit(task.build_model(0), task)


def test_tracin_is_played_forward_step_by_step(task, runs, tracin, checkpoints):
    """Against a loop over steps: gradients at the nearest checkpoint, the recipe's rate, the mean over the batch."""
    simulator = sf.AttributedSimulator(tracin).fit(runs)
    products = {}
    for step, checkpoint in checkpoints.items():
        model = task.build_model(0)
        checkpoint.restore(model)
        train, test = (gradients(model, data, task.loss) for data in (task.train_data, task.test_data))
        products[step] = (test @ train.T).numpy()
    for run in (runs[1], runs[3]):
        losses = [run.initial_losses.astype(np.float64)]
        for step, batch in enumerate(run.curriculum):
            nearest = min(products, key=lambda at: abs(at - step))
            losses.append(losses[-1] - 0.3 * products[nearest][:, batch].mean(axis=1))
        unbounded = simulator._simulate([run.curriculum], run.initial_losses[None].astype(np.float64))[0]
        assert np.allclose(unbounded[1:], losses[1:], rtol=1e-4, atol=1e-5)
        simulated = simulator.simulate([run.curriculum], run.initial_losses)[0]
        assert np.allclose(simulated, np.maximum(losses, 0), rtol=1e-4, atol=1e-5)


def test_scores_in_losses_are_shared_out_over_occurrences(runs):
    rng = np.random.default_rng(0)
    scores = 0.02 * rng.normal(size=(5, 12))  # so that no loss falls below 0
    simulator = sf.AttributedSimulator(scores).fit(runs)
    counts = np.array([run.curriculum.counts.toarray().sum(0) for run in runs])
    usual = np.array([counts[counts[:, i] > 0, i].mean() for i in range(12)])
    run = runs[2]
    expected = run.initial_losses - scores @ (counts[2] / usual)  # batches are all full
    simulated = simulator.simulate([run.curriculum], run.initial_losses)[0, -1]
    assert np.allclose(simulated, expected, rtol=1e-9)


@pytest.mark.parametrize("around", [None, "mean"])
def test_the_fitted_scale_is_the_least_squares_one(runs, tracin, around):
    unscaled = sf.AttributedSimulator(tracin, around=around).fit(runs)
    fitted = sf.AttributedSimulator(tracin, fit_scale=True, around=around).fit(runs)
    true = runs.losses.astype(np.float64)

    def error(scale):
        unscaled.scale_ = scale
        return ((unscaled.simulate(runs.curricula, runs.initial_losses) - true) ** 2).sum()

    assert fitted.scale_ != 1.0
    best = error(fitted.scale_)
    assert best < min(error(0.99 * fitted.scale_), error(1.01 * fitted.scale_))
    assert np.allclose(
        fitted.simulate(runs.curricula, runs.initial_losses),
        unscaled.simulate(runs.curricula, runs.initial_losses),
        atol=1,
    )


def test_around_the_mean_the_usual_curriculum_ends_at_the_mean(runs):
    scores = 0.05 * np.random.default_rng(1).normal(size=(5, 12))  # so that no loss falls below 0
    simulator = sf.AttributedSimulator(scores, around="mean").fit(runs)
    simulated = simulator.simulate(runs.curricula, runs.initial_losses)[:, -1]
    assert np.allclose(simulated.mean(axis=0), runs.losses[:, -1].mean(axis=0), atol=1e-6)
    assert np.ptp(simulated, axis=0).min() > 0.005


def test_an_empty_batch_changes_nothing(runs, tracin):
    simulator = sf.AttributedSimulator(tracin).fit(runs)
    curriculum = sf.Curriculum([[0, 1], [], [2]], n_train=12)
    simulated = simulator.simulate([curriculum], runs.initial_losses[0])[0]
    assert np.array_equal(simulated[1], simulated[2])
    assert not np.array_equal(simulated[2], simulated[3])


@pytest.mark.parametrize("source", ["tracin", "scores", "ideal"])
def test_whatever_is_played_is_cloned_and_saved(source, runs, tracin, tmp_path):
    attributor = {
        "tracin": tracin,
        "scores": np.random.default_rng(0).normal(size=(5, 12)),
        "ideal": attribution.TracInIdeal().fit(runs),
    }[source]
    fitted = sf.AttributedSimulator(attributor, fit_scale=True).fit(runs)
    fitted.save(tmp_path / "fitted.safetensors")
    expected = fitted.simulate(runs.curricula, runs.initial_losses)
    loaded = sf.Simulator.load(tmp_path / "fitted.safetensors")
    for same in (loaded, sklearn.base.clone(fitted).fit(runs)):
        assert np.array_equal(same.simulate(runs.curricula, runs.initial_losses), expected)
    changes = sf.leave_one_out(fitted, runs[0])
    index = int(runs[0].curriculum[0][0])
    assert np.allclose(changes[:, index], sf.what_if(fitted, runs[0], sf.Remove([index])).change)


def test_bad_input(runs, task, tracin):
    for simulator, message in (
        (sf.AttributedSimulator(), "attributor is required"),
        (sf.AttributedSimulator(np.zeros((5, 11))), "scores are of 5 test and 11 training examples"),
        (sf.AttributedSimulator(np.zeros(12)), r"finite numbers \[test, train\]"),
        (sf.AttributedSimulator(np.full((5, 12), np.nan)), "finite numbers"),
        (sf.AttributedSimulator(np.zeros((5, 12)), fit_scale=True), "no scale to fit"),
        (sf.AttributedSimulator(tracin, fit_scale="best"), "fit_scale='best' is unknown: choose from False, True"),
        (sf.AttributedSimulator(tracin, around="median"), "choose from None, 'mean'"),
    ):
        with pytest.raises(InvalidInput, match=message):
            simulator.fit(runs)
    cosine = attribution.GradientCosine().fit(task.build_model(0), task)
    with pytest.raises(InvalidInput, match="pass fit_scale=True"):
        sf.AttributedSimulator(cosine).fit(runs)
    assert np.isfinite(sf.AttributedSimulator(cosine, fit_scale=True).fit(runs).scale_)
    states = [(task.build_model(0).state_dict(), 0.3)]
    unknown = attribution.TracInCP(states).fit(task.build_model(0), task)
    with pytest.raises(InvalidInput, match="does not contain its step"):
        sf.AttributedSimulator(unknown).fit(runs)
    bare = sf.Runs.from_arrays(runs.curricula, runs.losses)
    with pytest.raises(InvalidInput, match="has no learning rates"):
        sf.AttributedSimulator(tracin).fit(bare)


def test_tracin_ideal_reads_what_happened(runs):
    scores = attribution.TracInIdeal().fit(runs).scores()
    expected, shown = np.zeros((5, 12)), np.zeros(12)
    for run in runs:
        for step, batch in enumerate(run.curriculum):
            for index in batch:
                expected[:, index] += (run.losses[step].astype(float) - run.losses[step + 1]) / len(batch)
        shown[np.unique(run.curriculum.indices)] += 1
    assert np.allclose(scores.values, expected / np.maximum(shown, 1), atol=1e-6)
    assert scores.unit == "loss"
    one = attribution.TracInIdeal().fit(runs[0]).scores().values
    assert np.allclose(one.sum(axis=1), runs[0].losses[0] - runs[0].losses[-1], atol=1e-6)  # all changes are shared out


def test_tracin_ideal_refuses(runs):
    with pytest.raises(InvalidInput, match="no run to trace"):
        attribution.TracInIdeal().fit(runs[:0])
    with pytest.raises(sf.SimfluenceError, match="not fitted"):
        attribution.TracInIdeal().scores()
    fitted = attribution.TracInIdeal().fit(runs)
    with pytest.raises(InvalidInput, match="leave test_data out"):
        fitted.scores((torch.zeros(1, 3), torch.zeros(1)))
    with pytest.raises(InvalidInput, match="no unit 'raw'"):
        fitted.scores(unit="raw")
    gaps = sf.Runs.from_arrays(
        runs.curricula[:1], np.where(np.arange(11) == 4, np.nan, 1.0)[None, :, None] * np.ones(5)
    )
    with pytest.raises(InvalidInput, match="lacks losses at some steps"):
        attribution.TracInIdeal().fit(gaps)
