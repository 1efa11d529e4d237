"""What simulators have in common that differentiate a task's model, and whose files hold no model."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import numpy as np

from simfluence._internal.validation import number
from simfluence.errors import InvalidInput
from simfluence.recipe import Recipe
from simfluence.recording.engines.base import TrainingSetup
from simfluence.runs import Runs
from simfluence.simulators.base import Simulator
from simfluence.simulators.learned import MOST, check_arrays, check_indices
from simfluence.task import Task
from simfluence.tasks.losses import BY_NAME

__all__ = ["TaskSimulator"]

_IGNORED = -100  # target without a loss in torch's cross-entropy

TaskSimulatorT = TypeVar("TaskSimulatorT", bound="TaskSimulator")


class TaskSimulator(Simulator):
    """A simulator of a task's model.

    Files hold targets, recipe and the name of the loss, which is what simulation needs of the task.

    Attributes:
        targets_: of the training examples, then of the test examples.
        shape_: shape of the model's outputs for one example.
        loss_: name of the loss if the library defines it, else None.
        l2_: the task's own L2.
        recipe_: fields of the recipe.
    """

    needs_task = True

    task: Task | None
    recipe: Recipe | None

    def __sklearn_clone__(self: TaskSimulatorT) -> TaskSimulatorT:
        """Clone the parameters, but share the task."""
        return type(self)(**self.get_params(deep=False))

    def _check_parameters(self) -> None:
        for name, kind in (("task", Task), ("recipe", Recipe)):
            if not isinstance(getattr(self, name), kind | None):
                raise InvalidInput(f"{name} must be a {kind.__name__} or None, got {getattr(self, name)!r}")

    def _task_and_recipe(self, runs: Runs) -> tuple[Task, Recipe]:
        """Return the task, and the recipe that is given or was recorded.

        Raises:
            InvalidInput: one of them is missing.
        """
        if self.task is None:
            raise InvalidInput(f"task is required, as {self.name!r} simulates its model: {type(self).__name__}(task)")
        recipe = self.recipe or runs[0].recipe
        if recipe is None:
            raise InvalidInput("these runs were recorded without a recipe: pass recipe=")
        return self.task, recipe

    def _keep(self, setup: TrainingSetup, shape: list[int]) -> None:
        """Keep what simulation needs of the task."""
        self.targets_, self.shape_ = setup.all_data[1].numpy(), shape
        self.loss_ = next((name for name, loss in BY_NAME.items() if loss is setup.task.loss), None)
        self.l2_, self.recipe_ = float(setup.task.l2), setup.recipe.model_dump(mode="json")

    def _loss(self) -> Any:
        if self.task is not None:
            return self.task.loss
        if self.loss_ is None:
            raise InvalidInput(
                "the task's loss is a function of your own, which files do not hold: set simulator.task = task"
            )
        return BY_NAME[self.loss_]

    def _check_kept(self, outputs: int) -> Recipe:
        """Check what a file holds of the task, for ``outputs`` numbers per example; return the recipe."""
        for name in ("shape_", "targets_", "recipe_", "loss_", "l2_"):
            if not hasattr(self, name):
                raise InvalidInput(f"it lacks {name}")
        number("l2_", self.l2_, least=0)
        shape, examples = self.shape_, self.n_train_ + self.n_test_
        if not isinstance(shape, list) or not all(isinstance(size, int) and 0 < size <= MOST for size in shape):
            raise InvalidInput("shape_ is no shape")
        if math.prod(shape) != outputs:
            raise InvalidInput("shape_ does not fit the outputs")
        if not isinstance(self.targets_, np.ndarray) or self.targets_.ndim == 0 or len(self.targets_) != examples:
            raise InvalidInput("targets_ does not have a target for each example")
        if self.targets_.dtype.kind == "f" and not np.isfinite(self.targets_).all():
            raise InvalidInput("targets_ has a NaN or an infinity")
        if self.loss_ is not None and self.loss_ not in BY_NAME:
            raise InvalidInput("loss_ is unknown")
        if self.loss_ == "cross_entropy":
            check_arrays(self, {"targets_": "int64 examples"})
            check_indices("targets_", self.targets_[self.targets_ != _IGNORED], shape[0])
        if self.loss_ == "squared_error" and self.targets_.size != examples * outputs:
            raise InvalidInput("targets_ does not have a target for each output")
        return Recipe(**self.recipe_)

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Leave out task and recipe: the learned attributes hold what simulation needs of them."""
        about, arrays = super()._state()
        about["parameters"] |= {"task": None, "recipe": None}
        return about, arrays
