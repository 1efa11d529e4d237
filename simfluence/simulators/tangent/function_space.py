"""Outputs that move under the tangent kernels of one reference run, one training step at a time.

``simulators.tangent.simulator`` has the equations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from simfluence.curriculum import Curriculum
from simfluence.recipe import Recipe
from simfluence.simulators.batches import batch_weights

__all__ = ["FunctionSpace", "Moments", "Position", "State", "Update"]

#: How far a head, its features and, without a head, outputs may be from the reference's, as a share of their own size
#: along its path.
REACH_OF_HEAD, REACH_OF_FEATURES, REACH_OF_OUTPUTS = 1.0, 0.5, 2.0
#: Least second moment of a head's weight under Adam, as a share of the mean over the weights of its output.
LEAST_SQUARE = 0.03


class State(NamedTuple):
    """What training changes, one row per curriculum.

    Args:
        head: the head's weight, ``[rows, outputs, width]``.
        features: the tracked features minus those of the reference, ``[rows, examples, n_tracked]``.
    """

    head: Tensor
    features: Tensor

    def map(self, function: Callable[..., Tensor], *others: State) -> State:
        """Apply ``function`` to both parts."""
        return State(*(function(*parts) for parts in zip(self, *others, strict=True)))


class Moments(NamedTuple):
    """Optimizer state, one row per curriculum.

    Args:
        first: momentum, or Adam's first moments.
        squares: Adam's second moments of the head.
    """

    first: State
    squares: Tensor


class Update(NamedTuple):
    """One update of all rows.

    Args:
        step: the training step, counted from 0.
        rate: the learning rate.
        batch: indices of the training examples in any row's batch, ``[batch]``.
        weights: their weights in each row's batch, ``[rows, batch]``.
        n_updates: number of updates so far, this one included, ``[rows, 1, 1]``.
        active: whether the row makes this update, ``[rows, 1, 1]``.
    """

    step: int
    rate: float
    batch: Tensor
    weights: Tensor
    n_updates: Tensor
    active: Tensor


class Position(NamedTuple):
    """All rows before a step.

    Args:
        state, moments: within the reference's reach.
        update: the update to come; None at the end.
        kept: the shares of the deviations from the reference that were kept to stay within reach, ``[rows, 1, 1]``.
    """

    state: State
    moments: Moments
    update: Update | None
    kept: State


@dataclass(frozen=True, eq=False)
class FunctionSpace:
    """One reference run, and how outputs move under its kernels.

    Args:
        loss: ``(outputs, targets)`` → ``[batch]``.
        targets: of the training examples, then of the test examples.
        recipe: the training recipe.
        kernels: kernels of the tracked features, ``[checkpoints, train, n_tracked, examples, n_tracked]``, or their
            factors, ``[checkpoints, examples, n_tracked, rank]``.
        times: steps of the kernels.
        n_train: number of training examples.
        features: inputs of the head along the reference run, ``[steps + 1, examples, width]``.
        heads: the head's weight along the reference run, ``[steps + 1, outputs, width]``.
        learned: whether the head is trained; otherwise it is the identity.
        basis: directions of ``features`` and ``heads`` in the model's own coordinates, ``[width, width]``.
        reference: curriculum of the reference run.
        shape: shape of the model's outputs for one example.
        l2: the objective's own penalty.
        bounded: whether deviations stay within reach of the reference and Adam's second moments have a floor; files of
            older versions simulate without.
    """

    loss: Any
    targets: Tensor
    recipe: Recipe
    kernels: Tensor
    times: np.ndarray
    n_train: int
    features: Tensor
    heads: Tensor
    learned: bool
    basis: Tensor
    reference: Curriculum
    shape: tuple[int, ...]
    l2: float
    bounded: bool

    def roll(self, curricula: Sequence[Curriculum], longest: int) -> np.ndarray:
        """Simulate the test losses, ``[runs, longest + 1, test]``."""
        losses = np.empty((len(curricula), longest + 1, len(self.targets) - self.n_train))
        for step, position in enumerate(self.path(curricula, longest)):
            losses[:, step] = self._test_losses(position.state, step)
        return losses

    def path(self, curricula: Sequence[Curriculum], longest: int) -> Iterator[Position]:
        """Yield the position of all curricula before each step, and at the end.

        The last row is the reference, which follows its recorded path.
        """
        with_reference = [*curricula, self.reference]
        weights, updates = batch_weights(with_reference, max(longest, len(self.reference)), 1)
        weights = weights.tocsr()
        steps = len(updates) // len(with_reference)
        updates = updates.reshape(len(with_reference), steps)
        rates = self.recipe.learning_rates(steps)
        state = self._start(len(with_reference))
        moments = Moments(state.map(torch.zeros_like), torch.zeros_like(state.head))
        n_updates = torch.zeros(len(with_reference), 1, 1, dtype=state.head.dtype)
        rows, reach = np.arange(len(with_reference)) * steps, self._reach()
        for step in range(longest):
            self._reset_reference(state, step)
            state, moments, kept = self._within(reach, state, moments, step)
            active = torch.from_numpy(updates[:, step])[:, None, None]
            n_updates = n_updates + active
            update = Update(step, float(rates[step]), *_batch(weights[rows + step], state.head), n_updates, active)
            yield Position(state, moments, update, kept)
            moments, following = self.updated(state, moments, update)
            if updates[-1, step]:
                following = self._anchored(following, step)
            state = state.map(lambda before, after, on=active: torch.where(on, after, before), following)
        state, moments, kept = self._within(reach, state, moments, longest)
        yield Position(state, moments, None, kept)

    def updated(self, state: State, moments: Moments, update: Update) -> tuple[Moments, State]:
        """Return moments and state after an update under the kernels, before anchoring."""
        moments, moves = self._optimizer_step(moments, self._gradient(state, update), update.n_updates, update.active)
        moves = self._with_adamw_decay(moves, state)
        return moments, state.map(lambda before, move: before - update.rate * move, moves)

    @property
    def factored(self) -> bool:
        """Whether kernels are stored as factors."""
        return self.kernels.ndim == 4

    def _start(self, rows: int) -> State:
        n_tracked = self.kernels.shape[2]
        return State(self.heads[0].repeat(rows, 1, 1), self.features.new_zeros(rows, self.features.shape[1], n_tracked))

    def _at(self, step: int) -> int:
        """Clip a step to the reference's last one."""
        return min(step, len(self.reference))

    def _reset_reference(self, state: State, step: int) -> None:
        """Put the reference row back on its recorded path."""
        state.head[-1] = self.heads[self._at(step)]
        state.features[-1] = 0.0

    def _reach(self) -> State:
        """Return how far heads and tracked features may be from the reference's, as root mean squares."""
        n_tracked, path = self.kernels.shape[2], slice(len(self.reference) + 1)
        of_features = REACH_OF_FEATURES if self.learned else REACH_OF_OUTPUTS
        features = self.features[path, :, :n_tracked]
        return State(REACH_OF_HEAD * _size(self.heads[path]), of_features * _size(features))

    def _within(self, reach: State, state: State, moments: Moments, step: int) -> tuple[State, Moments, State]:
        """Shrink deviations that are out of reach, and their momentum with them.

        A kernel knows no bound, but a network has one: what moves its features as far as they are large also changes
        its kernel. A head is exact where no features are tracked, and so is not bounded.

        Returns:
            State, moments, and the shares of the deviations that were kept.
        """
        if not self.kernels.shape[2] or not self.bounded:
            whole = state.head.new_ones(len(state.head), 1, 1)
            return state, moments, State(whole, whole)
        reference = State(self.heads[self._at(step)], torch.zeros_like(state.features[-1]))
        kept = state.map(_share_within, reference, reach)
        if all(bool((share == 1).all()) for share in kept):
            return state, moments, kept
        first = moments.first.map(lambda part, share: _shrunk(part, part[-1], share), kept)
        return state.map(_shrunk, reference, kept), moments._replace(first=first), kept

    def _anchored(self, following: State, step: int) -> State:
        """Add to all rows the error that the kernels make in the reference's own step."""
        true = State(self.heads[self._at(step + 1)], torch.zeros_like(following.features[-1]))
        return following.map(lambda after, truth: after + (truth - after[-1]), true)

    def _gradient(self, state: State, update: Update) -> State:
        """Return the batch gradient of the head, and the change of the features that it brings about."""
        step, batch, weights = update.step, update.batch, update.weights
        outputs = self._outputs(state, self._at(step), batch)
        residuals = self._residuals(outputs, self.targets[batch]) * weights[..., None]  # [rows, batch, outputs]
        n_tracked = state.features.shape[-1]
        by_head = residuals.mT @ self.features[self._at(step), batch]  # [rows, outputs, width]
        by_head[..., :n_tracked] += residuals.mT @ state.features[:, batch]
        by_head = by_head if self.learned else torch.zeros_like(by_head)
        by_features = residuals @ state.head[..., :n_tracked]  # [rows, batch, n_tracked]
        moves = self._kernel_product(by_features, weights != 0, batch, step)
        gradient = State(by_head, moves)
        if self.recipe.clip_norm is not None:
            squares = (by_features * moves[:, batch]).sum((1, 2)).clamp(min=0) + by_head.square().sum((1, 2))
            scale = (self.recipe.clip_norm / (_root(squares) + 1e-6)).clamp(max=1.0)[:, None, None]
            gradient = gradient.map(lambda part: part * scale)
        coupled = self.l2 + (self.recipe.weight_decay if self.recipe.optimizer == "sgd" else 0.0)
        return self._decayed(gradient, state, coupled)

    def _decayed(self, moves: State, state: State, decay: float) -> State:
        """Add weight decay. A feature deviation is linear in the parameters, so its decay is the deviation itself."""
        if not decay:
            return moves
        head = moves.head + decay * state.head if self.learned else moves.head
        return State(head, moves.features + decay * state.features)

    def _with_adamw_decay(self, moves: State, state: State) -> State:
        """Add AdamW's weight decay, which bypasses the moments."""
        return self._decayed(moves, state, self.recipe.weight_decay if self.recipe.optimizer == "adamw" else 0.0)

    def _outputs(self, state: State, at: int, examples: Tensor | slice) -> Tensor:
        """Return each row's outputs for some examples, ``[rows, examples, outputs]``."""
        features, n_tracked = state.features[:, examples], state.features.shape[-1]
        return self.features[at, examples] @ state.head.mT + features @ state.head[..., :n_tracked].mT

    def _residuals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return ``∂ℓ/∂f`` of each row's examples, differentiable if the outputs are."""
        differentiable = outputs.requires_grad
        outputs = outputs if differentiable else outputs.detach().requires_grad_()
        with torch.enable_grad():
            total = self._losses(outputs, targets).sum()
        return torch.autograd.grad(total, outputs, create_graph=differentiable)[0]

    def _test_losses(self, state: State, step: int) -> np.ndarray:
        """Return the test losses of all rows but the reference's."""
        test = slice(self.n_train, None)
        with torch.no_grad():
            rows = state.map(lambda part: part[:-1])
            losses = self._losses(self._outputs(rows, self._at(step), test), self.targets[test])
        values: np.ndarray = losses.double().numpy()
        return values

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Return each row's losses, ``[rows, examples]``; the loss gets outputs in the shape that the model gives."""
        shaped = outputs.reshape(-1, *self.shape)
        losses: Tensor = self.loss(shaped, targets.repeat(len(outputs), *[1] * (targets.ndim - 1)))
        return losses.reshape(outputs.shape[:2])

    def checkpoints_around(self, step: int) -> list[tuple[int, float]]:
        """Return the checkpoints around a step, with their interpolation weights."""
        after = int(np.searchsorted(self.times, step, side="right"))
        if after == len(self.times):
            return [(after - 1, 1.0)]
        first, second = self.times[after - 1], self.times[after]
        fraction = float((step - first) / (second - first))
        return [(checkpoint, part) for checkpoint, part in ((after - 1, 1 - fraction), (after, fraction)) if part]

    def kernel(self, checkpoint: int, train: Tensor, examples: Tensor) -> Tensor:
        """Return a kernel's rows and columns for these examples, ``[train, n_tracked, examples, n_tracked]``."""
        kernels = self.kernels[checkpoint]
        if self.factored:
            return torch.einsum("imk,xnk->imxn", kernels[train], kernels[examples])
        tracked = torch.arange(kernels.shape[1])
        return kernels[train[:, None, None], tracked[:, None], examples]

    def _kernel_product(self, by_features: Tensor, used: Tensor, batch: Tensor, step: int) -> Tensor:
        """Multiply gradients by the batch's features, ``[rows, batch, n_tracked]``, with the kernel at a step.

        Returns:
            The change of all features per unit of the learning rate, ``[rows, examples, n_tracked]``.
        """
        n_tracked = by_features.shape[-1]
        if not n_tracked:
            return self._start(len(by_features)).features
        total = by_features.new_zeros(len(by_features), self.features.shape[1] * n_tracked)
        add_product = _add_factor_product if self.factored else _add_kernel_product
        for checkpoint, part in self.checkpoints_around(step):
            add_product(total, self.kernels[checkpoint], part * by_features, used, batch)
        return total.view(len(total), -1, n_tracked)

    @property
    def _optimizer_args(self) -> dict[str, Any]:
        return dict(self.recipe.optimizer_args)

    def _optimizer_step(
        self, moments: Moments, gradient: State, n_updates: Tensor, active: Tensor
    ) -> tuple[Moments, State]:
        """Return new moments, and what is subtracted per unit of the learning rate."""
        if self.recipe.optimizer != "sgd":
            return self._adam_step(moments, gradient, n_updates, active)
        momentum, arguments = self.recipe.momentum, self._optimizer_args
        if not momentum:
            return moments, gradient
        damped = torch.where(n_updates == 1, 1.0, 1.0 - arguments.get("dampening", 0.0))
        first = moments.first.map(lambda m, g: torch.where(active, momentum * m + damped * g, m), gradient)
        moves = gradient.map(lambda g, m: g + momentum * m, first) if arguments.get("nesterov") else first
        return moments._replace(first=first), moves

    def _adam_step(self, moments: Moments, gradient: State, n_updates: Tensor, active: Tensor) -> tuple[Moments, State]:
        """Take Adam's own step for the head, in the model's coordinates. The kernels contain the second moments.

        RMSprop is Adam without first moments, whose second moments start at 0 without a correction.
        """
        if self.recipe.optimizer == "rmsprop":
            beta, beta_squares = 0.0, self._optimizer_args.get("alpha", 0.99)
        else:
            beta, beta_squares = self._optimizer_args.get("betas", (0.9, 0.999))
        eps, n_updates = self._optimizer_args.get("eps", 1e-8), n_updates.clamp(min=1)
        gradient = gradient._replace(head=gradient.head @ self.basis)
        first = moments.first.map(lambda m, g: torch.where(active, beta * m + (1 - beta) * g, m), gradient)
        squares = beta_squares * moments.squares + (1 - beta_squares) * gradient.head**2
        squares = torch.where(active, squares, moments.squares)
        moves = first.map(lambda m: m / (1 - beta**n_updates))
        grown = 1 - beta_squares**n_updates
        unbiased = squares / grown
        if self.bounded and moves.features.shape[-1]:  # inexact features have small gradients where the model's are 0
            unbiased = torch.maximum(unbiased, LEAST_SQUARE * unbiased.mean(-1, keepdim=True))
        if self.recipe.optimizer == "rmsprop":
            unbiased, moves = unbiased * grown, moves._replace(features=moves.features / _root(grown))
        sizes = _root(unbiased) + eps
        return Moments(first, squares), moves._replace(head=(moves.head / sizes) @ self.basis.T)


def _batch(rows: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the training examples in any row of the weights ``[rows, train]``, and their weights in each row."""
    indices = np.unique(rows.indices)
    return torch.from_numpy(indices.astype(np.int64)), torch.from_numpy(rows[:, indices].toarray()).to(like)


def _size(tensor: Tensor) -> Tensor:
    """Return the root mean square."""
    return tensor.square().mean().sqrt()


def _share_within(part: Tensor, reference: Tensor, reach: Tensor) -> Tensor:
    """Return what each row's deviation must be multiplied by for its root mean square to be within reach."""
    sizes = torch.linalg.vector_norm(part - reference, dim=(1, 2), keepdim=True) / reference.numel() ** 0.5
    return torch.where(sizes > reach, reach / sizes, 1.0)


def _shrunk(part: Tensor, reference: Tensor, share: Tensor) -> Tensor:
    return torch.where(share < 1, reference + share * (part - reference), part)


def _root(squares: Tensor) -> Tensor:
    """Take square roots, with a finite derivative at 0."""
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


def _add_kernel_product(total: Tensor, kernel: Tensor, by_features: Tensor, used: Tensor, batch: Tensor) -> None:
    """Add to ``total`` the product with a kernel ``[train, n_tracked, examples, n_tracked]``.

    For examples that few rows use, the kernel is read in place rather than copied.
    """
    kernel = kernel.flatten(2)  # [train, n_tracked, examples · n_tracked]
    common = used.double().mean(0) > 0.5
    total.addmm_(by_features[:, common].flatten(1), kernel[batch[common]].flatten(0, 1))
    for column in (~common).nonzero()[:, 0].tolist():
        users = used[:, column].nonzero()[:, 0]
        total.index_add_(0, users, by_features[users, column] @ kernel[int(batch[column])])


def _add_factor_product(total: Tensor, factors: Tensor, by_features: Tensor, used: Tensor, batch: Tensor) -> None:
    """Add to ``total`` the product with the kernel whose factors are ``[examples, n_tracked, rank]``."""
    total.addmm_(by_features.flatten(1) @ factors[batch].flatten(0, 1), factors.flatten(0, 1).T)
