from __future__ import annotations

import numpy as np
import pytest

import simfluence as sf
from simfluence.errors import DivergedWarning, InvalidInput
from simfluence.evaluation.metrics import MIN_SKILL
from simfluence.simulators import build


class Overflowing(sf.Simulator):
    """Runs away, with a warning of NumPy."""

    name = "overflowing"

    def _fit(self, runs):
        self.shape_ = list(runs.losses.shape[1:])

    def _simulate(self, curricula, initial):
        return np.exp(np.full((len(curricula), *self.shape_), 2000.0))


@pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")  # two runs miss examples
@pytest.mark.parametrize("simulator", ["linear", sf.LinearSimulator(l2=5.0, around="mean")])
def test_it_is_of_evaluate(known, simulator):
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


def test_default_sizes(known):
    for held_out, sizes in ((11, [2, 4, 8, 16, 19]), (14, [2, 4, 8, 16]), (29, [1])):
        assert sf.learning_curve("additive", known.runs, held_out=held_out)["runs"].tolist() == sizes


def test_what_runs_away_is_hopeless_and_silent(runs):
    away = sf.learning_curve(Overflowing(), runs, held_out=2)
    assert (away[["skill", "skill_low", "final_skill_high"]] == MIN_SKILL).all(axis=None)


def test_diverged_runs_are_left_out(runs):
    broken = sf.Run("broken", runs[0].curriculum, np.full_like(runs[0].losses, np.nan))
    with pytest.warns(DivergedWarning, match="broken"):
        curve = sf.learning_curve("additive", sf.Runs([*runs, broken]), held_out=2)
    assert curve.equals(sf.learning_curve("additive", runs, held_out=2))


def test_progress_on_a_terminal(runs, capfd, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    sf.learning_curve("additive", runs, held_out=2)
    assert "learning curve" in capfd.readouterr().err
    sf.learning_curve("additive", runs, held_out=2, progress=False)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"sizes": [0, 2]}, "from 1 to 22"),
        ({"sizes": []}, "from 1 to 22"),
        ({"sizes": [23]}, "from 1 to 22"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
        ({"held_out": 30}, "leave at least one"),
    ],
)
def test_bad_requests(known, arguments, said):
    with pytest.raises(InvalidInput, match=said):
        sf.learning_curve("linear", known.runs, **arguments)
