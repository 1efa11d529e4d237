"""L2-regularised least squares for all test examples at once.

With the weights ``w`` [rows, train] of the batches, shared by all test examples, and for each channel k a
multiplier ``v_k`` [rows, test], minimise for every test example z

    Σ_r ( y_rz − Σ_k v_k,rz Σ_i w_ri x_k,iz )² + l2 Σ_k,i x_k,iz².

The simulators differ in their channels only: the previous loss for effects on the slope, 1 for additive ones.
The normal equations' matrices of different test examples share the batches' sparsity, and are either
factorised or solved by conjugate gradients, whichever costs less.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def ridge(
    weights: scipy.sparse.csr_array, multipliers: Sequence[Multiplier], targets: np.ndarray, l2: float
) -> Solution:
    """The minimiser ``[channels, train, test]`` in float64, by whichever method is cheaper.

    Args:
        weights: sparse ``[rows, train]``.
        multipliers: for each channel ``[rows, test]``, or None for 1.
        targets: ``[rows, test]``.
        l2: penalty, above 0; it is added to sums over rows, not to means.
    """
    size, tests = len(multipliers) * weights.shape[1], targets.shape[1]
    systems = 1 if all(multiplier is None for multiplier in multipliers) else tests
    direct = systems * size**3 / 3 / _DENSE_FLOPS
    iterative = _TYPICAL_ITERATIONS * 8 * len(multipliers) * weights.nnz * tests / _SPARSE_FLOPS
    method = ridge_direct if direct < iterative else ridge_iterative
    return method(weights, multipliers, targets.astype(np.float64), l2)


def ridge_direct(
    weights: scipy.sparse.csr_array, multipliers: Sequence[Multiplier], targets: np.ndarray, l2: float
) -> Solution:
    """``ridge`` by Cholesky factorisation of each test example's normal matrix."""
    train, tests, channels = weights.shape[1], targets.shape[1], len(multipliers)
    right = _transposed(weights, multipliers, targets).reshape(channels * train, tests)
    pairs = _row_pairs(weights)
    if all(multiplier is None for multiplier in multipliers):
        matrix = _normal_matrices(pairs, multipliers, train, slice(0, 1), l2)[0]
        return scipy.linalg.solve(matrix, right, assume_a="pos").reshape(channels, train, tests)
    solution = np.empty_like(right)
    step = max(1, _DIRECT_ENTRIES // (channels * train) ** 2)
    for start in range(0, tests, step):
        some = slice(start, min(start + step, tests))
        for offset, matrix in enumerate(_normal_matrices(pairs, multipliers, train, some, l2)):
            solution[:, start + offset] = scipy.linalg.solve(matrix, right[:, start + offset], assume_a="pos")
    return solution.reshape(channels, train, tests)


def ridge_iterative(
    weights: scipy.sparse.csr_array,
    multipliers: Sequence[Multiplier],
    targets: np.ndarray,
    l2: float,
    tolerance: float = 1e-10,
) -> Solution:
    """``ridge`` by conjugate gradients with a Jacobi preconditioner, one recurrence per test example.

    Raises:
        SimfluenceError: the relative residual is still above ``tolerance`` after 20 · unknowns iterations.
    """
    solution = np.zeros((len(multipliers), weights.shape[1], targets.shape[1]))
    residual = _transposed(weights, multipliers, targets)  # [channels, train, test], as all vectors here
    goal = tolerance * np.sqrt((residual**2).sum((0, 1)))
    scale = 1 / (_diagonal(weights, multipliers, targets.shape[1]) + l2)
    direction = scale * residual
    slope = (residual * direction).sum((0, 1))  # [test]
    for _ in range(20 * weights.shape[1] * len(multipliers)):
        if np.all(np.sqrt((residual**2).sum((0, 1))) <= goal):
            return solution
        image = _transposed(weights, multipliers, _forward(weights, multipliers, direction)) + l2 * direction
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


def _forward(weights: scipy.sparse.csr_array, multipliers: Sequence[Multiplier], vectors: np.ndarray) -> np.ndarray:
    """Predictions ``[rows, test]``."""
    parts = (_times(multiplier, weights @ vector) for multiplier, vector in zip(multipliers, vectors, strict=True))
    return np.sum(list(parts), axis=0)


def _transposed(weights: scipy.sparse.csr_array, multipliers: Sequence[Multiplier], errors: np.ndarray) -> np.ndarray:
    """The transpose of ``_forward`` applied to ``[rows, test]``."""
    return np.stack([weights.T @ _times(multiplier, errors) for multiplier in multipliers])


def _diagonal(weights: scipy.sparse.csr_array, multipliers: Sequence[Multiplier], tests: int) -> np.ndarray:
    squares = weights.power(2).T
    ones = np.ones((weights.shape[0], tests))
    return np.stack([squares @ (ones if m is None else m.astype(np.float64) ** 2) for m in multipliers])


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


def _normal_matrices(
    pairs: scipy.sparse.csc_array, multipliers: Sequence[Multiplier], train: int, some: slice, l2: float
) -> np.ndarray:
    """Normal matrices ``[test, channels · train, channels · train]`` of ``some`` of the test examples."""
    channels, tests = len(multipliers), some.stop - some.start
    matrices = np.empty((tests, channels, train, channels, train))
    chosen = [np.ones((pairs.shape[0], tests)) if m is None else m[:, some].astype(np.float64) for m in multipliers]
    for k in range(channels):
        for other in range(k + 1):
            gram = (pairs.T @ (chosen[k] * chosen[other])).reshape(train, train, tests).transpose(2, 0, 1)
            matrices[:, k, :, other] = matrices[:, other, :, k] = gram  # each gram matrix is symmetric
    matrices = matrices.reshape(tests, channels * train, channels * train)
    diagonal = np.arange(channels * train)
    matrices[:, diagonal, diagonal] += l2
    return matrices
