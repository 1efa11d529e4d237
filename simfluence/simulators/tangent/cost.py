"""What a reference of the tangent kernel simulator costs, counted before any of it is computed."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from simfluence.attribution.gradients.hooks import evaluating
from simfluence.attribution.gradients.tangent_kernel import one_tensor
from simfluence.recipe import Recipe
from simfluence.recording.engines.base import TrainingSetup
from simfluence.task import Task, forward, take

__all__ = ["reference_operations"]


def reference_operations(task: Task, recipe: Recipe, n_features: int, n_checkpoints: int) -> float:
    """Count the floating-point operations of the derivatives that one reference needs.

    At each checkpoint the tracked features of each example are differentiated, which takes a forward and a backward
    pass each; a backward pass has twice as many operations. The forward pass of one example is counted.

    Raises:
        InvalidInput: the model cannot be built.
    """
    setup = TrainingSetup.of(task, recipe)
    model = task.build_model(recipe.seed).to(recipe.torch_dtype)
    with torch.no_grad(), evaluating(model), FlopCounterMode(display=False) as counter:
        outputs = one_tensor(forward(model, take(setup.train_data[0], torch.arange(1))))
    tracked = outputs.numel() + n_features
    operations: float = 3.0 * counter.get_total_flops() * tracked * (len(task.train) + len(task.test)) * n_checkpoints
    return operations
