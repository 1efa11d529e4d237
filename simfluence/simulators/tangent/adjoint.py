"""Derivatives of the final losses for removing training examples, from one backward pass over the simulated steps.

Removing an example from a batch drops its weight ``w_i`` and shrinks the batch. The weights go along a straight line
from the batch with the example (ε = 0) to the batch without it (ε = 1): its own weight falls by ``ε w_i``, every other
weight rises by ``ε w_i w_j / (1 − w_i)``. So, with G the derivative of the loss by the weights,

    dL/dε = w_i / (1 − w_i) · (Σ_j w_j G_j − G_i)        and −G_i if the batch holds nothing else

The backward pass gives G. It has one row per test example, whatever the number of training examples: only the training
examples that the curriculum shows and the row's own test example matter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simfluence.curriculum import Curriculum
from simfluence.simulators.tangent.function_space import FunctionSpace, Moments, Position, State, Update

__all__ = ["by_removal", "final_derivatives"]

_AT_ONCE = 100  # test examples per backward pass


def final_derivatives(space: FunctionSpace, curriculum: Curriculum) -> tuple[np.ndarray, np.ndarray]:
    """Return final test losses, ``[test]``, and their derivatives by ε for each training example, ``[train, test]``."""
    path = [_first_row(position) for position in space.path([curriculum], len(curriculum))]
    shown = torch.from_numpy(np.unique(curriculum.indices).astype(np.int64))
    tests = torch.arange(space.n_train, len(space.targets))
    losses, derivatives = [], torch.zeros(space.n_train, len(tests), dtype=torch.float64)
    for chunk in torch.split(tests, _AT_ONCE):
        backwards = _Backwards.of(space, shown, chunk)
        final, gradients = backwards.final_losses(path[-1], len(curriculum))
        losses.append(final)
        for position in reversed(path):
            update = position.update
            if update is not None and bool(update.active):  # neither the end nor an empty batch
                gradients, by_weights = backwards.step_back(position, update, gradients)
                removals = by_removal(update.weights, by_weights)  # [chunk, batch]
                derivatives[update.batch[:, None], chunk - space.n_train] += removals.T
            gradients = _before_shrinking(position, gradients)
    return np.concatenate(losses), derivatives.numpy()


def by_removal(weights: Any, by_weights: Any) -> Any:
    """Return ``dL/dε`` for each example of a batch, given the weights and ``dL/dw``, all ``[…, examples]``."""
    mean = (weights * by_weights).sum(-1)[..., None]
    remaining = 1 - weights
    shrinks = remaining > 1e-6
    return weights * (mean * shrinks - by_weights) / (remaining + ~shrinks)


def _first_row(position: Position) -> Position:
    """Drop the reference row and keep only the first row's batch."""
    state, moments, update, kept = position
    state, first = state.map(lambda part: part[:1].clone()), moments.first.map(lambda part: part[:1].clone())
    if update is not None:
        used = update.weights[0] != 0
        update = update._replace(
            batch=update.batch[used],
            weights=update.weights[:1, used],
            n_updates=update.n_updates[:1],
            active=update.active[:1],
        )
    return Position(state, Moments(first, moments.squares[:1].clone()), update, kept.map(lambda part: part[:1]))


def _before_shrinking(position: Position, gradients: list[Tensor]) -> list[Tensor]:
    """Turn derivatives by state and momentum within reach into those before shrinking, taking the shares as given."""
    head, features = position.kept
    *shrunk, squares = gradients
    return [*(gradient * share for gradient, share in zip(shrunk, (head, features) * 2, strict=True)), squares]


@dataclass(frozen=True, eq=False)
class _Backwards(FunctionSpace):
    """A function space of the shown training examples and, in each row, one test example after them.

    Args:
        full: the space of all examples.
        train: indices of the shown training examples, in order, ``[shown]``.
        test: index of each row's test example, ``[rows]``.
    """

    full: FunctionSpace
    train: Tensor
    test: Tensor

    @classmethod
    def of(cls, space: FunctionSpace, train: Tensor, test: Tensor) -> _Backwards:
        narrow = vars(space) | {"features": space.features[:, train], "targets": space.targets[train]}
        return cls(**narrow, full=space, train=train, test=test)

    def final_losses(self, end: Position, step: int) -> tuple[np.ndarray, list[Tensor]]:
        """Return each row's loss at the last step, ``[rows]``, and its derivatives by the tensors of ``_rows``."""
        inputs = self._rows(end)
        head, features = inputs[:2]
        n_tracked = features.shape[-1]
        reference = self.full.features[self._at(step), self.test]  # [rows, width]
        outputs = torch.einsum("rw,row->ro", reference, head)
        outputs = outputs + torch.einsum("rm,rom->ro", features[:, -1], head[..., :n_tracked])
        losses = self._losses(outputs[None], self.full.targets[self.test])[0]
        return losses.detach().double().numpy(), _derivatives([losses.sum()], inputs, [torch.ones_like(losses.sum())])

    def step_back(self, position: Position, update: Update, after: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Turn derivatives by the state after an update into those by the state before it.

        Returns:
            The derivatives before the update, and those by the batch's weights, ``[rows, batch]``.
        """
        inputs = self._rows(position)
        weights = _leaf(update.weights.expand(len(self.test), -1))
        update = update._replace(batch=torch.searchsorted(self.train, update.batch), weights=weights)
        head, features, *first, squares = inputs
        moments, state = self.updated(State(head, features), Moments(State(*first), squares), update)
        *before, by_weights = _derivatives([*state, *moments.first, moments.squares], [*inputs, weights], after)
        return before, by_weights

    def _rows(self, position: Position) -> list[Tensor]:
        """Repeat state, first moments and squares for each test example; rows differ only in their test example."""
        rows, (state, moments, *_) = len(self.test), position

        def narrow(features: Tensor) -> Tensor:
            return torch.cat([features[:, self.train].expand(rows, -1, -1), features[0, self.test, None]], 1)

        tensors = [
            tensor
            for part in (state, moments.first)
            for tensor in (part.head.expand(rows, -1, -1), narrow(part.features))
        ]
        return [_leaf(tensor) for tensor in (*tensors, moments.squares.expand(rows, -1, -1))]

    def _kernel_product(self, by_features: Tensor, used: Tensor, batch: Tensor, step: int) -> Tensor:
        """Return what the full space does, for this space's examples: ``[rows, shown + 1, n_tracked]``."""
        if not by_features.shape[-1]:
            return by_features.new_zeros(len(by_features), len(self.train) + 1, 0)
        columns, examples = self.train[batch], torch.cat([self.train, self.test])
        parts = [
            part * self.kernel(checkpoint, columns, examples) for checkpoint, part in self.checkpoints_around(step)
        ]
        kernel = functools.reduce(torch.add, parts)
        product: Callable[..., Tensor] = _KernelProduct.apply
        return product(by_features, kernel[:, :, : len(self.train)], kernel[:, :, len(self.train) :])


class _KernelProduct(torch.autograd.Function):
    """Gradients by features, ``[rows, batch, n_tracked]``, times a kernel.

    All rows hold the same numbers, so the forward pass multiplies only one. Their derivatives differ.
    """

    @staticmethod
    def forward(context: Any, by_features: Tensor, to_train: Tensor, to_test: Tensor) -> Tensor:
        context.kernels = to_train, to_test
        train = torch.einsum("cm,cmxn->xn", by_features[0], to_train).expand(len(by_features), -1, -1)
        test = torch.einsum("cm,cmrn->rn", by_features[0], to_test)
        return torch.cat([train, test[:, None]], 1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        to_train, to_test = context.kernels
        by_features = torch.einsum("rxn,cmxn->rcm", gradient[:, :-1], to_train)
        return by_features + torch.einsum("rn,cmrn->rcm", gradient[:, -1], to_test), None, None


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()


def _derivatives(outputs: Sequence[Tensor], inputs: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    """Differentiate the products of outputs with ``after`` by the inputs; 0 where an input has no effect."""
    return list(torch.autograd.grad(outputs, inputs, after, allow_unused=True, materialize_grads=True))
