"""``TrainerRecorder``: record the runs of a ``transformers.Trainer``, with its own batches or with a curriculum's."""

from __future__ import annotations

import importlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from simfluence._internal.checked import checked, shown
from simfluence._internal.types import Count
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.examples import Examples
from simfluence.recipe import Recipe
from simfluence.recording.explain import PASSED_ON, named
from simfluence.storage.recorder import Recorder
from simfluence.storage.store import RunStore
from simfluence.task import Task

__all__ = ["TrainerRecorder"]


def _callback_class() -> Any:
    try:
        return importlib.import_module("transformers").TrainerCallback
    except ImportError:  # TrainerRecorder reports it
        return object


if TYPE_CHECKING:

    class _Callback:
        """``transformers.TrainerCallback``, which may be missing."""

else:
    _Callback = _callback_class()


class TrainerRecorder(_Callback):
    """Record a ``Trainer``'s curriculum and test losses as a run of a store.

    The recorder attaches itself to the trainer and replaces an earlier recorder:

        TrainerRecorder(trainer, "runs/mine", "seed-0")
        trainer.train()

    A step is an update; its batch contains all examples of all accumulated parts. Examples that are dropped at the end
    of an epoch (``dataloader_drop_last``) are in no batch. Recording does not change the trainer's batches, random
    numbers or results. It is as crash-safe as ``Recorder``; ``trainer.train(resume_from_checkpoint=…)`` resumes the
    recording with the same name.

    Args:
        trainer: the trainer, before ``train()``: one process, with an indexed dataset.
        store: folder of the runs, or the store itself.
        run: the run's id. By default it is random, and the recording cannot be resumed.
        train, test: training and test examples, or their ids, in the order of ``trainer.train_dataset`` and of the
            test losses. By default a new store numbers the rows of the two datasets.
        task: the ``Task`` that the trainer trains on, if there is one. Its test losses are then recorded.
        losses: ``losses(model)`` → the loss of every test example, ``[test]``, called in evaluation mode without
            gradients. By default the trainer's own loss of each example of ``eval_dataset``, computed one example at a
            time so that it depends neither on padding nor on other examples.
        curriculum: batches to train on instead of those of the trainer's sampler; indices are rows of
            ``train_dataset``. Batches may differ in size.
        every: read the test losses every ``every`` steps and after the last one.
        recipe: the recipe that describes the training, if there is one.

    Raises:
        InvalidInput: transformers is missing, the trainer hides which examples it trains on (a dataset without
            indices, several processes, workers out of order), or the numbers of rows and examples differ. When
            training starts: the curriculum does not fit the trainer's steps.
    """

    batches: _TrackedSampler
    _plain_loader: Callable[[], DataLoader[Any]]

    @checked
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
        every: Count = 1,
        recipe: Recipe | None = None,
    ) -> None:
        if _Callback is object:
            raise InvalidInput("recording a Trainer needs transformers: pip install 'simfluence[hf]'")
        _check(trainer, every)
        self.trainer, self.run, self.task, self.curriculum = trainer, run, task, curriculum
        self.every, self.recipe = every, recipe
        self.store = store if isinstance(store, RunStore) else RunStore(store)
        self.train, self.test = _examples(self.store, trainer, task, train, test, losses is None)
        self.losses = losses or (_OfTask(task) if task else _OneByOne(trainer))
        self._recorder: Recorder | None = None
        self._rate: float | None = None
        for callback in list(trainer.callback_handler.callbacks):
            if isinstance(callback, TrainerRecorder):
                trainer.remove_callback(callback)
                trainer.get_train_dataloader = callback._plain_loader
        self._plain_loader = trainer.get_train_dataloader
        trainer.get_train_dataloader = self._loader
        trainer.add_callback(self)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start or resume the run."""
        if self.curriculum is not None and state.max_steps != len(self.curriculum):
            raise InvalidInput(
                f"the trainer makes {state.max_steps} steps, but the curriculum has {len(self.curriculum)}: "
                f"set max_steps={len(self.curriculum)} in its TrainingArguments"
            )
        resume = None if self.run is None else state.global_step
        if self.run is None and state.global_step:
            raise InvalidInput("resuming from a checkpoint needs the recording's name: pass run=…")
        if self._recorder is not None:
            self._recorder.leave()  # its training was interrupted
        self._recorder = Recorder(
            self.store, self.run, train=self.train, test=self.test, task=self.task, recipe=self.recipe, resume=resume
        ).__enter__()
        if state.global_step and not args.ignore_data_skip:
            self.batches.skip = self._trained_parts_of_epoch(state)
        if self.recorder.steps == 0:
            losses = self._read()
            self._check_finite(losses)
            self.recorder.read(losses)
        self._is_read = True

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        """Remember the learning rate before the schedule advances."""
        self._rate = float(optimizer.param_groups[0]["lr"])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the update's batch and, if they are due, the test losses."""
        batch = self.batches.next(self.trainer.current_gradient_accumulation_steps)
        if self.trainer.accelerator.optimizer_step_was_skipped:  # a gradient of mixed precision overflowed
            batch = []
        read = state.global_step % self.every == 0 or state.global_step >= state.max_steps
        self.recorder.step(batch, self._read() if read else None, lr=self._rate)
        self._is_read = read

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Finish the run."""
        if not self._is_read:  # stopped early
            self.recorder.read(self._read())
        self.recorder.__exit__(None, None, None)

    @property
    def recorder(self) -> Recorder:
        """Recorder of the current or last training.

        Raises:
            InvalidInput: no training has started.
        """
        if self._recorder is None:
            raise InvalidInput("no run is recorded yet: call trainer.train() first")
        return self._recorder

    def _read(self) -> Tensor:
        model = self.trainer.model
        mode = model.training
        model.eval()
        try:
            with torch.no_grad():
                return self.losses(model)
        except PASSED_ON:
            raise
        except Exception as error:
            raise InvalidInput(
                f"the evaluation of the test examples after step {self.trainer.state.global_step} failed with "
                f"{type(error).__name__}: {error}"
            ) from error
        finally:
            model.train(mode)

    def _check_finite(self, losses: Tensor) -> None:
        """Check the test losses before training.

        Raises:
            InvalidInput: a loss is NaN or infinite.
        """
        bad = torch.nonzero(~torch.isfinite(torch.as_tensor(losses))).flatten().tolist()
        if bad:
            raise InvalidInput(
                f"before any training the loss of {len(bad)} of {len(self.test)} test examples is NaN or infinite: "
                f"{named(self.test, [row for row in bad if row < len(self.test)])}. Look for missing values in their "
                "inputs and for labels that are all ignored (-100); correct these examples or leave them out"
            )

    def _loader(self) -> DataLoader[Any]:
        """Build the trainer's loader of training batches with a sampler that tracks their examples."""
        plain = self._plain_loader()
        inner: Any = getattr(plain, "batch_sampler", None)
        dataset: Any = getattr(plain, "dataset", None)
        if inner is None or isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
            raise InvalidInput(
                "the trainer hides which examples it trains on: its loader has no batch sampler over an indexed "
                "dataset (is it an IterableDataset?). Use a dataset with len() and integer indices, or record your "
                "own loop with store.recorder(…)"
            )
        if len(dataset) != len(self.train):
            raise InvalidInput(
                f"the training dataset has {len(dataset)} rows, but there are {len(self.train)} training examples"
            )
        self.batches = _TrackedSampler(
            inner if self.curriculum is None else self._parts(self.curriculum), len(self.train)
        )
        settings = {name: getattr(plain, name) for name in _LOADER_SETTINGS}
        loader: DataLoader[Any] = DataLoader(dataset, batch_sampler=self.batches, **settings)
        prepared: DataLoader[Any] = self.trainer.accelerator.prepare_data_loader(loader)
        return prepared

    def _parts(self, curriculum: Curriculum) -> list[list[int]]:
        """Divide each batch of the curriculum into as many equal parts as the trainer accumulates.

        Raises:
            InvalidInput: a batch is empty, or cannot be divided into equal parts.
        """
        if curriculum.n_train != len(self.train):
            raise InvalidInput(
                f"the curriculum is for {curriculum.n_train} training examples, but the trainer's dataset has "
                f"{len(self.train)}"
            )
        count = self.trainer.args.gradient_accumulation_steps
        for step, size in enumerate(curriculum.sizes):
            if size == 0 or size % count:
                raise InvalidInput(
                    f"batch {step} has {size} examples: with gradient_accumulation_steps={count} a batch needs a "
                    f"positive multiple of {count}, because all parts have equal weight"
                )
        return [part.tolist() for batch in curriculum for part in batch.reshape(count, -1)]

    def _trained_parts_of_epoch(self, state: Any) -> int:
        """Count the parts of the current epoch that were trained on before the checkpoint."""
        count: int = self.trainer.args.gradient_accumulation_steps
        per_epoch = max(1, -(-len(self.batches) // count))
        return int(state.global_step % per_epoch) * count


#: Settings copied from the trainer's loader of training batches.
_LOADER_SETTINGS = (
    "collate_fn", "num_workers", "pin_memory", "worker_init_fn", "persistent_workers", "prefetch_factor",
    "multiprocessing_context", "timeout", "generator",
)  # fmt: skip


class _TrackedSampler(BatchSampler):
    """Batch sampler that stores the rows of each batch until the end of their step."""

    def __init__(self, batches: Any, rows: int) -> None:
        self.inner, self.rows = batches, rows
        self.batch_size = getattr(batches, "batch_size", 0)
        self.drop_last = bool(getattr(batches, "drop_last", False))
        self.skip = 0  # parts of a resumed epoch that were already trained on
        self.waiting: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        self.waiting.clear()
        for number, batch in enumerate(self.inner):
            rows = list(batch)
            if not all(isinstance(row, int) and 0 <= row < self.rows for row in rows):
                raise InvalidInput(
                    f"the trainer's sampler hides which examples it draws: {rows[:3]!r} are not row numbers"
                )
            if number >= self.skip:
                self.waiting.append(rows)
            yield rows
        self.skip = 0

    def next(self, parts: int) -> list[int]:
        """Return the rows of the finished step, which had this many parts."""
        return [row for _ in range(parts) for row in self.waiting.popleft()]

    def set_epoch(self, epoch: int) -> None:
        if hasattr(self.inner, "set_epoch"):
            self.inner.set_epoch(epoch)

    @property
    def sampler(self) -> Any:
        """Sampler of the wrapped batch sampler, which accelerate seeds."""
        return getattr(self.inner, "sampler", None)

    @sampler.setter
    def sampler(self, value: Any) -> None:
        self.inner.sampler = value

    def __len__(self) -> int:
        return len(self.inner)


class _OneByOne:
    """The trainer's own loss of each row of its test dataset, computed row by row."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.batches: list[Any] = []

    def __call__(self, model: nn.Module) -> Tensor:
        if not self.batches:
            loader = self.trainer.get_eval_dataloader()
            self.batches = [loader.collate_fn([loader.dataset[row]]) for row in range(len(loader.dataset))]
        with self.trainer.compute_loss_context_manager():
            return torch.stack([self._loss(model, row) for row in range(len(self.batches))])

    def _loss(self, model: nn.Module, row: int) -> Tensor:
        """Compute the loss of one test example.

        Raises:
            InvalidInput: the model fails on it.
        """
        try:
            loss: Tensor = self.trainer.compute_loss(model, self._on_device(self.batches[row])).float()
        except PASSED_ON:
            raise
        except Exception as error:
            raise InvalidInput(
                f"the trainer's loss of row {row} of eval_dataset failed with {type(error).__name__}: {error}"
            ) from error
        return loss

    def _on_device(self, batch: Any) -> dict[str, Any]:
        device = self.trainer.args.device
        return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in batch.items()}


class _OfTask:
    """The model's test losses on a task."""

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(self, model: nn.Module) -> Tensor:
        return self.task.evaluate(model, self.task.test_data)["loss"]


def _check(trainer: Any, every: int) -> None:
    if isinstance(trainer, type) or not all(hasattr(trainer, name) for name in ("args", "callback_handler")):
        raise InvalidInput(f"trainer must be a transformers.Trainer, got {shown(trainer)}")
    args = trainer.args
    if args.world_size > 1:
        raise InvalidInput(
            f"a trainer with {args.world_size} processes hides which examples the others train on: use one process"
        )
    if args.auto_find_batch_size:
        raise InvalidInput("auto_find_batch_size restarts training with other batches: turn it off to record")
    if args.dataloader_num_workers and not args.dataloader_in_order:
        raise InvalidInput("workers that deliver out of order hide the order of examples: set dataloader_in_order=True")
    if args.load_best_model_at_end and every > 1:
        raise InvalidInput(
            "load_best_model_at_end may end with another model than the last step's: record with every=1"
        )


def _examples(
    store: RunStore, trainer: Any, task: Task | None, train: Any, test: Any, own_losses: bool
) -> tuple[Examples, Examples]:
    """Choose training and test examples: the arguments, the task's, the store's, or the datasets' numbered rows.

    Raises:
        InvalidInput: the number of examples is unknown, or differs from that of the dataset.
    """
    if task is None and own_losses and not hasattr(trainer.eval_dataset, "__len__"):
        raise InvalidInput(
            "there are no test losses to record: give the trainer an eval_dataset with len(), or pass losses= or task="
        )
    known = (task.train, task.test) if task else store.sides() if store.exists else (None, None)
    datasets, arguments = (trainer.train_dataset, trainer.eval_dataset), (train, test)
    chosen = []
    for name, argument, examples, dataset in zip(("train", "test"), arguments, known, datasets, strict=True):
        if argument is not None:
            chosen.append(argument if isinstance(argument, Examples) else Examples(list(argument)))
        elif examples is not None:
            chosen.append(examples)
        elif hasattr(dataset, "__len__"):
            chosen.append(Examples.numbered(len(dataset)))
        else:
            raise InvalidInput(f"the trainer's {name} dataset has no length: pass {name}= the ids of its examples")
    if task is None and own_losses and len(trainer.eval_dataset) != len(chosen[1]):
        raise InvalidInput(
            f"the test dataset has {len(trainer.eval_dataset)} rows, but there are {len(chosen[1])} test examples"
        )
    return chosen[0], chosen[1]
