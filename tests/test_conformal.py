from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import simfluence as sf
from simfluence.errors import InvalidInput, StoreError


@pytest.fixture(scope="module")
def digits():
    """A simulator fitted on 8 runs of digits, and the held-out runs."""
    fit, held_out = sf.RunStore("runs/digits").load().split(8, seed=0)
    return sf.ConformalSimulator(sf.LinearSimulator(l2=10, around="mean"), members=5).fit(fit), held_out


@pytest.fixture(scope="module")
def boosted(runs):
    return sf.ConformalSimulator(sf.BoostedSimulator(rounds=3), members=2, folds=2).fit(runs)


def test_nine_in_ten_final_losses_are_within_90_percent_intervals(digits):
    fitted, held_out = digits
    low, high = fitted.interval(held_out.curricula, held_out.initial_losses, confidence=0.9)
    inside = (low <= held_out.losses) & (held_out.losses <= high)
    assert 0.85 <= inside[:, -1].mean() <= 0.95
    assert 0.85 <= inside[:, 1:].mean() <= 0.95


def test_intervals_of_known_noise(known):
    """With Gaussian noise around a known mean, ±1.645 standard deviations contain nine in ten losses."""
    rng = np.random.default_rng(0)
    losses = known.runs.losses[:1] + rng.normal(size=(400, 41, 4)) * [0.1, 1, 2, 4]
    losses[:, 0] = 0
    curricula = [known.runs.curricula[0]] * 400
    runs = sf.Runs.from_arrays(curricula, losses)
    fitted = sf.ConformalSimulator(sf.MeanTrajectorySimulator(), members=5).fit(runs)
    low, high = fitted.interval(curricula[:1], losses[:1, 0], confidence=0.9)
    half = (high - low)[0, 1:] / 2
    assert np.allclose(half, 1.645 * np.array([0.1, 1, 2, 4]), rtol=0.3)
    assert np.allclose((low + high) / 2, fitted.simulate(curricula[:1], losses[:1, 0]))
    assert (low[:, 0] == high[:, 0]).all()


def test_more_confidence_is_wider(runs):
    fitted = sf.ConformalSimulator(sf.LinearSimulator(around="mean"), members=3).fit(runs)
    args = runs.curricula, runs.initial_losses
    widths = [np.subtract(*fitted.interval(*args, confidence=c)[::-1]) for c in (0.5, 0.8, 0.99)]
    assert (widths[0] <= widths[1]).all()
    assert (widths[1] <= widths[2]).all()
    assert (widths[0][:, 1:] > 0).all()


def test_a_curriculum_that_runs_say_little_of_has_wider_intervals(digits):
    fitted, held_out = digits
    run = held_out[0]
    strange = sf.Curriculum([run.curriculum[0]] * 200, n_train=300)
    usual, odd = (np.subtract(*fitted.interval([c], run.losses[0])[::-1]).mean() for c in (run.curriculum, strange))
    assert odd > 1.3 * usual


def test_forecasts_are_those_of_the_simulator_alone(runs):
    alone = sf.LinearSimulator(around="mean").fit(runs)
    fitted = sf.ConformalSimulator(sf.LinearSimulator(around="mean"), members=2).fit(runs)
    args = runs.curricula, runs.initial_losses
    assert np.array_equal(fitted.simulate(*args), alone.simulate(*args))


def test_intervals_are_saved(runs, boosted, tmp_path):
    boosted.save(tmp_path / "fitted.safetensors")
    loaded = sf.Simulator.load(tmp_path / "fitted.safetensors")
    assert loaded.simulator.get_params() == boosted.simulator.get_params()
    args = runs.curricula, runs.initial_losses
    assert np.array_equal(np.stack(loaded.interval(*args)), np.stack(boosted.interval(*args)))
    with pytest.raises(StoreError, match="holds a simulator 'conformal', not one of LinearSimulator"):
        sf.LinearSimulator.load(tmp_path / "fitted.safetensors")


def test_bad_input(runs):
    with pytest.raises(InvalidInput, match="3 runs cannot be split into 4 folds"):
        sf.ConformalSimulator(sf.MeanTrajectorySimulator()).fit(runs[:3])
    fitted = sf.ConformalSimulator(sf.MeanTrajectorySimulator(), members=2).fit(runs)
    with pytest.raises(InvalidInput, match=r"confidence must be from 0.5 to 0.99, got 1"):
        fitted.interval(runs.curricula, runs.initial_losses, confidence=1.0)
    for name in ("members", "folds", "seed"):
        with pytest.raises(InvalidInput, match=f"{name} must be a whole number"):
            sf.ConformalSimulator(**{name: -1}).fit(runs)


def test_losses_recorded_with_gaps(runs):
    gaps = np.arange(11) % 5 == 0
    sparse = sf.Runs(
        dataclasses.replace(run, losses=np.where(gaps[:, None], run.losses, np.nan), recorded=gaps) for run in runs
    )
    fitted = sf.ConformalSimulator(sf.AdditiveSimulator(), members=2).fit(sparse)
    low, high = fitted.interval(runs.curricula, runs.initial_losses)
    assert (low[:, 1:] < high[:, 1:]).all()


def test_a_flipped_bit_is_noticed(boosted, tmp_path):
    file = tmp_path / "fitted.safetensors"
    boosted.save(file)
    content = bytearray(file.read_bytes())
    for position in np.random.default_rng(0).integers(8, len(content), size=100):
        damaged = bytearray(content)
        damaged[position] ^= 1
        file.write_bytes(damaged)
        with pytest.raises(StoreError):
            sf.Simulator.load(file)
