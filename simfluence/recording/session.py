"""``record``: train on each curriculum and store the runs."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from simfluence._internal.checked import checked
from simfluence._internal.deprecation import renamed_arguments
from simfluence._internal.generator import lent_generator
from simfluence._internal.progress import RecordingProgress
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput, SimfluenceError, StoreError
from simfluence.recipe import Recipe
from simfluence.recording.activation_cache import ACTIVATION_CACHE_BYTES
from simfluence.recording.checkpoints import Checkpoint
from simfluence.recording.engines.base import Training, TrainingSetup
from simfluence.recording.observe import Observe
from simfluence.recording.plan import RunGroup, plan
from simfluence.recording.trials import InitialReadings, check_before_training
from simfluence.runs import Run, Runs
from simfluence.storage.store import RunStore
from simfluence.task import Task

__all__ = ["SECONDS_BETWEEN_LOOKS", "SECONDS_BETWEEN_SAVES", "check", "record", "run_id"]

#: Time between saves of an unfinished run, from which an interrupted recording resumes.
SECONDS_BETWEEN_SAVES = 30.0

#: Most stored runs that are read to find one with the same initial weights.
_READ_TO_COMPARE = 32

#: Time between checks whether another process has finished the runs that it is recording.
SECONDS_BETWEEN_LOOKS = 0.2


@renamed_arguments(trunk_bytes="activation_cache_bytes")
@checked
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

    Before any run is trained, a few passes look for what would spoil all of them: a test loss that is not finite or
    depends on other examples, a batch that the model cannot be trained on, and stored runs whose losses before
    training are not those of this model. Recordings in several threads wait for each other: initial weights and
    dropout come from torch's one global generator, which is left as it was.

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
            checkpoints are requested without a store; a step or measure does not exist; a test loss before training
            is NaN, infinite or depends on other examples; the model or the loss fails on a batch, which is named;
            ``micro_batch`` changes gradients.
        StoreError: the store is of another task or of a model or loss whose code has changed, or cannot be read or
            written.

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
    with lent_generator():
        ids = [run_id(task, recipe, curriculum) for curriculum in curricula]
        session = _Session(task, recipe, _open(store, task), observe, device, verification, activation_cache_bytes)
        runs = session.run_all(plan(task, recipe, dict(zip(ids, curricula, strict=True)), engine))
    return Runs(runs[name] for name in ids)


@checked
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
        self._check_before_training(missing)
        if not missing:
            return self.runs
        count = sum(len(group.curricula) for group in groups)
        with RecordingProgress([(g.steps, len(g.curricula)) for g in missing], count) as progress:
            for group in self._claim(missing, progress):
                self._record(group, progress)
        return self.runs

    def _check_before_training(self, missing: Sequence[RunGroup]) -> None:
        """Evaluate the untrained model, and compare it with what is stored and what is to be trained.

        Raises:
            InvalidInput: the model, the loss or an example would spoil the runs.
            StoreError: the store has runs of this task whose losses before training are others.
        """
        curricula = {name: curriculum for group in missing for name, curriculum in group.curricula.items()}
        initial = check_before_training(self._setup(self.observe.measures), curricula)
        if self.store is not None:
            for run in self.runs.values() or _some_run(self.store, self.task, self.recipe):
                _check_same_model(self.store, self.task, run, initial)

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
        has_checkpoints = set(self.observe.checkpoints) <= set(run.checkpoints) and all(
            Checkpoint.is_whole(run.checkpoints[step]) for step in self.observe.checkpoints
        )
        return not (has_readings and has_checkpoints)

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
        training = self._started(group, self._setup(tuple(measures)), times)
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
                if not _has_whole_checkpoint(self.store, name, training.step):
                    checkpoint.save(self.store.checkpoint(name, training.step), aside=self.store.partial(group.name))

    def _started(self, group: RunGroup, setup: TrainingSetup, times: np.ndarray) -> Training:
        """Start the group's training, or resume it from its unfinished recording if this has all that is requested."""
        training = group.start(setup, times)
        if self.store is None or not (file := self._partial_file(self.store, group)).is_file():
            return training
        try:
            saved = Checkpoint.load(file)
        except StoreError as error:
            _warn_damaged(error)
            return training
        earlier = [step for step in self.observe.checkpoints if step < saved.step]
        if not all(_has_whole_checkpoint(self.store, name, step) for name in group.curricula for step in earlier):
            return training
        try:
            training.restore(saved)
        except StoreError:  # it is whole, but of other readings
            return training
        except (RuntimeError, LookupError, ValueError, TypeError) as error:  # it is of another version or forged
            _warn_damaged(error)
            return group.start(setup, times)
        return training

    @staticmethod
    def _partial_file(store: RunStore, group: RunGroup) -> Path:
        return store.partial(group.name) / "training.safetensors"


def _has_whole_checkpoint(store: RunStore, name: str, step: int) -> bool:
    file = store.checkpoint(name, step)
    return file.is_file() and Checkpoint.is_whole(file)


def _warn_damaged(error: Exception) -> None:
    warnings.warn(f"an unfinished recording is made again from the start: {error}", UserWarning, stacklevel=2)


def _some_run(store: RunStore, task: Task, recipe: Recipe) -> list[Run]:
    """Read one stored run that ``record`` made with the same initial weights, if one of the first files is such a run.

    Damaged files are passed over: they are reported to whoever loads them.
    """
    names: list[str] = []
    with contextlib.suppress(StoreError):
        names = store.ids()[:_READ_TO_COMPARE]
    for name in names:
        with contextlib.suppress(StoreError):
            run = store.read(name)
            if run.recipe is None or (run.recipe.seed, run.recipe.dtype) != (recipe.seed, recipe.dtype):
                continue
            if run.id == run_id(task, run.recipe, run.curriculum):
                return [run]
    return []


def _check_same_model(store: RunStore, task: Task, run: Run, initial: InitialReadings) -> None:
    """Check that a stored run started with the losses and measures of the untrained model.

    Raises:
        StoreError: it started with others.
    """
    loose = run.losses.dtype == np.float32  # the tolerances of ``runs.combined``: rounding of engines and machines
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if loose else {"rtol": 1e-9, "atol": 1e-9}
    for name, values in initial.values.items():
        if 0 not in run.times_of(name):
            continue
        stored = run.losses[0] if name == "loss" else run.measures[name][0]
        if not np.allclose(stored, values, equal_nan=True, **tolerance):
            raise StoreError(
                f"{store.path} has runs of task {task.name!r} with another model, loss or measure: before training, "
                f"run {run.id} has a mean {name} of {np.mean(stored):.5g}, but the task now gives "
                f"{np.mean(values):.5g} for the same examples and seed. The code of the model, the loss or the "
                "measure has changed since (or the version of torch, which draws the initial weights). Record into a "
                "new folder, or with the old code. Nothing was changed"
            )


def _open(store: str | Path | RunStore | None, task: Task) -> RunStore | None:
    if store is None:
        return None
    store = store if isinstance(store, RunStore) else RunStore(store)
    store.open_for(task)
    _check_round_trip(store, task)
    return store


def _check_round_trip(store: RunStore, task: Task) -> None:
    """Check, before anything is trained, that the task's examples can be read from the store.

    Raises:
        InvalidInput: ids or metadata are of a kind that the store cannot hold.
    """
    try:
        stored = store.sides()
    except SimfluenceError:
        raise
    except Exception as error:
        raise InvalidInput(
            f"the metadata of task {task.name!r} cannot be read back from {store.path} ({error}): convert their "
            "columns to numbers or strings, and record into a new folder"
        ) from error
    for side, examples, read in zip(("training", "test"), (task.train, task.test), stored, strict=True):
        if list(read.ids) != list(examples.ids):
            raise InvalidInput(
                f"the ids of the {side} examples of task {task.name!r} change when {store.path} stores them: use "
                "numbers or strings as ids, and record into a new folder"
            )
