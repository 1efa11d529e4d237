"""How outputs move under the tangent kernels of one reference run: the update of ``tangent``, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simfluence.curriculum import Curriculum
from simfluence.recipe import Recipe
from simfluence.simulators.dynamics import batch_weights


@dataclass(frozen=True, eq=False)
class FunctionSpace:
    """One reference run, and how outputs move under its kernels.

    Args:
        loss: ``(outputs, targets)`` → ``[batch]``.
        targets: of the training examples, then of the test examples.
        recipe: how is trained.
        kernels: ``[checkpoints, train, outputs, examples, outputs]``.
        times: of the kernels.
        path: true outputs of the reference, ``[steps + 1, examples, outputs]``.
        decays: ``J θ − f`` at the checkpoints, ``[checkpoints, examples, outputs]``; 0 for a model linear in θ.
        reference: its curriculum.
        anchored: whether the path is followed.
        shape: of one example's outputs, as the model gives them.
        l2: the objective's own penalty.
    """

    loss: Any
    targets: Tensor
    recipe: Recipe
    kernels: Tensor
    times: np.ndarray
    path: Tensor
    decays: Tensor
    reference: Curriculum
    anchored: bool
    shape: tuple[int, ...]
    l2: float

    def roll(self, curricula: Sequence[Curriculum], longest: int) -> np.ndarray:
        """Test losses ``[runs, longest + 1, test]``. The reference goes along as one more row, on its true path."""
        every = [*curricula, self.reference]
        weights, updates = batch_weights(every, max(longest, len(self.reference)), 1)
        weights = weights.tocsr()
        steps = len(updates) // len(every)
        updates = updates.reshape(len(every), steps)
        rates = self.recipe.learning_rates(steps)
        f = self.path[0].repeat(len(every), 1, 1)
        moments, made = torch.zeros_like(f), torch.zeros(len(every), 1, 1, dtype=f.dtype)
        losses = np.empty((len(curricula), longest + 1, len(self.targets) - len(self.kernels[0])))
        losses[:, 0] = self._test_losses(f[:-1])
        rows = np.arange(len(every)) * steps
        for step in range(longest):
            if step < len(self.path):
                f[-1] = self.path[step]
            active = torch.from_numpy(updates[:, step])[:, None, None]
            gradient = self._gradient(f, weights[rows + step], step)
            made += active
            moments, moved = self._moved(moments, gradient, made, active)
            moved = moved * float(rates[step]) + self._decoupled(f, step) * float(rates[step])
            following = f - moved
            if self.anchored and updates[-1, step]:
                following = following + (self.path[step + 1] - (f[-1] - moved[-1]))
            f = torch.where(active, following, f)
            losses[:, step + 1] = self._test_losses(f[:-1])
        return losses

    def _gradient(self, f: Tensor, weights: Any, step: int) -> Tensor:
        """What the batches' mean gradients do to the outputs, ``[rows, examples, outputs]``."""
        shown = np.unique(weights.indices)
        chosen = torch.from_numpy(shown.astype(np.int64))
        shares = torch.from_numpy(weights[:, shown].toarray()).to(f)
        residuals = self._residuals(f[:, chosen], self.targets[chosen]) * shares[..., None]  # [rows, shown, outputs]
        kernel, flat = self._kernel(chosen, step), residuals.flatten(1)
        moved = (flat @ kernel.flatten(0, 1).flatten(1)).reshape(f.shape)
        if self.recipe.clip_norm is not None:
            own = kernel[:, :, chosen].flatten(0, 1).flatten(1)  # [shown · outputs, shown · outputs]
            norms = ((flat @ own) * flat).sum(1).clamp(min=0).sqrt()
            moved = moved * (self.recipe.clip_norm / (norms + 1e-6)).clamp(max=1.0)[:, None, None]
        return moved + (self._coupled_decay * self._decay(f, step) if self._coupled_decay else 0.0)

    def _residuals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``∂ℓ/∂f`` of each row's examples."""
        outputs = outputs.detach().requires_grad_()
        with torch.enable_grad():
            total = self._losses(outputs, targets).sum()
        return torch.autograd.grad(total, outputs)[0]

    def _test_losses(self, f: Tensor) -> np.ndarray:
        n_train = self.kernels.shape[1]
        with torch.no_grad():
            found = self._losses(f[:, n_train:], self.targets[n_train:])
        values: np.ndarray = found.double().numpy()
        return values

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of each row's examples, ``[rows, examples]``; the loss sees outputs of the shape that the model gives."""
        shaped = outputs.reshape(-1, *self.shape)
        losses: Tensor = self.loss(shaped, targets.repeat(len(outputs), *[1] * (targets.ndim - 1)))
        return losses.reshape(outputs.shape[:2])

    def _between(self, step: int) -> tuple[int, int, float]:
        """The checkpoints around a step, and how far it is from the first to the second."""
        after = int(np.searchsorted(self.times, step, side="right"))
        if after == len(self.times):
            return after - 1, after - 1, 0.0
        first, second = self.times[after - 1], self.times[after]
        return after - 1, after, float((step - first) / (second - first))

    def _kernel(self, chosen: Tensor, step: int) -> Tensor:
        """K_t of some training examples, ``[chosen, outputs, examples, outputs]``."""
        before, after, share = self._between(step)
        if share == 0.0:
            return self.kernels[before, chosen]
        return torch.lerp(self.kernels[before, chosen], self.kernels[after, chosen], share)

    def _decay(self, f: Tensor, step: int) -> Tensor:
        """``J θ`` of each row: the outputs themselves where they are linear in θ, and what the checkpoints say else."""
        before, after, share = self._between(step)
        return f + torch.lerp(self.decays[before], self.decays[after], share)

    @property
    def _coupled_decay(self) -> float:
        """Weight decay that goes through the optimizer."""
        return self.l2 + (self.recipe.weight_decay if self.recipe.optimizer == "sgd" else 0.0)

    def _decoupled(self, f: Tensor, step: int) -> Tensor | float:
        """Weight decay beside the optimizer's step."""
        decays = self.recipe.optimizer == "adamw" and self.recipe.weight_decay
        return self.recipe.weight_decay * self._decay(f, step) if decays else 0.0

    def _moved(self, moments: Tensor, gradient: Tensor, made: Tensor, active: Tensor) -> tuple[Tensor, Tensor]:
        """New moments, and what is subtracted from the outputs per unit of the learning rate."""
        arguments: dict[str, Any] = dict(self.recipe.optimizer_args)
        if self.recipe.optimizer != "sgd":
            beta = arguments.get("betas", (0.9, 0.999))[0]
            moments = torch.where(active, beta * moments + (1 - beta) * gradient, moments)
            return moments, moments / (1 - beta ** made.clamp(min=1))
        if not self.recipe.momentum:
            return moments, gradient
        damped = torch.where(made == 1, 1.0, 1.0 - arguments.get("dampening", 0.0))
        moments = torch.where(active, self.recipe.momentum * moments + damped * gradient, moments)
        return moments, gradient + self.recipe.momentum * moments if arguments.get("nesterov") else moments
