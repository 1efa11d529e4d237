from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
import pytest

import simfluence as sf
from simfluence.errors import DivergedWarning, InvalidInput, StoreError
from simfluence.evaluation import tuning
from simfluence.evaluation.metrics import MIN_SKILL
from simfluence.evaluation.tuning import search
from simfluence.simulators import SIMULATORS

ROOT = Path(__file__).parents[1]


class Explosive(sf.Simulator):
    """Right up to the mean where ``rate`` is small, and beyond all numbers where it is large."""

    name = "explosive"

    def __init__(self, rate: float = 0.1) -> None:
        self.rate = rate

    @classmethod
    def suggest(cls, trial):
        return {"rate": trial.suggest_float("rate", 0.0, 1.0)}

    def _fit(self, runs):
        self.mean_ = runs.losses.astype(np.float64).mean(0)

    def _simulate(self, curricula, initial):
        shape = (len(curricula), *self.mean_.shape)
        factor = np.exp(np.full(shape, 2000 * max(0.0, self.rate - 0.5)))  # overflows
        return np.broadcast_to(self.mean_, shape) * factor * (0.9 + self.rate) + (factor - factor)


KINDS = ("persistence", "mean_trajectory", "additive", "multiplicative", "linear", "tangent")


@pytest.fixture
def only(monkeypatch):
    """Says which kinds "best" chooses from."""
    return lambda *names: monkeypatch.setattr(tuning, "SIMULATORS", {name: SIMULATORS[name] for name in names})


@pytest.fixture(autouse=True)
def kinds(only):
    """Quick ones, unless a test says otherwise."""
    only(*KINDS)


@pytest.fixture
def explosive(monkeypatch, kinds):
    monkeypatch.setitem(tuning.SIMULATORS, "explosive", Explosive)


@pytest.fixture
def fits(monkeypatch):
    """What is fitted from here on."""
    fitted, errors = [], tuning.fitted_errors
    monkeypatch.setattr(tuning, "fitted_errors", lambda *of: fitted.append(of[0]) or errors(*of))
    return fitted


def cross_validated_skill(simulator, runs, folds, seed):
    """Slow and explicit."""
    ids = sorted(runs.ids)
    shuffled = [ids[index] for index in np.random.default_rng(seed).permutation(len(ids))]
    errors = [0.0, 0.0]  # of the simulator and of the mean trajectory
    for fold in range(folds):
        held = [run for run in runs if run.id in shuffled[fold::folds]]
        part = sf.Runs(run for run in runs if run.id not in shuffled[fold::folds])
        fitted = [simulator.fit(part), sf.MeanTrajectorySimulator().fit(part)]
        for run in held:
            for index, forecaster in enumerate(fitted):
                simulated = forecaster.simulate([run.curriculum], run.initial_losses)[0]
                errors[index] += ((simulated[1:] - run.losses[1:].astype(np.float64)) ** 2).sum()
    return 1 - errors[0] / errors[1]


#: What is searched of a linear simulator.
DRAWN = ("l2", "around", "prior", "order", "varying")


def same(left, right):
    return left.name == right.name and left.parameters == right.parameters and left.trials.equals(right.trials)


@pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")  # folds of a few runs miss examples
def test_skill_is_cross_validated(runs):
    found = search("linear", runs, trials=8, folds=3, seed=4)
    whole = found.trials[found.trials["folds"] == 3]
    assert len(found.trials) == 8
    assert len(whole) >= 5
    assert set(found.trials.columns) == {"simulator", *DRAWN, "skill", "folds", "problem"}
    for row in whole.to_dict("records"):
        given = {name: row[name] for name in DRAWN if not (pd.isna(row[name]) and name == "prior")}
        simulator = sf.LinearSimulator(**given | {"around": None if pd.isna(row["around"]) else row["around"]})
        assert row["skill"] == pytest.approx(cross_validated_skill(simulator, runs, folds=3, seed=4), abs=1e-9)
    assert found.skill == whole["skill"].max()


@pytest.fixture(scope="module")
def known_search(known):
    """A search for a linear simulator on the known process, and every simulator that it fitted."""
    fitted, errors = [], tuning.fitted_errors
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tuning, "fitted_errors", lambda *of: fitted.append(of[0]) or errors(*of))
        return search("linear", known.runs, trials=20), fitted


def test_a_known_process_needs_little_penalty(known_search):
    found, _ = known_search
    first = found.trials.loc[0]
    assert (first["l2"], first["prior"]) == (1, "identity")  # the defaults are a candidate, so none is worse
    assert found.skill > max(0.9999, first["skill"])
    assert found.parameters["l2"] < 0.5


def test_tuned_it_is_fitted_on_all_runs(known):
    fitted = sf.tune("linear", known.runs, trials=2, folds=2)
    found = search("linear", known.runs, trials=2, folds=2)
    assert fitted.get_params() == found.simulator.get_params()
    expected = found.simulator.fit(known.runs)
    assert np.array_equal(fitted.A_, expected.A_)


def test_the_same_whatever_the_order_of_runs(runs):
    found = search("additive", runs, trials=8, folds=2, seed=3)
    assert same(found, search("additive", sf.Runs(reversed(runs)), trials=8, folds=2, seed=3))
    assert not same(found, search("additive", runs, trials=8, folds=2, seed=4))


def test_hopeless_candidates_are_stopped_early(known_search):
    found, fits = known_search
    stopped = found.trials[found.trials["folds"] < 4]
    assert len(stopped) >= 2
    assert stopped["skill"].max() < found.skill
    assert len(fits) == found.trials["folds"].sum() + 4  # and the mean trajectory's folds


def test_fixed_parameters_are_not_searched(runs):
    found = search("linear", runs, trials=6, folds=3, fixed={"around": "mean"})
    assert (found.trials["around"] == "mean").all()
    assert "prior" not in found.parameters
    assert found.trials["l2"].nunique() == 6
    outside = search("linear", runs, trials=3, folds=3, fixed={"l2": 1e-3})
    assert (outside.trials["l2"] == 1e-3).all()
    clash = search("linear", runs, trials=12, folds=3, fixed={"prior": "zero"})
    assert clash.parameters["around"] is None
    assert clash.trials["problem"].str.contains("choose one").any()


@pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")
def test_the_tangent_kernel_is_tuned_with_its_task(task, runs, tmp_path, only):
    fixed = {"task": task, "n_checkpoints": 2, "n_references": 1}
    found = search("tangent", runs, trials=2, folds=2, fixed=fixed, storage=tmp_path / "trials.sqlite")
    default, ordered = sf.TangentKernelSimulator(**fixed), sf.Runs(sorted(runs, key=lambda run: run.id))
    assert found.trials["skill"][0] == pytest.approx(cross_validated_skill(default, ordered, folds=2, seed=0))
    assert found.trials["task"].tolist() == [task.fingerprint] * 2
    assert found.trials["n_features"][0] == default.n_features
    assert (found.trials["problem"] == "").all()
    assert found.simulator.task is task
    assert task.fingerprint.encode() in (tmp_path / "trials.sqlite").read_bytes()
    assert same(search("tangent", runs, trials=2, folds=2, fixed=fixed, storage=tmp_path / "trials.sqlite"), found)
    only("additive", "tangent")
    assert tuning._kinds("best", {"task": task})[0] == [sf.AdditiveSimulator, sf.TangentKernelSimulator]
    assert tuning._kinds("best", fixed)[0] == [sf.TangentKernelSimulator]  # no other kind has these parameters


def test_nothing_to_tune(runs):
    found = search("persistence", runs, trials=9, folds=3)
    assert (len(found.trials), dict(found.parameters)) == (1, {})
    assert found.skill == pytest.approx(cross_validated_skill(sf.PersistenceSimulator(), runs, folds=3, seed=0))
    fixed = {"l2": 3.0, "around": None, "prior": "zero", "order": 1, "varying": False}
    assert len(search("linear", runs, trials=9, folds=3, fixed=fixed).trials) == 1
    assert len(search("additive", runs, trials=1, folds=3).trials) == 1


def test_best_of_all_kinds(known):
    found = search("best", known.runs, trials=12)
    assert found.name == "linear"
    assert (found.trials["problem"] == "").all()
    counts = found.trials["simulator"].value_counts()
    assert (counts[["persistence", "mean_trajectory"]] == 1).all()
    assert counts[["additive", "multiplicative", "linear"]].sum() == 12
    assert counts["linear"] > counts["additive"] > counts["multiplicative"]  # which the race left behind
    alone = search("linear", known.runs, trials=int(counts["linear"]))
    assert (alone.parameters, alone.skill) == (found.parameters, found.skill)
    assert isinstance(sf.tune("best", known.runs, trials=3), sf.LinearSimulator)
    few = search("best", known.runs, trials=1, fixed={"around": "mean"})
    assert few.trials["simulator"].tolist() == ["additive", "multiplicative", "linear"]


def test_boosted_takes_part_where_examples_have_features(runs, known, only):
    only("additive", "boosted")
    few = {"rounds": 2, "min_rows": 5}
    able = search("best", runs, trials=1, folds=2)
    assert np.isfinite(able.trials["skill"]).all()
    assert (able.trials["problem"] == "").all()
    unable = search("best", known.runs, trials=4, folds=2)  # from arrays: nothing is known of the examples
    boosted = unable.trials["simulator"] == "boosted"
    assert unable.name == "additive"
    assert boosted.sum() == 1
    assert unable.trials[boosted]["problem"].str.contains("features").all()
    with pytest.raises(InvalidInput, match=r"'boosted' works: .* features"):
        search("boosted", known.runs, trials=1, folds=2, fixed=few)


def test_where_the_curriculum_does_not_matter_the_mean_is_best():
    rng = np.random.default_rng(0)
    curricula = sf.random_curricula(n_train=6, runs=12, steps=10, batch_size=2, seed=0)
    losses = 5 * rng.normal(size=(11, 3)) + rng.normal(size=(12, 11, 3))
    found = search("best", sf.Runs.from_arrays(curricula, losses), trials=3)
    assert (found.name, found.skill) == ("mean_trajectory", 0)


def test_candidates_that_run_away_are_bad_and_silent(runs, explosive, capfd):
    found = search("explosive", runs, trials=12, folds=3)
    away = found.trials[found.trials["rate"] > 0.7]
    assert len(away) >= 2
    assert (away["skill"] == MIN_SKILL).all()
    assert away["problem"].str.contains("grow without bounds").any()
    assert np.isfinite(found.trials["skill"]).all()
    assert found.parameters["rate"] < 0.5
    assert capfd.readouterr() == ("", "")
    with pytest.raises(InvalidInput, match="no candidate for 'explosive' works: its simulated losses grow"):
        search("explosive", runs, trials=3, folds=3, fixed={"rate": 0.9})


def test_a_kind_that_cannot_be_fitted_says_why(runs):
    gaps = [sf.Run(r.id, r.curriculum, r.losses, recorded=np.arange(11) % 2 == 0) for r in runs]
    found = search("additive", sf.Runs(gaps), trials=6, folds=3)
    assert found.parameters["around"] is None
    with pytest.raises(InvalidInput, match=r"'linear' works: .* recorded with gaps"):
        search("linear", sf.Runs(gaps), trials=2, folds=3)


def test_the_users_optuna_is_left_as_it_was(runs, capfd):
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.DEBUG)
    try:
        search("additive", runs, trials=2, folds=2)
        assert optuna.logging.get_verbosity() == optuna.logging.DEBUG
    finally:
        optuna.logging.set_verbosity(before)
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal(runs, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    search("additive", runs, trials=3, folds=2)
    assert "tuning" in capfd.readouterr().err
    search("additive", runs, trials=3, folds=2, progress=False)
    assert capfd.readouterr().err == ""


def test_diverged_runs_are_left_out_with_one_warning(runs):
    broken = sf.Run("broken", runs[0].curriculum, np.full_like(runs[0].losses, np.nan))
    with pytest.warns(DivergedWarning, match="broken") as caught:
        fitted = sf.tune("additive", sf.Runs([*runs, broken]), trials=3, folds=3)
    assert len(caught) == 1
    assert np.array_equal(fitted.B_, sf.tune("additive", runs, trials=3, folds=3).B_)


def test_a_storage_remembers(runs, tmp_path, fits, only):
    file = tmp_path / "new folder" / "trials.sqlite"
    only("persistence", "additive", "linear")
    whole = search("best", runs, trials=8, folds=2)
    search("best", runs, trials=4, folds=2, storage=file)
    assert same(search("best", runs, trials=8, folds=2, storage=str(file)), whole)
    other = search("best", runs, trials=4, folds=2, storage=file, seed=1)  # in the same file, and apart
    assert same(other, search("best", runs, trials=4, folds=2, seed=1))
    fits.clear()
    assert same(search("best", runs, trials=8, folds=2, storage=file), whole)
    assert len(fits) == 2  # the mean trajectory of each fold, and nothing else
    assert same(search("best", runs, trials=4, folds=2, storage=file), search("best", runs, trials=4, folds=2))


@pytest.mark.parametrize("what", ["fewer runs", "other losses", "folds", "seed", "fixed"])
def test_what_is_remembered_is_of_the_same_search(runs, tmp_path, what, fits):
    arguments = {"runs": runs, "trials": 2, "folds": 3, "storage": tmp_path / "trials.sqlite"}
    search("additive", **arguments)
    other = [sf.Run(id=run.id, curriculum=run.curriculum, losses=run.losses + 1) for run in runs]
    changes = {"fewer runs": {"runs": runs[:5]}, "other losses": {"runs": sf.Runs(other)}, "folds": {"folds": 2}}
    changes |= {"seed": {"seed": 5}, "fixed": {"fixed": {"around": "mean"}}}
    fits.clear()
    search("additive", **(arguments | changes[what]))
    assert sum(isinstance(simulator, sf.AdditiveSimulator) for simulator in fits) >= 4


def test_two_processes_may_have_kept_the_same_trials(runs, tmp_path):
    file = tmp_path / "trials.sqlite"
    first = search("additive", runs, trials=7, folds=2, storage=file)
    url = f"sqlite:///{file}"
    (name,) = optuna.get_all_study_names(url)
    study = optuna.load_study(study_name=name, storage=url)
    study.add_trials(study.get_trials()[3:])
    study.enqueue_trial({"l2": 1.0})  # nor does it matter what others leave there
    assert same(search("additive", runs, trials=7, folds=2, storage=file), first)
    more = search("additive", runs, trials=9, folds=2, storage=file)
    assert same(more, search("additive", runs, trials=9, folds=2))


#: Starts a search and kills it, again and again, until one gets through; prints how much was kept at each kill.
KILLED = """
import os, signal, sqlite3, sys, time
import torch
import simfluence as sf
from simfluence.evaluation import tuning
torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
file, runs, errors = sys.argv[1], sf.RunStore(sys.argv[2]).load(), tuning.fitted_errors
tuning.search("additive", runs, trials=1, folds=2, storage=file + ".warm")  # imports are paid once
tuning.SIMULATORS = {name: tuning.SIMULATORS[name] for name in sys.argv[3:]}
tuning.fitted_errors = lambda *of: time.sleep(0.05) or errors(*of)
def kept():
    if not os.path.exists(file):
        return 0
    with sqlite3.connect(file) as database:
        there = database.execute("select 1 from sqlite_master where name = 'trials'").fetchone()
        return database.execute("select count(*) from trials").fetchone()[0] if there else 0
kills = []
while True:
    child = os.fork()
    if not child:
        tuning.search("best", runs, trials=6, folds=2, storage=file)
        os._exit(0)
    time.sleep(0.05 * 1.4 ** len(kills))
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == 0:
        break
    kills.append(kept())
print(*kills)
"""


def test_killed_at_any_moment_it_finds_the_same(store, tmp_path, only):
    kinds = ("persistence", "additive", "linear")
    only(*kinds)
    file = tmp_path / "trials.sqlite"
    command = [sys.executable, "-c", KILLED, file, store.path, *kinds]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    runs = store.load()
    memory = search("best", runs, trials=6, folds=2)
    kept = [int(count) for count in done.stdout.split()]
    assert len(kept) >= 3
    assert any(0 < count < len(memory.trials) for count in kept)  # in the middle
    assert same(search("best", runs, trials=6, folds=2, storage=file), memory)
    url = f"sqlite:///{file}"
    studies = [optuna.load_study(study_name=name, storage=url) for name in optuna.get_all_study_names(url)]
    states = [trial.state.name for study in studies for trial in study.trials]
    assert len(states) == len(memory.trials)
    assert set(states) <= {"COMPLETE", "PRUNED"}  # nothing half done was ever there


def test_a_database_is_created_whole_or_not_at_all(runs, tmp_path, monkeypatch):
    def interrupt(*of):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("os.link", interrupt)
        with pytest.raises(KeyboardInterrupt):
            search("additive", runs, trials=1, folds=2, storage=tmp_path / "trials.sqlite")
    assert list(tmp_path.iterdir()) == []
    search("additive", runs, trials=1, folds=2, storage=tmp_path / "trials.sqlite")
    assert [path.name for path in tmp_path.iterdir()] == ["trials.sqlite"]


def test_interrupted_it_keeps_what_is_finished(known, tmp_path, monkeypatch, fits):
    file = tmp_path / "trials.sqlite"
    counted = tuning.fitted_errors

    def interrupt(*of):
        if len(fits) == 4 + 4 * 3 + 2:
            raise KeyboardInterrupt
        return counted(*of)

    monkeypatch.setattr(tuning, "fitted_errors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search("linear", known.runs, trials=5, storage=file)
    monkeypatch.setattr(tuning, "fitted_errors", counted)
    fits.clear()
    found = search("linear", known.runs, trials=5, storage=file)
    assert len(fits) == 4 + found.trials["folds"][3:].sum()
    assert same(found, search("linear", known.runs, trials=5))


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("linaer", {}, "did you mean 'linear'"),
        ("linear", {"folds": 7}, r"6 run\(s\) cannot be split into 7 folds: record more runs, or use folds=6"),
        ("linear", {"folds": 1}, "folds must be at least 2, got 1"),
        ("linear", {"trials": 0}, "trials must be at least 1 and at most 1000000, got 0"),
        ("linear", {"seed": -1}, "seed must be at least 0, got -1"),
        (
            "linear",
            {"fixed": {"l3": 1}},
            "has no parameter 'l3', choose from: around, guard, l2, order, prior, rollout, varying",
        ),
        ("linear", {"fixed": {"l2": -1}}, "l2 must be a number above 0"),
        ("tangent", {}, "'tangent' needs the task: pass fixed={'task': task}"),
        ("best", {"fixed": {"l2": 1, "depth": 2}}, "no simulator has all of the parameters l2, depth"),
    ],
)
def test_bad_requests(runs, name, arguments, said):
    with pytest.raises(InvalidInput, match=said):
        sf.tune(name, runs, **arguments)


def test_runs_that_cannot_be_tuned_on(runs, known):
    with pytest.raises(InvalidInput, match="no run to tune on"):
        sf.tune("linear", runs[:0])
    with pytest.raises(InvalidInput, match=r"1 run\(s\) cannot be split into 2 folds: record at least 2"):
        sf.tune("linear", runs[:1], folds=2)
    alike = sf.Runs.from_arrays(known.runs.curricula[:6], np.ones((6, 41, 2)))
    with pytest.raises(InvalidInput, match="forecasts these runs exactly"):
        sf.tune("linear", alike)


def test_storages_that_cannot_be_used(runs, tmp_path):
    (tmp_path / "file").write_text("this is no database, though it is long enough to be looked at " * 20)
    for path in (tmp_path / "file", tmp_path, tmp_path / "file" / "trials.sqlite"):
        with pytest.raises(StoreError, match="cannot store trials in"):
            search("additive", runs, trials=1, folds=2, storage=path)


@pytest.mark.slow
def test_digits_are_tuned_around_the_mean():
    fit, held = sf.RunStore(ROOT / "runs" / "digits").load().split(8)
    tuned = sf.tune("linear", fit, trials=20, seed=0)
    assert tuned.around == "mean"
    assert sf.evaluate({"tuned": tuned}, held, fit, metrics=["skill"]).loc["tuned", "skill"] >= 0.6
