"""Estimate of the time, disk and memory of a recording, from a few measured steps; and when to retrain instead."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge

from simfluence._internal.checked import checked
from simfluence._internal.deprecation import warn_renamed
from simfluence._internal.files import size_of
from simfluence._internal.generator import lent_generator
from simfluence._internal.types import Count
from simfluence.curriculum import Curriculum
from simfluence.recipe import Recipe
from simfluence.recording.engines.base import TrainingSetup
from simfluence.recording.observe import Observe
from simfluence.recording.plan import RunGroup, plan
from simfluence.recording.session import check, run_id
from simfluence.recording.trials import check_before_training
from simfluence.storage.store import RunStore
from simfluence.task import Task

__all__ = ["Estimate", "Seconds", "break_even", "estimate"]

Seconds = Annotated[float, Ge(0)]

_WARM_UP = 2  # steps before measuring
_PARQUET_OVERHEAD = 6_000  # bytes of schema, metadata and page headers of a run file
_CHECKPOINT_OVERHEAD = 2_000


@dataclass(frozen=True)
class Estimate:
    """Expected time, disk and memory of a recording.

    Args:
        runs: number of runs to record.
        already_recorded: number of further runs that are already recorded.
        engines: number of runs to record with each engine.
        seconds: time for training and reading losses, on this machine under its present load.
        disk: approximate size of run files and checkpoints in bytes.
        memory: peak memory of the process in bytes, with all runs in memory at the end; 0 if unknown on this system.

    >>> Estimate(runs=3, already_recorded=0, engines={"loop": 3}, seconds=1.5, disk=2**20, memory=0).seconds
    1.5
    """

    runs: int
    already_recorded: int
    engines: dict[str, int]
    seconds: float
    disk: int
    memory: int

    @property
    def seconds_per_run(self) -> float:
        """Time of one training, as many at once as will be; NaN if there is nothing to record."""
        return self.seconds / self.runs if self.runs else float("nan")

    @property
    def there(self) -> int:
        """Old name of ``already_recorded``."""
        warn_renamed("Estimate.there", "Estimate.already_recorded")
        return self.already_recorded

    def __str__(self) -> str:
        engines = ", ".join(f"{count} by {name}" for name, count in self.engines.items()) or "none"
        memory = size_of(self.memory) if self.memory else "unknown on this system"
        a_run = f"\nA run takes {duration(self.seconds_per_run)} to train: where a forecast takes longer, retrain."
        return (
            f"{self.runs} runs to record ({engines}), {self.already_recorded} recorded already\n"
            f"time    about {duration(self.seconds)}\ndisk    about {size_of(self.disk)}\nmemory  about {memory}"
            f"{a_run if self.runs else ''}"
        )


@checked
def break_even(fit: Seconds | None, simulate: Seconds | None, retrain: Seconds) -> float:
    """Compute how many questions a fitted simulator must answer before it has saved time: fit / (retrain − simulate).

    Args:
        fit, simulate, retrain: seconds to fit the simulator, to answer one question with it, and to answer it by
            retraining.

    Returns:
        Infinity if retraining is cheaper, so that it never pays off; else NaN if a time is not known.

    >>> break_even(fit=30.0, simulate=0.5, retrain=2.0), break_even(fit=30.0, simulate=0.5, retrain=0.02)
    (20.0, inf)
    """
    if simulate is not None and simulate >= retrain:
        return float("inf")
    return float("nan") if fit is None or simulate is None else fit / (retrain - simulate)


@checked
def estimate(
    task: Task,
    recipe: Recipe,
    curricula: Iterable[Curriculum],
    store: str | Path | RunStore | None = None,
    *,
    observe: Observe | None = None,
    engine: str = "auto",
    device: str | torch.device = "cpu",
    steps: Count = 10,
) -> Estimate:
    """Estimate the time, disk and memory of ``record`` with the same arguments, from a few steps of each kind of group.

    Nothing is written. Runs that the store already has are left out.

    Args:
        task, recipe, curricula, store, observe, engine, device: same as in ``record``.
        steps: number of steps to measure, once with and once without reading the test losses.

    Raises:
        InvalidInput: ``record`` would raise it.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=20, n_test=5)
    >>> costs = estimate(task, sf.Recipe(), sf.random_curricula(n_train=20, runs=3, steps=20, batch_size=4))
    >>> costs.runs, costs.seconds > 0
    (3, True)
    """
    curricula, observe = list(curricula), observe or Observe()
    check(task, curricula, observe)
    with lent_generator():
        requested = {run_id(task, recipe, curriculum): curriculum for curriculum in curricula}
        store = RunStore(store) if isinstance(store, str | Path) else store
        already_recorded = set(store.ids()) & set(requested) if store is not None and store.exists else set()
        groups = [g for g in plan(task, recipe, requested, engine) if not already_recorded >= set(g.curricula)]
        setup = TrainingSetup.of(task, recipe, device, observe.measures)
        if groups:
            check_before_training(setup, {name: c for group in groups for name, c in group.curricula.items()})
        costs: dict[tuple[str, int], tuple[float, float, int]] = {}
        seconds, disk = 0.0, 0
        for group in groups:
            kind = group.engine, len(group.curricula)
            if kind not in costs:
                costs[kind] = _measure(group, setup, steps)
            update, reading, checkpoint = costs[kind]
            reads = int(observe.times(group.steps).sum())
            seconds += group.steps * update + reads * reading
            disk += len(group.curricula) * (_run_bytes(setup, group, reads) + len(observe.checkpoints) * checkpoint)
    engines: dict[str, int] = {}
    for group in groups:
        engines[group.engine] = engines.get(group.engine, 0) + len(group.curricula)
    in_memory = sum(_readings_bytes(setup, group.steps + 1) * len(group.curricula) for group in groups)
    memory = _peak_memory() + in_memory if _peak_memory() else 0
    return Estimate(sum(engines.values()), len(already_recorded), engines, seconds, disk, memory)


def _measure(group: RunGroup, setup: TrainingSetup, steps: int) -> tuple[float, float, int]:
    """Measure the seconds of an update and of a reading of the whole group, and the bytes of one run's checkpoint."""
    steps = max(1, min(steps, (group.steps - _WARM_UP) // 2))
    times = np.zeros(group.steps + 1, bool)
    times[: min(_WARM_UP + steps, group.steps) + 1] = True
    training = group.start(setup, times)
    for _ in range(min(_WARM_UP, group.steps)):
        training.advance()
    seconds = []
    for _ in range(2):  # with reading, then without
        start, updates = time.perf_counter(), 0
        while not training.finished and updates < steps:
            training.advance()
            updates += 1
        seconds.append((time.perf_counter() - start) / max(updates, 1))
    with_reading, update = seconds
    checkpoint = training.run_checkpoints()[0]
    tensors = [*checkpoint.model.values(), *(v for s in checkpoint.optimizer.values() for v in s.values())]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors if isinstance(tensor, torch.Tensor))
    return update, max(0.0, with_reading - update), size + _CHECKPOINT_OVERHEAD


def _readings_bytes(setup: TrainingSetup, times: int) -> int:
    return times * len(setup.task.test) * (1 + len(setup.measures)) * setup.recipe.torch_dtype.itemsize


def _run_bytes(setup: TrainingSetup, group: RunGroup, reads: int) -> int:
    """Estimate the size of a run file: losses are noise that hardly compresses, indices take about two bytes."""
    indices = max(len(curriculum.indices) for curriculum in group.curricula.values())
    return _readings_bytes(setup, reads) + 2 * indices + 3 * group.steps + _PARQUET_OVERHEAD


def _peak_memory() -> int:
    """Return the peak memory of this process so far in bytes, or 0 where the system does not report it."""
    try:
        import resource
    except ImportError:
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def duration(seconds: float) -> str:
    """Return a time in words, such as "0.02 s" or "3.5 h"."""
    if seconds < 1:
        return f"{seconds:.1g} s"
    if seconds < 120:
        return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
