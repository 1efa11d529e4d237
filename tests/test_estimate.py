from __future__ import annotations

import math
import time

import pytest

import simfluence as sf
from simfluence.errors import InvalidInput
from simfluence.recording.estimate import break_even, duration


@pytest.fixture(scope="module")
def job():
    task = sf.tasks.digits(n_train=60, n_test=40)
    return task, sf.Recipe(optimizer="adam", lr=0.01), sf.random_curricula(60, runs=4, steps=80, batch_size=8)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_time_and_disk_are_about_right(job, engine, tmp_path):
    observe = sf.Observe(every=2, measures=["margin"], checkpoints=[0, 30, 60])
    estimate = sf.estimate(*job, tmp_path, observe=observe, engine=engine, steps=40)
    assert not any(tmp_path.iterdir())  # nothing is written
    start = time.perf_counter()
    sf.record(*job, tmp_path, observe=observe, engine=engine)
    seconds = time.perf_counter() - start
    disk = sum(file.stat().st_size for file in tmp_path.rglob("*") if "run-" in file.name or "step-" in file.name)
    assert estimate.engines == {engine: 4}
    assert (estimate.runs, estimate.already_recorded) == (4, 0)
    assert 0.2 * seconds < estimate.seconds < 5 * seconds  # machines are noisy
    assert 0.7 * disk < estimate.disk < 1.4 * disk
    assert 50e6 < estimate.memory < 100e9
    assert "4 runs to record" in str(estimate)
    assert estimate.seconds_per_run == estimate.seconds / 4
    assert f"A run takes {duration(estimate.seconds / 4)} to train" in str(estimate)


def test_what_is_there_costs_nothing(job, tmp_path):
    task, recipe, curricula = job
    sf.record(task, recipe, curricula[:2], tmp_path, engine="loop")
    estimate = sf.estimate(*job, tmp_path, engine="loop")
    assert (estimate.runs, estimate.already_recorded) == (2, 2)
    sf.record(*job, tmp_path, engine="loop")
    estimate = sf.estimate(*job, tmp_path, engine="loop")
    assert (estimate.runs, estimate.already_recorded, estimate.seconds, estimate.disk) == (0, 4, 0, 0)
    assert math.isnan(estimate.seconds_per_run)
    assert "A run takes" not in str(estimate)


def test_short_runs(job):
    task, recipe, _ = job
    assert sf.estimate(task, recipe, sf.random_curricula(60, runs=2, steps=1, batch_size=4)).runs == 2


def test_bad_requests(job):
    task, recipe, curricula = job
    with pytest.raises(InvalidInput, match="no curriculum"):
        sf.estimate(task, recipe, [])
    with pytest.raises(InvalidInput, match="every=81"):
        sf.estimate(task, recipe, curricula, observe=sf.Observe(every=81))


def test_when_a_simulator_pays_off():
    fit, simulate, retrain = 30.0, 0.5, 2.0
    questions = break_even(fit, simulate, retrain)
    assert fit + questions * simulate == pytest.approx(questions * retrain)
    assert break_even(0.0, 0.0, 0.1) == 0
    for never in ((30.0, 2.0, 2.0), (0.0, 3.0, 2.0), (None, 3.0, 2.0)):
        assert break_even(*never) == math.inf
    assert math.isnan(break_even(None, 1.0, 2.0))
    assert math.isnan(break_even(1.0, None, 2.0))
    with pytest.raises(InvalidInput, match="retrain must be at least 0"):
        break_even(1.0, 1.0, -1.0)
    assert [duration(seconds) for seconds in (0.0213, 3.21, 45.3, 240, 9000)] == [
        "0.02 s", "3.2 s", "45 s", "4 min", "2.5 h",
    ]  # fmt: skip
