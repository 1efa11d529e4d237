"""Recording plan: which runs are trained together, and by which engine.

The plan depends on task, recipe and curricula, not on what is already recorded, so that a resumed recording repeats
the same arithmetic.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from simfluence.curriculum import Curriculum
from simfluence.errors import EngineWarning, InvalidInput, did_you_mean
from simfluence.recipe import Recipe
from simfluence.recording.engines.base import Training, TrainingSetup, first_pass
from simfluence.recording.engines.batched import BatchedTraining, obstacle, parameter_count
from simfluence.recording.engines.loop import LoopTraining
from simfluence.task import Task

__all__ = ["AUTO_PARAMETERS", "ENGINES", "GROUP_BYTES", "GROUP_RUNS", "RunGroup", "plan"]

ENGINES = ("auto", "batched", "loop")

#: Most runs trained at once, and most bytes of their parameters, gradients and optimizer state.
GROUP_RUNS = 32
GROUP_BYTES = 2**30
_COPIES = 5  # tensors per parameter: parameter, gradient, a temporary, two moments

#: Largest model that "auto" trains in batches; a larger one keeps the processor busy by itself.
AUTO_PARAMETERS = 1_000_000


@dataclass(frozen=True)
class RunGroup:
    """Runs of equal length that are trained together.

    Args:
        engine: "batched" or "loop".
        curricula: curricula by run id.
    """

    engine: str
    curricula: Mapping[str, Curriculum]

    @property
    def name(self) -> str:
        """Name of the group's unfinished state: the run's id, or a digest of the runs' ids."""
        ids = list(self.curricula)
        return ids[0] if len(ids) == 1 else hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]

    @property
    def steps(self) -> int:
        return len(next(iter(self.curricula.values())))

    def start(self, setup: TrainingSetup, times: np.ndarray) -> Training:
        """Build the group's training, before any update."""
        with first_pass(setup.task):
            if self.engine == "loop":
                return LoopTraining(setup, next(iter(self.curricula.values())), times)
            return BatchedTraining(setup, list(self.curricula.values()), times)


def plan(task: Task, recipe: Recipe, curricula: Mapping[str, Curriculum], engine: str = "auto") -> list[RunGroup]:
    """Divide runs into groups that are trained together.

    Args:
        task: the task to train on.
        recipe: how to train.
        curricula: the runs' curricula by run id.
        engine: "loop" trains one run after another. "batched" trains up to ``GROUP_RUNS`` runs of equal length
            at once; runs that cannot be batched (an optimizer that is not element-wise, a model with dropout or
            running statistics, a curriculum with an empty batch) use the loop, with a warning. "auto" uses "batched"
            where it works and the model is small, and "loop" elsewhere, without a warning.

    Returns:
        The groups, in the order of their first runs.

    Raises:
        InvalidInput: the engine is unknown.
    """
    if engine not in ENGINES:
        raise InvalidInput(f"unknown engine {engine!r}, {did_you_mean(engine, ENGINES)}")
    by_length: dict[int, dict[str, Curriculum]] = {}
    if engine != "loop" and _may_batch(task, recipe, len(curricula), engine):
        for name, curriculum in curricula.items():
            if curriculum.sizes.min() > 0:
                by_length.setdefault(len(curriculum), {})[name] = curriculum
    size = _group_size(task, recipe) if by_length else 1
    groups = [group for same_length in by_length.values() for group in _cut(same_length, size)]
    batched = {name for group in groups for name in group.curricula}
    single = [RunGroup("loop", {name: curriculum}) for name, curriculum in curricula.items() if name not in batched]
    if engine == "batched" and batched and single:
        warnings.warn(f"{len(single)} curricula with an empty batch use the loop engine", EngineWarning, stacklevel=4)
    order = {name: position for position, name in enumerate(curricula)}
    return sorted(groups + single, key=lambda group: order[next(iter(group.curricula))])


def _may_batch(task: Task, recipe: Recipe, runs: int, engine: str) -> bool:
    if engine == "auto" and (runs < 2 or parameter_count(task, frozen=True) > AUTO_PARAMETERS):
        return False
    reason = obstacle(task, recipe)
    if reason and engine == "batched":
        warnings.warn(f"all runs use the loop engine: {reason}", EngineWarning, stacklevel=5)
    return reason is None


def _group_size(task: Task, recipe: Recipe) -> int:
    bytes_per_run = _COPIES * recipe.torch_dtype.itemsize * max(1, parameter_count(task))
    return max(1, min(GROUP_RUNS, GROUP_BYTES // bytes_per_run))


def _cut(curricula: Mapping[str, Curriculum], size: int) -> list[RunGroup]:
    names = list(curricula)
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    return [
        RunGroup("batched" if len(part) > 1 else "loop", {name: curricula[name] for name in part}) for part in parts
    ]
