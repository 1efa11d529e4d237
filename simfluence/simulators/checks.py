"""Checks for authors of simulators: whether a simulator keeps the promises of the base class."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Never

import numpy as np
import sklearn.base
import torch

from simfluence._internal.checked import checked
from simfluence.curriculum import Curriculum, random_curricula
from simfluence.errors import InvalidInput, NotFittedError, StoreError
from simfluence.examples import Examples
from simfluence.recipe import Recipe
from simfluence.runs import Runs
from simfluence.simulators.base import Simulator
from simfluence.task import Task

__all__ = ["check_simulator"]

_TRAIN, _TEST, _STEPS = 12, 4, 8  # of the small runs
_FIT_RUNS = 5  # the others are held out
_PLAIN = (bool, int, float, str, list, tuple, dict, type(None), np.generic)  # parameters that are compared by value


@checked
def check_simulator(simulator: type[Simulator] | Simulator) -> None:
    """Check that a simulator keeps the promises of ``Simulator``, on a few small runs with a fixed seed.

    The runs are of 12 training and 4 test examples with features and classes, and 8 steps. For a class with
    ``needs_task`` they are recorded from a small task, which is passed as the parameter ``task``.

    Args:
        simulator: class that can be built without arguments, or instance, which is cloned and not changed.

    Raises:
        InvalidInput: a promise is broken; the message says which one, and what to do.

    >>> from simfluence.simulators import MeanTrajectorySimulator
    >>> check_simulator(MeanTrajectorySimulator)
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        task = _small_task() if simulator.needs_task else None
        runs = _recorded_runs(task) if task is not None else _made_runs()
        check = _Check(_instance(simulator), task)
        check.parameters()
        check.unfitted(runs)
        fitted = check.fit(runs[:_FIT_RUNS])
        check.forecasts(fitted, runs)
        check.independence(fitted, runs)
        check.diverged_runs(fitted, runs)
        check.score(fitted, runs[_FIT_RUNS:])
        check.files(fitted, runs)


@dataclasses.dataclass(frozen=True)
class _Check:
    """Checks of one simulator.

    Args:
        simulator: unfitted instance to clone.
        task: task of the runs, if the simulator needs one.
    """

    simulator: Simulator
    task: Task | None

    def new(self) -> Simulator:
        """Return an unfitted clone, with the task if it needs one."""
        simulator: Simulator = sklearn.base.clone(self.simulator)
        if self.task is not None:
            simulator.set_params(task=self.task)
        return simulator

    def parameters(self) -> None:
        advice = "let __init__ store each argument unchanged in an attribute of the same name, and do nothing else"
        try:
            parameters = self.simulator.get_params(deep=False)
            clone = self.new()
            clone.set_params(**clone.get_params(deep=False))
        except (AttributeError, RuntimeError, TypeError) as error:
            self.fail(f"its parameters do not survive get_params, set_params and clone ({error})", advice)
        for name, value in clone.get_params(deep=False).items():
            if not (name == "task" and self.task is not None) and not _same(value, parameters[name]):
                self.fail(f"clone changes the parameter {name!r} from {parameters[name]!r} to {value!r}", advice)

    def unfitted(self, runs: Runs) -> None:
        try:
            self.new().simulate(runs.curricula, runs.initial_losses)
        except NotFittedError:
            return
        except AttributeError:  # a learned attribute is missing
            pass
        self.fail("simulate before fit does not raise NotFittedError", "leave fit and simulate to the base class")

    def fit(self, runs: Runs) -> Simulator:
        simulator, losses = self.new(), runs.losses
        parameters = simulator.get_params(deep=False)
        if simulator.fit(runs) is not simulator:
            self.fail("fit does not return the simulator itself", "write _fit, and leave fit to the base class")
        for name in ("n_train_", "n_test_", "fingerprint_", "baseline_", "fitted_ids_"):
            if not hasattr(simulator, name):
                self.fail(f"fit does not set {name}", "write _fit, and leave fit to the base class")
        for name, value in simulator.get_params(deep=False).items():
            if not _same(value, parameters[name]):
                self.fail(f"fit changes the parameter {name!r}", f"store what is learned in an attribute {name}_")
        misnamed = [name for name in vars(simulator) if name not in parameters and not name.endswith("_")]
        if misnamed:
            self.fail(
                f"fit sets {', '.join(misnamed)}, which save leaves out", "end learned attributes in an underscore"
            )
        if not np.array_equal(losses, runs.losses, equal_nan=True):
            self.fail("fit changes the losses of its runs", "copy them before changing them")
        return simulator

    def forecasts(self, fitted: Simulator, runs: Runs) -> None:
        curricula, initial = _unequal(runs.curricula), runs.initial_losses.astype(np.float64)
        indices, start = [curriculum.indices.copy() for curriculum in curricula], initial.copy()
        raw = fitted._simulate(curricula, initial.copy())  # before bounds replace what is not a number
        losses = fitted.simulate(curricula, initial)
        if not np.array_equal(start, initial):
            self.fail("simulate changes the initial losses that it is given", "copy them before changing them")
        if not all(map(np.array_equal, indices, (curriculum.indices for curriculum in curricula))):
            self.fail("simulate changes the curricula that it is given", "copy their indices before changing them")
        lengths = [len(curriculum) for curriculum in curricula]
        expected = len(curricula), max(lengths) + 1, fitted.n_test_
        if losses.shape != expected or losses.dtype != np.float64:
            self.fail(
                f"simulate returns {losses.dtype} {list(losses.shape)}, not float64 {list(expected)}",
                "return float64 losses [runs, longest + 1, test] from _simulate, the first row before any update",
            )
        if not np.array_equal(losses[:, 0], initial):
            self.fail("simulated losses do not start at the initial losses", "leave simulate to the base class")
        for row, length in enumerate(lengths):
            if not np.isfinite(raw[row, 1 : length + 1]).all():
                self.fail(
                    f"forecasts of {length} steps are NaN or infinite, with fitting runs of {_STEPS} steps",
                    "forecast curricula shorter and longer than the fitting runs, such as by repeating the last value",
                )
            if not np.isnan(losses[row, length + 1 :]).all():
                self.fail(
                    "losses after the end of a shorter curriculum are not NaN", "leave simulate to the base class"
                )
        if not np.array_equal(losses, fitted.simulate(curricula, initial), equal_nan=True):
            self.fail("simulate gives other losses the second time", "seed random numbers by a parameter seed")
        shared = fitted.simulate(curricula, initial[0])
        if not _close(shared, fitted.simulate(curricula, np.tile(initial[0], (len(curricula), 1)))):
            self.fail(
                "initial losses [test] and the same [runs, test] give other forecasts",
                "leave simulate to the base class",
            )

    def independence(self, fitted: Simulator, runs: Runs) -> None:
        curricula, initial = _unequal(runs.curricula), runs.initial_losses
        together = fitted.simulate(curricula, initial)
        for row, curriculum in enumerate(curricula):
            alone = fitted.simulate([curriculum], initial[row])[0]
            if not _close(alone, together[row, : len(alone)]):
                self.fail(
                    "a curriculum simulated alone has other losses than simulated with curricula of other lengths",
                    "forecast each curriculum in _simulate from that curriculum and its initial losses alone",
                )

    def diverged_runs(self, fitted: Simulator, runs: Runs) -> None:
        losses = runs[-1].losses.copy()
        losses[_STEPS // 2 :] = np.nan
        losses[_STEPS // 2, 0] = np.inf
        diverged = dataclasses.replace(runs[-1], id="diverged", losses=losses)
        robust = self.new().fit(Runs([*runs[:_FIT_RUNS], diverged]))
        forecasts, expected = (s._simulate(runs.curricula, runs.initial_losses) for s in (robust, fitted))
        advice = "call runs.usable('fit') before learning, or write _fit and leave fit to the base class"
        if not np.isfinite(forecasts[:, 1:]).all():
            self.fail("a diverged run among the fitting runs makes forecasts NaN or infinite", advice)
        if not _close(forecasts[:, 1:], expected[:, 1:]):
            self.fail("a diverged run among the fitting runs changes forecasts", advice)

    def score(self, fitted: Simulator, held: Runs) -> None:
        score = fitted.score(held)
        if not isinstance(score, float) or not np.isfinite(score):
            self.fail(f"score is {score!r}, not a finite number", "leave score to the base class")

    def files(self, fitted: Simulator, runs: Runs) -> None:
        advice = "learn only arrays, values that JSON can hold, and lists of simulators"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "fitted.safetensors"
            try:
                fitted.save(path)
                loaded = Simulator.load(path)
            except InvalidInput:  # says what to do
                raise
            except (TypeError, ValueError, StoreError) as error:
                self.fail(f"it cannot be saved and loaded ({error})", advice)
        arguments = _unequal(runs.curricula), runs.initial_losses
        if type(loaded) is not type(fitted) or not np.array_equal(
            loaded.simulate(*arguments), fitted.simulate(*arguments), equal_nan=True
        ):
            self.fail("a saved and loaded simulator gives other forecasts", advice)

    def fail(self, problem: str, advice: str) -> Never:
        raise InvalidInput(
            f"{type(self.simulator).__name__} does not keep a promise of Simulator: {problem}. To fix it, {advice}"
        )


def _instance(simulator: type[Simulator] | Simulator) -> Simulator:
    if isinstance(simulator, Simulator):
        return simulator
    try:
        return simulator()
    except TypeError as error:
        raise InvalidInput(
            f"{simulator.__name__} cannot be built without arguments ({error}): give its parameters defaults, or pass "
            "an instance"
        ) from None


def _made_runs() -> Runs:
    """Return runs of additive effects, without a task."""
    train, test = _small_examples()
    curricula, rng = _small_curricula(), np.random.default_rng(0)
    effects = 0.1 * rng.normal(size=(_TRAIN, _TEST)) - 0.1
    counts = np.stack([curriculum.counts.toarray() for curriculum in curricula])  # [runs, steps, train]
    start = 2 + rng.random((len(curricula), 1, _TEST))
    changes = np.cumsum(counts @ effects / 3, axis=1)
    losses = np.concatenate([start, start + changes], axis=1).astype(np.float32)
    return Runs.from_arrays(curricula, losses, train=train, test=test)


def _small_curricula() -> list[Curriculum]:
    return random_curricula(n_train=_TRAIN, runs=_FIT_RUNS + 2, steps=_STEPS, batch_size=3, subset=0.75, seed=0)


def _small_examples() -> tuple[Examples, Examples]:
    """Return training and test examples of three features in two classes."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=(_TRAIN + _TEST, 3)).astype(np.float32)
    targets = (features[:, 0] > 0).astype(np.int64)
    return (
        Examples.numbered(_TRAIN, None, features[:_TRAIN], targets[:_TRAIN]),
        Examples.numbered(_TEST, None, features[_TRAIN:], targets[_TRAIN:]),
    )


def _small_task() -> Task:
    from simfluence.tasks import from_arrays

    train, test = _small_examples()
    pair = test.features, test.targets
    return from_arrays(_small_model, train.features, train.targets, "cross_entropy", test=pair, name="small")


def _small_model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2))


def _recorded_runs(task: Task) -> Runs:
    from simfluence.recording import record

    return record(task, Recipe(lr=0.3), _small_curricula())


def _unequal(curricula: Sequence[Curriculum]) -> list[Curriculum]:
    """Return the curricula with the first one doubled and the second one cut short."""
    longer, shorter, *others = curricula
    return [
        Curriculum(longer.tolist() * 2, longer.n_train),
        Curriculum(shorter.tolist()[: _STEPS // 2], shorter.n_train),
        *others,
    ]


def _same(one: Any, other: Any) -> bool:
    """Decide whether two values of a parameter are equal; objects without a value of their own are equal by type."""
    if isinstance(one, np.ndarray) or isinstance(other, np.ndarray):
        return np.array_equal(one, other)
    if isinstance(one, _PLAIN) or isinstance(other, _PLAIN):
        return type(one) is type(other) and (one == other or one != one)
    return type(one) is type(other)


def _close(one: np.ndarray, other: np.ndarray) -> bool:
    return one.shape == other.shape and np.allclose(one, other, rtol=1e-5, atol=1e-8, equal_nan=True)
