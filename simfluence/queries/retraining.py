"""Training again under edited curricula: the truth that forecasts are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float

from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.recipe import Recipe
from simfluence.recording import record
from simfluence.runs import Run
from simfluence.task import Task


def retrained(
    runs: Sequence[Run],
    curricula: Sequence[Sequence[Curriculum]],
    task: Task | None,
    recipe: Recipe | None,
    store: str | Path | None,
    seeds: int,
) -> tuple[list[list[np.ndarray]], Float[np.ndarray, "queries runs seeds test"] | None]:
    """Train under each edited curriculum; return the losses ``[queries][runs]`` and the changes from several seeds.

    Raises:
        InvalidInput: the task or recipe is missing or differs from that of a base run.
    """
    recipe = recipe or runs[0].recipe
    if task is None or recipe is None:
        missing = "task" if task is None else "recipe"
        raise InvalidInput(f"verifying trains again, which needs the {missing}: pass {missing}=")
    for run in runs:
        run.check_task(task)
        if run.recipe not in (None, recipe):
            raise InvalidInput(f"base run {run.id} was trained by another recipe: {run.recipe}")
    edited = [curriculum for row in curricula for curriculum in row]
    losses_of_runs = [run.losses.astype(np.float64) for run in record(task, recipe, edited, store, verification=True)]
    after = [losses_of_runs[start : start + len(runs)] for start in range(0, len(losses_of_runs), len(runs))]
    if seeds == 1:
        return after, None
    final = np.array([[losses[-1] for losses in row] for row in after])
    changes = [final - np.array([run.losses[-1] for run in runs], np.float64)]
    for offset in range(1, seeds):
        other = recipe.replace(seed=recipe.seed + offset)
        again = record(task, other, [*(run.curriculum for run in runs), *edited], store, verification=True)
        ends = np.array([run.losses[-1] for run in again], np.float64)
        changes.append(ends[len(runs) :].reshape(final.shape) - ends[: len(runs)])
    return after, np.stack(changes, axis=2)
