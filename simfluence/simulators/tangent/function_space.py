"""How outputs move under the tangent kernels of one reference run: the update of ``tangent``, step by step."""

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


class State(NamedTuple):
    """What moves, one row per curriculum.

    Args:
        head: the head's weight, ``[rows, outputs, width]``.
        features: how far the first few features are from the reference's, ``[rows, examples, moving]``.
    """

    head: Tensor
    features: Tensor

    def map(self, function: Callable[..., Tensor], *others: State) -> State:
        """``function`` of both parts."""
        return State(*(function(*parts) for parts in zip(self, *others, strict=True)))


class Moments(NamedTuple):
    """An optimizer's, one row per curriculum.

    Args:
        first: momentum, or Adam's first moments.
        squares: Adam's second moments of the head.
    """

    first: State
    squares: Tensor


class Update(NamedTuple):
    """One update of all rows.

    Args:
        step: counted from 0.
        rate: of learning.
        shown: who is in the batch of any row, ``[shown]``.
        shares: theirs of each row's batch, ``[rows, shown]``.
        made: number of updates, this one included, ``[rows, 1, 1]``.
        active: whether the row makes it, ``[rows, 1, 1]``.
    """

    step: int
    rate: float
    shown: Tensor
    shares: Tensor
    made: Tensor
    active: Tensor


class Position(NamedTuple):
    """Where all rows are; ``update`` is what comes next, None at the end."""

    state: State
    moments: Moments
    update: Update | None


@dataclass(frozen=True, eq=False)
class FunctionSpace:
    """One reference run, and how outputs move under its kernels.

    Args:
        loss: ``(outputs, targets)`` → ``[batch]``.
        targets: of the training examples, then of the test examples.
        recipe: how is trained.
        kernels: of the features that move, ``[checkpoints, train, moving, examples, moving]``, or their factors,
            ``[checkpoints, examples, moving, rank]``.
        times: of the kernels.
        n_train: how many of the examples are training examples.
        features: what the head reads along the reference, ``[steps + 1, examples, width]``.
        heads: the head's weight along it, ``[steps + 1, outputs, width]``.
        learned: whether the head is trained; otherwise it is the identity.
        basis: of ``features`` and ``heads``, in the model's own coordinates, ``[width, width]``.
        reference: its curriculum.
        shape: of one example's outputs, as the model gives them.
        l2: the objective's own penalty.
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

    def roll(self, curricula: Sequence[Curriculum], longest: int) -> np.ndarray:
        """Test losses ``[runs, longest + 1, test]``."""
        losses = np.empty((len(curricula), longest + 1, len(self.targets) - self.n_train))
        for step, position in enumerate(self.path(curricula, longest)):
            losses[:, step] = self._test_losses(position.state, step)
        return losses

    def path(self, curricula: Sequence[Curriculum], longest: int) -> Iterator[Position]:
        """Where all curricula are before each step, and at the end.

        The reference goes along as one more row, on its true path.
        """
        every = [*curricula, self.reference]
        weights, updates = batch_weights(every, max(longest, len(self.reference)), 1)
        weights = weights.tocsr()
        steps = len(updates) // len(every)
        updates = updates.reshape(len(every), steps)
        rates = self.recipe.learning_rates(steps)
        state = self._start(len(every))
        moments = Moments(state.map(torch.zeros_like), torch.zeros_like(state.head))
        made = torch.zeros(len(every), 1, 1, dtype=state.head.dtype)
        rows = np.arange(len(every)) * steps
        for step in range(longest):
            self._put_reference(state, step)
            active = torch.from_numpy(updates[:, step])[:, None, None]
            made = made + active
            update = Update(step, float(rates[step]), *_shown(weights[rows + step], state.head), made, active)
            yield Position(state, moments, update)
            moments, following = self.updated(state, moments, update)
            if updates[-1, step]:
                following = self._anchored(following, step)
            state = state.map(lambda now, then, on=active: torch.where(on, then, now), following)
        yield Position(state, moments, None)

    def updated(self, state: State, moments: Moments, update: Update) -> tuple[Moments, State]:
        """After an update, as the kernels know it."""
        moments, moves = self._moved(moments, self._gradient(state, update), update.made, update.active)
        moves = self._with_decay(moves, state)
        return moments, state.map(lambda now, move: now - update.rate * move, moves)

    @property
    def factored(self) -> bool:
        """Whether kernels are held as factors."""
        return self.kernels.ndim == 4

    def _start(self, rows: int) -> State:
        moving = self.kernels.shape[2]
        return State(self.heads[0].repeat(rows, 1, 1), self.features.new_zeros(rows, self.features.shape[1], moving))

    def _at(self, step: int) -> int:
        """The reference stays where it ends."""
        return min(step, len(self.reference))

    def _put_reference(self, state: State, step: int) -> None:
        """Its row, on its true path."""
        state.head[-1] = self.heads[self._at(step)]
        state.features[-1] = 0.0

    def _anchored(self, following: State, step: int) -> State:
        """All rows, moved by what the kernels did not know of the reference's own step."""
        true = State(self.heads[self._at(step + 1)], torch.zeros_like(following.features[-1]))
        return following.map(lambda then, truth: then + (truth - then[-1]), true)

    def _gradient(self, state: State, update: Update) -> State:
        """The batches' mean gradient by the head's weight, and what it does to the features."""
        step, chosen, shares = update.step, update.shown, update.shares
        outputs = self._outputs(state, self._at(step), chosen)
        residuals = self._residuals(outputs, self.targets[chosen]) * shares[..., None]  # [rows, shown, outputs]
        moving = state.features.shape[-1]
        by_head = residuals.mT @ self.features[self._at(step), chosen]  # [rows, outputs, width]
        by_head[..., :moving] += residuals.mT @ state.features[:, chosen]
        by_head = by_head if self.learned else torch.zeros_like(by_head)
        by_features = residuals @ state.head[..., :moving]  # [rows, shown, moving]
        moves = self._pushed(by_features, shares != 0, chosen, step)
        found = State(by_head, moves)
        if self.recipe.clip_norm is not None:
            squares = (by_features * moves[:, chosen]).sum((1, 2)).clamp(min=0) + by_head.square().sum((1, 2))
            scale = (self.recipe.clip_norm / (_root(squares) + 1e-6)).clamp(max=1.0)[:, None, None]
            found = found.map(lambda gradient: gradient * scale)
        coupled = self.l2 + (self.recipe.weight_decay if self.recipe.optimizer == "sgd" else 0.0)
        return self._decayed(found, state, coupled)

    def _decayed(self, moves: State, state: State, decay: float) -> State:
        """Weight decay: of a deviation of features that is linear in the parameters, the deviation itself."""
        if not decay:
            return moves
        head = moves.head + decay * state.head if self.learned else moves.head
        return State(head, moves.features + decay * state.features)

    def _with_decay(self, moves: State, state: State) -> State:
        """AdamW's, beside the optimizer's step."""
        return self._decayed(moves, state, self.recipe.weight_decay if self.recipe.optimizer == "adamw" else 0.0)

    def _outputs(self, state: State, at: int, chosen: Tensor | slice) -> Tensor:
        """Of each row's examples, ``[rows, chosen, outputs]``."""
        moving = state.features.shape[-1]
        return self.features[at, chosen] @ state.head.mT + state.features[:, chosen] @ state.head[..., :moving].mT

    def _residuals(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """``∂ℓ/∂f`` of each row's examples; to be differentiated once more if the outputs are."""
        again = outputs.requires_grad
        outputs = outputs if again else outputs.detach().requires_grad_()
        with torch.enable_grad():
            total = self._losses(outputs, targets).sum()
        return torch.autograd.grad(total, outputs, create_graph=again)[0]

    def _test_losses(self, state: State, step: int) -> np.ndarray:
        """Of all rows but the reference's."""
        test = slice(self.n_train, None)
        with torch.no_grad():
            rows = state.map(lambda part: part[:-1])
            found = self._losses(self._outputs(rows, self._at(step), test), self.targets[test])
        values: np.ndarray = found.double().numpy()
        return values

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Of each row's examples, ``[rows, examples]``; the loss sees outputs of the shape that the model gives."""
        shaped = outputs.reshape(-1, *self.shape)
        losses: Tensor = self.loss(shaped, targets.repeat(len(outputs), *[1] * (targets.ndim - 1)))
        return losses.reshape(outputs.shape[:2])

    def around(self, step: int) -> list[tuple[int, float]]:
        """The checkpoints around a step, and their parts in its kernel."""
        after = int(np.searchsorted(self.times, step, side="right"))
        if after == len(self.times):
            return [(after - 1, 1.0)]
        first, second = self.times[after - 1], self.times[after]
        share = float((step - first) / (second - first))
        return [(place, part) for place, part in ((after - 1, 1 - share), (after, share)) if part]

    def kernel(self, checkpoint: int, train: Tensor, examples: Tensor) -> Tensor:
        """Of some training examples with some examples, ``[train, moving, examples, moving]``."""
        kernels = self.kernels[checkpoint]
        if self.factored:
            return torch.einsum("imk,xnk->imxn", kernels[train], kernels[examples])
        every = torch.arange(kernels.shape[1])
        return kernels[train[:, None, None], every[:, None], examples]

    def _pushed(self, by_features: Tensor, used: Tensor, chosen: Tensor, step: int) -> Tensor:
        """What gradients by the features of some training examples, ``[rows, chosen, moving]``, do to the features of
        all, ``[rows, examples, moving]``."""
        moving = by_features.shape[-1]
        found = by_features.new_zeros(len(by_features), self.features.shape[1] * moving)
        push = _by_factors if self.factored else _by_kernel
        for checkpoint, part in self.around(step) if moving else ():
            push(found, self.kernels[checkpoint], part * by_features, used, chosen)
        return found.view(len(found), -1, moving) if moving else self._start(len(found)).features

    @property
    def _arguments(self) -> dict[str, Any]:
        """Of the optimizer."""
        return dict(self.recipe.optimizer_args)

    def _moved(self, moments: Moments, gradient: State, made: Tensor, active: Tensor) -> tuple[Moments, State]:
        """New moments, and what is subtracted per unit of the learning rate."""
        if self.recipe.optimizer != "sgd":
            return self._by_adam(moments, gradient, made, active)
        momentum, arguments = self.recipe.momentum, self._arguments
        if not momentum:
            return moments, gradient
        damped = torch.where(made == 1, 1.0, 1.0 - arguments.get("dampening", 0.0))
        first = moments.first.map(lambda m, g: torch.where(active, momentum * m + damped * g, m), gradient)
        moves = gradient.map(lambda g, m: g + momentum * m, first) if arguments.get("nesterov") else first
        return moments._replace(first=first), moves

    def _by_adam(self, moments: Moments, gradient: State, made: Tensor, active: Tensor) -> tuple[Moments, State]:
        """The head by Adam itself, in the model's own coordinates. The kernels know the second moments already."""
        beta, beta_squares = self._arguments.get("betas", (0.9, 0.999))
        eps, made = self._arguments.get("eps", 1e-8), made.clamp(min=1)
        gradient = gradient._replace(head=gradient.head @ self.basis)
        first = moments.first.map(lambda m, g: torch.where(active, beta * m + (1 - beta) * g, m), gradient)
        squares = beta_squares * moments.squares + (1 - beta_squares) * gradient.head**2
        squares = torch.where(active, squares, moments.squares)
        moves = first.map(lambda m: m / (1 - beta**made))
        sizes = _root(squares / (1 - beta_squares**made)) + eps
        return Moments(first, squares), moves._replace(head=(moves.head / sizes) @ self.basis.T)


def _shown(weights: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Who is in the batch of any row of the weights ``[rows, train]``, and their shares of each."""
    shown = np.unique(weights.indices)
    return torch.from_numpy(shown.astype(np.int64)), torch.from_numpy(weights[:, shown].toarray()).to(like)


def _root(squares: Tensor) -> Tensor:
    """Square roots whose derivative at 0 is a number."""
    return squares.clamp(min=torch.finfo(squares.dtype).tiny).sqrt()


def _by_kernel(found: Tensor, kernel: Tensor, flat: Tensor, used: Tensor, chosen: Tensor) -> None:
    """A kernel ``[train, moving, examples, moving]`` is read as it lies in memory where few rows use an example."""
    kernel = kernel.flatten(2)  # [train, moving, examples · moving]
    common = used.double().mean(0) > 0.5
    found.addmm_(flat[:, common].flatten(1), kernel[chosen[common]].flatten(0, 1))
    for place in (~common).nonzero()[:, 0].tolist():
        users = used[:, place].nonzero()[:, 0]
        found.index_add_(0, users, flat[users, place] @ kernel[int(chosen[place])])


def _by_factors(found: Tensor, factors: Tensor, flat: Tensor, used: Tensor, chosen: Tensor) -> None:
    """Factors ``[examples, moving, rank]``: their products are the kernel."""
    found.addmm_(flat.flatten(1) @ factors[chosen].flatten(0, 1), factors.flatten(0, 1).T)
