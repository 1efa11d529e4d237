"""The model that a recorded run trained, at any of its steps: read from checkpoints, or trained again."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from simfluence.errors import InvalidInput
from simfluence.recording.checkpoints import Checkpoint
from simfluence.recording.engines.base import TrainingSetup
from simfluence.recording.engines.loop import LoopTraining
from simfluence.recording.observe import Observe
from simfluence.recording.session import record
from simfluence.runs import Run
from simfluence.storage.store import RunStore
from simfluence.task import Task


def replay(
    task: Task, run: Run, steps: Sequence[int], store: str | Path | RunStore | None = None
) -> dict[int, Checkpoint]:
    """The run's state after each of ``steps`` updates, by step.

    Those that it has checkpoints of are read; for others it is trained again, from the start.

    Args:
        task, run: what was trained.
        steps: from 0 to the run's number of steps.
        store: folder to keep new checkpoints in, with the run; without one they are not kept.

    Raises:
        InvalidInput: the run is of another task, does not know its recipe, or has no such step.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=20, n_test=5)
    >>> run = sf.record(task, sf.Recipe(lr=0.1), sf.random_curricula(n_train=20, runs=1, steps=4, batch_size=4))[0]
    >>> [checkpoint.step for checkpoint in replay(task, run, [0, 4]).values()]
    [0, 4]
    """
    if run.fingerprint not in (None, task.fingerprint):
        raise InvalidInput(f"run {run.id} is of another task than {task.name!r}")
    wrong = [step for step in steps if not 0 <= step <= run.steps]
    if wrong:
        raise InvalidInput(f"run {run.id} has no step {wrong[0]}: steps go from 0 to {run.steps}")
    if set(steps) <= set(run.checkpoints):
        return {step: Checkpoint.load(run.checkpoints[step]) for step in steps}
    if run.recipe is None:
        raise InvalidInput(f"run {run.id} does not know its recipe, so it cannot be trained again")
    with tempfile.TemporaryDirectory() as folder:
        observe = Observe(checkpoints=tuple(steps))
        again = record(
            task, run.recipe, [run.curriculum], store or folder, observe=observe, verification=run.verification
        )[0]
        return {step: Checkpoint.load(again.checkpoints[step]) for step in steps}


def follow(task: Task, run: Run, device: str | torch.device = "cpu") -> Iterator[LoopTraining]:
    """Train a run again, and stop after each update for whoever follows: ``step`` 0 (before any), 1, … steps.

    What is yielded is the training itself, with its ``model`` and ``optimizer``; both go on changing.

    Raises:
        InvalidInput: the run is of another task, or does not know its recipe.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=20, n_test=5)
    >>> run = sf.record(task, sf.Recipe(lr=0.1), sf.random_curricula(n_train=20, runs=1, steps=4, batch_size=4))[0]
    >>> [training.step for training in follow(task, run)]
    [0, 1, 2, 3, 4]
    """
    if run.fingerprint not in (None, task.fingerprint):
        raise InvalidInput(f"run {run.id} is of another task than {task.name!r}")
    if run.recipe is None:
        raise InvalidInput(f"run {run.id} does not know its recipe, so it cannot be trained again")
    never = np.zeros(run.steps + 1, bool)
    with torch.random.fork_rng(devices=[]):
        training = LoopTraining(TrainingSetup.of(task, run.recipe, device, ()), run.curriculum, never)
        yield training
        while not training.finished:
            training.advance()
            yield training


def trained_model(task: Task, run: Run, store: str | Path | RunStore | None = None) -> nn.Module:
    """The model at the end of a run, in evaluation mode; arguments and errors as of ``replay``.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=20, n_test=5)
    >>> run = sf.record(task, sf.Recipe(lr=0.1), sf.random_curricula(n_train=20, runs=1, steps=4, batch_size=4))[0]
    >>> model = trained_model(task, run)
    >>> losses = task.loss(model(task.test_data[0]), task.test_data[1]).detach().numpy()
    >>> bool(abs(losses - run.losses[-1]).max() < 1e-5)
    True
    """
    model = task.build_model(0)
    if run.recipe is not None:
        model = task.build_model(run.recipe.seed).to(run.recipe.torch_dtype)
    replay(task, run, [run.steps], store)[run.steps].restore(model)
    return model.eval()
