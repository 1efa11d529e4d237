"""The Markov family's equation, in torch: affine steps of a curriculum, rollouts, and training on rollouts.

Every member of the family is a sum of terms. With ``w`` the weights of a batch and ``c̄`` their centre (0 unless around
the mean), a term k contributes ``τ^q · Σ_i (w_i − c̄_i) x_k,i`` times an earlier loss, or times 1; τ is the time as a
share of the longest fitting run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import scipy.sparse
import torch
from torch import Tensor

from simfluence.curriculum import Curriculum
from simfluence.runs import Runs
from simfluence.simulators.batches import batch_weights, weights_of_batches
from simfluence.simulators.markov.least_squares import sparse_tensor

__all__ = ["Differences", "Dynamics", "Steps", "Term", "free_terms", "rolled", "trained_on_rollouts"]

_ROLLOUT_ITERATIONS = 60
_CHANGES_ENTRIES = 8_000_000  # maps and batches in memory at a time; limits the test examples per pass
_BLOCK_SLOTS = 500_000  # of the batches without a group's examples, laid end to end
_CHUNK_ENTRIES = 400_000  # of [runs, steps, test] simulated at a time, to stay in the processor's caches


@dataclass(frozen=True)
class Term:
    """One term of a step: effects of training examples, times the loss ``lag`` steps back, times τ to the ``power``.

    Lag 1 is the last loss; lag 0 multiplies no loss.
    """

    lag: int
    power: int = 0


@dataclass(frozen=True)
class Dynamics:
    """A fitted member of the family, as tensors.

    Args:
        terms: terms that a step sums.
        effects: effects of the training examples, one set per term, ``[terms, train, test]``.
        batch_size: batch size of the fitting runs.
        horizon: steps of the longest fitting run.
        order: number of earlier losses that a step depends on.
        fixed_slope: α of the last loss without any effects, 1 or 0; around the mean, α of its deviation.
        guard: whether the slopes of a step are scaled down where they sum to more than 1.
        centre: c̄ ``[train]``; None unless around the mean.
        mean: m ``[steps + 1, test]``; None unless around the mean.
        deviation_slopes: coefficients of ``free_terms``, ``[free, test]``; None unless around the mean.
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
    deviation_slopes: Tensor | None = None

    def affine(self, steps: Steps) -> tuple[Tensor, Tensor]:
        """Return α ``[order, steps, runs, test]``, β ``[steps, runs, test]`` of ``L_{t+1} = Σ_j α_j L_{t+1−j} + β``."""
        sums: list[Any] = [self._fixed_intercept(steps), *self._fixed_slopes(steps)]  # by lag, 0 for β
        for term, effects in zip(self.terms, self.effects, strict=True):
            offset = None if self.centre is None else -(self.centre @ effects)
            if term.power:
                sums[term.lag] = _sum(sums[term.lag], steps.sums(effects, offset) * self._share(steps))
            else:
                sums[term.lag] = steps.sums(effects, _sum(sums[term.lag], offset))
        shape = (*steps.updates.shape, self.effects.shape[2])
        beta, *slopes = (_filled(total, shape) for total in sums)
        if self.guard:
            slopes, beta = self._guarded(steps, slopes, beta)
        if not steps.all_update:
            no_update = ~steps.updates[..., None]
            slopes = [torch.where(no_update, float(lag == 0), slope) for lag, slope in enumerate(slopes)]
            beta = torch.where(no_update, 0.0, beta)
        return torch.stack(slopes) if self.order > 1 else slopes[0][None], beta

    def _guarded(self, steps: Steps, slopes: list[Tensor], beta: Tensor) -> tuple[list[Tensor], Tensor]:
        """Scale the slopes down to sum to at most 1 in size; around the mean, only the slopes of deviations."""
        excess = torch.stack([slope.abs() for slope in slopes]).sum(0).clamp(min=1.0)
        scaled = [slope / excess for slope in slopes]
        if self.mean is not None:
            for lag, (slope, scaled_slope) in enumerate(zip(slopes, scaled, strict=True), start=1):
                beta = beta + (slope - scaled_slope) * _mean_at(self.mean, steps, lag)
        return scaled, beta

    def _fixed_intercept(self, steps: Steps) -> Any:
        """Return β without any effects: None for 0, or ``[steps, 1, test]``."""
        if self.mean is None:
            return None
        intercept = _mean_at(self.mean, steps, 0)
        for lag, slope in enumerate(self._fixed_slopes(steps), start=1):
            intercept = intercept if slope is None else intercept - slope * _mean_at(self.mean, steps, lag)
        return intercept

    def _fixed_slopes(self, steps: Steps) -> list[Any]:
        """Return each slope without any effects: None for 0, a number, or ``[steps, 1, test]``."""
        slopes: list[Any] = [self.fixed_slope or None] + [None] * (self.order - 1)
        if self.deviation_slopes is None:
            return slopes
        varying = any(term.power for term in self.terms)
        for term, coefficient in zip(free_terms(self.order, varying), self.deviation_slopes, strict=True):
            gain = (coefficient * self._share(steps) if term.power else coefficient).expand(len(steps.times), 1, -1)
            slopes[term.lag - 1] = _sum(slopes[term.lag - 1], gain)
        return slopes

    def _share(self, steps: Steps) -> Tensor:
        """Return τ of each step, ``[steps, 1, 1]``."""
        return (steps.times.double() / self.horizon).clamp(max=1.0)[:, None, None]

    def simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        """Roll out losses ``[runs, steps + 1, test]`` from the losses before training, ``[runs, test]``."""
        steps = Steps.of(curricula, self.batch_size)
        count, runs = steps.updates.shape
        losses = torch.empty(count + 1, runs, initial.shape[1], dtype=torch.float64)
        losses[0] = torch.as_tensor(initial.copy())
        history = [losses[0]] * self.order
        chunk = max(1, _CHUNK_ENTRIES // (runs * initial.shape[1]))
        for start in range(0, count, chunk):
            alphas, beta = self.affine(steps.part(start, min(start + chunk, count)))
            history = rolled(alphas, beta, history, losses[start + 1 :])[::-1][: self.order]
        return losses.numpy().swapaxes(0, 1)

    def changes(self, base: Curriculum, differences: Differences, initial: np.ndarray) -> np.ndarray:
        """Change of the final losses under curricula that differ from ``base`` at some steps, ``[variants, test]``.

        Exact, by composing affine maps: where a curriculum differs, the deviation from the base run follows from the
        two batches. From that step to the next one that differs, or to the end, the deviation is multiplied by the
        product of the base's maps, which is composed of products over powers of two of steps.
        """
        changes = np.empty((differences.variants, len(initial)))
        entries = int(np.log2(len(base)) + 1) * len(base) * self.order**2 + self.order * len(differences.steps)
        for span in _spans(len(initial), max(1, _CHANGES_ENTRIES // entries)):
            changes[:, span] = self._restricted(span)._changes(base, differences, torch.as_tensor(initial[span].copy()))
        return changes

    def _restricted(self, span: slice) -> Dynamics:
        """Return the dynamics of a slice of the test examples."""
        mean = None if self.mean is None else self.mean[:, span]
        slopes = None if self.deviation_slopes is None else self.deviation_slopes[:, span]
        return dataclasses.replace(self, effects=self.effects[..., span], mean=mean, deviation_slopes=slopes)

    def _changes(self, base: Curriculum, differences: Differences, initial: Tensor) -> np.ndarray:
        alphas, beta = (part.squeeze(-2) for part in self.affine(Steps.of([base], self.batch_size)))
        before = torch.stack(rolled(alphas, beta, [initial] * self.order))  # [order + steps, test]; time t at order−1+t
        other_alphas, other_beta = (part.squeeze(-2) for part in self.affine(differences.as_steps(self.batch_size)))
        maps = _Maps.of(alphas)
        deviation = torch.zeros(differences.variants, self.order, len(initial), dtype=torch.float64)  # latest first
        time = torch.zeros(differences.variants, dtype=torch.long)  # of each variant's latest deviation
        for entries in differences.rounds():
            variants, steps = differences.variant[entries], differences.steps[entries]
            carried = maps.carry(deviation[variants], time[variants], steps)
            counterfactual = other_beta[entries] - before[steps + self.order]
            for lag in range(self.order):
                counterfactual += other_alphas[lag, entries] * (before[steps + self.order - 1 - lag] + carried[:, lag])
            deviation[variants] = torch.cat([counterfactual[:, None], carried[:, :-1]], dim=1)
            time[variants] = steps + 1
        return maps.carry(deviation, time, torch.full_like(time, len(base)))[:, 0].numpy()


@dataclass(frozen=True)
class _Maps:
    """Products of a run's affine maps, without their constants, over 1, 2, 4, … steps.

    Args:
        products: for each power of two, the products of the maps from each step on, ``[steps, order, order, test]``.
    """

    products: list[Tensor]

    @classmethod
    def of(cls, alphas: Tensor) -> _Maps:
        order, steps, tests = alphas.shape
        maps = torch.zeros(steps, order, order, tests, dtype=alphas.dtype)
        maps[:, 0] = alphas.swapaxes(0, 1)
        for lag in range(1, order):
            maps[:, lag, lag - 1] = 1.0
        products, length = [maps], 1
        while 2 * length <= steps:
            products.append(_composed(products[-1][length:], products[-1][:-length]))
            length *= 2
        return cls(products)

    def carry(self, deviation: Tensor, start: Tensor, stop: Tensor) -> Tensor:
        """Carry deviations ``[rows, order, test]`` from the times ``start`` to the times ``stop``."""
        distance, time = stop - start, start.clone()
        for power, products in enumerate(self.products):
            rows = torch.nonzero(distance >> power & 1).squeeze(1)
            if len(rows):
                deviation[rows] = _composed(products[time[rows]], deviation[rows][:, :, None]).squeeze(2)
                time[rows] += 1 << power
        return deviation


def _composed(later: Tensor, earlier: Tensor) -> Tensor:
    """Multiply matrices over axes 1 and 2, ``[rows, order, k, test]``."""
    if later.shape[1] == 1:
        return later * earlier
    return (later[:, :, :, None] * earlier[:, None]).sum(2)


@dataclass(frozen=True)
class Differences:
    """The batches at which variants of a base curriculum differ from it.

    Args:
        variants: number of variants.
        variant, steps: variant and step of each batch, ``[batches]``, sorted by variant and then by step.
        indices, offsets: the batches, laid end to end, and where each starts.
        n_train: number of training examples.
    """

    variants: int
    variant: Tensor
    steps: Tensor
    indices: np.ndarray
    offsets: np.ndarray
    n_train: int

    @classmethod
    def between(cls, base: Curriculum, edited: Sequence[Curriculum]) -> Differences:
        """Compare the base with edited curricula of as many steps."""
        steps = [_differing(base, other) for other in edited]
        batches = [other[step] for other, differing in zip(edited, steps, strict=True) for step in differing.tolist()]
        variant = np.repeat(np.arange(len(edited)), [len(differing) for differing in steps])
        return cls._of(len(edited), variant, np.concatenate(steps), batches, base.n_train)

    @classmethod
    def without(cls, base: Curriculum, groups: Sequence[np.ndarray]) -> Differences:
        """Leave each group of examples, given by rows, out of the base; batches shrink."""
        counts = base.counts.astype(bool).T.astype(np.int64)  # [train, steps]
        members, ends = np.concatenate([*groups, np.empty(0, np.int64)]), np.cumsum([0, *map(len, groups)])
        membership = scipy.sparse.csr_array((np.ones_like(members), members, ends), (len(groups), base.n_train))
        variant, steps = (membership @ counts).nonzero()
        order = np.lexsort((steps, variant))
        variant, steps = variant[order], steps[order]
        sizes = base.sizes[steps]
        starts = np.repeat(base.offsets[steps] - np.cumsum(sizes) + sizes, sizes)
        indices = base.indices[starts + np.arange(len(starts))]
        # A pair of a group and an example as one number, to look up which slots are left out.
        left_out = np.repeat(np.arange(len(groups)), np.diff(ends)) * base.n_train + members
        remains = ~np.isin(np.repeat(variant, sizes) * base.n_train + indices, left_out)
        offsets = np.concatenate([[0], np.cumsum(remains)])[np.concatenate([[0], np.cumsum(sizes)])]
        variant, steps = torch.as_tensor(variant), torch.as_tensor(steps)
        return cls(len(groups), variant, steps, indices[remains], offsets, base.n_train)

    @staticmethod
    def blocks(base: Curriculum, groups: Sequence[np.ndarray]) -> Iterator[slice]:
        """Cut groups into slices whose batches, as ``without`` lays them end to end, have a bounded number of slots."""
        slots = base.counts.astype(bool).T.astype(np.int64) @ base.sizes  # of all batches that show an example, [train]
        start = total = 0
        for index, group in enumerate(groups):
            size = min(int(slots[group].sum()), len(base.indices))
            if index > start and total + size > _BLOCK_SLOTS:
                yield slice(start, index)
                start, total = index, 0
            total += size
        if start < len(groups):
            yield slice(start, len(groups))

    @classmethod
    def _of(
        cls, variants: int, variant: np.ndarray, steps: np.ndarray, batches: list[np.ndarray], n_train: int
    ) -> Differences:
        offsets = np.cumsum([0, *(len(batch) for batch in batches)])
        indices = np.concatenate([*batches, np.empty(0, np.int32)])
        return cls(variants, torch.as_tensor(variant), torch.as_tensor(steps), indices, offsets, n_train)

    def as_steps(self, batch_size: int) -> Steps:
        """Return each batch as a step of one run."""
        weights = weights_of_batches(self.indices, self.offsets, self.n_train, batch_size)
        updates = torch.as_tensor(np.diff(self.offsets) > 0)[:, None]
        return Steps(weights, self.steps, updates, bool(updates.all()))

    def rounds(self) -> Iterator[Tensor]:
        """Yield the positions of every variant's first batch, then of every variant's second, and so on."""
        counts = torch.bincount(self.variant, minlength=self.variants)
        starts = counts.cumsum(0) - counts
        for number in range(int(counts.max()) if len(counts) else 0):
            yield starts[counts > number] + number


def _differing(base: Curriculum, other: Curriculum) -> np.ndarray:
    """Return the steps at which two curricula of equal length differ, be it only in the order within a batch."""
    equal = base.sizes == other.sizes
    base_indices, other_indices = (
        curriculum.indices[np.repeat(equal, curriculum.sizes)] for curriculum in (base, other)
    )
    step = np.repeat(np.flatnonzero(equal), base.sizes[equal])
    differs = ~equal
    differs[step[base_indices != other_indices]] = True
    return np.flatnonzero(differs)


def _spans(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _sum(one: Any, other: Any) -> Any:
    """Add two values, of which None means 0, so that no large array is copied needlessly."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _filled(value: Any, shape: tuple[int, ...]) -> Tensor:
    return torch.as_tensor(0.0 if value is None else value, dtype=torch.float64).expand(shape)


def _mean_at(mean: Tensor, steps: Steps, lag: int) -> Tensor:
    """Return m at ``lag`` before the time that each step leads to, ``[steps, 1, test]``, held at its ends."""
    return mean[(steps.times + 1 - lag).clamp(0, len(mean) - 1)][:, None]


def free_terms(order: int, varying: bool) -> list[Term]:
    """Return the deviations from the mean whose coefficients are not penalised."""
    return [Term(lag) for lag in range(1, order + 1)] + ([Term(1, 1)] if varying else [])


def rolled(alphas: Tensor, beta: Tensor, history: Sequence[Tensor], out: Tensor | None = None) -> list[Tensor]:
    """Return the losses before and after each step, oldest first: ``history`` reversed, then one for each step.

    Args:
        alphas, beta: see ``Dynamics.affine``.
        history: losses before the first step, latest first, each ``[runs, test]``.
        out: ``[steps, runs, test]`` to write the losses into, if given.
    """
    losses = list(history[::-1])
    slopes = [alpha.unbind(0) for alpha in alphas]
    for step, constant in enumerate(beta.unbind(0)):
        loss = torch.addcmul(constant, slopes[0][step], losses[-1], out=None if out is None else out[step])
        for lag in range(1, len(slopes)):
            loss = torch.addcmul(loss, slopes[lag][step], losses[-1 - lag], out=None if out is None else out[step])
        losses.append(loss)
    return losses


@dataclass(frozen=True)
class Steps:
    """Steps of several curricula side by side.

    Args:
        weights: ``w_i = count · B/|c|`` sparse ``[steps · runs, train]``, grouped by step; empty after a curriculum's
            end.
        times: time before each step, ``[steps]``.
        updates: whether each step is an update, ``[steps, runs]``.
        all_update: whether every step is an update.
        transpose: transposed weights, for derivatives; None where none are taken.
    """

    weights: scipy.sparse.csr_array
    times: Tensor
    updates: Tensor
    all_update: bool
    transpose: Tensor | None = None

    @classmethod
    def of(cls, curricula: Sequence[Curriculum], batch_size: int, longest: int | None = None) -> Steps:
        longest = longest or max(len(curriculum) for curriculum in curricula)
        weights, updates = batch_weights(curricula, longest, batch_size)
        by_step = np.arange(len(updates)).reshape(len(curricula), longest).T.ravel()
        updates = updates[by_step].reshape(longest, -1)
        return cls(weights[by_step], torch.arange(longest), torch.as_tensor(updates), bool(updates.all()))

    def part(self, start: int, stop: int) -> Steps:
        runs = self.updates.shape[1]
        if (start, stop) == (0, len(self.times)):
            return self
        weights = self.weights[start * runs : stop * runs]
        return Steps(weights, self.times[start:stop], self.updates[start:stop], self.all_update)

    def with_derivatives(self) -> Steps:
        return dataclasses.replace(self, transpose=sparse_tensor(self.weights.T.tocsr()))

    @cached_property
    def _tensor(self) -> Tensor:
        return sparse_tensor(self.weights)

    def sums(self, effects: Tensor, start: Any = None) -> Tensor:
        """Return ``start`` plus Σ_i w_i x_i of effects ``[train, test]`` for each step, ``[steps, runs, test]``."""
        shape = (*self.updates.shape, effects.shape[1])
        if self.transpose is not None:
            multiply: Any = _Product.apply
            product: Tensor = multiply(self._tensor, self.transpose, effects).reshape(shape)
            return product if start is None else product + start
        sums = effects.new_empty(shape)
        if start is not None:
            sums.copy_(torch.as_tensor(start).expand(shape))
        sums.flatten(0, 1).addmm_(self._tensor, effects, beta=0 if start is None else 1)
        return sums


class _Product(torch.autograd.Function):
    """Sparse times dense matrix product; torch does not differentiate it for compressed rows."""

    @staticmethod
    def forward(context: Any, weights: Tensor, transpose: Tensor, effects: Tensor) -> Tensor:
        context.transpose = transpose
        return weights @ effects

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        return None, None, context.transpose @ gradient


def trained_on_rollouts(start: Dynamics, runs: Runs, l2: np.ndarray, prior: np.ndarray, length: int) -> Dynamics:
    """Minimise the squared errors of rollouts of ``length`` steps from true losses, by L-BFGS.

    Args:
        start: dynamics to start from, the one-step solution.
        runs: runs recorded at every step. Each is cut into windows that start from its true losses.
        l2: penalty on the squared distance of effects from ``prior``, ``[test]``.
        prior: ``[terms, train, test]``, or an array that broadcasts to it.
        length: steps of a window, cut to those of the longest run.
    """
    windows = _Windows.of(runs, start.order, length)
    steps = Steps.of(runs.curricula, start.batch_size, windows.padded).with_derivatives()
    penalty, target = torch.as_tensor(l2), torch.as_tensor(prior)
    effects = start.effects.clone().requires_grad_()
    slopes = None if start.deviation_slopes is None else start.deviation_slopes.clone().requires_grad_()
    trained = dataclasses.replace(start, effects=effects, deviation_slopes=slopes)
    optimizer: Any = torch.optim.LBFGS(  # without type hints
        [effects] if slopes is None else [effects, slopes],
        max_iter=_ROLLOUT_ITERATIONS, tolerance_change=1e-7, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def objective() -> Tensor:
        optimizer.zero_grad()
        error = windows.error(*trained.affine(steps)) + (penalty * ((effects - target) ** 2).sum((0, 1))).sum()
        torch.autograd.backward(error)
        return error

    optimizer.step(objective)
    slopes = None if slopes is None else slopes.detach()
    return dataclasses.replace(start, effects=effects.detach(), deviation_slopes=slopes)


@dataclass(frozen=True)
class _Windows:
    """Runs cut into windows of ``length`` steps, side by side.

    Args:
        length: steps of a window.
        padded: steps of a run, rounded up to whole windows.
        history: losses before each window, latest first, each ``[windows, test]``.
        targets: losses after each step of a window, ``[length, windows, test]``; 0 after a run's end.
        known: whether there is a target, ``[length, windows, 1]``.
    """

    length: int
    padded: int
    history: list[Tensor]
    targets: Tensor
    known: Tensor

    @classmethod
    def of(cls, runs: Runs, order: int, length: int) -> _Windows:
        longest = max(run.steps for run in runs)
        length = min(length, longest)
        padded = -(-longest // length) * length
        losses = np.full((padded + 1, len(runs), runs.n_test), np.nan)
        losses[: longest + 1] = runs.losses.swapaxes(0, 1)
        starts = np.arange(0, padded, length)
        filled = torch.as_tensor(np.nan_to_num(losses))
        history = [filled[np.maximum(starts - lag, 0)].flatten(0, 1) for lag in range(order)]
        known = torch.as_tensor(np.isfinite(losses[1:]).all(axis=2, keepdims=True))
        return cls(length, padded, history, _cut(filled[1:], length), _cut(known, length))

    def error(self, alphas: Tensor, beta: Tensor) -> Tensor:
        """Return the sum of squared errors of the rollouts."""
        slopes = torch.stack([_cut(alpha, self.length) for alpha in alphas])
        losses = torch.stack(rolled(slopes, _cut(beta, self.length), self.history)[len(self.history) :])
        return ((losses - self.targets) ** 2 * self.known).sum()


def _cut(values: Tensor, length: int) -> Tensor:
    """Cut ``[steps, runs, …]`` into windows side by side, ``[length, windows, …]``."""
    return values.reshape(-1, length, *values.shape[1:]).transpose(0, 1).flatten(1, 2)
