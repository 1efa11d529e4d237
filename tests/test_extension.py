"""A simulator of one's own goes everywhere that the library's own go, and files say which version wrote them."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from sklearn.pipeline import Pipeline

import simfluence as sf
import simfluence.task
from simfluence import attribution
from simfluence.attribution import METHODS
from simfluence.cli.options import METHOD_NAMES, SIMULATOR_NAMES
from simfluence.errors import InvalidInput, StoreError
from simfluence.evaluation import search
from simfluence.recording import Estimate
from simfluence.simulators import SIMULATORS, check_simulator
from simfluence.simulators.base import FORMAT, _checksum

MINE = '''
import numpy as np
import simfluence as sf


class Mine(sf.Simulator):
    """The mean trajectory, drawn to where the losses started."""

    name = "mine"

    def __init__(self, pull: float = 0.0) -> None:
        self.pull = pull

    @classmethod
    def suggest(cls, trial):
        return {"pull": trial.suggest_float("pull", 0.0, 1.0)}

    def _fit(self, runs):
        self.mean_ = runs.losses.astype(np.float64).mean(axis=0)

    def _simulate(self, curricula, initial):
        times = np.minimum(np.arange(max(map(len, curricula)) + 1), len(self.mean_) - 1)
        return self.mean_[times] + self.pull * (initial - self.mean_[0])[:, None]
'''


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """The class, from a file of its own."""
    (tmp_path / "my_simulators.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)
    import my_simulators

    yield my_simulators.Mine
    monkeypatch.delitem(__import__("sys").modules, "my_simulators")


@pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")
def test_a_simulator_of_ones_own_goes_everywhere(mine, runs, task, tmp_path):
    assert len(MINE.splitlines()) < 30
    fit, held = runs[:4], runs[4:]
    fitted = mine().fit(fit)
    assert sf.evaluate({"mine": fitted}, held, fit)["skill"].item() == pytest.approx(fitted.score(held))
    for given in ("mine", mine, mine()):
        assert type(sf.tune(given, fit, trials=2, folds=2)) is mine
    assert dict(search(mine(pull=0.25), fit, trials=3, folds=2).parameters) == {"pull": 0.25}
    fitted.save(tmp_path / "mine.safetensors")
    loaded = sf.Simulator.load(tmp_path / "mine.safetensors")
    assert np.array_equal(loaded.simulate(*everything(held)), fitted.simulate(*everything(held)))
    assert np.isfinite(sf.what_if(fitted, held[0], sf.Remove([0]), task=task).change).all()
    assert np.asarray(sf.leave_one_out(fitted, held[0])).shape == (5, 12)
    low, high = sf.ConformalSimulator(mine(), members=2).fit(runs).interval(*everything(held))
    assert (low <= high).all()


LIBRARY = [kind for kind in SIMULATORS.values() if kind.__module__.startswith("simfluence.")]


#: Instances in place of a class whose defaults are slow.
FAST = {
    sf.TangentKernelSimulator: sf.TangentKernelSimulator(n_checkpoints=2, n_references=1, n_features=1),
    sf.BoostedSimulator: sf.BoostedSimulator(rounds=5),
}


@pytest.mark.parametrize(
    "kind", [*(FAST.get(kind, kind) for kind in LIBRARY), sf.ConformalSimulator, sf.LinearSimulator(l2=3.0, order=2)]
)
def test_every_simulator_keeps_its_promises(kind):
    check_simulator(kind)


def test_a_simulator_of_ones_own_keeps_its_promises(mine):
    check_simulator(mine)
    unfitted = mine(pull=0.5)
    check_simulator(unfitted)
    assert not hasattr(unfitted, "n_train_")


class Sound(sf.Simulator):
    """Its subclasses break one promise each."""

    name = "sound"

    def __init__(self, pull: float = 0.5) -> None:
        self.pull = pull

    def _fit(self, runs):
        self.mean_ = runs.losses.astype(np.float64).mean(axis=0)

    def _simulate(self, curricula, initial):
        times = np.minimum(np.arange(max(map(len, curricula)) + 1), len(self.mean_) - 1)
        return self.mean_[times] + self.pull * (initial - self.mean_[0])[:, None]


class ChangesParameters(Sound):
    def __init__(self, pull: float = 0.5) -> None:
        self.pull = [pull]


class RequiresArguments(Sound):
    def __init__(self, pull: float) -> None:
        self.pull = pull


class FittedFromTheStart(Sound):
    n_train_, n_test_ = 12, 4


class ReturnsNothing(Sound):
    def fit(self, runs, y=None):
        super().fit(runs)


class MisnamesItsMean(Sound):
    def _fit(self, runs):
        super()._fit(runs)
        self.average = self.mean_


class ChangesItsRuns(Sound):
    def _fit(self, runs):
        super()._fit(runs)
        runs[0].losses[1:] -= 1


class ForecastsTooShort(Sound):
    def _simulate(self, curricula, initial):
        return super()._simulate(curricula, initial)[:, :-1]


class NotBeyondItsRuns(Sound):
    def _simulate(self, curricula, initial):
        losses = super()._simulate(curricula, initial)
        losses[:, len(self.mean_) :] = np.nan
        return losses


class Random(Sound):
    def _simulate(self, curricula, initial):
        losses = super()._simulate(curricula, initial)
        return losses + np.random.default_rng().normal(size=losses.shape)


class LooksAtTheOthers(Sound):
    def _simulate(self, curricula, initial):
        losses = super()._simulate(curricula, initial)
        return losses - losses.mean(axis=0)


class LearnsFromDivergedRuns(Sound):
    def fit(self, runs, y=None):
        super().fit(runs)
        self.mean_ = runs.losses.astype(np.float64).mean(axis=0)
        return self


class NoScore(Sound):
    def score(self, runs, y=None):
        return None


class HidesAFunction(Sound):
    name = "hides_a_function"

    def _fit(self, runs):
        super()._fit(runs)
        self.function_ = np.mean


class ForgetsInFiles(Sound):
    name = "forgets_in_files"

    def _state(self):
        about, arrays = super()._state()
        return about, {name: np.round(array, 2) for name, array in arrays.items()}


class Nameless(Sound):
    """It would be read as its base class."""


def test_a_sound_simulator_passes():
    check_simulator(Sound)


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (ChangesParameters, "do not survive get_params, set_params and clone .*let __init__ store each argument"),
        (RequiresArguments, "RequiresArguments cannot be built without arguments .*: give its parameters defaults"),
        (FittedFromTheStart, "simulate before fit does not raise NotFittedError"),
        (ReturnsNothing, "fit does not return the simulator itself"),
        (MisnamesItsMean, "fit sets average, which save leaves out"),
        (ChangesItsRuns, "fit changes the losses of its runs"),
        (ForecastsTooShort, r"simulate returns float64 \[7, 16, 4\], not float64 \[7, 17, 4\]"),
        (NotBeyondItsRuns, "forecasts of 16 steps are NaN or infinite, with fitting runs of 8 steps"),
        (Random, "other losses the second time"),
        (LooksAtTheOthers, "simulated alone has other losses"),
        (LearnsFromDivergedRuns, "a diverged run among the fitting runs makes forecasts NaN"),
        (NoScore, "score is None, not a finite number"),
        (HidesAFunction, "cannot be saved and loaded .* learn only arrays, values that JSON can hold"),
        (ForgetsInFiles, "a saved and loaded simulator gives other forecasts"),
        (Nameless, "give Nameless a name of its own"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_broken_promise_is_named(broken, message):
    with pytest.raises(InvalidInput, match=message):
        check_simulator(broken)


def everything(runs: sf.Runs):
    return runs.curricula, runs.initial_losses


def test_a_subclass_does_not_hide_the_class_it_varies(runs, tmp_path):
    fitted = sf.LinearSimulator().fit(runs)
    fitted.save(tmp_path / "linear.safetensors")

    class Nameless(sf.LinearSimulator):
        """Varies the library's own, under its name."""

    assert type(sf.Simulator.load(tmp_path / "linear.safetensors")) is sf.LinearSimulator
    with pytest.raises(InvalidInput, match="give Nameless a name of its own"):
        Nameless().fit(runs).save(tmp_path / "nameless.safetensors")
    with pytest.raises(InvalidInput, match="cannot be called 'linear'"):
        type("Taken", (sf.LinearSimulator,), {"name": "linear"})


def test_numpys_numbers_are_numbers(runs):
    fitted = sf.LinearSimulator().set_params(l2=np.int64(3), order=np.int64(2)).fit(runs)
    assert np.array_equal(fitted.A_, sf.LinearSimulator(l2=3, order=2).fit(runs).A_)
    sf.ConformalSimulator().set_params(members=np.int64(2), seed=np.int32(1)).fit(runs)
    for wrong in (True, 1.5, "2", 0):
        with pytest.raises(InvalidInput, match="order must be a whole number from 1 to "):
            sf.LinearSimulator().set_params(order=wrong).fit(runs)


@pytest.mark.parametrize(
    ("made", "parameters"),
    [
        (sf.BoostedSimulator(), {"rounds": np.int64(3), "seed": np.int32(1), "learning_rate": np.float32(0.1)}),
        (sf.FeaturizedSimulator(), {"components": np.int64(2), "l2": np.int64(3)}),
        (sf.TangentKernelSimulator(), {"n_features": np.int64(3), "memory": np.int64(2)}),
        (attribution.EKFAC(), {"batch_size": np.int64(3), "rank": np.int64(2), "damping": np.int64(1)}),
        (attribution.GradientDot(), {"batch_size": np.int64(3)}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_numpys_numbers_pass_every_check(made, parameters):
    made.set_params(**parameters)._check_parameters()


def test_numpys_numbers_are_saved(runs, tmp_path):
    fitted = sf.LinearSimulator().set_params(l2=np.float64(3), order=np.int64(2)).fit(runs)
    fitted.save(tmp_path / "fitted.safetensors")
    assert sf.Simulator.load(tmp_path / "fitted.safetensors").order == 2


def test_an_instances_parameters_may_be_arrays(runs):
    scores = np.random.default_rng(0).normal(size=(5, 12))
    tuned = search(sf.AttributedSimulator(scores), runs, trials=1, folds=2)
    assert tuned.parameters["attributor"] is scores


def test_a_pipeline_fits_a_simulator(runs):
    fitted = Pipeline([("linear", sf.LinearSimulator(l2=3.0, around="mean"))]).fit(runs[:4])
    assert fitted.score(runs[4:]) == fitted[-1].score(runs[4:])


def test_a_newer_file_is_newer_and_not_damaged(runs, tmp_path):
    path = tmp_path / "fitted.safetensors"
    sf.AdditiveSimulator().fit(runs).save(path)
    with safetensors.safe_open(path, "np") as file:
        about = json.loads(file.metadata()["simfluence"])
    assert about["format"] == FORMAT
    arrays = safetensors.numpy.load_file(path)
    text = json.dumps(about | {"format": FORMAT + 1})
    path.write_bytes(safetensors.numpy.save(arrays, {"simfluence": text, "sha256": _checksum(text, arrays)}))
    with pytest.raises(StoreError, match="which a newer version of simfluence wrote"):
        sf.Simulator.load(path)


def test_help_names_what_there_is():
    own = {name for name, kind in SIMULATORS.items() if kind.__module__.startswith("simfluence.")}
    assert set(SIMULATOR_NAMES) == own
    assert METHOD_NAMES == METHODS


@pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")
def test_simulating_does_not_copy_the_effects():
    """A short curriculum costs what it touches: 4.8 million effects are not read."""
    rng = np.random.default_rng(0)
    curricula = sf.random_curricula(n_train=2400, runs=2, steps=2, batch_size=8, seed=0)
    fitted = sf.LinearSimulator().fit(sf.Runs.from_arrays(curricula, rng.normal(size=(2, 3, 1000)), n_train=2400))
    assert fitted.effects_.size == 4_800_000
    short, initial = sf.Curriculum([[0, 1, 2]], n_train=2400), rng.normal(size=1000)
    seconds = []
    for _ in range(20):
        start = time.perf_counter()
        fitted._simulate([short], initial[None])
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.003  # 17 ms where everything was copied; measured under 1 ms on an idle machine


def test_old_names_work_with_a_warning(runs):
    mean = sf.MeanTrajectorySimulator().fit(runs[:4])
    with pytest.warns(DeprecationWarning, match="baseline_runs="):
        sf.evaluate({"mean": mean}, runs[4:], reference=runs[:4])
    with pytest.warns(DeprecationWarning, match="n_features="):
        assert sf.TangentKernelSimulator(features=3).n_features == 3
    with pytest.warns(DeprecationWarning, match="already_recorded"):
        assert Estimate(0, 3, {}, 0.0, 0, 0).there == 3
    with pytest.warns(DeprecationWarning, match="attributor_from_run"):
        assert attribution.of_run is attribution.attributor_from_run
    with pytest.warns(DeprecationWarning, match="ExternalTask"):
        assert sf.task.Outline is sf.task.ExternalTask
    with pytest.warns(DeprecationWarning, match="fit_scale="):
        assert sf.AttributedSimulator(scale="fitted").fit_scale is True
