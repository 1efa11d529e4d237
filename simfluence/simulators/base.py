"""The base class of all simulators: input checks, saving and loading, and scikit-learn's conventions."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar

import numpy as np
import optuna
import safetensors
import safetensors.numpy
from annotated_types import Ge
from jaxtyping import Bool, Float, Int

from simfluence._internal.checked import checked, shown
from simfluence._internal.files import check_format, write_whole
from simfluence._internal.progress import bar
from simfluence._internal.types import Losses, Seed, Share
from simfluence._internal.validation import checked_indices
from simfluence._version import __version__
from simfluence.curriculum import Curriculum
from simfluence.edits import Remove
from simfluence.errors import (
    BeyondReferenceWarning,
    InvalidInput,
    NotFittedError,
    RunawayWarning,
    StoreError,
    did_you_mean,
)
from simfluence.runs import Run, Runs
from simfluence.simulators.bounds import bounds_of, kept_within, run_away
from simfluence.simulators.folds import fold_of, means_of_others, refitted_forecasts
from simfluence.simulators.learned import check_arrays, check_counts
from simfluence.simulators.mean import mean_trajectory
from simfluence.simulators.registry import register, registered
from simfluence.simulators.trust import Trust

if TYPE_CHECKING:  # scikit-learn has no type hints

    class BaseEstimator:
        """scikit-learn's base class."""

        def get_params(self, deep: bool = True) -> dict[str, Any]: ...

        def set_params(self, **parameters: Any) -> Any: ...
else:
    from sklearn.base import BaseEstimator

__all__ = ["FORMAT", "Simulator", "SimulatorT", "not_fitted_on"]

#: Version of the file format. Files without a version count as version 0. Older versions are read, newer ones refused.
FORMAT = 2

_AT_ONCE = 50  # edited curricula simulated at a time

#: Losses before training, ``[runs, test]``, or ``[test]`` for all runs alike.
InitialLosses = Float[np.ndarray, "*runs test"]
#: Changes of the final losses by each edit, ``[edits, test]``.
Changes = Float[np.ndarray, "edits test"]
#: Groups of training examples by their rows, or as booleans.
Groups = Bool[np.ndarray, "groups train"] | Int[np.ndarray, "groups members"] | Sequence[Any]

Folds = Annotated[int, Ge(2)]

# Not typing.Self: the tests' runtime type checker wraps functions, not classes.
SimulatorT = TypeVar("SimulatorT", bound="Simulator")


class Simulator(BaseEstimator, ABC):
    """Predicts the test losses of a training run from its curriculum and the losses before training.

    Subclasses implement ``_fit(runs)``, which sets attributes whose names end in an underscore, and
    ``_simulate(curricula, initial)``. Forecasts are kept within bounds: ten times the largest loss of the fitting runs,
    and 0 where none of them was negative. A forecast that reaches a bound is not to be trusted, and a warning says so;
    so does one for a curriculum longer than every fitting run.

    A class with a ``name`` of its own is registered under it when it is defined: files, ``tune`` and the command line
    then accept that name. ``simfluence.simulators.check_simulator`` tests a subclass.
    """

    #: Name in files and on the command line.
    name: ClassVar[str] = ""
    #: Whether it wraps another object, given as a parameter, so that it cannot be built from its name alone.
    is_wrapper: ClassVar[bool] = False
    #: Whether ``fit`` holds out runs, and so learns how far forecasts can be trusted.
    holds_out: ClassVar[bool] = False
    #: Whether it needs the task as well as the runs, as a parameter ``task``.
    needs_task: ClassVar[bool] = False

    @property
    def gives_intervals(self) -> bool:
        """Whether ``interval`` returns intervals of the losses."""
        return False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__dict__.get("name"):
            register(cls)

    @checked
    def fit(self: SimulatorT, runs: Runs | Sequence[Run], y: Any = None) -> SimulatorT:
        """Learn from recorded runs, leaving out diverged ones with a warning. A fit that fails changes nothing.

        The ids of the runs become ``fitted_ids_``, which files carry, so that ``evaluate`` can leave these runs out;
        ``fit_seconds_`` is how long it took.

        Args:
            runs: runs of one task and one recipe.
            y: ignored; scikit-learn's pipelines and searches pass it.

        Raises:
            InvalidInput: no run is left to learn from, or the runs have several recipes.
        """
        self._check_parameters()
        runs = (runs if isinstance(runs, Runs) else Runs(runs)).usable("fit")
        before, start = dict(vars(self)), time.perf_counter()
        self.__dict__.pop("trust_", None)
        try:
            self.n_train_ = runs.n_train
            self.n_test_ = runs.n_test
            self.fingerprint_ = runs[0].fingerprint
            self.baseline_ = mean_trajectory(runs)
            self.bounds_, self.spread_of_runs_ = bounds_of(runs), _spread(runs, self.baseline_)
            self._fit(runs)
            self.fitted_ids_ = sorted({*runs.ids, *self._ids_of_parts()})
            self.fit_seconds_ = time.perf_counter() - start
        except BaseException:
            self.__dict__ = before
            raise
        return self

    @checked
    def was_fitted_on(self, run: Run) -> bool | None:
        """Decide whether a run is one of those that this simulator learned from, or None where that is not known.

        A simulator inside of it counts too, and an attributor that has ``fitted_ids_``. Files of older versions do not
        tell.

        Raises:
            NotFittedError: before ``fit``.

        >>> from simfluence.simulators import MeanTrajectorySimulator
        >>> runs = Runs.from_arrays([[[0], [1]], [[1], [1]]], [[[3.0], [2.0], [1.0]], [[3.0], [2.5], [2.0]]])
        >>> fitted = MeanTrajectorySimulator().fit(runs[:1])
        >>> fitted.was_fitted_on(runs[0]), fitted.was_fitted_on(runs[1])
        (True, False)
        """
        self._check_fitted()
        ids = getattr(self, "fitted_ids_", None)
        return None if ids is None else run.id in ids

    @property
    def trust(self) -> Trust | None:
        """How right forecasts of held-out runs were; None if no runs were held out in fitting, or too few."""
        numbers = getattr(self, "trust_", None)
        return None if numbers is None else Trust(**numbers)

    def __str__(self) -> str:
        return f"{self!r}: {self.trust}" if self.trust else repr(self)

    def _ids_of_parts(self) -> set[str]:
        """Return the ids of the runs that fitted parts of this simulator learned from: its parameters and members."""
        values = [part for value in vars(self).values() for part in (value if isinstance(value, list) else [value])]
        parts = [part for part in values if isinstance(part, BaseEstimator)]
        return {run_id for part in parts for run_id in getattr(part, "fitted_ids_", None) or ()}

    @checked
    def score(self, runs: Runs | Sequence[Run], y: Any = None) -> float:
        """Return the skill on other runs: 1 − SSE(simulated) / SSE(mean trajectory of the fitting runs).

        Sums go over the runs, the steps after time 0 and the test examples, but not beyond the longest fitting run,
        where there is no mean trajectory. ``evaluate`` gives intervals too.

        Args:
            runs: held-out runs. Those that the simulator was fitted on are left out, with a warning.
            y: ignored.

        Raises:
            NotFittedError, InvalidInput: see ``simulate``; also if the simulator was fitted on all of these runs.
        """
        held_out = (runs if isinstance(runs, Runs) else Runs(runs)).usable("score")
        held_out = not_fitted_on({self.name or type(self).__name__: self}, held_out, stacklevel=4)
        simulated = self.simulate(held_out.curricula, held_out.initial_losses)
        if not hasattr(self, "baseline_"):
            raise InvalidInput(
                "an older version fitted this simulator, without the mean trajectory to compare with: fit it again"
            )
        known = slice(1, min(simulated.shape[1], len(self.baseline_)))
        true = held_out.losses.astype(np.float64)[:, known]
        error, baseline = (np.nansum((losses - true) ** 2) for losses in (simulated[:, known], self.baseline_[known]))
        return float(1 - error / baseline) if baseline > 0 else float("nan")

    @checked
    def cross_fit(self: SimulatorT, runs: Runs | Sequence[Run], folds: Folds = 4, seed: Seed = 0) -> SimulatorT:
        """Fit like ``fit``, and learn how far forecasts can be trusted from runs that are held out.

        Whole runs are held out in turn: each is forecast by a clone that was fitted on the runs of the other folds, so
        this takes about ``folds`` + 1 times as long as ``fit``. What comes out is ``trust``, which files carry and
        forecasts show. Where ``fit`` holds runs out already (``holds_out``), this is ``fit``, with the simulator's own
        folds.

        Args:
            runs: two runs or more, of one task and one recipe.
            folds: number of parts of the runs that are held out in turn; at most one for each run is made.
            seed: seed of the folds.

        Raises:
            InvalidInput: see ``fit``; also for a single run.

        >>> rng = np.random.default_rng(0)
        >>> runs = Runs.from_arrays(rng.integers(3, size=(8, 5, 2)), rng.normal(size=(8, 6, 2)).cumsum(axis=1))
        >>> from simfluence.simulators import MeanTrajectorySimulator
        >>> MeanTrajectorySimulator().cross_fit(runs).trust.skill
        0.0
        """
        runs = (runs if isinstance(runs, Runs) else Runs(runs)).usable("fit")
        if len(set(runs.ids)) < 2:
            raise InvalidInput("one run cannot be held out and fitted on: give two or more, or use fit(runs)")
        if self.holds_out:
            return self.fit(runs)
        numbers = fold_of(runs, folds, seed)
        forecasts = self._cross_fit(runs, numbers)
        self.trust_ = dataclasses.asdict(Trust.of(forecasts, runs.losses, means_of_others(runs, numbers)))
        return self

    def _cross_fit(self, runs: Runs, folds: np.ndarray) -> np.ndarray:
        """Fit on all runs, and return forecasts of each run by a clone that was fitted on the other folds alone.

        Args:
            runs: usable runs.
            folds: number of each run's fold, ``[runs]``.

        Returns:
            Losses ``[runs, steps + 1, test]``; NaN after a run's end.
        """
        forecasts = refitted_forecasts(self, runs, folds)
        self.fit(runs)
        return forecasts

    @classmethod
    def suggest(cls, trial: optuna.Trial) -> dict[str, Any]:
        """Draw parameters to try from an Optuna trial; by default none, if there is nothing to tune.

        The ranges must include the defaults, which ``tune`` tries first.
        """
        return {}

    @checked
    def simulate(self, curricula: Sequence[Curriculum], initial_losses: InitialLosses) -> Losses:
        """Simulate the losses under each curriculum, ``[runs, steps + 1, test]``, float64.

        Rows after the end of a curriculum shorter than the longest are NaN.

        Args:
            curricula: curricula of the training examples that the simulator was fitted on.
            initial_losses: losses before any update, ``[runs, test]``, or ``[test]`` for all curricula alike.

        Raises:
            NotFittedError: before ``fit``.
            InvalidInput: numbers of examples or curricula do not match.
        """
        self._check_fitted()
        curricula = list(curricula)
        initial = self._check_initial(curricula, initial_losses)
        self._warn_beyond(curricula)
        return self._finished(self._simulate(curricula, initial), curricula, initial)

    @checked
    def changes(self, base: Curriculum, edited: Sequence[Curriculum], initial_losses: InitialLosses) -> Changes:
        """Simulate the change of the final losses from the ``base`` curriculum to each edited one.

        Args:
            base, edited: curricula of the training examples that the simulator was fitted on.
            initial_losses: losses before any update, ``[test]``.

        Raises:
            NotFittedError, InvalidInput: see ``simulate``.
        """
        self._check_fitted()
        edited = list(edited)
        initial = self._check_initial([base, *edited], initial_losses)[0]
        if not edited:
            return np.empty((0, self.n_test_))
        return self._changes(base, edited, initial)

    @checked
    def changes_without(self, base: Curriculum, groups: Groups, initial_losses: InitialLosses) -> Changes:
        """Simulate the change of the final losses without each group of training examples; batches shrink.

        Args:
            base: curriculum of the training examples that the simulator was fitted on.
            groups: the rows of the examples in each group, ``[groups, members]`` or a list of lists; or a boolean
                membership, ``[groups, train]``, which takes more memory. A group that the base does not show changes
                nothing.
            initial_losses: losses before any update, ``[test]``.

        Raises:
            NotFittedError, InvalidInput: see ``simulate``; also if a group holds every example that the base shows.
        """
        self._check_fitted()
        initial = self._check_initial([base], initial_losses)[0]
        members = _members(groups, self.n_train_)
        _check_remaining(base, members)
        return self._changes_without(base, members, initial)

    @checked
    def derivatives_without(self, base: Curriculum, initial_losses: InitialLosses) -> Float[np.ndarray, "train test"]:
        """Estimate ``changes_without`` each training example by a derivative of the final losses.

        The weights in a batch change linearly as the example leaves, from ``1 / |c|`` to ``1 / (|c| − 1)`` for the
        others; the derivative is taken at the full batch.

        Args:
            base: curriculum of the training examples that the simulator was fitted on.
            initial_losses: losses before any update, ``[test]``.

        Raises:
            NotFittedError, InvalidInput: see ``changes_without``; also if the simulator has no derivatives.
        """
        self._check_fitted()
        initial = self._check_initial([base], initial_losses)[0]
        _check_remaining(base, [base.indices[:1]])
        return self._derivatives_without(base, initial)

    @checked
    def interval(
        self, curricula: Sequence[Curriculum], initial_losses: InitialLosses, confidence: Share = 0.9
    ) -> tuple[Losses, Losses]:
        """Return the lower and upper ends of the interval of each loss, each ``[runs, steps + 1, test]``.

        Raises:
            InvalidInput: the simulator gives no intervals (``gives_intervals`` is False).
        """
        raise InvalidInput(f"simulator {self.name!r} gives no intervals: wrap it as ConformalSimulator({self!r})")

    def with_parameters(self: SimulatorT, **parameters: object) -> SimulatorT:
        """Set parameters like ``set_params``, and check them.

        Raises:
            InvalidInput: there is no such parameter, or its value is out of range.
        """
        options = self.get_params()
        for name in parameters:
            if name not in options:
                raise InvalidInput(f"simulator {self.name!r} has no parameter {name!r}, {did_you_mean(name, options)}")
        self.set_params(**parameters)
        self._check_parameters()
        return self

    @checked
    def save(self, path: str | Path) -> None:
        """Write the fitted simulator as safetensors: data, never code.

        Raises:
            NotFittedError: before ``fit``.
        """
        self._check_fitted()
        about, arrays = self._state()
        text = json.dumps(about | {"format": FORMAT, "library": __version__})
        content = {"simfluence": text, "sha256": _checksum(text, arrays)}
        write_whole(Path(path), safetensors.numpy.save(arrays, content))

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Return the state to save, as JSON and as arrays by name; arrays of an inner simulator have a prefix.

        Raises:
            InvalidInput: the class has no name of its own, so that a file could not be loaded.
        """
        if registered(self.name) is not type(self):
            raise InvalidInput(
                f"cannot save, because a file identifies a simulator by its class's name: give {type(self).__name__} "
                "a name of its own"
            )
        parameters = self.get_params(deep=False)
        learned = {name: value for name, value in vars(self).items() if name.endswith("_")}
        arrays = {name: np.ascontiguousarray(value) for name, value in learned.items() if isinstance(value, np.ndarray)}
        about: dict[str, Any] = {"simulator": self.name, "parts": {}}
        about["parameters"] = {
            name: value._state()[0] if isinstance(value, Simulator) else _plain(value)
            for name, value in parameters.items()
        }
        for name, value in learned.items():
            if isinstance(value, list) and value and isinstance(value[0], Simulator):
                states = [part._state() for part in value]
                about["parts"][name] = [part for part, _ in states]
                arrays |= {f"{name}.{k}.{key}": v for k, (_, part) in enumerate(states) for key, v in part.items()}
        rest = learned.keys() - arrays.keys() - about["parts"].keys()
        return about | {"learned": {name: _plain(learned[name]) for name in sorted(rest)}}, arrays

    @classmethod
    @checked
    def load(cls: type[SimulatorT], path: str | Path) -> SimulatorT:
        """Read a fitted simulator of this class; ``Simulator.load`` reads one of any class.

        Raises:
            StoreError: the file is missing or damaged, or holds no simulator or one of another class.
        """
        try:
            with safetensors.safe_open(path, "np") as file:
                metadata = file.metadata() or {}
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if metadata["sha256"] != _checksum(metadata["simfluence"], arrays):
                raise ValueError("its checksum does not match its content")
            about = json.loads(metadata["simfluence"])
            check_format(about.get("format", 0), FORMAT, path)
            simulator = _restored(about, arrays, about.get("format", 0))
        except FileNotFoundError:
            raise StoreError(f"no simulator at {path}: the file does not exist") from None
        except StoreError:  # names the file
            raise
        except (
            safetensors.SafetensorError, KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError,
            ArithmeticError, MemoryError, OSError,
        ) as error:  # fmt: skip
            raise StoreError(f"{path} is damaged or holds no simulator: {error}") from None
        if not isinstance(simulator, cls):
            raise StoreError(
                f"{path} holds a simulator {simulator.name!r}, not one of {cls.__name__}: load it with Simulator.load"
            )
        return simulator

    @classmethod
    def _from_format_0(
        cls, parameters: dict[str, Any], learned: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Turn the parameters and the learned attributes of a file of format 0 into those of format 1."""
        return parameters, learned

    @classmethod
    def _from_format_1(
        cls, parameters: dict[str, Any], learned: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Turn the parameters and the learned attributes of a file of format 1 into those of format 2."""
        return parameters, learned

    @abstractmethod
    def _fit(self, runs: Runs) -> None: ...

    @abstractmethod
    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        """Simulate losses ``[runs, longest + 1, test]``; time 0 and rows after a curriculum's end are overwritten."""

    def _changes(self, base: Curriculum, edited: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        """Simulate the base and the edited curricula, a chunk of them at a time, for ``changes``."""
        before = self.simulate([base], initial)[0, -1]
        after = np.empty((len(edited), self.n_test_))
        with bar("Simulating", len(edited), shown=len(edited) > _AT_ONCE) as advance:
            for start in range(0, len(edited), _AT_ONCE):
                chunk = edited[start : start + _AT_ONCE]
                losses = self.simulate(chunk, initial)
                last = [len(curriculum) for curriculum in chunk]
                after[start : start + len(chunk)] = losses[np.arange(len(chunk)), last]
                advance(len(chunk))
        changes: np.ndarray = after - before
        return changes

    def _changes_without(self, base: Curriculum, groups: Sequence[np.ndarray], initial: np.ndarray) -> np.ndarray:
        """Simulate the curricula without each group of rows, a chunk of them at a time, for ``changes_without``."""
        changes = np.zeros((len(groups), self.n_test_))
        in_base = np.zeros(self.n_train_, bool)
        in_base[base.indices] = True
        touched = [index for index, group in enumerate(groups) if in_base[group].any()]
        with bar("Simulating", len(touched), shown=len(touched) > _AT_ONCE) as advance:
            for start in range(0, len(touched), _AT_ONCE):
                chunk = touched[start : start + _AT_ONCE]
                edited = [Remove(rows=groups[index]).apply(base) for index in chunk]
                changes[chunk] = self._changes(base, edited, initial)
                advance(len(chunk))
        return changes

    def _derivatives_without(self, base: Curriculum, initial: np.ndarray) -> np.ndarray:
        raise InvalidInput(f"simulator {self.name!r} has no derivatives: use method='simulate'")

    def _warn_beyond(self, curricula: Sequence[Curriculum]) -> None:
        longest = max(len(curriculum) for curriculum in curricula)
        if hasattr(self, "baseline_") and longest >= len(self.baseline_):
            warnings.warn(
                f"a curriculum has {longest} steps, but no fitting run has more than {len(self.baseline_) - 1}: later "
                "steps are less right; fit on a run of that length to know better",
                BeyondReferenceWarning,
                stacklevel=4,
            )

    def _finished(self, losses: np.ndarray, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        """Keep losses ``[runs, times, test]`` within the bounds, from the initial ones to each curriculum's end."""
        losses = self._bounded(losses, curricula)
        losses[:, 0] = initial
        for index, curriculum in enumerate(curricula):
            losses[index, len(curriculum) + 1 :] = np.nan
        return losses

    def _bounded(self, losses: np.ndarray, curricula: Sequence[Curriculum]) -> np.ndarray:
        """Keep losses ``[runs, times, test]`` within the bounds, and warn of forecasts that run away."""
        if not hasattr(self, "bounds_"):  # the file of an older version
            return losses
        kept = kept_within(losses, self.bounds_)
        times, lengths = np.arange(losses.shape[1]), np.array([len(curriculum) for curriculum in curricula])
        within = (times > 0) & (times <= lengths[:, None])  # [runs, times]
        away = (run_away(losses, self.bounds_).any(axis=2) & within).any(axis=1)
        if away.any():
            warnings.warn(
                f"{away.sum()} of {len(losses)} forecasts of {self.name or type(self).__name__} ran away and were "
                "stopped at ten times the largest loss of the fitting runs: do not trust them",
                RunawayWarning,
                stacklevel=4,
            )
        return kept

    def beyond_bounds(self, losses: np.ndarray) -> np.ndarray:
        """Tell which forecast losses a bound had to stop, or would have to, as booleans of the same shape."""
        bounds = getattr(self, "bounds_", np.array([-np.inf, np.inf]))  # the file of an older version has none
        stopped: np.ndarray = run_away(losses, bounds) | (losses >= bounds[1])
        return stopped

    def _bounded_changes(self, base: Curriculum, changes: np.ndarray, initial: np.ndarray) -> np.ndarray:
        """Keep the losses that changes ``[edits, test]`` lead to within the bounds, where they were not simulated."""
        if not hasattr(self, "bounds_") or not len(changes):
            return changes
        before = self.simulate([base], initial)[0, -1]
        after = before + changes
        outside = np.isnan(after) | (after < self.bounds_[0]) | (after > self.bounds_[1])
        return np.where(outside, kept_within(after, self.bounds_) - before, changes)

    def _check_parameters(self) -> None:
        """Raise ``InvalidInput`` for parameters out of range."""

    def _check_learned(self) -> None:
        """Raise ``InvalidInput`` if the attributes that a file holds do not fit together."""
        check_counts(self, "n_train_", "n_test_")
        if hasattr(self, "baseline_"):  # not in files of older versions
            check_arrays(self, {"baseline_": "float times test"})
        if hasattr(self, "bounds_"):
            check_arrays(self, {"bounds_": "float 2", "spread_of_runs_": "float times"})
        if getattr(self, "fingerprint_", None) is not None and not isinstance(self.fingerprint_, str):
            raise InvalidInput("fingerprint_ is not text")
        if getattr(self, "trust_", None) is not None:
            Trust.checked(self.trust_)
        ids = getattr(self, "fitted_ids_", [])  # not in files of older versions
        if not isinstance(ids, list) or not all(isinstance(run_id, str) for run_id in ids):
            raise InvalidInput("fitted_ids_ is not a list of the ids of runs")

    def _check_fitted(self) -> None:
        if not hasattr(self, "n_train_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit(runs) first")

    def _check_initial(self, curricula: list[Curriculum], initial_losses: Any) -> np.ndarray:
        if not curricula:
            raise InvalidInput("no curriculum to simulate: give at least one")
        for curriculum in curricula:
            if curriculum.n_train != self.n_train_:
                raise InvalidInput(
                    f"a curriculum is of {curriculum.n_train} training examples, but this simulator was fitted on "
                    f"{self.n_train_}"
                )
        initial = np.asarray(initial_losses, np.float64)
        if not np.isfinite(initial).all():
            raise InvalidInput("initial losses must be finite numbers, but some are NaN or infinite")
        if initial.shape not in ((self.n_test_,), (len(curricula), self.n_test_)):
            raise InvalidInput(
                f"initial losses must be [{len(curricula)} runs, {self.n_test_} test examples] or [{self.n_test_}], "
                f"as the simulator was fitted; got {list(initial.shape)}"
            )
        return np.broadcast_to(initial, (len(curricula), self.n_test_))


def not_fitted_on(simulators: Mapping[str, Simulator], held: Runs, stacklevel: int) -> Runs:
    """Return the runs that no simulator was fitted on, and warn about the others.

    A simulator knows the runs that it was trained on, so its errors on them say nothing about other runs. All
    simulators are scored on the same runs, so that their rows can be compared.

    Raises:
        InvalidInput: no run is left.
    """
    fitted = {name: {run.id for run in held if simulator.was_fitted_on(run)} for name, simulator in simulators.items()}
    known = set().union(*fitted.values())
    if not known:
        return held
    names = ", ".join(repr(name) for name, ids in fitted.items() if ids)
    said = f"{len(known)} of the {len(held)} held-out runs are among the runs that {names} was fitted on"
    if len(known) == len(set(held.ids)):
        raise InvalidInput(
            f"{said}, so no run is left to evaluate on: hold out other runs (the same split and seed as in fitting)"
        )
    warnings.warn(f"{said}, so they are left out: {_listed(known)}", UserWarning, stacklevel)
    return Runs(run for run in held if run.id not in known)


def _spread(runs: Runs, mean: np.ndarray) -> np.ndarray:
    """Return the mean square of the runs' deviations from their mean trajectory, ``[times]``."""
    sums, counts = np.zeros(len(mean)), np.zeros(len(mean))
    for run in runs:  # one at a time: all losses together may not fit into memory
        squares = (run.losses - mean[: len(run.losses)]) ** 2
        known = ~np.isnan(squares).any(axis=1)
        sums[: len(known)][known] += squares[known].mean(axis=1)
        counts[: len(known)] += known
    times = np.flatnonzero(counts)
    return np.interp(np.arange(len(mean)), times, sums[times] / counts[times])


def _listed(ids: Iterable[str], most: int = 5) -> str:
    """Return the first few ids, for a message."""
    first = sorted(ids)
    return ", ".join(first[:most]) + (f" and {len(first) - most} more" if len(first) > most else "")


def _members(groups: Any, count: int) -> list[np.ndarray]:
    """Return the rows of the examples in each group, sorted."""
    if isinstance(groups, np.ndarray) and groups.dtype == bool:
        if groups.shape[1] != count:
            raise InvalidInput(f"groups as booleans must be [groups, {count} train], got {list(groups.shape)}")
        return [np.flatnonzero(group) for group in groups]
    return [_rows(number, group, count) for number, group in enumerate(groups)]


def _rows(number: int, group: Any, count: int) -> np.ndarray:
    try:
        rows = np.asarray(group)
    except (TypeError, ValueError, RuntimeError):  # lists of lists of different lengths; tensors with a gradient
        rows = np.empty((0, 0))
    if rows.shape == (0,):
        return np.empty(0, np.int64)
    if rows.ndim != 1 or rows.dtype.kind not in "iu":
        raise InvalidInput(f"groups[{number}] must be a list of rows of training examples, got {shown(group)}")
    return np.unique(checked_indices(rows, count))


def _check_remaining(base: Curriculum, groups: Sequence[np.ndarray]) -> None:
    in_base = np.unique(base.indices)
    if any(len(group) >= len(in_base) and np.isin(in_base, group).all() for group in groups):
        raise InvalidInput("a group holds every example that the base shows: removing it would leave none to train on")


def _checksum(text: str, arrays: dict[str, np.ndarray]) -> str:
    digest = hashlib.sha256(text.encode())
    for name in sorted(arrays):
        digest.update(f"{name} {arrays[name].dtype} {arrays[name].shape}".encode() + arrays[name].tobytes())
    return digest.hexdigest()


def _restored(about: dict[str, Any], arrays: dict[str, np.ndarray], version: int) -> Simulator:
    """Build a simulator from its saved ``_state``.

    Raises:
        KeyError, ValueError, TypeError, AttributeError: this is no saved state.
    """
    kind = registered(str(about["simulator"]))
    if kind is None:
        raise ValueError(
            f"unknown simulator {about['simulator']!r}: if it is your own, first import the module that defines it"
        )
    learned: dict[str, Any] = about["learned"] | {name: value for name, value in arrays.items() if "." not in name}
    parameters = {
        name: _restored(value | {"learned": {}, "parts": {}}, {}, version) if isinstance(value, dict) else value
        for name, value in about["parameters"].items()
    }
    for older, migrated in enumerate((kind._from_format_0, kind._from_format_1)):
        if version <= older:
            parameters, learned = migrated(parameters, learned)
    simulator: Simulator = kind().with_parameters(**parameters)
    for name, states in about["parts"].items():
        prefixes = [f"{name}.{index}." for index in range(len(states))]
        inner = [
            {key.removeprefix(prefix): array for key, array in arrays.items() if key.startswith(prefix)}
            for prefix in prefixes
        ]
        learned[name] = [_restored(*pair, version) for pair in zip(states, inner, strict=True)]
    for name, value in learned.items():
        if not name.isidentifier() or name.startswith("_") or not name.endswith("_"):
            raise ValueError(f"it sets {name!r}, which is no learned attribute")
        setattr(simulator, name, value)
    if learned:  # a parameter that is a simulator has none
        simulator._check_learned()
    return simulator


def _plain(value: Any) -> Any:
    """Convert a NumPy scalar to a Python one, for JSON."""
    return value.item() if isinstance(value, np.generic) else value
