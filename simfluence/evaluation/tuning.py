"""Choose a simulator and its parameters by cross-validation.

Trial k of a search depends only on the arguments and on trials 0…k−1, and a storage holds only finished trials. So a
search that was killed, or that is asked for more trials, continues from its storage as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import optuna
import pandas as pd
from annotated_types import Ge, Interval
from optuna.trial import FrozenTrial, TrialState

from simfluence._internal.checked import checked
from simfluence._internal.deprecation import renamed_arguments
from simfluence._internal.progress import bar
from simfluence._internal.types import Seed
from simfluence._version import __version__
from simfluence.errors import InvalidInput, SimfluenceError, StoreError, did_you_mean
from simfluence.evaluation.cross_validation import fitted_errors
from simfluence.evaluation.metrics import MIN_SKILL, bounded_skill
from simfluence.recipe import Recipe
from simfluence.runs import Runs
from simfluence.simulators import SIMULATORS, BestSimulator, MeanTrajectorySimulator, Simulator
from simfluence.task import Task

__all__ = ["Search", "search", "tune"]

Trials = Annotated[int, Interval(ge=1, le=1_000_000)]
Folds = Annotated[int, Ge(2)]

_STARTUP_TRIALS = 5  # drawn at random, and never stopped early


@dataclass(frozen=True, eq=False)
class Search:
    """The candidates that a search tried, and the best of them.

    Attributes:
        kind: class of the best simulator.
        parameters: its parameters; any others have their defaults.
        skill: its cross-validated skill.
        trials: a row per candidate, grouped by kind and in the order tried: ``simulator``, its parameters, the number
            of ``folds`` scored (fewer if it was stopped early), the ``skill`` over these folds, and the ``problem`` of
            a candidate that does not work.
    """

    kind: type[Simulator]
    parameters: Mapping[str, Any]
    skill: float
    trials: pd.DataFrame

    @property
    def name(self) -> str:
        """Name of the best simulator."""
        return kind_name(self.kind)

    @property
    def simulator(self) -> Simulator:
        """The best simulator, not yet fitted."""
        return self.kind().with_parameters(**self.parameters)


@renamed_arguments(name="simulator")
@checked
def tune(
    simulator: str | Simulator | type[Simulator],
    runs: Runs,
    *,
    trials: Trials = 20,
    seed: Seed = 0,
    folds: Folds = 4,
    fixed: Mapping[str, Any] | None = None,
    storage: str | Path | None = None,
    progress: bool = True,
) -> Simulator:
    """Return the simulator with the best cross-validated skill, fitted on all ``runs``.

    This is ``search`` followed by ``fit``; see ``search`` for arguments and errors.

    >>> rng = np.random.default_rng(0)
    >>> runs = Runs.from_arrays(rng.integers(3, size=(8, 5, 2)), rng.normal(size=(8, 6, 2)).cumsum(axis=1))
    >>> tune("additive", runs, trials=3, fixed={"around": "mean"}).around
    'mean'
    """
    runs = runs.usable("tune on")
    options: dict[str, Any] = {"fixed": fixed, "storage": storage, "progress": progress}
    return search(simulator, runs, trials=trials, seed=seed, folds=folds, **options).simulator.fit(runs)


@renamed_arguments(name="simulator")
@checked
def search(
    simulator: str | Simulator | type[Simulator],
    runs: Runs,
    *,
    trials: Trials = 20,
    seed: Seed = 0,
    folds: Folds = 4,
    fixed: Mapping[str, Any] | None = None,
    storage: str | Path | None = None,
    progress: bool = True,
) -> Search:
    """Try different parameters, and score each candidate by cross-validation on held-out runs.

    The skill is that of ``evaluate``, relative to the mean trajectory of each fold's fitting runs and pooled over all
    folds. The first candidate has the default parameters; the others are drawn from ``Simulator.suggest`` by Optuna's
    TPE sampler. A candidate that is below the median of the others after a fold is stopped early.

    Args:
        simulator: a name, a class (your own too) or an instance. Parameters of an instance that differ from the
            defaults are fixed. With "best", the best single kind is sought (``BestSimulator`` weighs several): every
            kind is tried with its defaults, followed by successive halving. The kinds share the trials of a round
            equally, and the better half stays for the next round. So most trials are spent on the best kinds, and few
            on slow kinds that do not pay off.
        runs: runs to cross-validate on, in any order; diverged ones are left out with a warning.
        trials: total number of candidates; "best" tries at least one of each kind.
        seed: seed of the folds and of the sampler.
        folds: number of disjoint parts that are held out in turn.
        fixed: parameters that are not searched. "best" chooses among the kinds that have them. The tangent kernel
            needs ``fixed={"task": task}``, and "best" includes it only then.
        storage: SQLite file that stores finished trials; several searches can share it.
        progress: show a progress bar on a terminal.

    Raises:
        InvalidInput: fewer runs than folds, runs that are all alike, arguments out of range, or no candidate that
            could be fitted.
        StoreError: ``storage`` cannot be used.
    """
    runs, fixed = runs.usable("tune on"), dict(fixed or {})
    kinds, fixed = _kinds(simulator, fixed)
    plan = _Plan(_folds(runs, folds, seed), fixed, seed, f"seed{seed}-folds{folds}-{_digest(runs, fixed)}")
    with _quiet(), _opened(storage) as stored, bar("tuning", trials, progress) as advance:
        with _reading(storage):
            entries = [_Entry(kind, plan, stored) for kind in kinds]
        _race(entries, trials, advance)
    winner = max(entries, key=lambda entry: entry.skill)
    best = winner.best.user_attrs
    if winner.skill <= MIN_SKILL:
        raise InvalidInput(f"no candidate for {simulator!r} works: {best['problem']}")
    table = pd.DataFrame([row for entry in entries for row in entry.rows()]).rename_axis("candidate")
    return Search(winner.kind, best["parameters"] | _fixed_for(winner.kind, fixed), winner.skill, table)


@dataclass(frozen=True)
class _Fold:
    """Fitting runs, held-out runs, and the squared error of the fitting runs' mean trajectory on the held-out ones."""

    fitting: Runs
    held_out: Runs
    error_of_mean: float


@dataclass(frozen=True)
class _Plan:
    """Settings that all trials of a search share."""

    folds: Sequence[_Fold]
    fixed: Mapping[str, Any]
    seed: int
    study_suffix: str


class _Entry:
    """One kind of simulator in a search. Only its first ``count`` trials are used, even if the storage has more."""

    def __init__(self, kind: type[Simulator], plan: _Plan, storage: optuna.storages.BaseStorage | None) -> None:
        self.kind, self.plan, self.count = kind, plan, 0
        self.stored = optuna.create_study(
            study_name=f"{kind_name(kind)}-{plan.study_suffix}",
            storage=storage,
            direction="maximize",
            load_if_exists=True,
        )
        pruner = optuna.pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS)
        self.study = optuna.create_study(direction="maximize", pruner=pruner)
        finished = self.stored.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
        _check_finished(finished)
        # Two processes that run the same search may both store a trial; the copies are equal.
        self.study.add_trials({trial.user_attrs["index"]: trial for trial in finished}.values())

    @property
    def trials(self) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False)[: self.count]

    @property
    def best(self) -> FrozenTrial:
        return max((trial for trial in self.trials if trial.state == TrialState.COMPLETE), key=_value)

    @property
    def skill(self) -> float:
        return _value(self.best)

    @property
    def is_tunable(self) -> bool:
        return bool(self.trials[0].params)

    def rows(self) -> Iterator[dict[str, Any]]:
        for trial in self.trials:
            candidate = {"simulator": kind_name(self.kind)} | trial.user_attrs["parameters"]
            scores = {"skill": _value(trial), "folds": len(trial.intermediate_values)}
            yield candidate | scores | {"problem": trial.user_attrs.get("problem", "")}

    def next(self) -> None:
        """Take the next trial from the storage, or run and store it."""
        if self.count == len(self.study.get_trials(deepcopy=False)):
            self._try(self.count)
            self.stored.add_trial(self.study.get_trials(deepcopy=False)[self.count])
        self.count += 1

    def _try(self, index: int) -> None:
        kind, fixed = self.kind, _fixed_for(self.kind, self.plan.fixed)
        self.study.sampler = _sampler(self.plan.seed, index)
        if index == 0:
            self.study.enqueue_trial(kind().get_params())
        trial = self.study.ask()
        parameters = kind.suggest(_PartlyFixedTrial(trial, fixed)) | fixed
        trial.set_user_attr("index", index)
        trial.set_user_attr("parameters", _plain(parameters))
        try:
            skill = self._score(trial, kind().with_parameters(**parameters))
        except SimfluenceError as error:  # parameters that exclude each other, a solver that does not converge
            trial.set_user_attr("problem", str(error))
            skill = MIN_SKILL
        self.study.tell(trial, skill, TrialState.PRUNED if skill is None else TrialState.COMPLETE)

    def _score(self, trial: optuna.Trial, simulator: Simulator) -> float | None:
        """Return the skill pooled over the folds, or None if the candidate is stopped early."""
        sse = baseline_sse = skill = 0.0
        for index, fold in enumerate(self.plan.folds):
            if index and trial.should_prune():
                return None
            sse += fitted_errors(simulator, fold.fitting, fold.held_out)[0].sum()
            baseline_sse += fold.error_of_mean
            skill = float(bounded_skill(sse, baseline_sse))
            trial.report(skill, index)
        if skill <= MIN_SKILL:
            trial.set_user_attr("problem", "its simulated losses grow without bounds")
        return skill


def _check_finished(trials: Sequence[FrozenTrial]) -> None:
    """Check that stored trials are those of a search: each with its parameters, without a gap."""
    for trial in trials:
        parameters, problem = trial.user_attrs.get("parameters"), trial.user_attrs.get("problem", "")
        complete = trial.state != TrialState.COMPLETE or (trial.value is not None and math.isfinite(trial.value))
        if not complete or not isinstance(parameters, dict) or not isinstance(problem, str):
            raise InvalidInput(f"trial {trial.number} is incomplete")
    if {trial.user_attrs.get("index") for trial in trials} != set(range(len({t.user_attrs["index"] for t in trials}))):
        raise InvalidInput("trials are missing")


class _PartlyFixedTrial(optuna.Trial):
    """A copy of a trial that returns fixed parameters as they are, of any value, and samples only the others."""

    def __init__(self, trial: optuna.Trial, fixed: Mapping[str, Any]) -> None:
        vars(self).update(vars(trial))
        self.fixed = fixed

    def suggest_float(self, name: str, *space: Any, **options: Any) -> Any:
        return self.fixed[name] if name in self.fixed else super().suggest_float(name, *space, **options)

    def suggest_int(self, name: str, *space: Any, **options: Any) -> Any:
        return self.fixed[name] if name in self.fixed else super().suggest_int(name, *space, **options)

    def suggest_categorical(self, name: str, *space: Any, **options: Any) -> Any:
        return self.fixed[name] if name in self.fixed else super().suggest_categorical(name, *space, **options)


def _sampler(seed: int, index: int) -> optuna.samplers.BaseSampler:
    """Return a sampler for one trial, with its own seed, so that a draw depends only on the earlier trials.

    The seeds are the same for all kinds, so kinds that share parameters start with the same values of them.
    """
    trial_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
    return optuna.samplers.TPESampler(seed=trial_seed, n_startup_trials=_STARTUP_TRIALS, constant_liar=False)


def _race(entries: Sequence[_Entry], trials: int, advance: Callable[[], None]) -> None:
    """Try all kinds with their defaults, then spend the other trials by successive halving.

    Kinds without parameters to tune are tried once, and do not count towards ``trials``.
    """
    for entry in entries:
        entry.next()
    racing = [entry for entry in entries if entry.is_tunable]
    remaining = trials - len(racing)
    for rounds in range(math.ceil(math.log2(max(1, len(racing)))) + 1, 0, -1):
        share = max(0, remaining) // rounds // max(1, len(racing))
        for entry in racing * share:
            entry.next()
            advance()
        remaining -= share * len(racing)
        racing = sorted(racing, key=lambda entry: -entry.skill)[: math.ceil(len(racing) / 2)]


def _kinds(
    simulator: str | Simulator | type[Simulator], fixed: dict[str, Any]
) -> tuple[list[type[Simulator]], dict[str, Any]]:
    """Return the kinds to search, checked to accept the fixed parameters, and all fixed parameters."""
    fixed = _changed_parameters(simulator) | fixed
    kinds = _kinds_with(fixed) if isinstance(simulator, str) and simulator == "best" else [_kind_of(simulator)]
    for kind in kinds:
        if kind.needs_task and fixed.get("task") is None:
            raise InvalidInput(f"simulator {kind_name(kind)!r} needs the task: pass fixed={{'task': task}}")
        kind().with_parameters(**_fixed_for(kind, fixed))
    return kinds, fixed


def _kind_of(simulator: Any) -> type[Simulator]:
    """Return the class of a simulator that is passed as a name, an instance or a class."""
    if isinstance(simulator, Simulator):
        return type(simulator)
    if isinstance(simulator, type) and issubclass(simulator, Simulator):
        return simulator
    if simulator not in SIMULATORS:
        raise InvalidInput(f"unknown simulator {simulator!r}, {did_you_mean(str(simulator), (*SIMULATORS, 'best'))}")
    kind: type[Simulator] = SIMULATORS[simulator]
    return kind


def _changed_parameters(simulator: object) -> dict[str, Any]:
    """Return the parameters of an instance that differ from their defaults; a name or a class has none."""
    if not isinstance(simulator, Simulator):
        return {}
    defaults = type(simulator)().get_params(deep=False)
    values = simulator.get_params(deep=False)
    return {name: value for name, value in values.items() if not np.all(value == defaults[name])}  # arrays too


def _kinds_with(fixed: Mapping[str, Any]) -> list[type[Simulator]]:
    """Return the kinds that have all fixed parameters, and the task among them if they need one."""
    kinds = [
        kind
        for kind in SIMULATORS.values()
        if kind is not BestSimulator  # it is made of the others
        and _fixed_for(kind, fixed).keys() <= kind().get_params().keys()
        and (not kind.needs_task or fixed.get("task") is not None)
    ]
    if not kinds:
        raise InvalidInput(f"no simulator has all of the parameters {', '.join(fixed)}")
    return kinds


def _fixed_for(kind: type[Simulator], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fixed parameters of a kind, without the task if the kind does not need it."""
    return {name: value for name, value in fixed.items() if name != "task" or "task" in kind().get_params()}


def kind_name(kind: type[Simulator]) -> str:
    """Return the name of a kind, or of its class if it has none."""
    return kind.name or kind.__name__


def _folds(runs: Runs, count: int, seed: int) -> list[_Fold]:
    """Split the runs into disjoint folds, shuffled by the seed but independent of the order of ``runs``."""
    ids = sorted(set(runs.ids))
    if len(ids) < count:
        advice = f"record more runs, or use folds={len(ids)}" if len(ids) > 1 else "record at least 2"
        raise InvalidInput(f"{len(ids)} run(s) cannot be split into {count} folds: {advice}")
    shuffled = np.random.default_rng(seed).permutation(len(ids))
    fold_of = {ids[index]: position % count for position, index in enumerate(shuffled)}
    ordered = sorted(runs, key=lambda run: run.id)
    folds = []
    for fold in range(count):
        fitting = Runs(run for run in ordered if fold_of[run.id] != fold)
        held_out = Runs(run for run in ordered if fold_of[run.id] == fold)
        error_of_mean = float(fitted_errors(MeanTrajectorySimulator(), fitting, held_out)[0].sum())
        folds.append(_Fold(fitting, held_out, error_of_mean))
    if not any(fold.error_of_mean for fold in folds):
        raise InvalidInput("the mean trajectory forecasts these runs exactly: there is nothing to tune")
    return folds


def _digest(runs: Runs, fixed: Mapping[str, Any]) -> str:
    """Return a digest of the version, the fixed parameters, the examples and the runs.

    It includes the losses, because ``Runs.select`` puts another measure of the same runs in their place.
    """
    digest = hashlib.sha256(json.dumps([__version__, _plain(fixed)], sort_keys=True, default=repr).encode())
    for examples in (runs.train, runs.test):
        for values in () if examples is None else (examples.features, examples.targets):
            if values is not None:
                digest.update(f"{values.dtype} {values.shape}".encode() + values.tobytes())
    for run in sorted(runs, key=lambda run: run.id):
        digest.update(f"{run.id} {run.curriculum.digest}".encode() + run.losses.tobytes())
    return digest.hexdigest()[:16]


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Replace a task by its fingerprint and a recipe by its fields, so that a storage can hold them."""

    def plain(value: Any) -> Any:
        if isinstance(value, Task):
            return value.fingerprint
        return value.canonical() if isinstance(value, Recipe) else value

    return {name: plain(value) for name, value in parameters.items()}


def _value(trial: FrozenTrial) -> float:
    return float(trial.value if trial.value is not None else MIN_SKILL)


@contextlib.contextmanager
def _opened(path: str | Path | None) -> Iterator[optuna.storages.BaseStorage | None]:
    """Open the SQLite file ``path``, or create it; yield None without a path."""
    if path is None:
        yield None
        return
    from sqlalchemy.exc import SQLAlchemyError  # slow to import

    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        if not Path(path).exists():
            _create(Path(path))
        with _database(path) as storage:
            yield storage
    except (OSError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise StoreError(f"cannot store trials in {path}: {error}") from error


@contextlib.contextmanager
def _reading(path: str | Path | None) -> Iterator[None]:
    """Say which file it is whose trials cannot be read; a damaged one can raise anything in Optuna."""
    from sqlalchemy.exc import SQLAlchemyError  # slow to import

    try:
        yield
    except SQLAlchemyError:  # explained where the file is opened
        raise
    except Exception as error:
        raise StoreError(
            f"the trials in {path} cannot be read, because the file is damaged ({error}): delete it or name another one"
        ) from error


@contextlib.contextmanager
def _database(path: str | Path) -> Iterator[optuna.storages.BaseStorage]:
    storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
    try:
        yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _create(path: Path) -> None:
    """Create an empty database in another folder, then move it to ``path`` in one step.

    SQLite commits each table and index separately. A process killed in between would leave a database without the
    index that keeps the names of studies unique, and no search could use it.
    """
    with tempfile.TemporaryDirectory() as folder:
        with _database(Path(folder) / path.name):
            pass
        content = (Path(folder) / path.name).read_bytes()
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        unfinished.write_bytes(content)
        try:
            os.link(unfinished, path)
        except FileExistsError:  # another process was faster
            pass
        except OSError:  # a file system without hard links
            os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Optuna's log of each trial inside the block."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
