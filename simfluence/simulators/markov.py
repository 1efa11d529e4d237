"""The paper's simulators: a linear Markov process for each test example (Guu et al. 2023, arXiv 2303.08114).

    L_{t+1}(z) = α(c_t) · L_t(z) + β(c_t),    α(c) = Σ_{i∈c} w A_i(z),    β(c) = Σ_{i∈c} w B_i(z)

with ``w = B/|c|`` for a batch of size |c| and fitting runs of batch size B, so that effects are those of an
example in a full batch; at |c| = B this is the paper's equation. An empty batch is a step without an update.

    additive          α = 1
    multiplicative    β = 0
    linear            both
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import numpy as np
import scipy.sparse
from jaxtyping import Float

from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.runs import Runs
from simfluence.simulators.base import Simulator
from simfluence.simulators.solver import Multiplier, ridge

PRIORS = ("identity", "zero")
Effects = Float[np.ndarray, "runs steps test"]


class MarkovSimulator(Simulator):
    """The family's common part. Fits squared one-step errors from the true previous loss, plus ``l2`` times the
    squared parameters; simulates by rolling out from the losses before training.

    Attributes:
        A_, B_: effects on slope and intercept, ``[train, test]``; a fixed one is absent.
        batch_size_: the fitting runs' (the most frequent, if they have several).
    """

    l2: float
    prior: str = "identity"
    learns_slope: ClassVar[bool]
    learns_intercept: ClassVar[bool]

    def effects(self, curricula: Sequence[Curriculum]) -> tuple[Effects, Effects]:
        """α and β of every step, each ``[runs, steps, test]``; steps after a curriculum's end are α=1, β=0."""
        self._check_fitted()
        longest = max(len(curriculum) for curriculum in curricula)
        shape = (len(curricula), longest, self.n_test_)
        weights, updates = _weights(curricula, longest, self.batch_size_)
        alpha, beta = np.ones(shape), np.zeros(shape)
        if self.learns_slope:
            alpha = np.where(updates[:, None], weights @ self.A_, 1.0).reshape(shape)
        if self.learns_intercept:
            beta = (weights @ self.B_).reshape(shape)
        return alpha, beta

    def _check_parameters(self) -> None:
        if not isinstance(self.l2, int | float) or not self.l2 > 0:
            raise InvalidInput(f"l2 must be a number above 0, got {self.l2!r}")
        if self.prior not in PRIORS:
            raise InvalidInput(f"unknown prior {self.prior!r}, {did_you_mean(str(self.prior), PRIORS)}")

    def _fit(self, runs: Runs) -> None:
        self.batch_size_ = usual_batch_size(runs.curricula)
        weights, before, after = self._transitions(runs)
        shrinks_to_one = self.prior == "identity" or not self.learns_slope
        multipliers: list[Multiplier] = [before] if self.learns_slope else []
        multipliers += [None] if self.learns_intercept else []
        effects = list(ridge(weights, multipliers, after - before if shrinks_to_one else after, self.l2))
        if self.learns_slope:
            self.A_ = effects.pop(0) + (1 / self.batch_size_ if shrinks_to_one else 0.0)
        if self.learns_intercept:
            self.B_ = effects.pop(0)

    def _transitions(self, runs: Runs) -> tuple[scipy.sparse.csr_array, np.ndarray, np.ndarray]:
        """Weights ``[rows, train]`` between two readings, and the losses ``[rows, test]`` before and after.

        Where every step was read that is a row per update. Additive effects of several steps add up; a slope's
        do not, so it cannot be learned from readings with gaps.
        """
        longest = max(run.steps for run in runs)
        weights, _ = _weights(runs.curricula, longest, self.batch_size_)
        gaps = [np.diff(run.times) for run in runs]
        if self.learns_slope and any((gap > 1).any() for gap in gaps):
            raise InvalidInput(
                f"{type(self).__name__} learns from losses at every step, and these runs were recorded with gaps: "
                "record with every=1, or fit an AdditiveSimulator"
            )
        rows = sum(len(gap) for gap in gaps)
        row_of_step = np.repeat(np.arange(rows), np.concatenate(gaps))
        steps = np.concatenate([row * longest + np.arange(r.times[0], r.times[-1]) for row, r in enumerate(runs)])
        which = scipy.sparse.csr_array((np.ones(len(steps)), (row_of_step, steps)), (rows, weights.shape[0]))
        between = which @ weights
        before = np.concatenate([run.losses[run.times[:-1]] for run in runs]).astype(np.float64)
        after = np.concatenate([run.losses[run.times[1:]] for run in runs]).astype(np.float64)
        updated = np.diff(between.indptr) > 0
        return between[np.flatnonzero(updated)], before[updated], after[updated]

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        alpha, beta = self.effects(curricula)
        losses = np.empty((len(curricula), alpha.shape[1] + 1, self.n_test_))
        losses[:, 0] = initial
        for step in range(alpha.shape[1]):
            losses[:, step + 1] = alpha[:, step] * losses[:, step] + beta[:, step]
        return losses


class AdditiveSimulator(MarkovSimulator):
    """``L_{t+1} = L_t + β(c_t)``: what an ideal TracIn could reach (Guu et al. 2023, section 3).

    Args:
        l2: penalty on the squared effects.

    >>> runs = Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> AdditiveSimulator(l2=1e-6).fit(runs).B_.round(3).ravel()
    array([-1. ,  0.5])
    """

    name = "additive"
    learns_slope = False
    learns_intercept = True

    def __init__(self, l2: float = 1.0) -> None:
        self.l2 = l2


class MultiplicativeSimulator(MarkovSimulator):
    """``L_{t+1} = α(c_t) · L_t`` (Guu et al. 2023, section 3).

    Args:
        l2: penalty on the squared effects.
        prior: "identity" shrinks to α = 1 (nothing learned, nothing changes); "zero", the paper's, to α = 0.

    >>> runs = Runs.from_arrays([[[0], [1], [0]]], [[[4.0], [2.0], [3.0], [1.5]]])
    >>> MultiplicativeSimulator(l2=1e-6).fit(runs).A_.round(3).ravel()
    array([0.5, 1.5])
    """

    name = "multiplicative"
    learns_slope = True
    learns_intercept = False

    def __init__(self, l2: float = 1.0, prior: str = "identity") -> None:
        self.l2 = l2
        self.prior = prior


class LinearSimulator(MarkovSimulator):
    """``L_{t+1} = α(c_t) · L_t + β(c_t)`` (Guu et al. 2023, equations 1–3).

    Args:
        l2: penalty on the squared effects.
        prior: "identity" shrinks to α = 1 (nothing learned, nothing changes); "zero", the paper's, to α = 0.

    >>> rng = np.random.default_rng(0)
    >>> curricula = [rng.integers(3, size=(50, 1)) for _ in range(4)]
    >>> losses = np.cumsum(rng.normal(size=(4, 51, 2)), axis=1)
    >>> LinearSimulator(l2=0.1).fit(Runs.from_arrays(curricula, losses)).A_.shape
    (3, 2)
    """

    name = "linear"
    learns_slope = True
    learns_intercept = True

    def __init__(self, l2: float = 1.0, prior: str = "identity") -> None:
        self.l2 = l2
        self.prior = prior


def usual_batch_size(curricula: Sequence[Curriculum]) -> int:
    """The most frequent size of a batch that is not empty."""
    sizes = np.concatenate([curriculum.sizes for curriculum in curricula])
    return int(np.bincount(sizes[sizes > 0]).argmax())


def _weights(
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
