"""The plain engine: one training after the other, for any ``torch.nn.Module``."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

from simfluence._types import RunLosses
from simfluence.curriculum import Curriculum
from simfluence.errors import StoreError
from simfluence.recipe import Recipe
from simfluence.recording.checkpoints import Checkpoint
from simfluence.task import Data, Task, cast, take


class Training:
    """One training under way: each ``advance()`` makes one update and measures the test losses.

    The global random state of torch is the recipe's while a training runs; ``checkpoint()`` and ``restore()``
    carry it along, so an interrupted training goes on bit for bit.
    """

    def __init__(
        self, task: Task, recipe: Recipe, curriculum: Curriculum, device: torch.device, data: tuple[Data, Data]
    ) -> None:
        self.task = task
        self.recipe = recipe
        self.train_data, self.test_data = data
        self.model = task.build_model(recipe.seed).to(device, recipe.torch_dtype)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = recipe.build_optimizer(self.parameters)
        self.rates = recipe.learning_rates(len(curriculum))
        self.rate_of_step: list[float] = self.rates.tolist()  # optimizers are slow with NumPy's floats
        self.batches = torch.tensor(curriculum.indices, dtype=torch.int64, device=device).split(
            curriculum.sizes.tolist()
        )
        self.mode = ModeSwitch(self.model)
        self.step = 0
        torch.manual_seed(recipe.seed)
        first = self._evaluate()
        self.losses = torch.full((len(curriculum) + 1, len(first)), torch.nan, dtype=recipe.torch_dtype, device=device)
        self.losses[0] = first

    @property
    def finished(self) -> bool:
        return self.step == len(self.batches)

    def advance(self) -> None:
        """One step: the mean loss over the batch, its gradient, clipping, the optimizer, the test losses.

        An empty batch is a step without an update; the schedule moves on.
        """
        batch = self.batches[self.step]
        if len(batch):
            self._update(batch)
        self.step += 1
        self.losses[self.step] = self._evaluate()

    def _evaluate(self) -> Tensor:
        self.mode.training(False)
        return self.task.evaluate(self.model, self.test_data)

    def _update(self, batch: Tensor) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate_of_step[self.step]
        self.mode.training(True)
        self.optimizer.zero_grad()
        losses = self.task.batch_losses(self.model, take(self.train_data, batch))
        losses.backward(torch.full_like(losses, 1 / len(batch)))  # the gradient of their mean, an operation cheaper
        if self.recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip_norm)
        self.optimizer.step()

    def recorded(self) -> RunLosses:
        """The losses so far, ``[steps + 1, test]``."""
        return self.losses.cpu().numpy()

    def checkpoint(self) -> Checkpoint:
        """All that the rest of this training depends on."""
        return Checkpoint.of(
            self.step, self.model, self.optimizer, losses=self.losses[: self.step + 1], random=torch.get_rng_state()
        )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from ``checkpoint``.

        Raises:
            StoreError: it is of a training with other test examples, or from before this one started.
        """
        before = checkpoint.extra["losses"].to(self.losses)
        if not np.array_equal(before[0].cpu(), self.losses[0].cpu()):
            raise StoreError("a training under way started from other losses than this one does")
        checkpoint.restore(self.model, self.optimizer)
        self.losses[: checkpoint.step + 1] = before
        torch.set_rng_state(checkpoint.extra["random"])
        self.step = checkpoint.step


class ModeSwitch:
    """``model.train()`` and ``model.eval()``, twice a step, at a twentieth of their cost.

    Modules that define their own ``train`` or ``eval`` (to keep a layer frozen, say) get it called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        modules = list(model.modules())
        plain = all(type(m).train is nn.Module.train and type(m).eval is nn.Module.eval for m in modules)
        self.flags = [vars(module) for module in modules] if plain else None

    def training(self, mode: bool) -> None:
        if self.flags is None:
            self.model.train(mode)
            return
        for flags in self.flags:
            flags["training"] = mode


def prepare(task: Task, recipe: Recipe, device: torch.device) -> tuple[Data, Data]:
    """The task's training and test data on the device, in the recipe's dtype."""
    return cast(task.train_data, device, recipe.torch_dtype), cast(task.test_data, device, recipe.torch_dtype)
