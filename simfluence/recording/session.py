"""``record``: train under each curriculum and write the runs."""

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

#: A training that takes longer than this is kept on disk while under way, so that it can be gone on with.
SECONDS_BETWEEN_SAVES = 30.0

#: How often to look whether another process has finished the runs that it is recording.
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
    """Train under each curriculum and record every test example's loss before training and after every step.

    Runs that the store already has are read, not made again; interrupted ones are gone on with. The losses are
    the same as of an uninterrupted recording. Several processes may record into one store: each takes runs that
    no other is at. A run whose loss becomes NaN or infinite is kept, as diverged.

    Args:
        task: what is trained.
        recipe: how.
        curricula: on which examples in which order.
        store: folder to keep the runs in; without one they are returned only.
        observe: what to record. A stored run that has less is trained again, must give the same losses, and
            keeps all that it had.
        engine: "auto", "batched" (many runs at once) or "loop"; see ``recording.engines.plan``.
        device: where to train.
        verification: mark the runs as made to confirm a forecast: ``load()`` leaves them out.
        activation_cache_bytes: memory for the outputs of frozen layers below the first trained one, which the loop
            then computes once for each example; 0 computes them every time.

    Returns:
        The runs, in the order of ``curricula``.

    Raises:
        InvalidInput: no curriculum, or one of other examples than the task's; checkpoints without a store;
            a step or measure that is not there.
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
        raise InvalidInput("checkpoints are files: give store= a folder to keep them in")
    wanted = {run_id(task, recipe, curriculum): curriculum for curriculum in curricula}
    session = _Session(task, recipe, _opened(store, task), observe, device, verification, activation_cache_bytes)
    with torch.random.fork_rng(devices=[]):
        found = session.all(plan(task, recipe, wanted, engine))
    return Runs(found[run_id(task, recipe, curriculum)] for curriculum in curricula)


def run_id(task: Task, recipe: Recipe, curriculum: Curriculum) -> str:
    """The content address of a run: task, recipe with its seed, curriculum.

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
    """Whether this can be recorded.

    Raises:
        InvalidInput: it cannot.
    """
    if not curricula:
        raise InvalidInput("no curriculum to record: give at least one, for example from random_curricula(…)")
    for index, curriculum in enumerate(curricula):
        if not isinstance(curriculum, Curriculum):
            raise InvalidInput(
                f"curricula must be a list of Curriculum, but item {index} is {type(curriculum).__name__}"
            )
        if curriculum.n_train != len(task.train):
            raise InvalidInput(
                f"curriculum {index} is of {curriculum.n_train} training examples, but task {task.name!r} has "
                f"{len(task.train)}"
            )
    observe.check(task, curricula)


class _Session:
    """One call of ``record``."""

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
        self.found: dict[str, Run] = {}

    def all(self, groups: Sequence[RunGroup]) -> Mapping[str, Run]:
        """Every run by id: read if it is there, recorded otherwise."""
        missing = [group for group in groups if not self._is_there(group)]
        if not missing:
            return self.found
        runs = sum(len(group.curricula) for group in groups)
        with RecordingProgress([(g.steps, len(g.curricula)) for g in missing], runs) as progress:
            for group in self._claimed(missing, progress):
                self._record(group, progress)
        return self.found

    def _is_there(self, group: RunGroup) -> bool:
        """Whether the store has all that is wanted of these runs; those it has are read into ``found``."""
        if self.store is None:
            return False
        for name in group.curricula:
            if name in self.store:
                self.found[name] = self._promoted(self.store.read(name))
        return all(name in self.found and not self._lacks(self.found[name]) for name in group.curricula)

    def _lacks(self, run: Run) -> bool:
        """Whether a recorded run has less than is wanted."""
        wanted = np.flatnonzero(self.observe.times(run.steps))
        read = all(np.isin(wanted, run.times_of(name)).all() for name in ("loss", *self.observe.measures))
        return not (read and set(self.observe.checkpoints) <= set(run.checkpoints))

    def _promoted(self, run: Run) -> Run:
        """A verification run that is now wanted for itself loses its mark."""
        if self.store and run.verification and not self.verification:
            run = self.store.add(dataclasses.replace(run, verification=False))
        return run

    def _claimed(self, groups: Sequence[RunGroup], progress: RecordingProgress) -> Iterator[RunGroup]:
        """The groups to be recorded by this process, each held against others while it is."""
        if self.store is None:
            yield from groups
            return
        waiting, others = deque(groups), 0
        while waiting:
            group = waiting.popleft()
            with self.store.claim(group.name) as free:
                if free and not self._is_there(group):
                    yield group
                elif free:
                    progress.skip(group.steps, len(group.curricula))
                if free:
                    self.store.drop_partial(group.name)
                    others = 0
                    continue
            waiting.append(group)
            others += 1
            if others >= len(waiting):  # another process is at everything that is left
                time.sleep(SECONDS_BETWEEN_LOOKS)
                others = 0

    def _record(self, group: RunGroup, progress: RecordingProgress) -> None:
        there = [self.found[name] for name in group.curricula if name in self.found]
        measures = dict.fromkeys([*self.observe.measures, *(name for run in there for name in run.measures)])
        times = self.observe.times(group.steps)
        for run in there:  # what a run has is read again, to be compared
            times[run.times] = True
        training = group.start(self._setup(tuple(measures)), times)
        self._resume(training, group)
        progress.step(training.step)
        saved = time.monotonic()
        self._save_if_asked(training, group)
        while not training.finished:
            training.advance()
            progress.step()
            self._save_if_asked(training, group)
            if self.store and time.monotonic() - saved > SECONDS_BETWEEN_SAVES:
                training.checkpoint().save(self._partial_file(self.store, group))
                saved = time.monotonic()
        for (name, curriculum), readings in zip(group.curricula.items(), training.recorded(), strict=True):
            self.found[name] = self._kept(self._run(name, curriculum, training, group.engine, readings, times))
            progress.run_finished()

    def _setup(self, measures: tuple[str, ...]) -> TrainingSetup:
        """One for all groups that read the same, so that what it keeps is kept for all."""
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

    def _kept(self, run: Run) -> Run:
        if self.store is None:
            return run
        before = self.found.get(run.id)
        if before is not None and not self._lacks(before):  # its group was trained again for the sake of another run
            return before
        return self.store.add(run)

    def _save_if_asked(self, training: Training, group: RunGroup) -> None:
        if self.store and training.step in self.observe.checkpoints:
            for name, moment in zip(group.curricula, training.moments(), strict=True):
                if training.step not in self.store.checkpoints(name):
                    moment.save(self.store.checkpoint(name, training.step), aside=self.store.partial(group.name))

    def _resume(self, training: Training, group: RunGroup) -> None:
        if self.store is None or not (file := self._partial_file(self.store, group)).is_file():
            return
        with contextlib.suppress(StoreError):  # a damaged unfinished run costs its time again, nothing else
            saved = Checkpoint.load(file)
            passed = {step for step in self.observe.checkpoints if step < saved.step}
            if all(passed <= set(self.store.checkpoints(name)) for name in group.curricula):
                training.restore(saved)

    @staticmethod
    def _partial_file(store: RunStore, group: RunGroup) -> Path:
        return store.partial(group.name) / "training.safetensors"


def _opened(store: str | Path | RunStore | None, task: Task) -> RunStore | None:
    if store is None:
        return None
    store = store if isinstance(store, RunStore) else RunStore(store)
    store.open_for(task)
    return store
