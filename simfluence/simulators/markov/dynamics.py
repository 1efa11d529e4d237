"""The Markov family's equation, in torch: affine steps of a curriculum, rollouts, and training on rollouts.

Every member of the family is a sum of terms. With ``w`` the weights of a batch and ``c̄`` their centre (0 unless around
the mean), a term k contributes ``τ^q · Σ_i (w_i − c̄_i) x_k,i`` times an earlier loss, or times 1; τ is the share of the
longest fitting run that has gone by.
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

_ROLLOUT_ITERATIONS = 60
_CHANGES_ENTRIES = 8_000_000  # of maps and batches that are held at a time, for as many test examples as that allows
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
        """α ``[order, steps, runs, test]`` and β ``[steps, runs, test]``, of ``L_{t+1} = Σ_j α_j L_{t+1−j} + β``."""
        sums: list[Any] = [self._rest(steps), *self._starts(steps)]  # by lag, 0 for β
        for term, effects in zip(self.terms, self.effects, strict=True):
            usual = None if self.centre is None else -(self.centre @ effects)
            if term.power:
                sums[term.lag] = _sum(sums[term.lag], steps.sums(effects, usual) * self._share(steps))
            else:
                sums[term.lag] = steps.sums(effects, _sum(sums[term.lag], usual))
        shape = (*steps.updates.shape, self.effects.shape[2])
        beta, *slopes = (_filled(each, shape) for each in sums)
        if self.guard:
            slopes, beta = self._guarded(steps, slopes, beta)
        if not steps.all_update:
            still = ~steps.updates[..., None]
            slopes = [torch.where(still, float(lag == 0), slope) for lag, slope in enumerate(slopes)]
            beta = torch.where(still, 0.0, beta)
        return torch.stack(slopes) if self.order > 1 else slopes[0][None], beta

    def _guarded(self, steps: Steps, slopes: list[Tensor], beta: Tensor) -> tuple[list[Tensor], Tensor]:
        """Slopes scaled down to sum to at most 1 in size; around the mean they are those of deviations alone."""
        excess = torch.stack([slope.abs() for slope in slopes]).sum(0).clamp(min=1.0)
        scaled = [slope / excess for slope in slopes]
        if self.mean is not None:
            for lag, (slope, less) in enumerate(zip(slopes, scaled, strict=True), start=1):
                beta = beta + (slope - less) * self._means(steps, lag)
        return scaled, beta

    def _rest(self, steps: Steps) -> Any:
        """What β is without any effects: None for 0, or ``[steps, 1, test]``."""
        if self.mean is None:
            return None
        rest = self._means(steps, 0)
        for lag, start in enumerate(self._starts(steps), start=1):
            rest = rest if start is None else rest - start * self._means(steps, lag)
        return rest

    def _starts(self, steps: Steps) -> list[Any]:
        """What each slope is without any effects: None for 0, a number, or ``[steps, 1, test]``."""
        starts: list[Any] = [self.fixed_slope or None] + [None] * (self.order - 1)
        if self.lasting is None:
            return starts
        varying = any(term.power for term in self.terms)
        for term, coefficient in zip(free_terms(self.order, varying), self.lasting, strict=True):
            lasts = (coefficient * self._share(steps) if term.power else coefficient).expand(len(steps.times), 1, -1)
            starts[term.lag - 1] = _sum(starts[term.lag - 1], lasts)
        return starts

    def _share(self, steps: Steps) -> Tensor:
        """τ of each step, ``[steps, 1, 1]``."""
        return (steps.times.double() / self.horizon).clamp(max=1.0)[:, None, None]

    def _means(self, steps: Steps, lag: int) -> Tensor:
        """m of the time ``lag`` before the one that each step leads to, ``[steps, 1, test]``; held at its ends."""
        assert self.mean is not None  # noqa: S101 (for the type checker)
        return self.mean[(steps.times + 1 - lag).clamp(0, len(self.mean) - 1)][:, None]

    def simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        """Losses ``[runs, steps + 1, test]`` from the losses before training, ``[runs, test]``."""
        every = Steps.of(curricula, self.batch_size)
        count, runs = every.updates.shape
        losses = torch.empty(count + 1, runs, initial.shape[1], dtype=torch.float64)
        losses[0] = torch.as_tensor(initial.copy())
        history = [losses[0]] * self.order
        chunk = max(1, _CHUNK_ENTRIES // (runs * initial.shape[1]))
        for start in range(0, count, chunk):
            alphas, beta = self.affine(every.part(start, min(start + chunk, count)))
            history = rolled(alphas, beta, history, losses[start + 1 :])[::-1][: self.order]
        return losses.numpy().swapaxes(0, 1)

    def changes(self, base: Curriculum, differences: Differences, initial: np.ndarray) -> np.ndarray:
        """Change of the final losses under curricula that differ from ``base`` at some steps, ``[variants, test]``.

        Exact, by composing affine maps: where a curriculum differs, the deviation from the base run follows from the
        two batches; from there to the next such step, or the end, it is multiplied by the product of the base's maps,
        which is put together from products over powers of two of steps.
        """
        changes = np.empty((differences.variants, len(initial)))
        kept = int(np.log2(len(base)) + 1) * len(base) * self.order**2 + self.order * len(differences.steps)
        for some in _blocks(len(initial), max(1, _CHANGES_ENTRIES // kept)):
            changes[:, some] = self._of(some)._changes(base, differences, torch.as_tensor(initial[some].copy()))
        return changes

    def _of(self, some: slice) -> Dynamics:
        """Of some of the test examples."""
        mean = None if self.mean is None else self.mean[:, some]
        lasting = None if self.lasting is None else self.lasting[:, some]
        return dataclasses.replace(self, effects=self.effects[..., some], mean=mean, lasting=lasting)

    def _changes(self, base: Curriculum, differences: Differences, initial: Tensor) -> np.ndarray:
        alphas, beta = (part.squeeze(-2) for part in self.affine(Steps.of([base], self.batch_size)))
        before = torch.stack(rolled(alphas, beta, [initial] * self.order))  # [order + steps, test]; time t at order−1+t
        others, other_beta = (part.squeeze(-2) for part in self.affine(differences.as_steps(self.batch_size)))
        maps = _Maps.of(alphas)
        deviation = torch.zeros(differences.variants, self.order, len(initial), dtype=torch.float64)  # the last first
        time = torch.zeros(differences.variants, dtype=torch.long)  # when that is
        for entries in differences.rounds():
            variants, steps = differences.variant[entries], differences.steps[entries]
            known = maps.carry(deviation[variants], time[variants], steps)
            counterfactual = other_beta[entries] - before[steps + self.order]
            for lag in range(self.order):
                counterfactual += others[lag, entries] * (before[steps + self.order - 1 - lag] + known[:, lag])
            deviation[variants] = torch.cat([counterfactual[:, None], known[:, :-1]], dim=1)
            time[variants] = steps + 1
        return maps.carry(deviation, time, torch.full_like(time, len(base)))[:, 0].numpy()


@dataclass(frozen=True)
class _Maps:
    """Products of a run's affine maps, without their constants, over 1, 2, 4, … steps.

    Args:
        products: ``[steps, order, order, test]`` of each power of two; at t the product of the maps from t on.
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
        """Deviations ``[rows, order, test]`` at the times ``start`` as they are at ``stop``."""
        left, time = stop - start, start.clone()
        for power, products in enumerate(self.products):
            rows = torch.nonzero(left >> power & 1).squeeze(1)
            if len(rows):
                deviation[rows] = _composed(products[time[rows]], deviation[rows][:, :, None]).squeeze(2)
                time[rows] += 1 << power
        return deviation


def _composed(later: Tensor, earlier: Tensor) -> Tensor:
    """Matrix products over axes 1 and 2, ``[rows, order, k, test]``."""
    if later.shape[1] == 1:
        return later * earlier
    return (later[:, :, :, None] * earlier[:, None]).sum(2)


@dataclass(frozen=True)
class Differences:
    """Where variants of a base curriculum differ from it: a batch for each such step of each of them.

    Args:
        variants: how many there are.
        variant, steps: of each batch, ``[batches]``, sorted by variant and then by step.
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
        """Of curricula with as many steps as the base."""
        steps = [_differing(base, other) for other in edited]
        batches = [other[step] for other, some in zip(edited, steps, strict=True) for step in some.tolist()]
        variant = np.repeat(np.arange(len(edited)), [len(some) for some in steps])
        return cls._of(len(edited), variant, np.concatenate(steps), batches, base.n_train)

    @classmethod
    def without(cls, base: Curriculum, groups: np.ndarray) -> Differences:
        """Of the base without each group of examples, ``[groups, train]`` of truth values; batches shrink."""
        counts = base.counts.astype(bool).T.astype(np.int64)  # [train, steps]
        variant, steps = (scipy.sparse.csr_array(groups.astype(np.int64)) @ counts).nonzero()
        order = np.lexsort((steps, variant))
        variant, steps = variant[order], steps[order]
        sizes = base.sizes[steps]
        starts = np.repeat(base.offsets[steps] - np.cumsum(sizes) + sizes, sizes)
        indices = base.indices[starts + np.arange(len(starts))]
        kept = ~groups[np.repeat(variant, sizes), indices]
        ends = np.concatenate([[0], np.cumsum(kept)])[np.concatenate([[0], np.cumsum(sizes)])]
        return cls(len(groups), torch.as_tensor(variant), torch.as_tensor(steps), indices[kept], ends, base.n_train)

    @classmethod
    def _of(
        cls, variants: int, variant: np.ndarray, steps: np.ndarray, batches: list[np.ndarray], n_train: int
    ) -> Differences:
        offsets = np.cumsum([0, *(len(batch) for batch in batches)])
        indices = np.concatenate([*batches, np.empty(0, np.int32)])
        return cls(variants, torch.as_tensor(variant), torch.as_tensor(steps), indices, offsets, n_train)

    def as_steps(self, batch_size: int) -> Steps:
        """Each batch as a step of one run."""
        weights = weights_of_batches(self.indices, self.offsets, self.n_train, batch_size)
        updates = torch.as_tensor(np.diff(self.offsets) > 0)[:, None]
        return Steps(weights, self.steps, updates, bool(updates.all()))

    def rounds(self) -> Iterator[Tensor]:
        """Which batches are the first of their variant, then the second, and so on."""
        counts = torch.bincount(self.variant, minlength=self.variants)
        starts = counts.cumsum(0) - counts
        for number in range(int(counts.max()) if len(counts) else 0):
            yield starts[counts > number] + number


def _differing(base: Curriculum, other: Curriculum) -> np.ndarray:
    """The steps at which two curricula of equal length have other places (or the same in another order)."""
    equal = base.sizes == other.sizes
    mine, its = (each.indices[np.repeat(equal, each.sizes)] for each in (base, other))
    step = np.repeat(np.flatnonzero(equal), base.sizes[equal])
    differs = ~equal
    differs[step[mine != its]] = True
    return np.flatnonzero(differs)


def _blocks(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def _sum(one: Any, other: Any) -> Any:
    """Of two, where None is 0: large arrays are not copied for nothing."""
    if one is None or other is None:
        return other if one is None else one
    return one + other


def _filled(value: Any, shape: tuple[int, ...]) -> Tensor:
    return torch.as_tensor(0.0 if value is None else value, dtype=torch.float64).expand(shape)


def free_terms(order: int, varying: bool) -> list[Term]:
    """The deviations from the mean whose coefficients are not penalised."""
    return [Term(lag) for lag in range(1, order + 1)] + ([Term(1, 1)] if varying else [])


def rolled(alphas: Tensor, beta: Tensor, history: Sequence[Tensor], out: Tensor | None = None) -> list[Tensor]:
    """The losses before and after each step, oldest first: ``history`` turned round, then one for each step.

    Args:
        alphas, beta: as of ``Dynamics.affine``.
        history: the losses before, the last one first, each ``[runs, test]``.
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
        weights: ``w_i = count · B/|c|`` sparse ``[steps · runs, train]``, the runs of a step together; empty after a
            curriculum's end.
        times: of the steps, ``[steps]``.
        updates: which steps are updates, ``[steps, runs]``.
        all_update: whether all are.
        transpose: of the weights, for derivatives; None where none are taken.
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
        """Σ_i w_i of effects ``[train, test]`` for each step, on top of ``start``: ``[steps, runs, test]``."""
        shape = (*self.updates.shape, effects.shape[1])
        if self.transpose is not None:
            sums = _Product.apply(self._tensor, self.transpose, effects).reshape(shape)
            return sums if start is None else sums + start
        sums = effects.new_empty(shape)
        if start is not None:
            sums.copy_(torch.as_tensor(start).expand(shape))
        sums.flatten(0, 1).addmm_(self._tensor, effects, beta=0 if start is None else 1)
        return sums


class _Product(torch.autograd.Function):
    """Sparse times dense; torch itself does not take this product's derivative for compressed rows."""

    @staticmethod
    def forward(context: Any, weights: Tensor, transpose: Tensor, effects: Tensor) -> Tensor:
        context.transpose = transpose
        return weights @ effects

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[None, None, Tensor]:
        return None, None, context.transpose @ gradient


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
    steps = Steps.of(runs.curricula, start.batch_size, windows.padded).with_derivatives()
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
        there: where there is something wanted, ``[length, windows, 1]``.
    """

    length: int
    padded: int
    history: list[Tensor]
    wanted: Tensor
    there: Tensor

    @classmethod
    def of(cls, runs: Runs, order: int, length: int) -> _Windows:
        longest = max(run.steps for run in runs)
        length = min(length, longest)
        padded = -(-longest // length) * length
        losses = np.full((padded + 1, len(runs), runs.n_test), np.nan)
        losses[: longest + 1] = runs.losses.swapaxes(0, 1)
        starts = np.arange(0, padded, length)
        known = torch.as_tensor(np.nan_to_num(losses))
        history = [known[np.maximum(starts - lag, 0)].flatten(0, 1) for lag in range(order)]
        there = torch.as_tensor(np.isfinite(losses[1:]).all(axis=2, keepdims=True))
        return cls(length, padded, history, _cut(known[1:], length), _cut(there, length))

    def error(self, alphas: Tensor, beta: Tensor) -> Tensor:
        """Sum of squared errors of the rollouts."""
        slopes = torch.stack([_cut(alpha, self.length) for alpha in alphas])
        losses = torch.stack(rolled(slopes, _cut(beta, self.length), self.history)[len(self.history) :])
        return ((losses - self.wanted) ** 2 * self.there).sum()


def _cut(values: Tensor, length: int) -> Tensor:
    """``[steps, runs, …]`` as windows side by side, ``[length, windows, …]``."""
    return values.unflatten(0, (-1, length)).transpose(0, 1).flatten(1, 2)
