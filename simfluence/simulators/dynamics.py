"""The Markov family's equation, in torch: affine steps of a curriculum, rollouts, and training on rollouts.

Every member of the family is a sum of terms. With ``w`` the weights of a batch and ``c̄`` their centre (0 unless around
the mean), a term k contributes ``τ^q · Σ_i (w_i − c̄_i) x_k,i`` times an earlier loss, or times 1; τ is the share of the
longest fitting run that has gone by.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from simfluence.curriculum import Curriculum
from simfluence.runs import Runs
from simfluence.simulators.least_squares import sparse_tensor

_ROLLOUT_ITERATIONS = 60
_CHUNK_ENTRIES = 400_000  # of [runs, steps, test] that are simulated at a time, to stay in the processor's caches


@dataclass(frozen=True)
class Term:
    """Effects of training examples that multiply the loss ``lag`` steps back (1: the last one; 0: no loss), and grow
    with the share of training that has gone by, to the ``power``."""

    lag: int
    power: int = 0


@dataclass(frozen=True)
class Dynamics:
    """A fitted member of the family, as tensors.

    Args:
        terms: what it sums.
        effects: of the training examples, for each term ``[terms, train, test]``.
        batch_size: of the fitting runs.
        horizon: steps of the longest fitting run.
        centre: c̄ ``[train]``; None unless around the mean.
        mean: m ``[steps + 1, test]``; None unless around the mean.
        lasting: how deviations last, ``[free, test]`` in the order of ``free_terms``; None unless around the mean.
        order: how many earlier losses a step depends on.
        guard: whether the slopes of a step are scaled down where they sum to more than 1.
        fixed_slope: α of the last loss without any effects, 1 or 0; of deviations around the mean.
    """

    terms: Sequence[Term]
    effects: Tensor
    batch_size: int
    horizon: int
    order: int
    fixed_slope: float
    guard: bool = False
    centre: Tensor | None = None
    mean: Tensor | None = None
    lasting: Tensor | None = None

    def affine(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """α ``[order, runs, steps, test]`` and β ``[runs, steps, test]``, of ``L_{t+1} = Σ_j α_j L_{t+1−j} + β``."""
        shape = (*steps.shape, self.effects.shape[2])
        share = self._share(steps.shape[1])  # [steps, 1]
        slopes: list[Any] = [0.0] * self.order
        rest: Any = 0.0
        for term, effects in zip(self.terms, self.effects, strict=True):
            sums = steps.sums(effects, self.centre).reshape(shape)
            sums = sums * share if term.power else sums
            if term.lag:
                slopes[term.lag - 1] = slopes[term.lag - 1] + sums
            if not term.lag or self.mean is not None:
                rest = rest + (sums * self._means(steps.shape[1], term.lag) if term.lag else sums)
        slopes[0] = slopes[0] + self.fixed_slope
        if self.lasting is not None:
            for term, coefficient in zip(free_terms(self.order, self._is_varying), self.lasting, strict=True):
                slopes[term.lag - 1] = slopes[term.lag - 1] + (coefficient * share if term.power else coefficient)
        alphas = torch.stack([torch.as_tensor(slope, dtype=torch.float64).expand(shape) for slope in slopes])
        if self.guard:
            alphas = alphas / alphas.abs().sum(0).clamp(min=1.0)
        beta = torch.as_tensor(rest, dtype=torch.float64).expand(shape)
        if self.mean is not None:
            around = sum(alpha * self._means(shape[1], lag + 1) for lag, alpha in enumerate(alphas))
            beta = beta + self._means(shape[1], 0) - around
        if bool(steps.updates.all()):
            return alphas, beta
        still = ~steps.updates[..., None]
        first = torch.zeros(self.order, 1, 1, 1, dtype=torch.float64)
        first[0] = 1.0
        return torch.where(still, first, alphas), torch.where(still, 0.0, beta)

    @property
    def _is_varying(self) -> bool:
        return any(term.power for term in self.terms)

    def _share(self, steps: int) -> Tensor:
        return (torch.arange(steps, dtype=torch.float64) / self.horizon).clamp(max=1.0)[:, None]

    def _means(self, steps: int, lag: int) -> Tensor:
        """m of the time ``lag`` steps before the one that each step leads to, ``[steps, test]``; held at its ends."""
        assert self.mean is not None  # noqa: S101 (for the type checker)
        times = (torch.arange(1, steps + 1) - lag).clamp(0, len(self.mean) - 1)
        return self.mean[times]

    def simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        """Losses ``[runs, steps + 1, test]`` from the losses before training, ``[runs, test]``."""
        longest = max(len(curriculum) for curriculum in curricula)
        losses = np.empty((len(curricula), longest + 1, initial.shape[1]))
        chunk = max(1, _CHUNK_ENTRIES // (longest * initial.shape[1]))
        for start in range(0, len(curricula), chunk):
            some = slice(start, start + chunk)
            alphas, beta = self.affine(Steps.of(curricula[some], self.batch_size, longest))
            before = torch.as_tensor(initial[some].copy()).expand(self.order, -1, -1)
            out = torch.from_numpy(losses[some])
            out[:, 0] = before[0]
            rolled(alphas, beta, list(before), out[:, 1:])
        return losses


def free_terms(order: int, varying: bool) -> list[Term]:
    """The deviations from the mean whose coefficients are not penalised."""
    return [Term(lag) for lag in range(1, order + 1)] + ([Term(1, 1)] if varying else [])


def rolled(alphas: Tensor, beta: Tensor, history: list[Tensor], out: Tensor | None = None) -> list[Tensor]:
    """The losses after each step, each ``[runs, test]``, also written to ``out`` ``[runs, steps, test]`` if given.

    Args:
        alphas, beta: as of ``Dynamics.affine``.
        history: the losses before, the last one first, each ``[runs, test]``.
    """
    losses = []
    for step in range(beta.shape[1]):
        loss = torch.addcmul(beta[:, step], alphas[0, :, step], history[0])
        for alpha, earlier in zip(alphas[1:], history[1:], strict=True):
            loss = torch.addcmul(loss, alpha[:, step], earlier)
        history = [loss, *history[:-1]]
        if out is None:
            losses.append(loss)
        else:
            out[:, step] = loss
    return losses


@dataclass(frozen=True)
class Steps:
    """The steps of several curricula.

    Args:
        weights: ``w_i = count · B/|c|`` sparse ``[runs · steps, train]``; empty after a curriculum's end.
        transpose: of the weights, for derivatives; None where none are taken.
        updates: which steps are updates, ``[runs, steps]``.
    """

    weights: Tensor
    transpose: Tensor | None
    updates: Tensor

    @classmethod
    def of(cls, curricula: Sequence[Curriculum], batch_size: int, longest: int, *, derivatives: bool = False) -> Steps:
        weights, updates = batch_weights(curricula, longest, batch_size)
        transpose = sparse_tensor(weights.T.tocsr()) if derivatives else None
        return cls(sparse_tensor(weights), transpose, torch.as_tensor(updates).reshape(len(curricula), longest))

    @property
    def shape(self) -> tuple[int, int]:
        """Runs and steps."""
        return self.updates.shape[0], self.updates.shape[1]

    def sums(self, effects: Tensor, centre: Tensor | None) -> Tensor:
        """Σ_i (w_i − c̄_i) of effects ``[train, test]`` for each step, ``[runs · steps, test]``."""
        if self.transpose is None:
            sums = self.weights @ effects
        else:
            sums = _Product.apply(self.weights, self.transpose, effects)
        return sums if centre is None else sums - centre @ effects


class _Product(torch.autograd.Function):
    """Sparse times dense; torch itself does not take this product's derivative for compressed rows."""

    @staticmethod
    def forward(context: Any, weights: Tensor, transpose: Tensor, effects: Tensor) -> Tensor:
        context.transpose = transpose
        return weights @ effects

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        return None, None, context.transpose @ gradient


def batch_weights(
    curricula: Sequence[Curriculum], longest: int, batch_size: int
) -> tuple[scipy.sparse.csr_array, np.ndarray]:
    """``w_i = count · B/|c|`` of all steps ``[runs · longest, train]``, and which steps are updates.

    Steps after a curriculum's end are empty rows.
    """
    padded = [np.pad(curriculum.sizes, (0, longest - len(curriculum))) for curriculum in curricula]
    sizes = np.concatenate(padded)
    indices = np.concatenate([curriculum.indices for curriculum in curricula])
    values = np.repeat(batch_size / np.maximum(sizes, 1), sizes)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    weights = scipy.sparse.csr_array((values, indices, offsets), (len(sizes), curricula[0].n_train))
    weights.sum_duplicates()
    return weights, sizes > 0


def trained_on_rollouts(start: Dynamics, runs: Runs, l2: np.ndarray, prior: np.ndarray, length: int) -> Dynamics:
    """The dynamics that minimise the squared errors of rollouts of ``length`` steps from true losses, by L-BFGS.

    Args:
        start: where to start from: the one-step solution.
        runs: recorded at every step. Each is cut into windows that start from its true losses.
        l2: penalty on the squared distance of effects from ``prior``, ``[test]``.
        prior: ``[terms, train, test]``, or what broadcasts to it.
        length: of a window; at most that of the longest run.
    """
    windows = _Windows.of(runs, start.order, length)
    steps = Steps.of(runs.curricula, start.batch_size, windows.padded, derivatives=True)
    penalty, target = torch.as_tensor(l2), torch.as_tensor(prior)
    effects = start.effects.clone().requires_grad_()
    lasting = None if start.lasting is None else start.lasting.clone().requires_grad_()
    moving = dataclasses.replace(start, effects=effects, lasting=lasting)
    optimizer = torch.optim.LBFGS(
        [effects] if lasting is None else [effects, lasting],
        max_iter=_ROLLOUT_ITERATIONS, tolerance_change=1e-7, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        optimizer.zero_grad()
        error = windows.error(*moving.affine(steps)) + (penalty * ((effects - target) ** 2).sum((0, 1))).sum()
        error.backward()
        return error

    optimizer.step(objective)
    return dataclasses.replace(start, effects=effects.detach(), lasting=None if lasting is None else lasting.detach())


@dataclass(frozen=True)
class _Windows:
    """Runs cut into pieces of ``length`` steps, laid side by side.

    Args:
        history: losses before each window, the last one first, each ``[windows, test]``.
        wanted: losses after each of its steps, ``[length, windows, test]``; 0 after a run's end.
        counts: where there is something wanted, ``[length, windows, 1]``.
    """

    length: int
    padded: int
    history: list[Tensor]
    wanted: Tensor
    counts: Tensor

    @classmethod
    def of(cls, runs: Runs, order: int, length: int) -> _Windows:
        longest = max(run.steps for run in runs)
        length = min(length, longest)
        padded = -(-longest // length) * length
        losses = np.full((len(runs), padded + 1, runs.n_test), np.nan)
        losses[:, : longest + 1] = runs.losses
        starts = np.arange(0, padded, length)
        known = np.nan_to_num(losses)
        history = [
            torch.as_tensor(known[:, np.maximum(starts - lag, 0)].reshape(-1, runs.n_test)) for lag in range(order)
        ]
        pieces = losses[:, 1:].reshape(-1, length, runs.n_test).swapaxes(0, 1)
        counts = torch.as_tensor(np.isfinite(pieces).all(axis=2, keepdims=True))
        return cls(length, padded, history, torch.as_tensor(np.nan_to_num(pieces)), counts)

    def error(self, alphas: Tensor, beta: Tensor) -> Tensor:
        """Sum of squared errors of the rollouts."""
        cut = beta.reshape(-1, self.length, beta.shape[2])
        losses = rolled(alphas.reshape(len(alphas), *cut.shape), cut, self.history)
        return sum(((loss - true) ** 2 * there).sum() for loss, true, there in self._pairs(losses))  # type: ignore[return-value]

    def _pairs(self, losses: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        return zip(losses, self.wanted, self.counts, strict=True)
