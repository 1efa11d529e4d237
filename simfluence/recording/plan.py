"""Which runs are trained together, and by what: a plan made of the curricula alone.

The plan does not look at what is recorded already, so that a resumed recording repeats the same arithmetic.
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

ENGINES = ("auto", "batched", "loop")

#: Runs trained at once, at most; and the memory their parameters, gradients and optimizer state may take.
GROUP_RUNS = 32
GROUP_BYTES = 2**30
_COPIES = 5  # of a parameter: itself, its gradient, a temporary, two moments

#: Larger models keep the processor busy one at a time.
AUTO_PARAMETERS = 1_000_000


@dataclass(frozen=True)
class RunGroup:
    """Runs of equal length that are trained together.

    Args:
        engine: "batched" or "loop".
        curricula: by run id.
    """

    engine: str
    curricula: Mapping[str, Curriculum]

    @property
    def name(self) -> str:
        """What its unfinished state is kept under: the run's id, or a digest of the runs'."""
        ids = list(self.curricula)
        return ids[0] if len(ids) == 1 else hashlib.sha256("\n".join(ids).encode()).hexdigest()[:16]

    @property
    def steps(self) -> int:
        return len(next(iter(self.curricula.values())))

    def start(self, setup: TrainingSetup, times: np.ndarray) -> Training:
        """Its training, before any update."""
        with first_pass(setup.task):
            if self.engine == "loop":
                return LoopTraining(setup, next(iter(self.curricula.values())), times)
            return BatchedTraining(setup, list(self.curricula.values()), times)


def plan(task: Task, recipe: Recipe, curricula: Mapping[str, Curriculum], engine: str = "auto") -> list[RunGroup]:
    """Groups of the runs ``curricula`` (by id), in their order.

    Args:
        engine: "loop" trains one run after the other. "batched" trains up to ``GROUP_RUNS`` runs of equal length
            at once; runs that cannot be (an optimizer that is not element-wise, a model with dropout or running
            statistics, a curriculum with an empty batch) are left to the loop, with a warning. "auto" is
            "batched" where that works and the model is small, and "loop" elsewhere, without a warning.

    Raises:
        InvalidInput: there is no such engine.
    """
    if engine not in ENGINES:
        raise InvalidInput(f"unknown engine {engine!r}, {did_you_mean(engine, ENGINES)}")
    together: dict[int, dict[str, Curriculum]] = {}
    if engine != "loop" and _may_batch(task, recipe, len(curricula), engine):
        for name, curriculum in curricula.items():
            if curriculum.sizes.min() > 0:
                together.setdefault(len(curriculum), {})[name] = curriculum
    size = _group_size(task, recipe) if together else 1
    groups = [group for alike in together.values() for group in _cut(alike, size)]
    batched = {name for group in groups for name in group.curricula}
    alone = [RunGroup("loop", {name: curriculum}) for name, curriculum in curricula.items() if name not in batched]
    if engine == "batched" and batched and alone:
        warnings.warn(f"{len(alone)} curricula with an empty batch are left to the loop", EngineWarning, stacklevel=4)
    order = {name: position for position, name in enumerate(curricula)}
    return sorted(groups + alone, key=lambda group: order[next(iter(group.curricula))])


def _may_batch(task: Task, recipe: Recipe, runs: int, engine: str) -> bool:
    if engine == "auto" and (runs < 2 or parameter_count(task, frozen=True) > AUTO_PARAMETERS):
        return False
    reason = obstacle(task, recipe)
    if reason and engine == "batched":
        warnings.warn(f"all runs are left to the loop: {reason}", EngineWarning, stacklevel=5)
    return reason is None


def _group_size(task: Task, recipe: Recipe) -> int:
    bytes_per_run = _COPIES * recipe.torch_dtype.itemsize * max(1, parameter_count(task))
    return max(1, min(GROUP_RUNS, GROUP_BYTES // bytes_per_run))


def _cut(alike: Mapping[str, Curriculum], size: int) -> list[RunGroup]:
    names = list(alike)
    parts = [names[start : start + size] for start in range(0, len(names), size)]
    return [RunGroup("batched" if len(part) > 1 else "loop", {name: alike[name] for name in part}) for part in parts]
