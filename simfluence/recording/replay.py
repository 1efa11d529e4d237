"""Models of a recorded run at any step: read from checkpoints, or trained again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from simfluence._internal.checked import checked
from simfluence._internal.generator import lent_generator
from simfluence.errors import InvalidInput
from simfluence.recording.checkpoints import Checkpoint
from simfluence.recording.engines.base import TrainingSetup
from simfluence.recording.engines.loop import LoopTraining
from simfluence.recording.observe import Observe
from simfluence.recording.session import record
from simfluence.runs import Run
from simfluence.storage.store import RunStore
from simfluence.task import Task

__all__ = ["follow", "replay", "trained_model"]


@checked
def replay(
    task: Task, run: Run, steps: Sequence[int], store: str | Path | RunStore | None = None
) -> dict[int, Checkpoint]:
    """Return checkpoints of a run by step.

    If the run has checkpoints of all these steps, they are read; otherwise the run is trained again from the start.

    Args:
        task: the run's task.
        run: the run.
        steps: steps from 0 to the run's number of steps.
        store: folder for the run with its new checkpoints; by default they are not stored.

    Raises:
        InvalidInput: the run is of another task, has no recipe, or lacks one of the steps.
        StoreError: a checkpoint is missing or damaged, or the run trained again has other losses than the stored one.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=20, n_test=5)
    >>> run = sf.record(task, sf.Recipe(lr=0.1), sf.random_curricula(n_train=20, runs=1, steps=4, batch_size=4))[0]
    >>> [checkpoint.step for checkpoint in replay(task, run, [0, 4]).values()]
    [0, 4]
    """
    run.check_task(task)
    for step in steps:
        if not 0 <= step <= run.steps:
            raise InvalidInput(f"run {run.id} has no step {step}: steps go from 0 to {run.steps}")
    if not steps:
        return {}
    if set(steps) <= set(run.checkpoints):
        return {step: Checkpoint.load(run.checkpoints[step]) for step in steps}
    if run.recipe is None:
        raise InvalidInput(f"run {run.id} has no recipe, so it cannot be trained again")
    with tempfile.TemporaryDirectory() as folder:
        observe = Observe(checkpoints=tuple(steps))
        replayed = record(
            task, run.recipe, [run.curriculum], store or folder, observe=observe, verification=run.verification
        )[0]
        return {step: Checkpoint.load(replayed.checkpoints[step]) for step in steps}


@checked
def follow(task: Task, run: Run, device: str | torch.device = "cpu") -> Iterator[LoopTraining]:
    """Train a run again and yield the training before the first update and after each update.

    The same object is yielded each time. Its ``step`` counts updates; its ``model`` and ``optimizer`` change in place.

    Args:
        task: the run's task.
        run: the run.
        device: the device to train on.

    Raises:
        InvalidInput: the run is of another task, or has no recipe.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=20, n_test=5)
    >>> run = sf.record(task, sf.Recipe(lr=0.1), sf.random_curricula(n_train=20, runs=1, steps=4, batch_size=4))[0]
    >>> [training.step for training in follow(task, run)]
    [0, 1, 2, 3, 4]
    """
    run.check_task(task)
    if run.recipe is None:
        raise InvalidInput(f"run {run.id} has no recipe, so it cannot be trained again")
    no_readings = np.zeros(run.steps + 1, bool)
    with lent_generator():
        training = LoopTraining(TrainingSetup.of(task, run.recipe, device, ()), run.curriculum, no_readings)
        state = torch.get_rng_state()
    yield training
    while not training.finished:
        with lent_generator():  # not while the caller works, whose own random numbers would change the training
            torch.set_rng_state(state)
            training.advance()
            state = torch.get_rng_state()
        yield training


@checked
def trained_model(task: Task, run: Run, store: str | Path | RunStore | None = None) -> nn.Module:
    """Return the model at the end of a run, in evaluation mode. For arguments and errors see ``replay``.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=20, n_test=5)
    >>> run = sf.record(task, sf.Recipe(lr=0.1), sf.random_curricula(n_train=20, runs=1, steps=4, batch_size=4))[0]
    >>> model = trained_model(task, run)
    >>> losses = task.loss(model(task.test_data[0]), task.test_data[1]).detach().numpy()
    >>> bool(abs(losses - run.losses[-1]).max() < 1e-5)
    True
    """
    with lent_generator():
        model = task.build_model(run.recipe.seed if run.recipe else 0)
        model.to(run.recipe.torch_dtype if run.recipe else None)
        replay(task, run, [run.steps], store)[run.steps].restore(model)
    return model.eval()
