"""Forecast effects of each training example on each test loss: when it is left out, moved, or shown again.

Each function edits one base run in many ways and returns the changes of the final losses as ``Scores``,
``[test, train]``, positive where the edit raises the loss. Simulators of the Markov family are asked all at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pandas as pd

from simfluence._internal.checked import checked, shown
from simfluence._internal.types import Target
from simfluence.attribution.scores import Scores
from simfluence.edits import Insert, Move
from simfluence.errors import InvalidInput
from simfluence.examples import Examples
from simfluence.queries.tables import check_base, column_of, described
from simfluence.runs import Run, Runs
from simfluence.simulators import Simulator


@checked
def leave_one_out(simulator: Simulator, run: Run, method: Literal["simulate", "derivative"] = "simulate") -> Scores:
    """Forecast how each test example's final loss changes if one training example is never shown, for each of them.

    Batches shrink, as with ``Remove``. Examples that the run never shows get 0.

    Args:
        simulator: fitted on runs of the same task.
        run: the base: its curriculum, and the losses it starts from.
        method: "simulate" each removal, or extrapolate from the "derivative" of the final losses with respect to the
            weight of each training example, which one backward pass gives for all of them. Only
            ``TangentKernelSimulator`` has derivatives. On digits they correlate with the simulated changes at 0.99, in
            half the time, and are a fifth too small (relative error 0.23 to 0.24); with AdamW 0.96 and 0.40. So they
            rank examples well and size their effects roughly.

    Raises:
        NotFittedError: before ``fit``.
        InvalidInput: the run has other examples than the simulator or shows a single one, or the simulator has no
            derivatives.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> leave_one_out(sf.AdditiveSimulator(l2=1e-6).fit(runs), runs[0]).values.round(2)
    array([[ 2. , -0.5]])
    """
    check_base(simulator, run)
    if method == "derivative":
        return _scores(simulator, run, simulator.derivatives_without(run.curriculum, run.initial_losses).T, "loss")
    changes = simulator.changes_without(run.curriculum, np.arange(run.curriculum.n_train)[:, None], run.initial_losses)
    return _scores(simulator, run, changes.T, "loss")


@checked
def leave_group_out(simulator: Simulator, run: Run, groups: str | Mapping[Any, Target]) -> pd.DataFrame:
    """Forecast leaving out each group of training examples: a row per test example, a column per group.

    Args:
        simulator, run: same as in ``leave_one_out``.
        groups: a column of the training examples' metadata, whose values are the groups; or a mapping from names to
            targets (filters, indices or ids), which may overlap.

    Raises:
        NotFittedError, InvalidInput: same as in ``leave_one_out``; or a column or target is unknown, or a group has
            all examples that the base run shows.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], [2]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> fitted = sf.AdditiveSimulator(l2=1e-6).fit(runs)
    >>> leave_group_out(fitted, runs[0], {"even": [0, 2], "odd": [1]}).round(2).to_dict("records")
    [{'even': 2.0, 'odd': -0.5}]
    """
    check_base(simulator, run)
    members = _members(groups, run)
    changes = simulator.changes_without(
        run.curriculum, [np.flatnonzero(mask) for mask in members.values()], run.initial_losses
    )
    return pd.DataFrame(changes.T, columns=pd.Index(members, name="group")).rename_axis("test")


@checked
def move_each(simulator: Simulator, run: Run, to: int = 0) -> Scores:
    """Forecast how each final loss changes if all showings of one training example move to batch ``to`` (0: the first,
    −1: the last), for each of them; see ``Move``. Examples that the run never shows get 0.

    Raises:
        NotFittedError, InvalidInput: same as in ``leave_one_out``; or ``to`` is beyond the end.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> move_each(sf.AdditiveSimulator(l2=1e-6).fit(runs), runs[0], to=-1).values.round(2)  # [[], [1], [0, 0]] for 0
    array([[1.  , 0.25]])
    """
    check_base(simulator, run)
    shown = np.unique(run.curriculum.indices)
    moved = [Move(rows=[int(index)], to=to).apply(run.curriculum) for index in shown]
    changes = np.zeros((run.losses.shape[1], run.curriculum.n_train))
    changes[:, shown] = simulator.changes(run.curriculum, moved, run.initial_losses).T
    return _scores(simulator, run, changes, "change")


@checked
def show_again(simulator: Simulator, run: Run, at: int = -1) -> Scores:
    """Forecast how each final loss changes if one training example is shown once more in batch ``at`` (−1: the last),
    for each of them; see ``Insert``.

    Raises:
        NotFittedError, InvalidInput: same as in ``leave_one_out``; or ``at`` is beyond the end.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], []]], [[[3.0], [2.0], [2.5], [2.5]]])
    >>> show_again(sf.AdditiveSimulator(l2=1e-6).fit(runs), runs[0]).values.round(2)
    array([[-1. ,  0.5]])
    """
    check_base(simulator, run)
    edited = [Insert(rows=[index], at=at).apply(run.curriculum) for index in range(run.curriculum.n_train)]
    return _scores(simulator, run, simulator.changes(run.curriculum, edited, run.initial_losses).T, "change")


@checked
def rank_suspects(
    source: Simulator | Any,
    base: Run | Runs | None = None,
    *,
    test: Target | None = None,
    by: str | None = None,
    examples: Examples | None = None,
    method: Literal["simulate", "derivative"] = "simulate",
) -> pd.DataFrame:
    """Rank training examples by how much their removal lowers the test losses, mislabelled or harmful ones first.

    Args:
        source: a fitted simulator; or changes of test losses by the removal of each training example,
            ``[test, train]``, such as ``leave_one_out`` or an attributor's scores.
        base: for a simulator the run, or runs, to remove them from. Gains are means over those that show the example.
        test: whose losses count: a filter over the test examples, indices or ids; all of them by default.
        by: a column of the training examples' metadata: rank its groups instead.
        examples: the training examples, where no base run tells of them.
        method: of ``leave_one_out``, for a simulator; ``together`` is simulated.

    Returns:
        Columns: gain (mean fall of the chosen final losses if the example alone is removed), and with a simulator
        shown (how often, in all base runs); what is known of the examples. With ``by`` a row per group: the total gain
        of its examples, their number, the mean gain and, with a simulator, ``together``, the gain of removing them all.

    Raises:
        InvalidInput: a simulator without a base run, an array of another shape, an unknown column or target.

    >>> rank_suspects(np.array([[0.2, -0.5, 0.0]])).gain.to_dict()
    {1: 0.5, 2: -0.0, 0: -0.2}
    """
    runs = [base] if isinstance(base, Run) else list(base or [])
    train = examples or (runs[0].train if runs else None)
    if isinstance(source, Simulator):
        if not runs:
            raise InvalidInput("a simulator forecasts removals from a run: give base=, a run or several")
        gains = [-_mean_over_tests(leave_one_out(source, run, method).values, run.test, test) for run in runs]
        counts = np.array([run.curriculum.counts.sum(axis=0) for run in runs])  # [runs, train]
        gain = np.sum(gains, axis=0) / np.maximum((counts > 0).sum(axis=0), 1)
        table = pd.DataFrame({"gain": gain, "shown": counts.sum(axis=0)})
    else:
        try:
            changes = np.asarray(source, np.float64)
        except (TypeError, ValueError, RuntimeError):
            raise InvalidInput(
                f"source must be a fitted simulator, or changes [test, train], got {shown(source)}"
            ) from None
        if changes.ndim != 2 or (train is not None and changes.shape[1] != len(train)):
            raise InvalidInput(f"changes must be [test, train], got {list(changes.shape)}")
        table = pd.DataFrame({"gain": -_mean_over_tests(changes, runs[0].test if runs else None, test)})
    if by is None:
        return described(table.rename_axis("train"), train).sort_values("gain", ascending=False, kind="stable")
    groups = table["gain"].groupby(column_of(train, by, "training").to_numpy())
    totals = pd.DataFrame({"gain": groups.sum(), "examples": groups.size(), "mean_gain": groups.mean()}).rename_axis(by)
    if isinstance(source, Simulator):
        totals["together"] = np.mean([-_group_gains(source, run, by, test) for run in runs], axis=0)
    return totals.sort_values("gain", ascending=False, kind="stable")


def _scores(simulator: Simulator, run: Run, changes: np.ndarray, unit: str) -> Scores:
    """Return changes ``[test, train]`` with the ids of the examples."""
    train, test = (None if examples is None else examples.ids for examples in (run.train, run.test))
    return Scores(changes, unit, simulator.name, train=train, test=test)


def chosen_tests(test: Target | None, examples: Examples | None, count: int) -> np.ndarray:
    """Return the indices of the test examples that a target selects; all of them without a target.

    Raises:
        InvalidInput: unknown ones, or a filter that matches none.
    """
    if test is None:
        return np.arange(count)
    return (examples or Examples.numbered(count)).select(test)


def _mean_over_tests(changes: np.ndarray, examples: Examples | None, test: Target | None) -> np.ndarray:
    """Average over the chosen test examples, ``[train]``."""
    means: np.ndarray = changes[chosen_tests(test, examples, len(changes))].mean(axis=0)
    return means


def _group_gains(simulator: Simulator, run: Run, by: str, test: Target | None) -> np.ndarray:
    return _mean_over_tests(leave_group_out(simulator, run, by).to_numpy(), run.test, test)


def _members(groups: str | Mapping[Any, Target], run: Run) -> dict[Any, np.ndarray]:
    """Return the members of each group as a mask, ``[train]``."""
    count = run.curriculum.n_train
    if isinstance(groups, str):
        values = column_of(run.train, groups, "training")
        return {value: (values == value).to_numpy() for value in sorted(values.dropna().unique())}
    known = run.train or Examples.numbered(count)
    return {name: np.isin(np.arange(count), known.select(target)) for name, target in groups.items()}
