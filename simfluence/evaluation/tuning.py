"""Choose a simulator and its parameters by cross-validation.

Trial k of a search depends on the arguments and on trials 0…k−1 alone, and a storage holds finished trials only. So
the storage is a memory: a search that was killed, or that is asked for more trials, goes on as if never stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pandas as pd
from optuna.trial import FrozenTrial, TrialState

from simfluence._internal.deprecation import renamed_arguments
from simfluence._internal.progress import bar
from simfluence._version import __version__
from simfluence.errors import InvalidInput, SimfluenceError, StoreError, did_you_mean
from simfluence.evaluation.cross_validation import fitted_errors
from simfluence.evaluation.metrics import MIN_SKILL, bounded_skill
from simfluence.recipe import Recipe
from simfluence.runs import Runs
from simfluence.simulators import SIMULATORS, MeanTrajectorySimulator, Simulator
from simfluence.task import Task

_STARTUP_TRIALS = 5  # drawn at random, and never stopped early


@dataclass(frozen=True, eq=False)
class Search:
    """The candidates that a search tried, and the best of them.

    Attributes:
        kind: the class of the best simulator.
        parameters: its best parameters; those that are not named here are at their defaults.
        skill: its cross-validated skill.
        trials: a row per candidate in the order tried, one kind after the other: ``simulator``, its parameters,
            ``skill`` over the ``folds`` that were scored (fewer than all where it was stopped early), and the
            ``problem`` of a candidate that does not work.
    """

    kind: type[Simulator]
    parameters: Mapping[str, Any]
    skill: float
    trials: pd.DataFrame

    @property
    def name(self) -> str:
        """The name of the best simulator."""
        return kind_name(self.kind)

    @property
    def simulator(self) -> Simulator:
        """The best simulator, not fitted yet."""
        return self.kind().with_parameters(**self.parameters)


@renamed_arguments(name="simulator")
def tune(
    simulator: str | Simulator | type[Simulator],
    runs: Runs,
    *,
    trials: int = 20,
    seed: int = 0,
    folds: int = 4,
    fixed: Mapping[str, Any] | None = None,
    storage: str | Path | None = None,
    progress: bool = True,
) -> Simulator:
    """Return the simulator of best cross-validated skill, fitted on all ``runs``: ``search``, then ``fit``.

    Arguments and errors are those of ``search``.

    >>> rng = np.random.default_rng(0)
    >>> runs = Runs.from_arrays(rng.integers(3, size=(8, 5, 2)), rng.normal(size=(8, 6, 2)).cumsum(axis=1))
    >>> tune("additive", runs, trials=3, fixed={"around": "mean"}).around
    'mean'
    """
    runs = runs.usable("tune on")
    options: dict[str, Any] = {"fixed": fixed, "storage": storage, "progress": progress}
    return search(simulator, runs, trials=trials, seed=seed, folds=folds, **options).simulator.fit(runs)


@renamed_arguments(name="simulator")
def search(
    simulator: str | Simulator | type[Simulator],
    runs: Runs,
    *,
    trials: int = 20,
    seed: int = 0,
    folds: int = 4,
    fixed: Mapping[str, Any] | None = None,
    storage: str | Path | None = None,
    progress: bool = True,
) -> Search:
    """Try parameters, and score each by its rollouts of runs it was not fitted on.

    The skill is that of ``evaluate``, against the mean trajectory of each fold's fitting runs, pooled over all
    folds. The first candidate has the default parameters; the next are drawn by Optuna's TPE sampler from
    ``Simulator.suggest``. One that is below the median of the others after a fold is stopped.

    Args:
        simulator: a name; a class, also one of your own; or an instance, whose parameters that are not at their
            defaults are given and not searched. With "best" every kind is tried with its defaults, then the kinds
            race: in each round those still in the race share the round's trials and the better half goes on, so most
            trials are spent on the best kinds and few on slow ones that do not pay.
        runs: whose order does not matter; diverged ones are left out with a warning.
        trials: how many candidates in all; for "best" at least one for each kind.
        seed: of the folds and of the draws.
        folds: number of disjoint parts that are held out in turn.
        fixed: parameters that are given, not searched. "best" chooses among the kinds that have them. The tangent
            kernel needs ``fixed={"task": task}``, and takes part in "best" where that is given.
        storage: SQLite file that remembers finished trials, for this search and any other.
        progress: show a bar, if on a terminal.

    Raises:
        InvalidInput: fewer runs than folds, runs that are all alike, arguments out of range, or no candidate could
            be fitted.
        StoreError: ``storage`` cannot be used.
    """
    if trials < 1 or seed < 0 or folds < 2:
        raise InvalidInput(f"trials={trials}, seed={seed}, folds={folds}: at least 1, 0 and 2 are needed")
    runs, fixed = runs.usable("tune on"), dict(fixed or {})
    kinds, fixed = _kinds(simulator, fixed)
    plan = _Plan(_folds(runs, folds, seed), fixed, seed, f"seed{seed}-folds{folds}-{_digest(runs, fixed)}")
    with _quiet(), _memory(storage) as memory, bar("tuning", trials, progress) as advance:
        entries = [_Entry(kind, plan, memory) for kind in kinds]
        _race(entries, trials, advance)
    winner = max(entries, key=lambda entry: entry.skill)
    best = winner.best.user_attrs
    if winner.skill <= MIN_SKILL:
        raise InvalidInput(f"nothing that was tried for {simulator!r} works: {best['problem']}")
    table = pd.DataFrame([row for entry in entries for row in entry.rows()]).rename_axis("candidate")
    return Search(winner.kind, best["parameters"] | _fixed_for(winner.kind, fixed), winner.skill, table)


@dataclass(frozen=True)
class _Fold:
    """Runs to fit on, runs to score on, and how far the mean trajectory of the former is from the latter."""

    part: Runs
    held: Runs
    error_of_mean: float


@dataclass(frozen=True)
class _Plan:
    """What every trial of a search has in common."""

    folds: Sequence[_Fold]
    fixed: Mapping[str, Any]
    seed: int
    about: str


class _Entry:
    """One kind of simulator in a search. Its first ``count`` trials count, however many the memory has."""

    def __init__(self, kind: type[Simulator], plan: _Plan, memory: optuna.storages.BaseStorage | None) -> None:
        self.kind, self.plan, self.count = kind, plan, 0
        self.memory = optuna.create_study(
            study_name=f"{kind_name(kind)}-{plan.about}", storage=memory, direction="maximize", load_if_exists=True
        )
        pruner = optuna.pruners.MedianPruner(n_startup_trials=_STARTUP_TRIALS)
        self.study = optuna.create_study(direction="maximize", pruner=pruner)
        finished = self.memory.get_trials(states=(TrialState.COMPLETE, TrialState.PRUNED))
        # Two processes at the same search both keep what they tried, and it is the same.
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
            known = {"simulator": kind_name(self.kind)} | trial.user_attrs["parameters"]
            scores = {"skill": _value(trial), "folds": len(trial.intermediate_values)}
            yield known | scores | {"problem": trial.user_attrs.get("problem", "")}

    def next(self) -> None:
        """The next trial: remembered, or made and kept."""
        if self.count == len(self.study.get_trials(deepcopy=False)):
            self._try(self.count)
            self.memory.add_trial(self.study.get_trials(deepcopy=False)[self.count])
        self.count += 1

    def _try(self, index: int) -> None:
        kind, fixed = self.kind, _fixed_for(self.kind, self.plan.fixed)
        self.study.sampler = _sampler(self.plan.seed, index)
        if index == 0:
            self.study.enqueue_trial(kind().get_params())
        trial = self.study.ask()
        parameters = kind.suggest(_Partly(trial, fixed)) | fixed
        trial.set_user_attr("index", index)
        trial.set_user_attr("parameters", _plain(parameters))
        try:
            skill = self._score(trial, kind().with_parameters(**parameters))
        except SimfluenceError as error:  # parameters that exclude each other, a solver that gives up
            trial.set_user_attr("problem", str(error))
            skill = MIN_SKILL
        self.study.tell(trial, skill, TrialState.PRUNED if skill is None else TrialState.COMPLETE)

    def _score(self, trial: optuna.Trial, simulator: Simulator) -> float | None:
        """Skill pooled over the folds, or None for a candidate that is stopped early."""
        sse = baseline_sse = skill = 0.0
        for index, fold in enumerate(self.plan.folds):
            if index and trial.should_prune():
                return None
            sse += fitted_errors(simulator, fold.part, fold.held)[0].sum()
            baseline_sse += fold.error_of_mean
            skill = float(bounded_skill(sse, baseline_sse))
            trial.report(skill, index)
        if skill <= MIN_SKILL:
            trial.set_user_attr("problem", "its rollouts run away")
        return skill


class _Partly(optuna.Trial):
    """The same trial, in which some parameters are given, of whatever value, and only the others drawn."""

    def __init__(self, trial: optuna.Trial, given: Mapping[str, Any]) -> None:
        vars(self).update(vars(trial))
        self.given = given

    def suggest_float(self, name: str, *space: Any, **options: Any) -> Any:
        return self.given[name] if name in self.given else super().suggest_float(name, *space, **options)

    def suggest_int(self, name: str, *space: Any, **options: Any) -> Any:
        return self.given[name] if name in self.given else super().suggest_int(name, *space, **options)

    def suggest_categorical(self, name: str, *space: Any, **options: Any) -> Any:
        return self.given[name] if name in self.given else super().suggest_categorical(name, *space, **options)


def _sampler(seed: int, index: int) -> optuna.samplers.BaseSampler:
    """Seeded anew for each trial, so that the draw depends on the trials before it alone.

    All kinds have the same seeds, so the first parameters that they share are the same, and the race is fair.
    """
    drawn = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
    return optuna.samplers.TPESampler(seed=drawn, n_startup_trials=_STARTUP_TRIALS, constant_liar=False)


def _race(entries: Sequence[_Entry], trials: int, advance: Callable[[], None]) -> None:
    """Successive halving. The defaults of all come first; kinds with nothing to tune are left at that, and free."""
    for entry in entries:
        entry.next()
    racing = [entry for entry in entries if entry.is_tunable]
    left = trials - len(racing)
    for rounds in range(math.ceil(math.log2(max(1, len(racing)))) + 1, 0, -1):
        share = max(0, left) // rounds // max(1, len(racing))
        for entry in racing * share:
            entry.next()
            advance()
        left -= share * len(racing)
        racing = sorted(racing, key=lambda entry: -entry.skill)[: math.ceil(len(racing) / 2)]


def _kinds(
    simulator: str | Simulator | type[Simulator], fixed: dict[str, Any]
) -> tuple[list[type[Simulator]], dict[str, Any]]:
    """Return the kinds that take part, checked to take the fixed parameters, and all parameters that are fixed."""
    fixed = _changed_parameters(simulator) | fixed
    kinds = _able(fixed) if isinstance(simulator, str) and simulator == "best" else [_kind_of(simulator)]
    for kind in kinds:
        if kind.needs_task and fixed.get("task") is None:
            raise InvalidInput(
                f"simulator {kind_name(kind)!r} needs the task besides the runs: give fixed={{'task': task}}"
            )
        kind().with_parameters(**_fixed_for(kind, fixed))
    return kinds, fixed


def _kind_of(simulator: Any) -> type[Simulator]:
    """Return the class that a name, an instance or a class itself means."""
    if isinstance(simulator, Simulator):
        return type(simulator)
    if isinstance(simulator, type) and issubclass(simulator, Simulator):
        return simulator
    if simulator not in SIMULATORS:
        raise InvalidInput(f"unknown simulator {simulator!r}, {did_you_mean(str(simulator), (*SIMULATORS, 'best'))}")
    named: type[Simulator] = SIMULATORS[simulator]
    return named


def _changed_parameters(simulator: object) -> dict[str, Any]:
    """Return the parameters of an instance that are not at their defaults; a name or a class has none."""
    if not isinstance(simulator, Simulator):
        return {}
    defaults = type(simulator)().get_params(deep=False)
    values = simulator.get_params(deep=False)
    return {name: value for name, value in values.items() if not np.all(value == defaults[name])}  # of arrays too


def _able(fixed: Mapping[str, Any]) -> list[type[Simulator]]:
    """Return the kinds that have all fixed parameters; those that need a task take part where it is given."""
    kinds = [
        kind
        for kind in SIMULATORS.values()
        if _fixed_for(kind, fixed).keys() <= kind().get_params().keys()
        and (not kind.needs_task or fixed.get("task") is not None)
    ]
    if not kinds:
        raise InvalidInput(f"no simulator has all of the parameters {', '.join(fixed)}")
    return kinds


def _fixed_for(kind: type[Simulator], fixed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fixed parameters of a kind: the task is only for kinds that need it."""
    return {name: value for name, value in fixed.items() if name != "task" or "task" in kind().get_params()}


def kind_name(kind: type[Simulator]) -> str:
    """The name of a kind; its class's where it has none of its own."""
    return kind.name or kind.__name__


def _folds(runs: Runs, count: int, seed: int) -> list[_Fold]:
    """Disjoint parts of the runs, shuffled from their order by id, are held out in turn."""
    ids = sorted(set(runs.ids))
    if len(ids) < count:
        advice = f"ask for folds={len(ids)}" if len(ids) > 1 else "2 are needed"
        raise InvalidInput(f"{len(ids)} runs cannot be held out in {count} folds: record more, or {advice}")
    shuffled = np.random.default_rng(seed).permutation(len(ids))
    fold_of = {ids[index]: place % count for place, index in enumerate(shuffled)}
    ordered = sorted(runs, key=lambda run: run.id)
    folds = []
    for fold in range(count):
        part = Runs(run for run in ordered if fold_of[run.id] != fold)
        held = Runs(run for run in ordered if fold_of[run.id] == fold)
        folds.append(_Fold(part, held, float(fitted_errors(MeanTrajectorySimulator(), part, held)[0].sum())))
    if not any(fold.error_of_mean for fold in folds):
        raise InvalidInput("the mean trajectory forecasts these runs exactly: there is nothing to tune")
    return folds


def _digest(runs: Runs, fixed: Mapping[str, Any]) -> str:
    """Of all else that scores depend on; the losses, as another measure of the same runs may stand in their place."""
    digest = hashlib.sha256(json.dumps([__version__, _plain(fixed)], sort_keys=True, default=repr).encode())
    for examples in (runs.train, runs.test):
        for values in () if examples is None else (examples.features, examples.targets):
            if values is not None:
                digest.update(f"{values.dtype} {values.shape}".encode() + values.tobytes())
    for run in sorted(runs, key=lambda run: run.id):
        digest.update(f"{run.id} {run.curriculum.digest}".encode() + run.losses.tobytes())
    return digest.hexdigest()[:16]


def _plain(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """For a memory: a task by its fingerprint, a recipe by its fields."""

    def told(value: Any) -> Any:
        if isinstance(value, Task):
            return value.fingerprint
        return value.canonical() if isinstance(value, Recipe) else value

    return {name: told(value) for name, value in parameters.items()}


def _value(trial: FrozenTrial) -> float:
    return float(trial.value if trial.value is not None else MIN_SKILL)


@contextlib.contextmanager
def _memory(path: str | Path | None) -> Iterator[optuna.storages.BaseStorage | None]:
    """The SQLite file ``path``, made if it is not there; nothing without a path."""
    if path is None:
        yield None
        return
    from sqlalchemy.exc import SQLAlchemyError  # slow to import

    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        storage = optuna.storages.RDBStorage(f"sqlite:///{path}")
        try:
            yield storage
        finally:
            storage.remove_session()
            storage.engine.dispose()
    except (OSError, SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        raise StoreError(f"cannot keep trials in {path}: {error}") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Optuna need not tell of each trial; the user's own settings come back."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        yield
    finally:
        optuna.logging.set_verbosity(level)
