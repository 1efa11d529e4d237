"""What-if questions: what would the losses be under an edited curriculum?

forecast  = what_if(simulator, run, Remove("label == 3"))             one question: whole trajectories
forecasts = what_if(simulator, runs, {"no 3": Remove("label == 3"), …})   many, of many runs: final losses
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np

from simfluence._internal.checked import checked
from simfluence._internal.types import Share
from simfluence.curriculum import Curriculum
from simfluence.edits import Edit, apply_all
from simfluence.errors import InvalidInput
from simfluence.queries.forecast import Forecast, described_edits
from simfluence.queries.forecasts import Forecasts
from simfluence.queries.tables import check_base
from simfluence.runs import Run
from simfluence.simulators import Simulator
from simfluence.task import Task

_AT_ONCE = 50  # edited curricula whose intervals are asked for together

Query = Edit | Sequence[Edit]


@overload
def what_if(
    simulator: Simulator, base: Run, queries: Query, *, task: Task | None = None, confidence: float = 0.9
) -> Forecast: ...
@overload
def what_if(
    simulator: Simulator,
    base: Run,
    queries: Mapping[str, Query] | Sequence[Sequence[Edit]],
    *,
    task: Task | None = None,
    confidence: float = 0.9,
) -> Forecasts: ...
@overload
def what_if(
    simulator: Simulator,
    base: Sequence[Run],
    queries: Mapping[str, Query] | Sequence[Sequence[Edit]] | Query,
    *,
    task: Task | None = None,
    confidence: float = 0.9,
) -> Forecasts: ...
@checked
def what_if(
    simulator: Simulator,
    base: Run | Sequence[Run],
    queries: Query | Mapping[str, Query] | Sequence[Query],
    *,
    task: Task | None = None,
    confidence: Share = 0.9,
) -> Forecast | Forecasts:
    """Forecast the losses of a run whose curriculum is edited.

    Args:
        simulator: fitted on runs of the same task.
        base: a run or several, whose curricula are edited; simulations start from their initial losses.
        queries: one edit, or several to apply in turn; or many such queries, as a mapping from names or as a list of
            lists of edits.
        task: task for filters if the run has no metadata, and for ``verify``.
        confidence: confidence of intervals, if the simulator gives them (see ``ConformalSimulator``).

    Returns:
        A ``Forecast`` with whole trajectories for one run and one query; else ``Forecasts``.

    Raises:
        InvalidInput: there is no edit, an edit cannot be applied, or a run has other examples than the simulator.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> simulator = sf.AdditiveSimulator(l2=1e-6).fit(runs)
    >>> what_if(simulator, runs[0], sf.Remove([1])).change.round(2)
    array([-0.5])
    >>> forecasts = what_if(simulator, runs, {"without 0": sf.Remove([0]), "without 1": sf.Remove([1])})
    >>> forecasts.change.round(2).ravel()
    array([ 2. , -0.5])
    """
    runs = (base,) if isinstance(base, Run) else tuple(base)
    if not runs:
        raise InvalidInput("base has no run: give a run, such as runs[0], or several")
    for run in runs:
        check_base(simulator, run, task)
    if isinstance(base, Run) and _is_one(queries):
        edits = _edits(queries)
        edited = apply_all(edits, base.curriculum, task.train if task else base.train)
        return Forecast.of(simulator, base, edits, edited, confidence, task)
    return _forecasts(simulator, runs, _named(queries), confidence, task)


def _forecasts(
    simulator: Simulator,
    runs: tuple[Run, ...],
    queries: Mapping[str, tuple[Edit, ...]],
    confidence: float,
    task: Task | None,
) -> Forecasts:
    edited = [[_applied(name, edits, run, task) for run in runs] for name, edits in queries.items()]
    start = time.perf_counter()
    base, change, ends = [], [], []
    for number, run in enumerate(runs):
        curricula = [row[number] for row in edited]
        base.append(simulator.simulate([run.curriculum], run.initial_losses)[0, -1])
        change.append(simulator.changes(run.curriculum, curricula, run.initial_losses))
        if simulator.gives_intervals:
            ends.append(_final_intervals(simulator, curricula, run.initial_losses, confidence))
    low, high = np.stack(ends, axis=2) if ends else (None, None)
    seconds = (time.perf_counter() - start) / (len(queries) * len(runs))
    return Forecasts(
        simulator, runs, queries, edited, np.stack(base), np.stack(change, 1), low, high, confidence, task, seconds
    )


def _final_intervals(
    simulator: Simulator, curricula: Sequence[Curriculum], initial: np.ndarray, confidence: float
) -> np.ndarray:
    """Compute the low and high ends of the final losses, ``[2, curricula, test]``."""
    intervals = []
    for start in range(0, len(curricula), _AT_ONCE):
        chunk = curricula[start : start + _AT_ONCE]
        ends = simulator.interval(chunk, initial, confidence)
        intervals.append([[losses[len(c)] for losses, c in zip(end, chunk, strict=True)] for end in ends])
    return np.concatenate(intervals, axis=1)


def _applied(name: str, edits: tuple[Edit, ...], run: Run, task: Task | None) -> Curriculum:
    try:
        return apply_all(edits, run.curriculum, task.train if task else run.train)
    except InvalidInput as error:
        raise InvalidInput(f"query {name!r} of base run {run.id}: {error}") from None


def _is_one(queries: Any) -> bool:
    """Decide whether this is one query: an edit or a sequence of edits (an empty one is refused later)."""
    if isinstance(queries, Mapping):
        return False
    return isinstance(queries, Edit) or not any(isinstance(entry, Sequence) for entry in queries)


def _edits(query: Any) -> tuple[Edit, ...]:
    edits = (query,) if isinstance(query, Edit) else tuple(query)
    if not edits or not all(isinstance(edit, Edit) for edit in edits):
        raise InvalidInput("edits must be one or more of Remove, Keep, Repeat, …, such as Remove('label == 3')")
    return edits


def _named(queries: Any) -> dict[str, tuple[Edit, ...]]:
    """Map names to queries; a query without a name is named by its description."""
    if isinstance(queries, Mapping):
        named = {str(name): _edits(query) for name, query in queries.items()}
    else:
        listed = [_edits(query) for query in ([queries] if _is_one(queries) else queries)]
        named = {described_edits(edits): edits for edits in listed}
    if not named:
        raise InvalidInput("no query: give one edit or more")
    return named
