"""Tables of losses and of examples, and the checks that every question shares."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
from jaxtyping import Float

from simfluence._internal.deprecation import with_old_columns
from simfluence._internal.types import RunLosses
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.examples import Examples
from simfluence.runs import Run
from simfluence.simulators import Simulator
from simfluence.task import Task


def check_base(simulator: Simulator, run: Run, task: Task | None = None) -> None:
    """Check that a run is of the simulator's task.

    Raises:
        InvalidInput: the run is of another task than the simulator, or than ``task``.
    """
    if task is not None:
        run.check_task(task)
    fitted_on = getattr(simulator, "fingerprint_", None)
    if None not in (fitted_on, run.fingerprint) and fitted_on != run.fingerprint:
        raise InvalidInput(f"base run {run.id} is of another task than the runs that the simulator was fitted on")


def described(table: pd.DataFrame, examples: Examples | None) -> pd.DataFrame:
    """Add the examples' metadata to a table with a row per example."""
    if examples is None:
        return table
    taken = {name: f"{name}_of_example" for name in examples.table.columns if name in table.columns}
    return table.join(examples.table.rename(columns=taken))


def column_of(examples: Examples | None, name: str, side: str) -> pd.Series:
    """Return a metadata column of the training or test examples.

    Raises:
        InvalidInput: the run has no metadata for them, or the metadata has no such column.
    """
    if examples is None:
        raise InvalidInput(f"this run has no metadata for its {side} examples; pass task= to look up {name!r}")
    return pd.Series(examples.column(name), name=name)


def taken_by(edited: Curriculum, base: Curriculum) -> Float[np.ndarray, " train"]:
    """Count the showings of each training example that an edit takes away from the base; negative where it adds some.

    Of an edit that only moves showings, return instead how many steps earlier, in sum, each example is shown.
    """
    fewer, earlier = _exposure(base) - _exposure(edited)
    taken: np.ndarray = fewer if fewer.any() else earlier
    return taken


def _exposure(curriculum: Curriculum) -> Float[np.ndarray, "2 train"]:
    """Return how often each training example is shown, and the sum of the steps at which it is."""
    steps = np.repeat(np.arange(len(curriculum)), curriculum.sizes)
    shown, times = (
        np.bincount(curriculum.indices, weights, curriculum.n_train) for weights in (np.ones(len(steps)), steps)
    )
    return np.stack([shown, times])


def tidy(columns: Mapping[str, RunLosses]) -> pd.DataFrame:
    """Return losses ``[steps + 1, test]`` as columns, a row per step and test example, with change = what_if − base."""
    longest, tests = max(len(losses) for losses in columns.values()), next(iter(columns.values())).shape[1]
    index = {"step": np.repeat(np.arange(longest), tests), "test": np.tile(np.arange(tests), longest)}
    full = {name: np.full((longest, tests), np.nan) for name in columns}
    for name, losses in columns.items():
        full[name][: len(losses)] = losses
    frame = pd.DataFrame(index | {name: losses.ravel() for name, losses in full.items()})
    frame.insert(4, "change", frame["what_if"] - frame["base"])
    return with_old_columns(frame, {"delta": "change"})
