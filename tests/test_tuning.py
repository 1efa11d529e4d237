from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import optuna
import pytest

import simfluence as sf
from simfluence import tuning
from simfluence.errors import DivergedWarning, InvalidInput, StoreError
from simfluence.simulators import SIMULATORS, build
from simfluence.tuning import HOPELESS, search

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


KINDS = ("persistence", "mean_trajectory", "additive", "multiplicative", "linear")


@pytest.fixture(autouse=True)
def kinds(monkeypatch):
    """The kinds that "best" chooses from: quick ones."""
    monkeypatch.setattr(tuning, "SIMULATORS", {name: SIMULATORS[name] for name in KINDS})


@pytest.fixture
def explosive(monkeypatch, kinds):
    for known in (SIMULATORS, tuning.SIMULATORS):
        monkeypatch.setitem(known, "explosive", Explosive)


@pytest.fixture
def fits(monkeypatch):
    """What is fitted from here on."""
    fitted, errors = [], tuning._errors
    monkeypatch.setattr(tuning, "_errors", lambda *of: fitted.append(of[0]) or errors(*of))
    return fitted


def cross_validated_skill(simulator, runs, folds, seed):
    """Slow and explicit."""
    ids = sorted(runs.ids)
    shuffled = [ids[index] for index in np.random.default_rng(seed).permutation(len(ids))]
    ours = theirs = 0.0
    for fold in range(folds):
        held = [run for run in runs if run.id in shuffled[fold::folds]]
        part = sf.Runs(run for run in runs if run.id not in shuffled[fold::folds])
        simulator.fit(part)
        mean = sf.MeanTrajectorySimulator().fit(part)
        for run in held:
            for each, weight in ((simulator, 0), (mean, 1)):
                simulated = each.simulate([run.curriculum], run.initial_losses)[0]
                error = ((simulated[1:] - run.losses[1:].astype(np.float64)) ** 2).sum()
                ours, theirs = ours + (1 - weight) * error, theirs + weight * error
    return 1 - ours / theirs


def same(left, right):
    return left.name == right.name and left.parameters == right.parameters and left.trials.equals(right.trials)


def test_skill_is_cross_validated(runs):
    found = search("linear", runs, trials=8, folds=3, seed=4)
    whole = found.trials[found.trials["folds"] == 3]
    assert len(found.trials) == 8
    assert len(whole) >= 5
    for _, row in whole.iterrows():
        given = {name: row[name] for name in ("l2", "around", "prior") if isinstance(row[name], str | float)}
        simulator = sf.LinearSimulator(**{name: value for name, value in given.items() if value == value})  # not NaN
        assert row["skill"] == pytest.approx(cross_validated_skill(simulator, runs, folds=3, seed=4), abs=1e-9)
    assert found.skill == whole["skill"].max()


def test_a_known_process_needs_little_penalty(known):
    found = search("linear", known.runs, trials=8)
    first = found.trials.loc[0]
    assert (first["l2"], first["prior"]) == (1, "identity")  # the defaults are a candidate, so none is worse
    assert found.skill > max(0.9999, first["skill"])
    assert found.parameters["l2"] < 0.5
    fitted = sf.tune("linear", known.runs, trials=8)
    assert fitted.get_params() == found.simulator.get_params()
    expected = found.simulator.fit(known.runs)
    assert np.array_equal(fitted.A_, expected.A_)


def test_the_same_whatever_the_order_of_runs(runs):
    found = search("additive", runs, trials=12, folds=3, seed=3)
    assert same(found, search("additive", sf.Runs(reversed(runs)), trials=12, folds=3, seed=3))
    assert not same(found, search("additive", runs, trials=12, folds=3, seed=4))


def test_hopeless_candidates_are_stopped_early(known, fits):
    found = search("linear", known.runs, trials=20)
    stopped = found.trials[found.trials["folds"] < 4]
    assert len(stopped) >= 2
    assert stopped["skill"].max() < found.skill
    assert len(fits) == found.trials["folds"].sum() + 4  # and the mean trajectory's folds


def test_fixed_parameters_are_not_searched(runs):
    found = search("linear", runs, trials=10, folds=3, fixed={"around": "mean"})
    assert (found.trials["around"] == "mean").all()
    assert "prior" not in found.parameters
    assert found.trials["l2"].nunique() == 10
    outside = search("linear", runs, trials=3, folds=3, fixed={"l2": 1e-3})
    assert (outside.trials["l2"] == 1e-3).all()
    clash = search("linear", runs, trials=12, folds=3, fixed={"prior": "zero"})
    assert clash.parameters["around"] is None
    assert clash.trials["problem"].str.contains("choose one").any()


def test_nothing_to_tune(runs):
    found = search("persistence", runs, trials=9, folds=3)
    assert (len(found.trials), dict(found.parameters)) == (1, {})
    assert found.skill == pytest.approx(cross_validated_skill(sf.PersistenceSimulator(), runs, folds=3, seed=0))
    fixed = {"l2": 3.0, "around": None, "prior": "zero"}
    assert len(search("linear", runs, trials=9, folds=3, fixed=fixed).trials) == 1
    assert len(search("additive", runs, trials=1, folds=3).trials) == 1


def test_best_of_all_kinds(known):
    found = search("best", known.runs, trials=20)
    assert found.name == "linear"
    counts = found.trials["simulator"].value_counts()
    assert (counts[["persistence", "mean_trajectory"]] == 1).all()
    assert counts[["additive", "multiplicative", "linear"]].sum() == 20
    assert counts["linear"] > counts["additive"] > counts["multiplicative"]  # which the race left behind
    alone = search("linear", known.runs, trials=int(counts["linear"]))
    assert (alone.parameters, alone.skill) == (found.parameters, found.skill)
    assert isinstance(sf.tune("best", known.runs, trials=6), sf.LinearSimulator)
    few = search("best", known.runs, trials=1, fixed={"around": "mean"})
    assert few.trials["simulator"].tolist() == ["additive", "multiplicative", "linear"]


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
    assert (away["skill"] == HOPELESS).all()
    assert away["problem"].str.contains("run away").any()
    assert np.isfinite(found.trials["skill"]).all()
    assert found.parameters["rate"] < 0.5
    assert capfd.readouterr() == ("", "")
    with pytest.raises(InvalidInput, match="nothing that was tried for 'explosive' works: its rollouts run away"):
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


def test_a_storage_remembers(runs, tmp_path, fits):
    file = tmp_path / "new folder" / "trials.sqlite"
    whole = search("best", runs, trials=9, folds=3)
    search("best", runs, trials=5, folds=3, storage=file)
    assert same(search("best", runs, trials=9, folds=3, storage=str(file)), whole)
    other = search("best", runs, trials=9, folds=3, storage=file, seed=1)  # in the same file, and apart
    assert same(other, search("best", runs, trials=9, folds=3, seed=1))
    fits.clear()
    assert same(search("best", runs, trials=9, folds=3, storage=file), whole)
    assert len(fits) == 3  # the mean trajectory of each fold, and nothing else
    assert same(search("best", runs, trials=5, folds=3, storage=file), search("best", runs, trials=5, folds=3))


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
    first = search("additive", runs, trials=7, folds=3, storage=file)
    url = f"sqlite:///{file}"
    (name,) = optuna.get_all_study_names(url)
    study = optuna.load_study(study_name=name, storage=url)
    study.add_trials(study.get_trials()[3:])
    study.enqueue_trial({"l2": 1.0})  # nor does it matter what others leave there
    assert same(search("additive", runs, trials=7, folds=3, storage=file), first)
    more = search("additive", runs, trials=12, folds=3, storage=file)
    assert same(more, search("additive", runs, trials=12, folds=3))


#: Starts a search and kills it, again and again, until one gets through.
KILLED = """
import os, signal, sys, time
import simfluence as sf
from simfluence import tuning
file, runs, errors = sys.argv[1], sf.RunStore(sys.argv[2]).load(), tuning._errors
tuning.search("additive", runs, trials=1, folds=2, storage=file + ".warm")  # imports are paid once
tuning.SIMULATORS = {name: tuning.SIMULATORS[name] for name in sys.argv[3:]}
tuning._errors = lambda *of: time.sleep(0.02) or errors(*of)
kills = 0
while True:
    child = os.fork()
    if not child:
        tuning.search("best", runs, trials=8, folds=3, storage=file)
        os._exit(0)
    time.sleep(0.2 + 0.2 * kills)
    os.kill(child, signal.SIGKILL)
    if os.waitpid(child, 0)[1] == 0:
        break
    kills += 1
print(kills)
"""


def test_killed_at_any_moment_it_finds_the_same(store, tmp_path):
    file = tmp_path / "trials.sqlite"
    command = [sys.executable, "-c", KILLED, file, store.path, *KINDS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) >= 3
    runs = store.load()
    memory = search("best", runs, trials=8, folds=3)
    assert same(search("best", runs, trials=8, folds=3, storage=file), memory)
    url = f"sqlite:///{file}"
    studies = [optuna.load_study(study_name=name, storage=url) for name in optuna.get_all_study_names(url)]
    states = [trial.state.name for study in studies for trial in study.trials]
    assert len(states) == len(memory.trials)
    assert set(states) <= {"COMPLETE", "PRUNED"}  # nothing half done was ever there


def test_interrupted_it_keeps_what_is_finished(known, tmp_path, monkeypatch, fits):
    file = tmp_path / "trials.sqlite"
    counted = tuning._errors

    def interrupt(*of):
        if len(fits) == 4 + 4 * 3 + 2:
            raise KeyboardInterrupt
        return counted(*of)

    monkeypatch.setattr(tuning, "_errors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        search("linear", known.runs, trials=8, storage=file)
    monkeypatch.setattr(tuning, "_errors", counted)
    fits.clear()
    found = search("linear", known.runs, trials=8, storage=file)
    assert len(fits) == 4 + found.trials["folds"][3:].sum()
    assert same(found, search("linear", known.runs, trials=8))


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("linaer", {}, "did you mean 'linear'"),
        ("linear", {"folds": 7}, "6 runs cannot be held out in 7 folds: record more, or ask for folds=6"),
        ("linear", {"folds": 1}, "folds=1"),
        ("linear", {"trials": 0}, "trials=0"),
        ("linear", {"seed": -1}, "seed=-1"),
        ("linear", {"fixed": {"l3": 1}}, "has no parameter 'l3', known are: around, l2, prior"),
        ("linear", {"fixed": {"l2": -1}}, "l2 must be a number above 0"),
        ("best", {"fixed": {"l2": 1, "depth": 2}}, "no simulator has all of the parameters l2, depth"),
    ],
)
def test_bad_requests(runs, name, arguments, said):
    with pytest.raises(InvalidInput, match=said):
        sf.tune(name, runs, **arguments)


def test_runs_that_cannot_be_tuned_on(runs, known):
    with pytest.raises(InvalidInput, match="no run to tune on"):
        sf.tune("linear", runs[:0])
    with pytest.raises(InvalidInput, match="1 runs cannot be held out in 2 folds: record more, or 2 are needed"):
        sf.tune("linear", runs[:1], folds=2)
    alike = sf.Runs.from_arrays(known.runs.curricula[:6], np.ones((6, 41, 2)))
    with pytest.raises(InvalidInput, match="forecasts these runs exactly"):
        sf.tune("linear", alike)


def test_storages_that_cannot_be_used(runs, tmp_path):
    (tmp_path / "file").write_text("this is no database, though it is long enough to be looked at " * 20)
    for path in (tmp_path / "file", tmp_path, tmp_path / "file" / "trials.sqlite"):
        with pytest.raises(StoreError, match="cannot keep trials in"):
            search("additive", runs, trials=1, folds=2, storage=path)


@pytest.mark.parametrize("simulator", ["linear", sf.LinearSimulator(l2=5.0, around="mean")])
def test_learning_curve_is_of_evaluate(known, simulator):
    curve = sf.learning_curve(simulator, known.runs, sizes=[9, 2, 22], held_out=8, repeats=3, seed=6)
    fit, held = known.runs.split(8, seed=6)
    assert curve["runs"].tolist() == [2, 9, 22]
    assert curve["repeats"].tolist() == [3, 3, 1]
    for _, row in curve.iterrows():
        tables = []
        for repeat in range(int(row["repeats"])):
            order = np.random.default_rng([6, repeat]).permutation(22)[: int(row["runs"])]
            part = sf.Runs(fit[int(index)] for index in order)
            fitted = (build(simulator) if simulator == "linear" else sf.LinearSimulator(5.0, around="mean")).fit(part)
            tables.append(sf.evaluate({"it": fitted}, held, part, bootstrap=10).loc["it"])
        for name in ("skill", "final_skill"):
            assert row[name] == pytest.approx(np.median([table[name] for table in tables]), rel=1e-6)
            assert row[f"{name}_low"] < row[name] < row[f"{name}_high"]
    assert curve["skill"].is_monotonic_increasing
    assert not hasattr(simulator, "n_train_")  # it was cloned


def test_interval_of_all_runs_is_the_bootstrap_over_held_out_runs(known):
    curve = sf.learning_curve("additive", known.runs, sizes=[22])
    fit, held = known.runs.split(8)
    table = sf.evaluate({"it": sf.AdditiveSimulator().fit(fit)}, held, fit, bootstrap=4000).loc["it"]
    for name in ("skill_low", "skill_high", "final_skill_low", "final_skill_high"):
        assert curve.loc[0, name] == pytest.approx(table[name], abs=0.03)


def test_learning_curve_sizes_and_what_runs_away(known, runs, explosive):
    assert sf.learning_curve("additive", known.runs, held_out=11)["runs"].tolist() == [2, 4, 8, 16, 19]
    assert sf.learning_curve("additive", known.runs, held_out=14)["runs"].tolist() == [2, 4, 8, 16]
    assert sf.learning_curve("additive", known.runs, held_out=29)["runs"].tolist() == [1]
    away = sf.learning_curve(Explosive(rate=0.9), runs, held_out=2)
    assert (away[["skill", "skill_low", "final_skill_high"]] == HOPELESS).all(axis=None)
    for arguments, said in (
        ({"sizes": [0, 2]}, "from 1 to the 22"),
        ({"sizes": []}, "from 1 to the 22"),
        ({"sizes": [23]}, "from 1 to the 22"),
        ({"repeats": 0}, "repeats=0"),
        ({"held_out": 30}, "leave at least one"),
    ):
        with pytest.raises(InvalidInput, match=said):
            sf.learning_curve("linear", known.runs, **arguments)


@pytest.mark.slow
def test_digits_are_tuned_around_the_mean():
    fit, held = sf.RunStore(ROOT / "runs" / "digits").load().split(8)
    tuned = sf.tune("linear", fit, trials=20, seed=0)
    assert tuned.around == "mean"
    assert sf.evaluate({"tuned": tuned}, held, fit, metrics=["skill"]).loc["tuned", "skill"] >= 0.6
