"""Least-squares problems of many test examples that share sparse weights, in tensors and block by block."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float

__all__ = ["Block", "Columns", "Lazy", "Multiplier", "Problem", "SharedWeights", "sparse_tensor"]


@dataclass(frozen=True)
class Lazy:
    """An array ``[rows, test]`` that is computed block by block when it is needed, and never stored whole.

    Args:
        shape: numbers of rows and test examples.
        columns: function that returns ``[rows, block]`` for a slice of the test examples.

    >>> after = np.array([[3.0, 4.0, 5.0]])
    >>> Lazy(after.shape, lambda span: after[:, span] - 1)[:, 1:]
    array([[3., 4.]])
    """

    shape: tuple[int, ...]
    columns: Callable[[slice], np.ndarray]

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, span = index
        return self.columns(span)[rows]


Columns = Float[np.ndarray, "rows test"] | Lazy
Multiplier = Columns | None  # None is 1 everywhere


@dataclass(frozen=True)
class Problem:
    """Least-squares problem of every test example. Columns may be of any float type, memory-mapped or ``Lazy``.

    Args:
        weights: sparse ``[rows, train]``.
        multipliers: one for each channel, ``[rows, test]``, or None for 1.
        targets: ``[rows, test]``.
        centre: vector that is subtracted from every row of the weights, ``[train]``; by default none.
        free: columns ``[rows, test]`` whose coefficients are not penalised; by default none.
    """

    weights: scipy.sparse.csr_array
    multipliers: Sequence[Multiplier]
    targets: Columns
    centre: np.ndarray | None = None
    free: Sequence[Columns] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of channels, training examples and test examples."""
        return len(self.multipliers), self.weights.shape[1], self.targets.shape[1]

    @property
    def is_shared(self) -> bool:
        """Whether all test examples have the same normal matrix, apart from their L2."""
        return not self.free and all(multiplier is None for multiplier in self.multipliers)

    def block(self, span: slice) -> Problem:
        """Return the problem of a slice of the test examples."""
        count = span.stop - span.start

        def part(columns: Columns) -> Lazy:
            def sliced(inner: slice) -> np.ndarray:
                start, stop, _ = inner.indices(count)
                return columns[:, span.start + start : span.start + stop]

            return Lazy((columns.shape[0], count), sliced)

        multipliers = [None if multiplier is None else part(multiplier) for multiplier in self.multipliers]
        free = [part(columns) for columns in self.free]
        return Problem(self.weights, multipliers, part(self.targets), self.centre, free)


class SharedWeights:
    """The centred weights on the device, with their transpose, shared by all blocks."""

    def __init__(self, problem: Problem, device: Any, with_pairs: bool = False) -> None:
        transpose = problem.weights.T.tocsr()
        self.device = device
        self.weights = sparse_tensor(problem.weights, device)  # [rows, train]
        self.transpose = sparse_tensor(transpose, device)  # [train, rows]
        self.squares = sparse_tensor(transpose.power(2), device)
        self.pairs = sparse_tensor(_row_pairs(problem.weights) if with_pairs else transpose[:0], device)
        self.centre = None  # [train, 1]
        if problem.centre is not None:
            self.centre = torch.as_tensor(problem.centre, dtype=torch.float64, device=device)[:, None]

    def times(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply the centred weights by ``[train, k]``: ``[rows, k]``."""
        product = x.new_empty(self.weights.shape[0], x.shape[1]).addmm_(self.weights, x, beta=0)
        return product if self.centre is None else product.sub_(self.centre.T @ x)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """Multiply the transposed centred weights by ``[rows, k]``: ``[train, k]``."""
        product = values.new_empty(self.transpose.shape[0], values.shape[1]).addmm_(self.transpose, values, beta=0)
        return product if self.centre is None else product.sub_(self.centre * values.sum(0))

    def sums_of_squares(self, values: torch.Tensor) -> torch.Tensor:
        """Return Σ_r (w_ri − c_i)² v_r for ``[rows, k]``: ``[train, k]``."""
        product = self.squares @ values
        if self.centre is None:
            return product
        return product + self.centre * (self.centre * values.sum(0) - 2 * (self.transpose @ values))

    def gram(self, values: torch.Tensor) -> torch.Tensor:
        """Return Σ_r (w_r − c)(w_r − c)ᵀ v_r for ``[rows, k]``: ``[k, train, train]``."""
        train = self.transpose.shape[0]
        gram = (self.pairs @ values).T.reshape(-1, train, train)
        if self.centre is None:
            return gram
        cross = (self.transpose @ values).T[:, :, None] * self.centre.T
        return gram - cross - cross.mT + values.sum(0)[:, None, None] * (self.centre @ self.centre.T)


class Block:
    """The least-squares problem of a slice of the test examples, in tensors."""

    def __init__(self, problem: Problem, batches: SharedWeights, span: slice) -> None:
        self.span, self.batches = span, batches
        self.tests = span.stop - span.start
        self.multipliers = [None if m is None else self.tensor(m[:, span]) for m in problem.multipliers]
        self.targets = self.tensor(problem.targets[:, span])
        self.free, self.triangle = _orthonormal([self.tensor(column[:, span]) for column in problem.free])
        self.is_shared = problem.is_shared

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        copied = np.array(values, np.float64, order="C")  # tensors need contiguous, writable memory
        return torch.as_tensor(copied, device=self.batches.device)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Predict the targets ``[rows, block]`` from ``[channels, train, block]``, without the free columns."""
        values = torch.empty(0)
        for k in reversed(range(len(x))):  # the last channel has no multiplier, and costs least as the start
            product, multiplier = self.batches.times(x[k]), self.multipliers[k]
            if k == len(x) - 1:
                values = product if multiplier is None else product.mul_(multiplier)
            else:
                values = values.add_(product) if multiplier is None else values.addcmul_(product, multiplier)
        return values

    def transposed(self, values: torch.Tensor) -> torch.Tensor:
        """Apply the transpose of ``predict`` to ``[rows, block]``: ``[channels, train, block]``."""
        return torch.stack([self.batches.sums(values if m is None else m * values) for m in self.multipliers])

    def projected(self, values: torch.Tensor) -> torch.Tensor:
        """Project the free columns out of ``[rows, block]``."""
        for column in self.free:
            values = values - column * (column * values).sum(0)
        return values

    def free_part(self, values: torch.Tensor) -> torch.Tensor:
        """Return the free columns' least-squares coefficients for ``[rows, block]``: ``[free, block]``."""
        coefficients = values.new_zeros(len(self.free), self.tests)
        for j in reversed(range(len(self.free))):
            later = (self.triangle[j, j + 1 :] * coefficients[j + 1 :]).sum(0)
            coefficients[j] = ((self.free[j] * values).sum(0) - later) / self.triangle[j, j]
        return coefficients

    def right(self) -> torch.Tensor:
        """Return the normal equations' right-hand side, ``[channels, train, block]``."""
        return self.transposed(self.projected(self.targets))

    def normal(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply the normal matrices, without the penalty, by ``[channels, train, block]``."""
        return self.transposed(self.projected(self.predict(x)))

    def products(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield the product of each pair of channels' multipliers, ``[rows, block]``; one column if shared."""
        ones = self.targets.new_ones(len(self.targets), 1 if self.is_shared else self.tests)
        columns = [ones if m is None else m for m in self.multipliers]
        for k, left in enumerate(columns):
            for other, right in enumerate(columns[: k + 1]):
                yield k, other, left * right

    def channel_matrices(self) -> torch.Tensor:
        """Return the normal matrices' blocks of each training example, ``[channels, channels, train, block]``.

        The free columns are ignored: a few columns change little for each of many examples.
        """
        channels, train = len(self.multipliers), self.batches.transpose.shape[0]
        matrices = self.targets.new_empty(channels, channels, train, self.tests)
        for k, other, product in self.products():
            matrices[k, other] = matrices[other, k] = self.batches.sums_of_squares(product)
        return matrices

    def normal_matrices(self) -> torch.Tensor:
        """Return ``[block, channels · train, channels · train]``, or ``[1, …]`` if all are the same."""
        channels, train = len(self.multipliers), self.batches.transpose.shape[0]
        count = 1 if self.is_shared else self.tests
        matrices = self.targets.new_empty(count, channels, train, channels, train)
        for k, other, product in self.products():
            matrices[:, k, :, other] = matrices[:, other, :, k] = self.batches.gram(product)
        matrices = matrices.reshape(count, channels * train, channels * train)
        for column in self.free:
            along = self.transposed(column).flatten(0, 1).T  # [block, channels · train]
            matrices -= along[:, :, None] * along[:, None]
        return matrices


def _orthonormal(columns: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Orthonormalise the columns ``[rows, block]`` by Gram–Schmidt: their QR decomposition for each test example.

    R is a triangle ``[free, free, block]``. A column that depends on earlier ones becomes 0, with 1 on R's diagonal, so
    that its coefficient is 0.
    """
    basis: list[torch.Tensor] = []
    triangle = (
        torch.stack([torch.zeros_like(column[: len(columns)]) for column in columns]) if columns else torch.empty(0)
    )
    for j, column in enumerate(columns):
        residual = column
        for _ in range(2):  # once is not enough where columns nearly depend on each other
            for i, unit in enumerate(basis):
                along = (unit * residual).sum(0)
                triangle[i, j] += along
                residual = residual - unit * along
        length = residual.norm(dim=0)
        depends = length <= 1e-12 * column.norm(dim=0)
        triangle[j, j] = torch.where(depends, 1.0, length)
        basis.append(torch.where(depends, 0.0, residual / triangle[j, j]))
    return basis, triangle


def sparse_tensor(matrix: scipy.sparse.csr_array, device: Any = "cpu") -> torch.Tensor:
    """Return ``matrix`` as a tensor of compressed rows in double precision."""
    indices = torch.as_tensor(matrix.indptr.astype(np.int32)), torch.as_tensor(matrix.indices.astype(np.int32))
    values = torch.as_tensor(matrix.data.astype(np.float64))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse")  # "its interface may change"
        return torch.sparse_csr_tensor(*indices, values, matrix.shape).to(device)


def _row_pairs(weights: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """Return ``w_ri · w_rj`` for every pair (i, j) and row r, sparse ``[train · train, rows]``.

    Its product with ``[rows, test]`` gives one weighted Gram matrix per test example.
    """
    rows, train = weights.shape
    lengths = np.diff(weights.indptr)
    row_of = np.repeat(np.arange(rows), lengths)  # of each stored entry
    partners = lengths[row_of]
    left = np.repeat(np.arange(weights.nnz), partners)
    within = np.arange(len(left)) - np.repeat(np.cumsum(partners) - partners, partners)
    right = np.repeat(weights.indptr[row_of], partners) + within
    pairs = weights.indices[left].astype(np.int64) * train + weights.indices[right]
    products = weights.data[left] * weights.data[right]
    return scipy.sparse.csr_array((products, (pairs, row_of[left])), (train * train, rows))
