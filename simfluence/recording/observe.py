"""What to record of a run."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool
from pydantic import Field

from simfluence._internal.spec import Spec
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.task import Task


class Observe(Spec):
    """What to record of every run. Frozen.

    Losses before any update and after the last one are always recorded.

    Args:
        every: read the test losses (and measures) after every so many steps; the steps between are null.
        measures: names of the task's further measures to record.
        checkpoints: numbers of updates after which parameters and optimizer state are saved (0 is before any).

    >>> Observe(every=3).times(7)
    array([ True, False, False,  True, False, False,  True,  True])
    """

    every: int = Field(1, ge=1)
    measures: tuple[str, ...] = ()
    checkpoints: tuple[int, ...] = ()

    def times(self, steps: int) -> Bool[np.ndarray, " times"]:
        """At which times 0…steps the test side is read."""
        times = np.arange(steps + 1) % self.every == 0
        times[-1] = True
        return times

    def check(self, task: Task, curricula: Sequence[Curriculum]) -> None:
        """Compare with what is to be observed.

        Raises:
            InvalidInput: the task has no such measure, or a curriculum no such step.
        """
        for name in self.measures:
            if name not in task.measures:
                raise InvalidInput(f"task {task.name!r} has no measure {name!r}, {did_you_mean(name, task.measures)}")
        shortest = min(len(curriculum) for curriculum in curricula)
        if self.every > shortest:
            raise InvalidInput(f"every={self.every} is more than the {shortest} steps of the shortest curriculum")
        if self.checkpoints and not 0 <= min(self.checkpoints) <= max(self.checkpoints) <= shortest:
            raise InvalidInput(
                f"checkpoints={sorted(self.checkpoints)}: steps go from 0 to {shortest}, the shortest curriculum's"
            )
