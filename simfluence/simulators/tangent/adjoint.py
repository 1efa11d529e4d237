"""Derivatives of final losses in function space as training examples leave: the simulated steps run backwards.

An example that leaves takes its share ``w_i`` of a batch along, and the batch shrinks. The shares go in a straight line
from those with it (ε = 0) to those without it (ε = 1): its own falls by ``ε w_i``, and each other one's rises by
``ε w_i w_j / (1 − w_i)``. So, with G the loss's derivative by the shares,

    dL/dε = w_i / (1 − w_i) · (Σ_j w_j G_j − G_i)        and −G_i in a batch of its own

G comes from one pass backwards with a row for each test example, whatever the number of training examples: on the way
back only the training examples that are shown matter, and the row's own test example.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simfluence.curriculum import Curriculum
from simfluence.simulators.tangent.function_space import FunctionSpace, Moments, Position, State, Update

_AT_ONCE = 100  # test examples


def final_derivatives(space: FunctionSpace, curriculum: Curriculum) -> tuple[np.ndarray, np.ndarray]:
    """Final test losses, ``[test]``, and their derivatives by ε for each training example, ``[train, test]``."""
    path = [_first_row(position) for position in space.path([curriculum], len(curriculum))]
    shown = torch.from_numpy(np.unique(curriculum.indices).astype(np.int64))
    tests = torch.arange(space.n_train, len(space.targets))
    losses, changes = [], torch.zeros(space.n_train, len(tests), dtype=torch.float64)
    for own in tests.split(_AT_ONCE):
        backwards = _Backwards.of(space, shown, own)
        final, gradients = backwards.start(path[-1], len(curriculum))
        losses.append(final)
        for position in reversed(path):
            update = position.update
            if update is None or not bool(update.active):  # the end, or an empty batch
                continue
            gradients, by_shares = backwards.over(position, update, gradients)
            changed = by_removal(update.shares, by_shares)  # [own, in the batch]
            changes[update.shown[:, None], own - space.n_train] += changed.T
    return np.concatenate(losses), changes.numpy()


def by_removal(shares: Any, by_shares: Any) -> Any:
    """``dL/dε`` of each example in a batch, from ``dL/dw``; both ``[…, examples]``."""
    rest = (shares * by_shares).sum(-1)[..., None]
    left = 1 - shares
    shrinks = left > 1e-6
    return shares * (rest * shrinks - by_shares) / (left + ~shrinks)


def _first_row(position: Position) -> Position:
    """Without the reference's row, and with those alone in the batch that are in the first's."""
    state, moments, update = position
    state, first = state.map(lambda part: part[:1].clone()), moments.first.map(lambda part: part[:1].clone())
    if update is not None:
        own = update.shares[0] != 0
        update = update._replace(
            shown=update.shown[own], shares=update.shares[:1, own], made=update.made[:1], active=update.active[:1]
        )
    return Position(state, Moments(first, moments.squares[:1].clone()), update)


@dataclass(frozen=True, eq=False)
class _Backwards(FunctionSpace):
    """A space of the shown training examples and, in each row, one test example after them.

    Args:
        whole: the space that it is of.
        kept: the training examples, in order, ``[kept]``.
        own: each row's test example, ``[rows]``.
    """

    whole: FunctionSpace
    kept: Tensor
    own: Tensor

    @classmethod
    def of(cls, space: FunctionSpace, kept: Tensor, own: Tensor) -> _Backwards:
        narrow = vars(space) | {"features": space.features[:, kept], "targets": space.targets[kept]}
        return cls(**narrow, whole=space, kept=kept, own=own)

    def start(self, end: Position, at: int) -> tuple[np.ndarray, list[Tensor]]:
        """Each row's loss at step ``at``, ``[rows]``, and its derivatives by the parts of ``_rows``."""
        inputs = self._rows(end)
        head, features = inputs[:2]
        moving = features.shape[-1]
        seen = self.whole.features[self._at(at), self.own]  # [rows, width]
        outputs = torch.einsum("rw,row->ro", seen, head)
        outputs = outputs + torch.einsum("rm,rom->ro", features[:, -1], head[..., :moving])
        losses = self._losses(outputs[None], self.whole.targets[self.own])[0]
        return losses.detach().double().numpy(), _derivatives([losses.sum()], inputs, [torch.ones_like(losses.sum())])

    def over(self, position: Position, update: Update, after: list[Tensor]) -> tuple[list[Tensor], Tensor]:
        """Derivatives before an update from those after it; and those by the batch's shares, ``[rows, shown]``."""
        inputs = self._rows(position)
        shares = _leaf(update.shares.expand(len(self.own), -1))
        update = update._replace(shown=torch.searchsorted(self.kept, update.shown), shares=shares)
        head, features, *first, squares = inputs
        moments, state = self.updated(State(head, features), Moments(State(*first), squares), update)
        *before, by_shares = _derivatives([*state, *moments.first, moments.squares], [*inputs, shares], after)
        return before, by_shares

    def _rows(self, position: Position) -> list[Tensor]:
        """State, first moments and squares, one row for each test example; all that sets rows apart is its own."""
        rows, (state, moments, _) = len(self.own), position

        def narrow(features: Tensor) -> Tensor:
            return torch.cat([features[:, self.kept].expand(rows, -1, -1), features[0, self.own, None]], 1)

        parts = [
            part for each in (state, moments.first) for part in (each.head.expand(rows, -1, -1), narrow(each.features))
        ]
        return [_leaf(part) for part in (*parts, moments.squares.expand(rows, -1, -1))]

    def _pushed(self, by_features: Tensor, used: Tensor, chosen: Tensor, step: int) -> Tensor:
        """As the whole space's, ``[rows, kept + 1, moving]``."""
        if not by_features.shape[-1]:
            return by_features.new_zeros(len(by_features), len(self.kept) + 1, 0)
        shown, examples = self.kept[chosen], torch.cat([self.kept, self.own])
        parts = [part * self.kernel(checkpoint, shown, examples) for checkpoint, part in self.around(step)]
        kernel = functools.reduce(torch.add, parts)
        found: Tensor = _Push.apply(by_features, kernel[:, :, : len(self.kept)], kernel[:, :, len(self.kept) :])
        return found


class _Push(torch.autograd.Function):
    """Gradients by features, ``[rows, shown, moving]``, times a kernel. Rows are alike, so one is multiplied; their
    derivatives are not."""

    @staticmethod
    def forward(context: Any, by_features: Tensor, to_kept: Tensor, to_own: Tensor) -> Tensor:
        context.kernels = to_kept, to_own
        kept = torch.einsum("cm,cmxn->xn", by_features[0], to_kept).expand(len(by_features), -1, -1)
        own = torch.einsum("cm,cmrn->rn", by_features[0], to_own)
        return torch.cat([kept, own[:, None]], 1)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        to_kept, to_own = context.kernels
        pulled = torch.einsum("rxn,cmxn->rcm", gradient[:, :-1], to_kept)
        return pulled + torch.einsum("rn,cmrn->rcm", gradient[:, -1], to_own), None, None


def _leaf(part: Tensor) -> Tensor:
    return part.detach().requires_grad_()


def _derivatives(outputs: Sequence[Tensor], inputs: Sequence[Tensor], after: Sequence[Tensor]) -> list[Tensor]:
    """Of the products of outputs with ``after``, by the inputs; 0 where there is no dependence."""
    found = torch.autograd.grad(outputs, inputs, after, allow_unused=True, materialize_grads=True)
    return list(found)
