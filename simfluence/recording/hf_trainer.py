"""``TrainerRecorder``: an ordinary ``transformers.Trainer`` run, recorded, or made to follow a curriculum."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.examples import Examples
from simfluence.recipe import Recipe
from simfluence.storage.recorder import Recorder
from simfluence.storage.store import RunStore
from simfluence.task import Task


def _callback_class() -> Any:
    try:
        return importlib.import_module("transformers").TrainerCallback
    except ImportError:  # said when a recorder is made
        return object


_Callback: Any = _callback_class()


class TrainerRecorder(_Callback):
    """Records a ``Trainer``'s curriculum and test losses as a run of a store; attaches itself, in place of another one.

        TrainerRecorder(trainer, "runs/mine", "seed-0")
        trainer.train()

    A step is an update: its batch is every example whose gradient went into it, over all accumulated parts.
    Examples left out at the end of an epoch (``dataloader_drop_last``) are in no batch. The order of training, its
    random numbers and its results are those of the trainer without a recorder. It is crash-safe as ``Recorder`` is;
    ``trainer.train(resume_from_checkpoint=…)`` goes on with the recording of the same name.

    Args:
        trainer: before ``train()``; one process, with a dataset that is indexed.
        store: folder of the runs, or the store itself.
        run: the run's id; a random one without it, which cannot be gone on with.
        train, test: examples of ``trainer.train_dataset`` and of the test losses, or their ids, in their order. By
            default a new store numbers the rows of the two datasets.
        task: what is trained, if there is a ``Task`` of it: its test losses are recorded, of ``trainer.model``.
        losses: ``losses(model)`` → the loss of every test example, ``[test]``, called in evaluation mode without
            gradients. By default the trainer's own loss of each example of ``eval_dataset``, one at a time, so that
            padding and the company of others have no part in it.
        curriculum: train on this instead of what the trainer's sampler draws; indices are rows of ``train_dataset``.
            Its batches may differ in size.
        every: read the test losses after every so many steps, and after the last one.
        recipe: how the trainer trains, if a recipe can say it.

    Raises:
        InvalidInput: transformers is missing, the trainer hides which examples it trains on (a dataset that is only
            iterated, several processes, workers out of order), or datasets and examples differ in number; when
            training starts, a curriculum that does not go into the trainer's steps.
    """

    batches: _TrackedSampler
    _plain_loader: Callable[[], DataLoader]

    def __init__(
        self,
        trainer: Any,
        store: str | Path | RunStore,
        run: str | None = None,
        *,
        train: Examples | Sequence[Any] | None = None,
        test: Examples | Sequence[Any] | None = None,
        task: Task | None = None,
        losses: Callable[[nn.Module], Tensor] | None = None,
        curriculum: Curriculum | None = None,
        every: int = 1,
        recipe: Recipe | None = None,
    ) -> None:
        if _Callback is object:
            raise InvalidInput("recording a Trainer needs transformers: pip install 'simfluence[hf]'")
        _check(trainer, every)
        self.trainer, self.run, self.task, self.curriculum = trainer, run, task, curriculum
        self.every, self.recipe = every, recipe
        self.store = store if isinstance(store, RunStore) else RunStore(store)
        self.train, self.test = _sides(self.store, trainer, task, train, test, losses is None)
        self.losses = losses or (_OfTask(task) if task else _OneByOne(trainer))
        self._recorder: Recorder | None = None
        self._rate: float | None = None
        for other in [each for each in trainer.callback_handler.callbacks if isinstance(each, TrainerRecorder)]:
            trainer.remove_callback(other)
            trainer.get_train_dataloader = other._plain_loader
        self._plain_loader = trainer.get_train_dataloader
        trainer.get_train_dataloader = self._loader
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin the run, or go on with it."""
        if self.curriculum is not None and state.max_steps != len(self.curriculum):
            raise InvalidInput(
                f"the trainer is to make {state.max_steps} steps, but the curriculum has {len(self.curriculum)}: "
                f"set max_steps={len(self.curriculum)} in its arguments"
            )
        resume = None if self.run is None else state.global_step
        if self.run is None and state.global_step:
            raise InvalidInput("going on from a checkpoint, say which recording to go on with: give run= its name")
        if self._recorder is not None:
            self._recorder.leave()  # of a training that broke off
        self._recorder = Recorder(
            self.store, self.run, train=self.train, test=self.test, task=self.task, recipe=self.recipe, resume=resume
        ).__enter__()
        if state.global_step and not args.ignore_data_skip:
            self.batches.skip = self._parts_of_epoch_before(state)
        if self.recorder.steps == 0:
            self.recorder.read(self._read())
        self._is_read = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Note the learning rate, before the schedule moves on."""
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """An update was made."""
        batch = self.batches.next(self.trainer.current_gradient_accumulation_steps)
        if self.trainer.accelerator.optimizer_step_was_skipped:  # a gradient of mixed precision overflowed
            batch = []
        read = state.global_step % self.every == 0 or state.global_step >= state.max_steps
        self.recorder.step(batch, self._read() if read else None, lr=self._rate)
        self._is_read = read

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """The run is whole."""
        if not self._is_read:  # stopped early
            self.recorder.read(self._read())
        self.recorder.__exit__(None, None, None)

    @property
    def recorder(self) -> Recorder:
        """What records the training under way, or the last one.

        Raises:
            InvalidInput: none has begun.
        """
        if self._recorder is None:
            raise InvalidInput("nothing is recorded yet: trainer.train() begins it")
        return self._recorder

    def _read(self) -> Tensor:
        model = self.trainer.model
        mode = model.training
        model.eval()
        with torch.no_grad():
            losses = self.losses(model)
        model.train(mode)
        return losses

    def _loader(self) -> DataLoader:
        """The trainer's own loader of training batches, made to say which examples are in them."""
        plain = self._plain_loader()
        inner: Any = getattr(plain, "batch_sampler", None)
        dataset: Any = getattr(plain, "dataset", None)
        if inner is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise InvalidInput(
                "the trainer hides which examples it trains on: its loader has no batch sampler over an indexed "
                "dataset (an IterableDataset?). Give a dataset with a length and rows by number, or record the loop by "
                "store.recorder(…)"
            )
        if len(dataset) != len(self.train):
            raise InvalidInput(
                f"the training dataset has {len(dataset)} rows, but {len(self.train)} training examples are known"
            )
        self.batches = _TrackedSampler(
            inner if self.curriculum is None else self._parts(self.curriculum), len(self.train)
        )
        settings = {name: getattr(plain, name) for name in _LOADER_SETTINGS}
        loader = DataLoader(dataset, batch_sampler=self.batches, **settings)
        return self.trainer.accelerator.prepare_data_loader(loader)

    def _parts(self, curriculum: Curriculum) -> list[list[int]]:
        """The curriculum's batches, each in as many equal parts as the trainer accumulates.

        Raises:
            InvalidInput: a batch is empty, or does not go into equal parts.
        """
        if curriculum.n_train != len(self.train):
            raise InvalidInput(
                f"the curriculum is of {curriculum.n_train} training examples, the trainer's dataset has "
                f"{len(self.train)}"
            )
        count = self.trainer.args.gradient_accumulation_steps
        for step, size in enumerate(curriculum.sizes):
            if size == 0 or size % count:
                raise InvalidInput(
                    f"batch {step} has {size} examples: a Trainer that accumulates {count} parts, which count alike, "
                    f"needs a multiple of {count}, and at least one in each part"
                )
        return [part.tolist() for batch in curriculum for part in batch.reshape(count, -1)]

    def _parts_of_epoch_before(self, state: Any) -> int:
        """How many parts of the present epoch were trained before the checkpoint."""
        count = self.trainer.args.gradient_accumulation_steps
        per_epoch = max(1, -(-len(self.batches) // count))
        return int(state.global_step % per_epoch) * count


#: What the trainer's loader of training batches keeps.
_LOADER_SETTINGS = (
    "collate_fn", "num_workers", "pin_memory", "worker_init_fn", "persistent_workers", "prefetch_factor",
    "multiprocessing_context", "timeout", "generator",
)  # fmt: skip


class _TrackedSampler(BatchSampler):
    """Batches of rows, each kept until the step that they are trained in has ended."""

    def __init__(self, batches: Any, rows: int) -> None:
        self.inner, self.rows = batches, rows
        self.batch_size = getattr(batches, "batch_size", 0)
        self.drop_last = bool(getattr(batches, "drop_last", False))
        self.skip = 0  # parts that a resumed epoch leaves out
        self.waiting: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        self.waiting.clear()
        for number, batch in enumerate(self.inner):
            rows = list(batch)
            if not all(isinstance(row, int) and 0 <= row < self.rows for row in rows):
                raise InvalidInput(
                    f"the trainer's sampler hides which examples it draws: {rows[:3]!r} are no row numbers"
                )
            if number >= self.skip:
                self.waiting.append(rows)
            yield rows
        self.skip = 0

    def next(self, parts: int) -> list[int]:
        """The rows of the step that has ended."""
        return [row for _ in range(parts) for row in self.waiting.popleft()]

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(epoch)

    @property
    def sampler(self) -> Any:
        """Of the batches inside; accelerate seeds it."""
        return getattr(self.inner, "sampler", None)

    @sampler.setter
    def sampler(self, value: Any) -> None:
        self.inner.sampler = value

    def __len__(self) -> int:
        return len(self.inner)


class _OneByOne:
    """The trainer's own loss of each row of its test dataset, alone."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.batches: list[Any] = []

    def __call__(self, model: nn.Module) -> Tensor:
        if not self.batches:
            loader = self.trainer.get_eval_dataloader()
            self.batches = [loader.collate_fn([loader.dataset[row]]) for row in range(len(loader.dataset))]
        with self.trainer.compute_loss_context_manager():
            found = [self.trainer.compute_loss(model, self._on_device(batch)).float() for batch in self.batches]
        return torch.stack(found)

    def _on_device(self, batch: Any) -> dict[str, Any]:
        device = self.trainer.args.device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


class _OfTask:
    """The task's own test losses of the model."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, model: nn.Module) -> Tensor:
        return self.task.evaluate(model, self.task.test_data)["loss"]


def _check(trainer: Any, every: int) -> None:
    args = trainer.args
    if args.world_size > 1:
        raise InvalidInput(
            f"a trainer of {args.world_size} processes hides what the others train on: record one process"
        )
    if args.auto_find_batch_size:
        raise InvalidInput("auto_find_batch_size starts training over with other batches: turn it off to record")
    if args.dataloader_num_workers and not args.dataloader_in_order:
        raise InvalidInput("workers that deliver out of order hide which examples come when: set dataloader_in_order")
    if args.load_best_model_at_end and every > 1:
        raise InvalidInput("load_best_model_at_end may leave another model than the last step's: record with every=1")
    if every < 1:
        raise InvalidInput(f"every must be 1 or more, got {every}")


def _sides(
    store: RunStore, trainer: Any, task: Task | None, train: Any, test: Any, own_losses: bool
) -> tuple[Examples, Examples]:
    """The examples of both sides: as given, the task's, the store's, or numbered rows of the trainer's datasets.

    Raises:
        InvalidInput: nothing says how many there are.
    """
    if task is None and own_losses and not hasattr(trainer.eval_dataset, "__len__"):
        raise InvalidInput("which losses? Give the trainer an eval_dataset with a length, or losses= or task=")
    known = (task.train, task.test) if task else store.sides() if store.exists else (None, None)
    datasets, given = (trainer.train_dataset, trainer.eval_dataset), (train, test)
    found = []
    for side, own, there, dataset in zip(("train", "test"), given, known, datasets, strict=True):
        if own is None and there is None and not hasattr(dataset, "__len__"):
            raise InvalidInput(f"{side}: the trainer's dataset has no length; say which examples there are, {side}=ids")
        if own is not None:
            found.append(own if isinstance(own, Examples) else Examples(list(own)))
        else:
            found.append(Examples.numbered(len(dataset)) if there is None else there)
    if task is None and own_losses and len(trainer.eval_dataset) != len(found[1]):
        raise InvalidInput(f"the test dataset has {len(trainer.eval_dataset)} rows, but {len(found[1])} ids are known")
    return found[0], found[1]
