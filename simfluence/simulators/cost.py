"""What simulators that differentiate a model cost to fit, counted in operations before any of it is computed.

Counts do not depend on the machine, so neither does what is chosen by them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.utils.flop_counter import FlopCounterMode

from simfluence.attribution.gradients.hooks import evaluating
from simfluence.attribution.gradients.tangent_kernel import kernel_bytes, one_tensor
from simfluence.recipe import Recipe
from simfluence.recording.engines.base import TrainingSetup
from simfluence.runs import Runs
from simfluence.task import Task, forward, take

__all__ = ["ModelCost"]


@dataclass(frozen=True)
class ModelCost:
    """Floating-point operations of one example's forward pass, and its number of outputs.

    A backward pass has twice as many operations as a forward pass.
    """

    forward: float
    outputs: int
    examples: int

    @classmethod
    def of(cls, task: Task, recipe: Recipe) -> ModelCost:
        """Count the operations of a model.

        Raises:
            InvalidInput: the model cannot be built.
        """
        setup = TrainingSetup.of(task, recipe)
        model = task.build_model(recipe.seed).to(recipe.torch_dtype)
        with torch.no_grad(), evaluating(model), FlopCounterMode(display=False) as counter:
            outputs = one_tensor(forward(model, take(setup.train_data[0], torch.arange(1))))
        return cls(float(counter.get_total_flops()), outputs.numel(), len(task.train) + len(task.test))

    def of_derivatives(self, tracked: int, checkpoints: int) -> float:
        """Count the operations of differentiating ``tracked`` numbers of each example at some checkpoints."""
        return 3 * self.forward * tracked * self.examples * checkpoints

    def of_kernels(self, n_train: int, further: int, checkpoints: int) -> float:
        """Return the bytes of the tangent kernels of one reference, in single precision."""
        return checkpoints * kernel_bytes(n_train, self.examples - n_train, self.outputs + further, 4)

    def of_training(self, runs: Runs) -> float:
        """Count the operations of training the runs again."""
        return 3 * self.forward * sum(len(run.curriculum.indices) for run in runs)
