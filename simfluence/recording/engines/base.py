"""What both engines share: one or several trainings under way, in step with one another."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn

from simfluence.errors import InvalidInput, StoreError
from simfluence.recipe import Recipe
from simfluence.recording.activation_cache import ACTIVATION_CACHE_BYTES, CachedModel, find_trunk
from simfluence.recording.checkpoints import Checkpoint
from simfluence.recording.readings import LossReader
from simfluence.task import Data, Task, cast, set_seed


@dataclass(frozen=True)
class TrainingSetup:
    """What to train and what to read of it; the same for all groups of runs of one recording.

    Args:
        task, recipe: what is trained, and how.
        measures: names of the task's measures to read beside the loss.
        device: where.
        train_data, test_data: the task's, on the device and in the recipe's dtype.
        activation_cache_bytes: what kept outputs of frozen layers may take.
    """

    task: Task
    recipe: Recipe
    measures: tuple[str, ...]
    device: torch.device
    train_data: Data
    test_data: Data
    activation_cache_bytes: int = ACTIVATION_CACHE_BYTES

    @classmethod
    def of(
        cls,
        task: Task,
        recipe: Recipe,
        device: str | torch.device = "cpu",
        measures: Sequence[str] = (),
        activation_cache_bytes: int = ACTIVATION_CACHE_BYTES,
    ) -> TrainingSetup:
        """The setup on this device.

        Raises:
            InvalidInput: there is no such device.
        """
        try:
            device = torch.device(device)
            train, test = (cast(data, device, recipe.torch_dtype) for data in (task.train_data, task.test_data))
        except (RuntimeError, AssertionError) as error:
            raise InvalidInput(f"device {str(device)!r}: {str(error).splitlines()[0]}") from None
        return cls(task, recipe, tuple(measures), device, train, test, activation_cache_bytes)

    @cached_property
    def test_side(self) -> LossReader:
        """The test side, ready to be read."""
        return LossReader(self.task, self.test_data, self.measures)

    def cached_model(self, model: nn.Module) -> CachedModel | None:
        """For the frozen layers of one of the setup's models, which all start from the same weights."""
        if "trunk" not in self.__dict__:  # found in the first of them
            self.__dict__["trunk"] = find_trunk(self.task, model, self.train_data, self.activation_cache_bytes)
        trunk = self.__dict__["trunk"]
        return trunk and CachedModel(trunk, model, self.task, self.train_data)


@contextlib.contextmanager
def first_pass(task: Task) -> Iterator[None]:
    """Explain what the model's first pass over the task's data raises.

    Raises:
        InvalidInput: in place of torch's own errors.
    """
    try:
        yield
    except (RuntimeError, TypeError, IndexError) as error:
        raise InvalidInput(f"the model of task {task.name!r} does not run on its data: {error}") from error


class Training(ABC):
    """Trainings of equal length under way: each ``advance()`` makes one update of each and reads the test side.

    Torch's global random state is the recipe's while a training runs; ``checkpoint()`` and ``restore()`` carry it
    along, so an interrupted training goes on bit for bit.

    Args:
        setup: what to train.
        runs: how many trainings are in step.
        times: at which times 0…T to read the test side, ``[times]``.
    """

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
        self._rate_of_step: list[float] = self.rates.tolist()  # optimizers are slow with NumPy's floats

    @property
    def finished(self) -> bool:
        return self.step == self.steps

    def start(self) -> None:
        """Seed torch and read the test side before any update."""
        set_seed(self.setup.recipe.seed)
        self._keep(self._read())

    def advance(self) -> None:
        """One update of each training, and the readings after it."""
        self._update(self._rate_of_step[self.step])
        self.step += 1
        if self.times[self.step]:
            self._keep(self._read())

    def checkpoint(self) -> Checkpoint:
        """All that the rest of these trainings depends on."""
        extra = {f"readings/{name}": values[:, : self.step + 1] for name, values in self.readings.items()}
        return self._state(extra | {"random": torch.get_rng_state(), "times": torch.tensor(self.times)})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from ``checkpoint``.

        Raises:
            StoreError: it is of trainings that read something else or started from other losses.
        """
        if checkpoint.extra["times"].tolist() != self.times:
            raise StoreError("a training under way read the test side at other times")
        before = {name: checkpoint.extra.get(f"readings/{name}") for name in self.readings}
        for name, values in before.items():
            if values is None or not torch.equal(values[:, 0], self.readings[name][:, 0].cpu()):
                raise StoreError("a training under way started from other losses than this one does")
            self.readings[name][:, : checkpoint.step + 1] = values.to(self.readings[name])
        self._restore(checkpoint)
        torch.set_rng_state(checkpoint.extra["random"])
        self.step = checkpoint.step

    def recorded(self) -> list[dict[str, np.ndarray]]:
        """For each run, its readings so far by name, each ``[times, test]``; NaN where not read."""
        arrays = {name: values.cpu().numpy() for name, values in self.readings.items()}
        return [{name: values[run] for name, values in arrays.items()} for run in range(len(arrays["loss"]))]

    @abstractmethod
    def moments(self) -> list[Checkpoint]:
        """The present moment of each run by itself: parameters, buffers, optimizer state."""

    @abstractmethod
    def _update(self, rate: float) -> None:
        """One update of each training at this learning rate."""

    @abstractmethod
    def _read(self) -> Mapping[str, Tensor]:
        """Loss and measures of the test side, each ``[runs, test]``, or ``[test]`` of a single run."""

    @abstractmethod
    def _state(self, extra: Mapping[str, Tensor]) -> Checkpoint:
        """The present moment of all runs together."""

    @abstractmethod
    def _restore(self, checkpoint: Checkpoint) -> None:
        """Put back what ``_state`` took."""

    def _keep(self, values: Mapping[str, Tensor]) -> None:
        for name, readings in self.readings.items():
            readings[:, self.step] = values[name]
