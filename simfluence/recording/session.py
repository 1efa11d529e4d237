"""``record``: train on each curriculum and store the runs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simfluence._internal.deprecation import renamed_arguments
from simfluence._internal.progress import RecordingProgress
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput, StoreError
from simfluence.recipe import Recipe
from simfluence.recording.activation_cache import ACTIVATION_CACHE_BYTES
from simfluence.recording.checkpoints import Checkpoint
from simfluence.recording.engines.base import Training, TrainingSetup
from simfluence.recording.observe import Observe
from simfluence.recording.plan import RunGroup, plan
from simfluence.runs import Run, Runs
from simfluence.storage.store import RunStore
from simfluence.task import Task

__all__ = ["SECONDS_BETWEEN_LOOKS", "SECONDS_BETWEEN_SAVES", "check", "record", "run_id"]

#: Time between saves of an unfinished run, from which an interrupted recording resumes.
SECONDS_BETWEEN_SAVES = 30.0

#: Time between checks whether another process has finished the runs that it is recording.
SECONDS_BETWEEN_LOOKS = 0.2


@renamed_arguments(trunk_bytes="activation_cache_bytes")
def record(
    task: Task,
    recipe: Recipe,
    curricula: Iterable[Curriculum],
    store: str | Path | RunStore | None = None,
    *,
    observe: Observe | None = None,
    engine: str = "auto",
    device: str | torch.device = "cpu",
    verification: bool = False,
    activation_cache_bytes: int = ACTIVATION_CACHE_BYTES,
) -> Runs:
    """Train on each curriculum and record every test example's loss before training and after every step.

    Runs that the store already has are read, not trained again. Interrupted runs are resumed, with the same losses as
    in an uninterrupted recording. Several processes may record into one store: each takes runs that no other process
    is recording. A run whose loss becomes NaN or infinite is stored and marked as diverged.

    Args:
        task: the task to train on.
        recipe: how to train.
        curricula: the batches of each run.
        store: folder for the runs; by default they are only returned.
        observe: what to record. A stored run that lacks some of it is trained again: it must give the same losses, and
            nothing that it already had is lost.
        engine: "auto", "batched" (many runs at once) or "loop"; see ``recording.plan``.
        device: the device to train on.
        verification: mark the runs as verification of a forecast; ``load()`` leaves them out.
        activation_cache_bytes: memory for the outputs of frozen layers below the first trained one. The loop engine
            then computes them once per example; 0 computes them every time.

    Returns:
        The runs, in the order of ``curricula``.

    Raises:
        InvalidInput: there is no curriculum, or one for another number of training examples than the task has;
            checkpoints are requested without a store; a step or measure does not exist.
        StoreError: the store is of another task, or cannot be read or written.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=20, n_test=5)
    >>> curricula = sf.random_curricula(n_train=20, runs=2, steps=3, batch_size=4)
    >>> record(task, Recipe(lr=0.1), curricula).losses.shape
    (2, 4, 5)
    """
    curricula, observe = list(curricula), observe or Observe()
    check(task, curricula, observe)
    if observe.checkpoints and store is None:
        raise InvalidInput("checkpoints are files: pass store= a folder for them")
    requested = {run_id(task, recipe, curriculum): curriculum for curriculum in curricula}
    session = _Session(task, recipe, _open(store, task), observe, device, verification, activation_cache_bytes)
    with torch.random.fork_rng(devices=[]):
        runs = session.run_all(plan(task, recipe, requested, engine))
    return Runs(runs[run_id(task, recipe, curriculum)] for curriculum in curricula)


def run_id(task: Task, recipe: Recipe, curriculum: Curriculum) -> str:
    """Return the id of a run: a hash of task, recipe (with its seed) and curriculum.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=20, n_test=5)
    >>> curriculum = sf.Curriculum([[0, 1], [2, 3]], n_train=20)
    >>> first, other = (run_id(task, sf.Recipe(lr=lr), curriculum) for lr in (0.1, 0.2))
    >>> len(first), first == other
    (16, False)
    """
    content = "\n".join([task.fingerprint, recipe.canonical(), curriculum.digest])
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def check(task: Task, curricula: Sequence[Any], observe: Observe) -> None:
    """Check that the curricula can be recorded.

    Raises:
        InvalidInput: a curriculum is missing or is not for this task, or a requested step or measure does not exist.
    """
    if not curricula:
        raise InvalidInput("no curriculum to record: pass at least one, for example from random_curricula(…)")
    for index, curriculum in enumerate(curricula):
        if not isinstance(curriculum, Curriculum):
            raise InvalidInput(
                f"curricula must be a list of Curriculum, but item {index} is {type(curriculum).__name__}"
            )
        if curriculum.n_train != len(task.train):
            raise InvalidInput(
                f"curriculum {index} is for {curriculum.n_train} training examples, but task {task.name!r} has "
                f"{len(task.train)}"
            )
    observe.check(task, curricula)


class _Session:
    """State of one call of ``record``."""

    def __init__(
        self,
        task: Task,
        recipe: Recipe,
        store: RunStore | None,
        observe: Observe,
        device: str | torch.device,
        verification: bool,
        activation_cache_bytes: int,
    ) -> None:
        self.task, self.recipe, self.store, self.observe = task, recipe, store, observe
        self.device, self.verification, self.activation_cache_bytes = device, verification, activation_cache_bytes
        self.setups: dict[tuple[str, ...], TrainingSetup] = {}
        self.runs: dict[str, Run] = {}

    def run_all(self, groups: Sequence[RunGroup]) -> Mapping[str, Run]:
        """Read the runs that the store has, record the others, and return all by id."""
        missing = [group for group in groups if not self._is_recorded(group)]
        if not missing:
            return self.runs
        count = sum(len(group.curricula) for group in groups)
        with RecordingProgress([(g.steps, len(g.curricula)) for g in missing], count) as progress:
            for group in self._claim(missing, progress):
                self._record(group, progress)
        return self.runs

    def _is_recorded(self, group: RunGroup) -> bool:
        """Read the group's stored runs into ``runs`` and decide whether they have everything that was requested."""
        if self.store is None:
            return False
        for name in group.curricula:
            if name in self.store:
                self.runs[name] = self._unmarked(self.store.read(name))
        return all(name in self.runs and not self._is_incomplete(self.runs[name]) for name in group.curricula)

    def _is_incomplete(self, run: Run) -> bool:
        """Decide whether a recorded run lacks something that was requested."""
        times = np.flatnonzero(self.observe.times(run.steps))
        has_readings = all(np.isin(times, run.times_of(name)).all() for name in ("loss", *self.observe.measures))
        return not (has_readings and set(self.observe.checkpoints) <= set(run.checkpoints))

    def _unmarked(self, run: Run) -> Run:
        """Unmark a verification run that is now requested as an ordinary run."""
        if self.store and run.verification and not self.verification:
            run = self.store.add(dataclasses.replace(run, verification=False))
        return run

    def _claim(self, groups: Sequence[RunGroup], progress: RecordingProgress) -> Iterator[RunGroup]:
        """Yield the groups that this process records, each claimed against other processes meanwhile."""
        if self.store is None:
            yield from groups
            return
        waiting, busy = deque(groups), 0
        while waiting:
            group = waiting.popleft()
            with self.store.claim(group.name) as free:
                if free and not self._is_recorded(group):
                    yield group
                elif free:
                    progress.skip(group.steps, len(group.curricula))
                if free:
                    self.store.drop_partial(group.name)
                    busy = 0
                    continue
            waiting.append(group)
            busy += 1
            if busy >= len(waiting):  # other processes record everything that is left
                time.sleep(SECONDS_BETWEEN_LOOKS)
                busy = 0

    def _record(self, group: RunGroup, progress: RecordingProgress) -> None:
        stored = [self.runs[name] for name in group.curricula if name in self.runs]
        measures = dict.fromkeys([*self.observe.measures, *(name for run in stored for name in run.measures)])
        times = self.observe.times(group.steps)
        for run in stored:  # earlier readings are repeated, so that they can be compared
            times[run.times] = True
        training = group.start(self._setup(tuple(measures)), times)
        self._resume(training, group)
        progress.step(training.step)
        last_save = time.monotonic()
        self._save_checkpoints(training, group)
        while not training.finished:
            training.advance()
            progress.step()
            self._save_checkpoints(training, group)
            if self.store and time.monotonic() - last_save > SECONDS_BETWEEN_SAVES:
                training.checkpoint().save(self._partial_file(self.store, group))
                last_save = time.monotonic()
        for (name, curriculum), readings in zip(group.curricula.items(), training.recorded(), strict=True):
            self.runs[name] = self._saved(self._run(name, curriculum, training, group.engine, readings, times))
            progress.run_finished()

    def _setup(self, measures: tuple[str, ...]) -> TrainingSetup:
        """Return one setup for all groups with the same measures, so that they share its activation cache."""
        if measures not in self.setups:
            self.setups[measures] = TrainingSetup.of(
                self.task, self.recipe, self.device, measures, self.activation_cache_bytes
            )
        return self.setups[measures]

    def _run(
        self,
        name: str,
        curriculum: Curriculum,
        training: Training,
        engine: str,
        readings: Mapping[str, np.ndarray],
        times: np.ndarray,
    ) -> Run:
        return Run(
            id=name,
            curriculum=curriculum,
            losses=readings["loss"],
            learning_rates=training.rates,
            recipe=self.recipe,
            fingerprint=self.task.fingerprint,
            train=self.task.train,
            test=self.task.test,
            checkpoints=self.store.checkpoints(name) if self.store else {},
            recorded=None if times.all() else times,
            measures={measure: values for measure, values in readings.items() if measure != "loss"},
            verification=self.verification,
            engine=engine,
            task_name=self.task.name,
        )

    def _saved(self, run: Run) -> Run:
        if self.store is None:
            return run
        stored = self.runs.get(run.id)
        if stored is not None and not self._is_incomplete(stored):  # trained again only because of its group
            return stored
        return self.store.add(run)

    def _save_checkpoints(self, training: Training, group: RunGroup) -> None:
        if self.store and training.step in self.observe.checkpoints:
            for name, checkpoint in zip(group.curricula, training.run_checkpoints(), strict=True):
                if training.step not in self.store.checkpoints(name):
                    checkpoint.save(self.store.checkpoint(name, training.step), aside=self.store.partial(group.name))

    def _resume(self, training: Training, group: RunGroup) -> None:
        if self.store is None or not (file := self._partial_file(self.store, group)).is_file():
            return
        with contextlib.suppress(StoreError):  # a damaged unfinished run is started again
            saved = Checkpoint.load(file)
            earlier = {step for step in self.observe.checkpoints if step < saved.step}
            if all(earlier <= set(self.store.checkpoints(name)) for name in group.curricula):
                training.restore(saved)

    @staticmethod
    def _partial_file(store: RunStore, group: RunGroup) -> Path:
        return store.partial(group.name) / "training.safetensors"


def _open(store: str | Path | RunStore | None, task: Task) -> RunStore | None:
    if store is None:
        return None
    store = store if isinstance(store, RunStore) else RunStore(store)
    store.open_for(task)
    return store
