"""``Observe``: the choice of what to record of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from pydantic import Field

from simfluence._internal.spec import Spec
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.task import Task

__all__ = ["Observe"]


class Observe(Spec):
    """Choice of what to record of every run. Frozen.

    Losses before any update and after the last one are always recorded.

    Args:
        every: read the test losses (and measures) every ``every`` steps; the steps between are null.
        measures: names of the task's measures to record beside the loss.
        checkpoints: steps at which parameters and optimizer state are saved; 0 is before the first update.

    >>> Observe(every=3).times(7)
    array([ True, False, False,  True, False, False,  True,  True])
    """

    every: int = Field(1, ge=1)
    measures: tuple[str, ...] = ()
    checkpoints: tuple[int, ...] = ()

    def times(self, steps: int) -> Bool[np.ndarray, " times"]:
        """Decide for each time 0…steps whether the test losses are read."""
        times: np.ndarray = np.arange(steps + 1) % self.every == 0
        times[-1] = True
        return times

    def check(self, task: Task, curricula: Sequence[Curriculum]) -> None:
        """Check that the task has the measures and every curriculum the steps.

        Raises:
            InvalidInput: the task lacks a measure, or a curriculum lacks a step.
        """
        for name in self.measures:
            if name not in task.measures:
                raise InvalidInput(f"task {task.name!r} has no measure {name!r}, {did_you_mean(name, task.measures)}")
        shortest = min(len(curriculum) for curriculum in curricula)
        if self.every > shortest:
            raise InvalidInput(f"every={self.every} is more than the {shortest} steps of the shortest curriculum")
        if self.checkpoints and not 0 <= min(self.checkpoints) <= max(self.checkpoints) <= shortest:
            raise InvalidInput(
                f"checkpoints={sorted(self.checkpoints)}: steps go from 0 to {shortest} in the shortest curriculum"
            )
