"""``record``: train under each curriculum and write the runs."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput, StoreError
from simfluence.recipe import Recipe
from simfluence.recording.checkpoints import Checkpoint
from simfluence.recording.loop import Training, prepare
from simfluence.recording.progress import RecordingProgress
from simfluence.runs import Run, Runs
from simfluence.store import RunStore
from simfluence.task import Data, Task

#: A training that takes longer than this is kept on disk while under way, so that it can be gone on with.
SECONDS_BETWEEN_SAVES = 30.0


def record(
    task: Task,
    recipe: Recipe,
    curricula: Iterable[Curriculum],
    store: str | Path | RunStore | None = None,
    *,
    checkpoints: Iterable[int] = (),
    device: str | torch.device = "cpu",
) -> Runs:
    """Train under each curriculum and record every test example's loss before training and after every step.

    Runs that the store already has are read, not made again; interrupted ones are gone on with. The losses are
    the same as of an uninterrupted recording. A run whose loss becomes NaN or infinite is kept, as diverged.

    Args:
        task: what is trained.
        recipe: how.
        curricula: on which examples in which order.
        store: folder to keep the runs in; without one they are returned only.
        checkpoints: numbers of updates after which parameters and optimizer state are saved (0 is before
            any). A stored run without them is trained again, and must give the same losses.
        device: where to train.

    Returns:
        The runs, in the order of ``curricula``.

    Raises:
        InvalidInput: no curriculum, or one of other examples than the task's; checkpoints without a store,
            or at steps that a curriculum does not have.
        StoreError: the store is of another task, or cannot be read.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=20, n_test=5)
    >>> curricula = sf.random_curricula(n_train=20, runs=2, steps=3, batch_size=4)
    >>> record(task, Recipe(lr=0.1), curricula).losses.shape
    (2, 4, 5)
    """
    curricula = list(curricula)
    steps_to_save = frozenset(checkpoints)
    _check(task, curricula, steps_to_save, store)
    session = _Session(task, recipe, None if store is None else _opened(store, task), steps_to_save, device)
    with torch.random.fork_rng(devices=[]):
        found = session.all(curricula)
    return Runs(found[run_id(task, recipe, curriculum)] for curriculum in curricula)


def run_id(task: Task, recipe: Recipe, curriculum: Curriculum) -> str:
    """The content address of a run: task, recipe with its seed, curriculum."""
    content = "\n".join([task.fingerprint, recipe.canonical(), curriculum.digest])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


class _Session:
    """One call of ``record``."""

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        store: RunStore | None,
        steps_to_save: frozenset[int],
        device: str | torch.device,
    ) -> None:
        self.task, self.recipe, self.store, self.steps_to_save = task, recipe, store, steps_to_save
        self.device = torch.device(device)

    def all(self, curricula: Sequence[Curriculum]) -> dict[str, Run]:
        """Every run by id: read if it is there, recorded otherwise."""
        wanted = {run_id(self.task, self.recipe, curriculum): curriculum for curriculum in curricula}
        there = {name for name in wanted if self._is_there(name)}
        missing = {name: curriculum for name, curriculum in wanted.items() if name not in there}
        found = {name: self.store.read(name) for name in there} if self.store else {}
        if not missing:
            return found
        data = prepare(self.task, self.recipe, self.device)
        with RecordingProgress([len(curriculum) for curriculum in missing.values()], len(there)) as progress:
            for name, curriculum in missing.items():
                found[name] = self._record_one(name, curriculum, data, progress)
                progress.run_finished()
        return found

    def _is_there(self, name: str) -> bool:
        return self.store is not None and name in self.store and self.steps_to_save <= set(self.store.checkpoints(name))

    def _record_one(
        self, name: str, curriculum: Curriculum, data: tuple[Data, Data], progress: RecordingProgress
    ) -> Run:
        training = Training(self.task, self.recipe, curriculum, self.device, data)
        self._resume(training, name)
        progress.step(training.step)
        saved = time.monotonic()
        self._save_if_asked(training, name)
        while not training.finished:
            training.advance()
            progress.step()
            self._save_if_asked(training, name)
            if self.store and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                training.checkpoint().save(self._partial_file(self.store, name))
                saved = time.monotonic()
        return self._keep(self._run(name, curriculum, training))

    def _run(self, name: str, curriculum: Curriculum, training: Training) -> Run:
        return Run(
            id=name,
            curriculum=curriculum,
            losses=training.recorded(),
            learning_rates=training.rates,
            recipe=self.recipe,
            fingerprint=self.task.fingerprint,
            train=self.task.train,
            test=self.task.test,
            checkpoints=self.store.checkpoints(name) if self.store else {},
        )

    def _keep(self, run: Run) -> Run:
        if self.store is None:
            return run
        if run.id not in self.store:
            self.store.write(run)
            return run
        before = self.store.read(run.id)
        if not np.array_equal(before.losses, run.losses, equal_nan=True):
            raise StoreError(
                f"training run {run.id} again for its checkpoints gave other losses than are recorded in "
                f"{self.store.path} (another machine, torch version or number of threads?): "
                "record into another folder"
            )
        self.store.drop_partial(run.id)
        return run

    def _save_if_asked(self, training: Training, name: str) -> None:
        if self.store and training.step in self.steps_to_save:
            file = self.store.checkpoint(name, training.step)
            training.checkpoint().save(file, aside=self.store.partial(name))

    def _resume(self, training: Training, name: str) -> None:
        if self.store is None or not (file := self._partial_file(self.store, name)).is_file():
            return
        try:
            training.restore(Checkpoint.load(file))
        except StoreError:
            file.unlink()  # a damaged unfinished run costs its time again, nothing else

    @staticmethod
    def _partial_file(store: RunStore, name: str) -> Path:
        return store.partial(name) / "training.safetensors"


def _opened(store: str | Path | RunStore, task: Task) -> RunStore:
    store = store if isinstance(store, RunStore) else RunStore(store)
    store.open_for(task)
    return store


def _check(task: Task, curricula: Sequence[Curriculum], steps: frozenset[int], store: object) -> None:
    if not curricula:
        raise InvalidInput("no curriculum to record: give at least one, for example from random_curricula(…)")
    for index, curriculum in enumerate(curricula):
        if curriculum.n_train != len(task.train):
            raise InvalidInput(
                f"curriculum {index} is of {curriculum.n_train} training examples, but task {task.name!r} has "
                f"{len(task.train)}"
            )
    if steps and store is None:
        raise InvalidInput("checkpoints are files: give store= a folder to keep them in")
    shortest = min(len(curriculum) for curriculum in curricula)
    if steps and not 0 <= min(steps) <= max(steps) <= shortest:
        raise InvalidInput(f"checkpoints={sorted(steps)}: steps go from 0 to {shortest}, the shortest curriculum's")
