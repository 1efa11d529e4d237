"""The paper's simulators: a linear Markov process for each test example (Guu et al. 2023, arXiv 2303.08114).

    L_{t+1}(z) = α(c_t) · L_t(z) + β(c_t),    α(c) = Σ_{i∈c} w A_i(z),    β(c) = Σ_{i∈c} w B_i(z)

with ``w = B/|c|`` for a batch of size |c| and fitting runs of batch size B, so that effects are those of an
example in a full batch; at |c| = B this is the paper's equation. An empty batch is a step without an update.

    additive          α = 1
    multiplicative    β = 0
    linear            both

Around the mean trajectory m of the fitting runs (``around="mean"``, ours), effects are those of a batch that differs
from the usual one, with c̄ the mean weights of a fitting step:

    L_{t+1} − m_{t+1} = (1 + a)(L_t − m_t) + Σ_i (w_i − c̄_i)(A_i L_t + B_i)

where a, how deviations last, is not penalised. Beyond the longest fitting run m is held at its end. Rollouts stay
affine in the losses, with α = 1 + a + Σ (w − c̄) A and β = m_{t+1} − (1 + a) m_t + Σ (w − c̄) B.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import optuna
import scipy.sparse
from jaxtyping import Float

from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.runs import Runs
from simfluence.simulators.base import Simulator
from simfluence.simulators.baselines import mean_trajectory
from simfluence.simulators.solver import Multiplier, Problem, free_coefficients, ridge

PRIORS = ("identity", "zero")
AROUND = (None, "mean")
Effects = Float[np.ndarray, "runs steps test"]


class MarkovSimulator(Simulator):
    """The family's common part. Fits squared one-step errors from the true previous loss, plus ``l2`` times the
    squared parameters; simulates by rolling out from the losses before training.

    Attributes:
        A_, B_: effects on slope and intercept, ``[train, test]``; a fixed one is absent.
        batch_size_: the fitting runs' (the most frequent, if they have several).
        mean_, centre_, lasting_: around the mean only: m ``[steps + 1, test]``, c̄ ``[train]``, a ``[test]``.
    """

    l2: float
    prior: str = "identity"
    around: str | None
    learns_slope: ClassVar[bool]
    learns_intercept: ClassVar[bool]

    def effects(self, curricula: Sequence[Curriculum]) -> tuple[Effects, Effects]:
        """α and β of every step, each ``[runs, steps, test]``; steps after a curriculum's end are α=1, β=0."""
        self._check_fitted()
        longest = max(len(curriculum) for curriculum in curricula)
        shape = (len(curricula), longest, self.n_test_)
        weights, updates = _weights(curricula, longest, self.batch_size_)
        fixed_slope = np.full((len(updates), self.n_test_), 1.0 if self.around is None else 0.0)
        alpha = self._sums(weights, "A_") if self.learns_slope else fixed_slope
        beta = self._sums(weights, "B_") if self.learns_intercept else np.zeros_like(alpha)
        if self.around == "mean":
            times = np.minimum(np.arange(longest + 1), len(self.mean_) - 1)
            now, then = (np.tile(self.mean_[part], (len(curricula), 1)) for part in (times[:-1], times[1:]))
            alpha, beta = alpha + 1 + self.lasting_, beta + then - (1 + self.lasting_) * now
        still = ~updates[:, None]
        return np.where(still, 1.0, alpha).reshape(shape), np.where(still, 0.0, beta).reshape(shape)

    def _sums(self, weights: scipy.sparse.csr_array, name: str) -> np.ndarray:
        """Σ (w − c̄) of the effects ``name`` for each row, ``[rows, test]``."""
        effects = getattr(self, name)
        return weights @ effects - (self.centre_ @ effects if self.around == "mean" else 0.0)

    @classmethod
    def suggest(cls, trial: optuna.Trial) -> dict[str, Any]:
        found: dict[str, Any] = {"l2": trial.suggest_float("l2", 0.1, 1e5, log=True)}
        found["around"] = trial.suggest_categorical("around", AROUND)
        if cls.learns_slope and found["around"] is None:
            found["prior"] = trial.suggest_categorical("prior", PRIORS)
        return found

    def _check_parameters(self) -> None:
        if isinstance(self.l2, bool) or not isinstance(self.l2, int | float) or not self.l2 > 0:
            raise InvalidInput(f"l2 must be a number above 0, got {self.l2!r}")
        if self.prior not in PRIORS:
            raise InvalidInput(f"unknown prior {self.prior!r}, {did_you_mean(str(self.prior), PRIORS)}")
        if self.around not in AROUND:
            raise InvalidInput(f"around={self.around!r}: it can be None or 'mean'")
        if self.around == "mean" and self.prior != "identity":
            raise InvalidInput("prior says what α shrinks to; around='mean' shrinks to the mean trajectory: choose one")

    def _fit(self, runs: Runs) -> None:
        self.batch_size_ = usual_batch_size(runs.curricula)
        weights, before, after, times = self._transitions(runs)
        multipliers: list[Multiplier] = [before] if self.learns_slope else []
        multipliers += [None] if self.learns_intercept else []
        problem = Problem(weights, multipliers, after - before)
        prior_slope = 1 / self.batch_size_ if self.around is None else 0.0
        if self.around == "mean":
            self.mean_ = mean_trajectory(runs)
            self.centre_ = np.asarray(weights.mean(axis=0)).ravel()
            deviation = before - self.mean_[times]
            problem = Problem(
                weights, multipliers, after - self.mean_[times + 1] - deviation, self.centre_, [deviation]
            )
        elif self.prior == "zero" and self.learns_slope:
            problem, prior_slope = Problem(weights, multipliers, after), 0.0
        solution = ridge(problem, self.l2)
        if self.around == "mean":
            self.lasting_ = free_coefficients(problem, solution)[0]
        effects = list(solution)
        if self.learns_slope:
            self.A_ = effects.pop(0) + prior_slope
        if self.learns_intercept:
            self.B_ = effects.pop(0)

    def _transitions(self, runs: Runs) -> tuple[scipy.sparse.csr_array, np.ndarray, np.ndarray, np.ndarray]:
        """Weights ``[rows, train]`` between two readings, losses ``[rows, test]`` before and after, times before.

        Where every step was read that is a row per update. Additive effects of several steps add up; a slope's
        do not, so it cannot be learned from readings with gaps.
        """
        longest = max(run.steps for run in runs)
        weights, _ = _weights(runs.curricula, longest, self.batch_size_)
        gaps = [np.diff(run.times) for run in runs]
        if (self.learns_slope or self.around) and any((gap > 1).any() for gap in gaps):
            raise InvalidInput(
                f"{self} learns from losses at every step, and these runs were recorded with gaps: "
                "record with every=1, or fit AdditiveSimulator(around=None)"
            )
        rows = sum(len(gap) for gap in gaps)
        row_of_step = np.repeat(np.arange(rows), np.concatenate(gaps))
        steps = np.concatenate([row * longest + np.arange(r.times[0], r.times[-1]) for row, r in enumerate(runs)])
        which = scipy.sparse.csr_array((np.ones(len(steps)), (row_of_step, steps)), (rows, weights.shape[0]))
        between = which @ weights
        before = np.concatenate([run.losses[run.times[:-1]] for run in runs]).astype(np.float64)
        after = np.concatenate([run.losses[run.times[1:]] for run in runs]).astype(np.float64)
        times = np.concatenate([run.times[:-1] for run in runs])
        updated = np.diff(between.indptr) > 0
        return between[np.flatnonzero(updated)], before[updated], after[updated], times[updated]

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
        around: "mean" for effects around the mean trajectory of the fitting runs.

    >>> runs = Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> AdditiveSimulator(l2=1e-6).fit(runs).B_.round(3).ravel()
    array([-1. ,  0.5])
    """

    name = "additive"
    learns_slope = False
    learns_intercept = True

    def __init__(self, l2: float = 1.0, around: str | None = None) -> None:
        self.l2 = l2
        self.around = around


class MultiplicativeSimulator(MarkovSimulator):
    """``L_{t+1} = α(c_t) · L_t`` (Guu et al. 2023, section 3).

    Args:
        l2: penalty on the squared effects.
        prior: "identity" shrinks to α = 1 (nothing learned, nothing changes); "zero", the paper's, to α = 0.
        around: "mean" for effects around the mean trajectory of the fitting runs.

    >>> runs = Runs.from_arrays([[[0], [1], [0]]], [[[4.0], [2.0], [3.0], [1.5]]])
    >>> MultiplicativeSimulator(l2=1e-6).fit(runs).A_.round(3).ravel()
    array([0.5, 1.5])
    """

    name = "multiplicative"
    learns_slope = True
    learns_intercept = False

    def __init__(self, l2: float = 1.0, prior: str = "identity", around: str | None = None) -> None:
        self.l2 = l2
        self.prior = prior
        self.around = around


class LinearSimulator(MarkovSimulator):
    """``L_{t+1} = α(c_t) · L_t + β(c_t)`` (Guu et al. 2023, equations 1–3).

    Args:
        l2: penalty on the squared effects.
        prior: "identity" shrinks to α = 1 (nothing learned, nothing changes); "zero", the paper's, to α = 0.
        around: "mean" for effects around the mean trajectory of the fitting runs.

    >>> rng = np.random.default_rng(0)
    >>> curricula = [rng.integers(3, size=(50, 1)) for _ in range(4)]
    >>> losses = np.cumsum(rng.normal(size=(4, 51, 2)), axis=1)
    >>> LinearSimulator(l2=0.1).fit(Runs.from_arrays(curricula, losses)).A_.shape
    (3, 2)
    """

    name = "linear"
    learns_slope = True
    learns_intercept = True

    def __init__(self, l2: float = 1.0, prior: str = "identity", around: str | None = None) -> None:
        self.l2 = l2
        self.prior = prior
        self.around = around


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
