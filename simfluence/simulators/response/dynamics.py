"""Training as a deviation from the mean path, step by step; ``simulators.response.simulator`` has the equations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simfluence.curriculum import Curriculum
from simfluence.recipe import Recipe
from simfluence.simulators.batches import batch_weights
from simfluence.simulators.response.optimizers import Memory, Optimizer

__all__ = ["Response"]


@dataclass(frozen=True, eq=False)
class Response:
    """How the state of training answers to batches, around a mean path.

    Args:
        loss: ``(outputs, targets)`` → ``[batch]``.
        targets: of the training examples, then of the test examples.
        recipe: the training recipe.
        outputs: outputs along the mean path, ``[steps + 1, examples, outputs]``.
        shape: shape of the model's outputs for one example.
        times: steps of the checkpoints, ``[checkpoints]``.
        reads: change of the outputs with the state, ``[checkpoints, examples, outputs, directions]``.
        writes: change of the state by the training examples' outputs, ``[checkpoints, train, outputs, directions]``.
        decays: what weight decay in the gradient does, ``[checkpoints, directions, directions]``; None without it.
        n_train: number of training examples.
        coupled: weight decay in the gradient: the optimizer's and the task's l2.
    """

    loss: Callable[[Any, Tensor], Tensor]
    targets: Tensor
    recipe: Recipe
    outputs: Tensor
    shape: tuple[int, ...]
    times: np.ndarray
    reads: Tensor
    writes: Tensor
    decays: Tensor | None
    n_train: int
    coupled: float

    def centre(self, curricula: Sequence[Curriculum]) -> tuple[Tensor, Tensor]:
        """Go through the curricula of the mean path together.

        Returns:
            The mean of their states at each step over those that have not ended, ``[steps + 1, directions]``, and
            their test losses, ``[runs, steps + 1, test]``.
        """
        return self._roll(curricula, max(map(len, curricula)), None)

    def roll(self, curricula: Sequence[Curriculum], longest: int, centre: Tensor) -> Tensor:
        """Simulate the test losses, ``[runs, longest + 1, test]``."""
        return self._roll(curricula, longest, centre)[1]

    def _roll(self, curricula: Sequence[Curriculum], longest: int, centre: Tensor | None) -> tuple[Tensor, Tensor]:
        optimizer = Optimizer.of(self.recipe)
        weights, updates = batch_weights(curricula, longest, 1)
        weights, updates = weights.tocsr(), updates.reshape(len(curricula), longest)
        going = torch.tensor([len(curriculum) for curriculum in curricula])
        rates = self.recipe.learning_rates(longest).tolist()
        state = self.reads.new_zeros(len(curricula), self.reads.shape[-1])
        memory, means, losses = Memory.empty(state), [], []
        rows = np.arange(len(curricula)) * longest
        for step in range(longest + 1):
            mean = state[going >= step].mean(0) if centre is None else centre[min(step, len(centre) - 1)]
            deviation = state - mean
            means.append(mean)
            losses.append(self._test_losses(deviation, step))
            if step == longest:
                break
            active = torch.from_numpy(updates[:, step])[:, None]
            gradients = self._gradients(deviation, step, weights[rows + step])
            memory, moves = optimizer.step(memory, gradients, active)
            if self.recipe.optimizer == "adamw":
                moves = moves + self.recipe.weight_decay * deviation
            state = torch.where(active, state - rates[step] * moves, state)
        return torch.stack(means), torch.stack(losses, 1)

    def _gradients(self, deviation: Tensor, step: int, weights: Any) -> Tensor:
        """Return the batches' gradients times P, along the directions, ``[rows, directions]``."""
        used = np.unique(weights.indices)
        examples = torch.from_numpy(used.astype(np.int64))
        shares = torch.from_numpy(weights[:, used].toarray()).to(deviation)[..., None]  # [rows, batch, 1]
        outputs = self._outputs(deviation, step, examples)
        slopes = self._slopes(outputs, self.targets[examples]) * shares  # [rows, batch, outputs]
        writes = self._between(self.writes, step, examples).flatten(0, 1)
        gradients = slopes.flatten(1) @ writes
        if self.recipe.clip_norm is not None and not Optimizer.of(self.recipe).scales:
            norms = gradients.norm(dim=1, keepdim=True)
            gradients = gradients * (self.recipe.clip_norm / (norms + 1e-6)).clamp(max=1.0)
        if self.decays is not None:
            gradients = gradients + self.coupled * deviation @ self._between(self.decays, step)
        return gradients

    def _outputs(self, deviation: Tensor, step: int, examples: Tensor) -> Tensor:
        """Return each row's outputs for some examples, ``[rows, examples, outputs]``."""
        reads = self._between(self.reads, step, examples)
        moved = (deviation @ reads.flatten(0, 1).T).view(len(deviation), *reads.shape[:2])
        return self.outputs[min(step, len(self.outputs) - 1), examples] + moved

    def _slopes(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``∂ℓ/∂f`` of each row's examples."""
        outputs = outputs.detach().requires_grad_()
        with torch.enable_grad():
            total = self._losses(outputs, targets).sum()
        return torch.autograd.grad(total, outputs)[0]

    def _test_losses(self, deviation: Tensor, step: int) -> Tensor:
        test = torch.arange(self.n_train, len(self.targets))
        with torch.no_grad():
            return self._losses(self._outputs(deviation, step, test), self.targets[test])

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each row's losses, ``[rows, examples]``; the loss gets outputs in the shape that the model gives."""
        shaped = outputs.reshape(-1, *self.shape)
        losses: Tensor = self.loss(shaped, targets.repeat(len(outputs), *[1] * (targets.ndim - 1)))
        return losses.reshape(outputs.shape[:2])

    def _between(self, values: Tensor, step: int, rows: Tensor | None = None) -> Tensor:
        """Return values ``[checkpoints, …]`` at a step, on a straight line between checkpoints; some rows of them."""
        after = int(np.searchsorted(self.times, step, side="right"))
        around = values[after - 1 : after + 1] if rows is None else values[after - 1 : after + 1, rows]
        if len(around) == 1:
            return around[0]
        first, second = self.times[after - 1], self.times[after]
        return torch.lerp(around[0], around[1], float((step - first) / (second - first)))
