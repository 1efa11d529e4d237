"""L2-regularised least squares for all test examples at once.

With the weights ``w`` [rows, train] of the batches, shared by all test examples, their centre ``c`` [train], and for
each channel k a multiplier ``v_k`` [rows, test], minimise for every test example z

    Σ_r ( y_rz − d_rz a_z − Σ_k v_k,rz Σ_i (w_ri − c_i) x_k,iz )² + l2 Σ_k,i x_k,iz²

where ``a_z``, the coefficient of the column d, is not penalised. The simulators differ in their channels only: the
previous loss for effects on the slope, 1 for additive ones. The normal equations' matrices of different test examples
share the batches' sparsity, and are either factorised or solved by conjugate gradients, whichever costs less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import scipy.sparse
from jaxtyping import Float

from simfluence.errors import SimfluenceError

Multiplier = Float[np.ndarray, "rows test"] | None  # None is 1 everywhere
Solution = Float[np.ndarray, "channels train test"]

#: Entries of the normal matrices held at a time by the direct method: 400 MB in float64.
_DIRECT_ENTRIES = 50_000_000
# Rough throughputs of the two methods on one core, used only to choose between them.
_DENSE_FLOPS = 1e10
_SPARSE_FLOPS = 1e9
_TYPICAL_ITERATIONS = 60


@dataclass(frozen=True)
class Problem:
    """What is to be fitted.

    Args:
        weights: sparse ``[rows, train]``.
        multipliers: for each channel ``[rows, test]``, or None for 1.
        targets: ``[rows, test]``.
        centre: subtracted from every row of the weights, ``[train]``; nothing by default.
        free: the column with a coefficient that is not penalised, ``[rows, test]``; none by default.
    """

    weights: scipy.sparse.csr_array
    multipliers: Sequence[Multiplier]
    targets: np.ndarray
    centre: np.ndarray | None = None
    free: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, training examples, test examples."""
        return len(self.multipliers), self.weights.shape[1], self.targets.shape[1]

    @property
    def is_shared(self) -> bool:
        """Whether all test examples have the same normal matrix."""
        return self.free is None and all(multiplier is None for multiplier in self.multipliers)

    def predict(self, solution: np.ndarray) -> np.ndarray:
        """What ``solution`` says of the targets, ``[rows, test]``, without the free column."""
        parts = (
            _times(multiplier, self.weights @ x - (0.0 if self.centre is None else self.centre @ x))
            for multiplier, x in zip(self.multipliers, solution, strict=True)
        )
        return np.sum(list(parts), axis=0)

    def transposed(self, values: np.ndarray) -> np.ndarray:
        """The transpose of ``predict`` applied to ``[rows, test]``: ``[channels, train, test]``."""
        return np.stack([self._sums(_times(multiplier, values)) for multiplier in self.multipliers])

    def projected(self, values: np.ndarray) -> np.ndarray:
        """``[rows, test]`` without its part along the free column: what a free coefficient cannot explain."""
        return values if self.free is None else values - self.free * self.free_part(values)

    def free_part(self, values: np.ndarray) -> np.ndarray:
        """The coefficient ``[test]`` of the free column that explains most of ``[rows, test]``."""
        if self.free is None:
            return np.zeros(values.shape[1])
        return _ratio((self.free * values).sum(0), (self.free**2).sum(0))

    def diagonal(self) -> np.ndarray:
        """Of the normal matrices, without the free column: ``[channels, train, test]``."""
        squares, tests = self.weights.power(2).T, self.targets.shape[1]
        rows = [np.ones((self.weights.shape[0], tests)) if m is None else m**2 for m in self.multipliers]
        if self.centre is None:
            return np.stack([squares @ row for row in rows])
        c = self.centre[:, None]
        return np.stack([squares @ row - 2 * c * (self.weights.T @ row) + c**2 * row.sum(0) for row in rows])

    def _sums(self, values: np.ndarray) -> np.ndarray:
        """Over rows, of centred weights times ``[rows, test]``: ``[train, test]``."""
        sums = self.weights.T @ values
        return sums if self.centre is None else sums - np.outer(self.centre, values.sum(0))

    def normal_matrices(self, pairs: scipy.sparse.csc_array, some: slice, l2: float) -> np.ndarray:
        """Normal matrices ``[test, channels · train, channels · train]`` of ``some`` of the test examples."""
        channels, train, _ = self.shape
        tests = some.stop - some.start
        rows = self.weights.shape[0]
        chosen = [np.ones((rows, tests)) if m is None else m[:, some] for m in self.multipliers]
        matrices = np.empty((tests, channels, train, channels, train))
        for k in range(channels):
            for other in range(k + 1):
                gram = self._gram(pairs, chosen[k] * chosen[other])  # symmetric
                matrices[:, k, :, other] = matrices[:, other, :, k] = gram
        matrices = matrices.reshape(tests, channels * train, channels * train)
        if self.free is not None:
            d = self.free[:, some]
            along = np.stack([self._sums(v * d) for v in chosen]).reshape(channels * train, tests).T
            scaled = along * _ratio(np.ones(tests), (d**2).sum(0))[:, None]
            matrices -= along[:, :, None] * scaled[:, None, :]
        diagonal = np.arange(channels * train)
        matrices[:, diagonal, diagonal] += l2
        return matrices

    def _gram(self, pairs: scipy.sparse.csc_array, values: np.ndarray) -> np.ndarray:
        """Σ_r values_rz (w_r − c)(w_r − c)ᵀ for each test example, ``[test, train, train]``."""
        train, tests = self.weights.shape[1], values.shape[1]
        gram = (pairs.T @ values).reshape(train, train, tests).transpose(2, 0, 1)
        if self.centre is None:
            return gram
        sums = (self.weights.T @ values).T  # [test, train]
        cross = sums[:, :, None] * self.centre
        total = values.sum(0)[:, None, None] * np.outer(self.centre, self.centre)
        return gram - cross - cross.swapaxes(1, 2) + total


def ridge(problem: Problem, l2: float) -> Solution:
    """The minimiser ``[channels, train, test]`` in float64, by whichever method is cheaper.

    Args:
        problem: what to fit.
        l2: penalty, above 0; it is added to sums over rows, not to means.
    """
    channels, train, tests = problem.shape
    direct = (1 if problem.is_shared else tests) * (channels * train) ** 3 / 3 / _DENSE_FLOPS
    iterative = _TYPICAL_ITERATIONS * 8 * channels * problem.weights.nnz * tests / _SPARSE_FLOPS
    return (ridge_direct if direct < iterative else ridge_iterative)(problem, l2)


def ridge_direct(problem: Problem, l2: float) -> Solution:
    """``ridge`` by Cholesky factorisation of each test example's normal matrix."""
    channels, train, tests = problem.shape
    right = problem.transposed(problem.projected(problem.targets)).reshape(channels * train, tests)
    pairs = _row_pairs(problem.weights)
    if problem.is_shared:
        matrix = problem.normal_matrices(pairs, slice(0, 1), l2)[0]
        return scipy.linalg.solve(matrix, right, assume_a="pos").reshape(channels, train, tests)
    solution = np.empty_like(right)
    step = max(1, _DIRECT_ENTRIES // (channels * train) ** 2)
    for start in range(0, tests, step):
        some = slice(start, min(start + step, tests))
        for offset, matrix in enumerate(problem.normal_matrices(pairs, some, l2)):
            solution[:, start + offset] = scipy.linalg.solve(matrix, right[:, start + offset], assume_a="pos")
    return solution.reshape(channels, train, tests)


def ridge_iterative(problem: Problem, l2: float, tolerance: float = 1e-10) -> Solution:
    """``ridge`` by conjugate gradients with a Jacobi preconditioner, one recurrence per test example.

    Raises:
        SimfluenceError: the relative residual is still above ``tolerance`` after 20 · unknowns iterations.
    """
    channels, train, _ = problem.shape
    solution = np.zeros(problem.shape)
    residual = problem.transposed(problem.projected(problem.targets))  # [channels, train, test], as all vectors here
    goal = tolerance * np.sqrt((residual**2).sum((0, 1)))
    scale = 1 / (problem.diagonal() + l2)
    direction = scale * residual
    slope = (residual * direction).sum((0, 1))  # [test]
    for _ in range(20 * channels * train):
        if np.all(np.sqrt((residual**2).sum((0, 1))) <= goal):
            return solution
        image = problem.transposed(problem.projected(problem.predict(direction))) + l2 * direction
        length = _ratio(slope, (direction * image).sum((0, 1)))
        solution += length * direction
        residual -= length * image
        scaled = scale * residual
        new_slope = (residual * scaled).sum((0, 1))
        direction = scaled + _ratio(new_slope, slope) * direction
        slope = new_slope
    raise SimfluenceError(f"conjugate gradients did not converge to {tolerance:g}; a larger l2 than {l2:g} would help")


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
    """0 where a test example's system is solved exactly and nothing is left to divide."""
    return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0)


def _times(multiplier: Multiplier, values: np.ndarray) -> np.ndarray:
    return values if multiplier is None else multiplier * values


def _row_pairs(weights: scipy.sparse.csr_array) -> scipy.sparse.csc_array:
    """``w_ri · w_rj`` for every row r and pair (i, j), sparse ``[rows, train · train]``.

    Its transpose times any ``[rows, test]`` gives that many weighted Gram matrices in one sparse product.
    """
    rows, train = weights.shape
    lengths = np.diff(weights.indptr)
    row_of = np.repeat(np.arange(rows), lengths)  # of each stored entry
    partners = lengths[row_of]
    left = np.repeat(np.arange(weights.nnz), partners)
    within = np.arange(len(left)) - np.repeat(np.cumsum(partners) - partners, partners)
    right = np.repeat(weights.indptr[row_of], partners) + within
    columns = weights.indices[left].astype(np.int64) * train + weights.indices[right]
    products = weights.data[left] * weights.data[right]
    return scipy.sparse.csc_array((products, (row_of[left], columns)), (rows, train * train))
