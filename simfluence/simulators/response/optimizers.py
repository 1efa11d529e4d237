"""Optimizers as seen from the mean path: a diagonal matrix P that scales gradients, and a memory of past gradients.

The second moments of Adam and its like are those *expected* of random batches along the mean path, ``ḡ² + Var(g)/B``.
So P does not depend on the curriculum, and the memory can be kept in any coordinates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simfluence.errors import InvalidInput
from simfluence.recipe import Recipe

__all__ = ["COVERED", "Memory", "Optimizer", "preconditioners"]

#: Optimizers that are covered.
COVERED = ("sgd", "adam", "adamw", "nadam", "rmsprop", "adagrad")


class Memory(NamedTuple):
    """What an optimizer keeps of earlier updates, one row per curriculum.

    Args:
        first: momentum, or Adam's first moments, ``[rows, directions]``.
        updates: number of updates so far, ``[rows, 1]``.
        product: product of NAdam's momenta so far, ``[rows, 1]``.
    """

    first: Tensor
    updates: Tensor
    product: Tensor

    @classmethod
    def empty(cls, like: Tensor) -> Memory:
        return cls(torch.zeros_like(like), like.new_zeros(len(like), 1), like.new_ones(len(like), 1))


@dataclass(frozen=True)
class Optimizer:
    """A covered optimizer.

    Args:
        name: its name in recipes.
        momentum: decay of the momentum, or of Adam's first moments.
        decay: decay of the second moments; 1 for a plain mean.
        eps: Adam's ε.
        dampening, nesterov, momentum_decay: torch's arguments.
    """

    name: str
    momentum: float
    decay: float = 0.0
    eps: float = 1e-8
    dampening: float = 0.0
    nesterov: bool = False
    momentum_decay: float = 4e-3

    @classmethod
    def of(cls, recipe: Recipe) -> Optimizer:
        """Read a recipe.

        Raises:
            InvalidInput: the optimizer, or one of its options, is not covered.
        """
        name = recipe.optimizer
        arguments: dict[str, Any] = dict(recipe.optimizer_args)
        wrong = [option for option in ("amsgrad", "maximize", "centered") if arguments.get(option)]
        if name not in COVERED or wrong:
            what = f"{wrong[0]}=True" if wrong else f"optimizer {name!r}"
            raise InvalidInput(f"the response does not cover {what}; it covers {', '.join(COVERED)}")
        options: dict[str, Any] = {
            key: arguments[key] for key in ("eps", "momentum_decay", "dampening", "nesterov") if key in arguments
        }
        if name == "sgd":
            return cls(name, recipe.momentum, **options)
        if name == "rmsprop":
            return cls(name, recipe.momentum, arguments.get("alpha", 0.99), **options)
        if name == "adagrad":
            return cls(name, 0.0, 1.0, **{"eps": 1e-10} | options)
        betas = arguments.get("betas", (0.9, 0.999))
        return cls(name, betas[0], betas[1], **options)

    @property
    def scales(self) -> bool:
        """Whether it divides by roots of second moments."""
        return self.name != "sgd"

    def step(self, memory: Memory, gradients: Tensor, active: Tensor) -> tuple[Memory, Tensor]:
        """Return the memory after an update, and what is subtracted per unit of the learning rate.

        Args:
            memory: before the update.
            gradients: gradients times P, ``[rows, directions]``.
            active: which rows make an update, ``[rows, 1]``; the others keep their memory.
        """
        count = memory.updates + 1
        product = memory.product
        if self.name in ("adam", "adamw"):
            first = self.momentum * memory.first + (1 - self.momentum) * gradients
            moves = first / (1 - self.momentum**count)
        elif self.name == "nadam":
            now, following = self._nadam_momentum(count), self._nadam_momentum(count + 1)
            product = memory.product * now
            first = self.momentum * memory.first + (1 - self.momentum) * gradients
            moves = gradients * (1 - now) / (1 - product) + first * following / (1 - product * following)
        else:
            gradients = gradients * self._unnormalised(count)
            damping = self.dampening * (count > 1).to(gradients)
            first = self.momentum * memory.first + (1 - damping) * gradients
            moves = gradients + self.momentum * first if self.nesterov else first
        kept = (torch.where(active, new, old) for new, old in zip((first, count, product), memory, strict=True))
        return Memory(*kept), moves

    def _nadam_momentum(self, count: Tensor) -> Tensor:
        return self.momentum * (1 - 0.5 * 0.96 ** (count * self.momentum_decay))

    def _unnormalised(self, count: Tensor) -> Tensor | float:
        """Return the factor from P, which is of the *mean* of past squares, to what the optimizer divides by."""
        if self.name == "rmsprop":
            return (1 - self.decay**count).rsqrt()
        return count.rsqrt() if self.name == "adagrad" else 1.0


def preconditioners(optimizer: Optimizer, squares: Sequence[Tensor], times: np.ndarray) -> list[Tensor]:
    """Return the diagonal of P at each checkpoint, ``1 / (√v + ε)``.

    A parameter that has had no gradient so far has no step size either; it gets the one that it has at the next
    checkpoint, or 0 at the last.

    Args:
        optimizer: gives the decay of the second moments, and ε.
        squares: expected squares of a batch's gradient at each checkpoint, ``[parameters]`` each; they are taken to
            change linearly between checkpoints.
        times: steps of the checkpoints.
    """
    means, sums, weight = [], torch.zeros_like(squares[0]), 0.0
    old, new = (1.0, 1.0) if optimizer.decay == 1 else (optimizer.decay, 1 - optimizer.decay)
    for step in range(int(times[-1]) + 1):
        after = int(np.searchsorted(times, step))
        share = 0.0 if times[after] == step else (times[after] - step) / (times[after] - times[after - 1])
        square = torch.lerp(squares[after], squares[after - 1], float(share)) if share else squares[after]
        sums, weight = old * sums + new * square, old * weight + new
        if times[after] == step:
            means.append(sums / weight)
    diagonals: list[Tensor] = []
    following = torch.zeros_like(sums)
    for mean in reversed(means):
        following = torch.where(mean > 0, 1 / (mean.sqrt() + optimizer.eps), following)
        diagonals.insert(0, following)
    return diagonals
