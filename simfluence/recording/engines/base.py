"""Training setup and base class of both engines: one or several training runs that advance together."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from simfluence.errors import InvalidInput, StoreError
from simfluence.recipe import Recipe
from simfluence.recording.activation_cache import (
    ACTIVATION_CACHE_BYTES,
    ActivationCache,
    CachedModel,
    build_activation_cache,
)
from simfluence.recording.checkpoints import Checkpoint
from simfluence.recording.explain import PASSED_ON, explained
from simfluence.recording.readings import LossReader
from simfluence.task import Data, Task, cast, convert, set_seed, tensors

__all__ = ["Training", "TrainingSetup", "first_pass"]


@dataclass
class TrainingSetup:
    """Task, recipe and data of a recording, shared by all its groups of runs.

    Args:
        task: the task to train on.
        recipe: how to train.
        measures: names of the task's measures to read beside the loss.
        device: the device to train on.
        train_data, test_data: the task's data, on the device and in the recipe's dtype.
        activation_cache_bytes: bytes that the outputs of frozen layers may take.
    """

    task: Task
    recipe: Recipe
    measures: tuple[str, ...]
    device: torch.device
    train_data: Data
    test_data: Data
    activation_cache_bytes: int = ACTIVATION_CACHE_BYTES
    _activation_cache: ActivationCache | None = field(default=None, init=False, repr=False)
    _is_cache_built: bool = field(default=False, init=False, repr=False)

    @property
    def all_data(self) -> Data:
        """The training data, then the test data."""
        test_inputs = iter(tensors(self.test_data[0]))
        inputs = convert(lambda tensor: torch.cat([tensor, next(test_inputs)]), self.train_data[0])
        return inputs, torch.cat([self.train_data[1], self.test_data[1]])

    @classmethod
    def of(
        cls,
        task: Task,
        recipe: Recipe,
        device: str | torch.device = "cpu",
        measures: Sequence[str] = (),
        activation_cache_bytes: int = ACTIVATION_CACHE_BYTES,
    ) -> TrainingSetup:
        """Move the task's data to ``device``.

        Raises:
            InvalidInput: the device does not exist.
        """
        try:
            device = torch.device(device)
            train, test = (
                convert(_trainable, cast(data, device, recipe.torch_dtype))
                for data in (task.train_data, task.test_data)
            )
        except (RuntimeError, AssertionError) as error:
            raise InvalidInput(f"device {str(device)!r}: {str(error).splitlines()[0]}") from None
        return cls(task, recipe, tuple(measures), device, train, test, activation_cache_bytes)

    @cached_property
    def loss_reader(self) -> LossReader:
        """Reader of the test losses and measures."""
        return LossReader(self.task, self.test_data, self.measures)

    def cached_model(self, model: nn.Module) -> CachedModel | None:
        """Connect a model to the activation cache; return None if it has no frozen layers worth caching.

        All models of a setup start from the same weights, so the cache is built from the first one.
        """
        if not self._is_cache_built:
            self._activation_cache = build_activation_cache(
                self.task, model, self.train_data, self.activation_cache_bytes
            )
            self._is_cache_built = True
        cache = self._activation_cache
        return None if cache is None else CachedModel(cache, model, self.task, self.train_data)


def _trainable(tensor: Tensor) -> Tensor:
    """Copy a tensor that was made in ``torch.inference_mode``, which autograd cannot use."""
    return tensor.clone() if tensor.is_inference() else tensor


@contextlib.contextmanager
def first_pass(task: Task) -> Iterator[None]:
    """Turn torch's errors in the model's first pass over the task's data into ``InvalidInput``.

    Raises:
        InvalidInput: the model does not run on the data.
    """
    try:
        yield
    except PASSED_ON:
        raise
    except Exception as error:
        raise InvalidInput(f"the model of task {task.name!r} does not run on its data: {error}") from error


class Training(ABC):
    """One or several training runs of equal length; each ``advance()`` updates all of them and reads the test losses.

    Torch's global random state is seeded with the recipe's seed. ``checkpoint()`` saves it and ``restore()`` restores
    it, so that a resumed run equals an uninterrupted one bit for bit.

    Args:
        setup: task, recipe and data.
        runs: number of runs.
        times: whether to read the test losses at each time 0…T, ``[times]``.
    """

    model: nn.Module

    def __init__(self, setup: TrainingSetup, runs: int, times: np.ndarray) -> None:
        self.setup = setup
        self.times = times.tolist()
        self.step = 0
        self.steps = len(times) - 1
        shape = runs, len(times), len(setup.task.test)
        self.readings = {
            name: torch.full(shape, torch.nan, dtype=setup.recipe.torch_dtype, device=setup.device)
            for name in ("loss", *setup.measures)
        }
        self.rates = setup.recipe.learning_rates(self.steps)
        self._rate_of_step: list[float] = self.rates.tolist()  # optimizers are slow with NumPy floats

    @property
    def finished(self) -> bool:
        return self.step == self.steps

    def start(self) -> None:
        """Seed torch and read the test losses before any update."""
        set_seed(self.setup.recipe.seed)
        self._store(self._read())

    def advance(self) -> None:
        """Make one update of every run, then read the test losses if they are due.

        Raises:
            InvalidInput: the model or the loss fails on the step's batch, or on the test examples after it.
        """
        try:
            self._update(self._rate_of_step[self.step])
        except PASSED_ON:
            raise
        except Exception as error:
            raise self._explained(error, "the update", "train", self._batch_rows(), self.setup.train_data) from error
        self.step += 1
        if self.times[self.step]:
            try:
                readings = self._read()
            except PASSED_ON:
                raise
            except Exception as error:
                self.step -= 1
                rows = range(len(self.setup.task.test))
                raise self._explained(error, "the evaluation", "test", rows, self.setup.test_data) from error
            self._store(readings)

    def _explained(self, error: Exception, doing: str, side: str, rows: Sequence[int], data: Data) -> InvalidInput:
        return explained(error, f"{doing} of step {self.step}", self.setup.task, side, rows, self.model, data)

    def checkpoint(self) -> Checkpoint:
        """Return the state that the remaining steps depend on."""
        extra = {f"readings/{name}": values[:, : self.step + 1] for name, values in self.readings.items()}
        return self._state(extra | {"random": torch.get_rng_state(), "times": torch.tensor(self.times)})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Resume from ``checkpoint``.

        Raises:
            StoreError: the checkpoint has other readings or other initial losses.
        """
        if checkpoint.extra["times"].tolist() != self.times:
            raise StoreError("the checkpoint of the unfinished run has test losses of other steps")
        saved = {name: checkpoint.extra.get(f"readings/{name}") for name in self.readings}
        for name, values in saved.items():
            if values is None or not torch.equal(values[:, 0], self.readings[name][:, 0].cpu()):
                raise StoreError("the checkpoint of the unfinished run has other initial losses than this run")
            self.readings[name][:, : checkpoint.step + 1] = values.to(self.readings[name])
        self._restore(checkpoint)
        torch.set_rng_state(checkpoint.extra["random"])
        self.step = checkpoint.step

    def recorded(self) -> list[dict[str, np.ndarray]]:
        """Return each run's readings so far by name, each ``[times, test]``; NaN where not read."""
        arrays = {name: values.cpu().numpy() for name, values in self.readings.items()}
        return [{name: values[run] for name, values in arrays.items()} for run in range(len(arrays["loss"]))]

    @abstractmethod
    def run_checkpoints(self) -> list[Checkpoint]:
        """Return a checkpoint of each run: parameters, buffers and optimizer state."""

    @abstractmethod
    def _update(self, rate: float) -> None:
        """Make one update of every run at learning rate ``rate``."""

    @abstractmethod
    def _batch_rows(self) -> list[int]:
        """Return the training examples of the present step's batches, of all runs."""

    @abstractmethod
    def _read(self) -> Mapping[str, Tensor]:
        """Read loss and measures of the test examples, each ``[runs, test]``, or ``[test]`` for a single run."""

    @abstractmethod
    def _state(self, extra: Mapping[str, Tensor]) -> Checkpoint:
        """Return a checkpoint of all runs together."""

    @abstractmethod
    def _restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state that ``_state`` returned."""

    def _store(self, values: Mapping[str, Tensor]) -> None:
        for name, readings in self.readings.items():
            readings[:, self.step] = values[name]
