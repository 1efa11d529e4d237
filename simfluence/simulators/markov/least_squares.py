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


@dataclass(frozen=True)
class Lazy:
    """``[rows, test]`` that is computed for a block of test examples when it is needed, and never held whole.

    Args:
        shape: rows and test examples.
        columns: gives ``[rows, block]`` for a slice of the test examples.

    >>> after = np.array([[3.0, 4.0, 5.0]])
    >>> Lazy(after.shape, lambda some: after[:, some] - 1)[:, 1:]
    array([[3., 4.]])
    """

    shape: tuple[int, ...]
    columns: Callable[[slice], np.ndarray]

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        rows, some = index
        return self.columns(some)[rows]


Columns = Float[np.ndarray, "rows test"] | Lazy
Multiplier = Columns | None  # None is 1 everywhere


@dataclass(frozen=True)
class Problem:
    """What is to be fitted. Columns may be of any float type, memory-mapped or ``Lazy``.

    Args:
        weights: sparse ``[rows, train]``.
        multipliers: for each channel ``[rows, test]``, or None for 1.
        targets: ``[rows, test]``.
        centre: subtracted from every row of the weights, ``[train]``; nothing by default.
        free: columns ``[rows, test]`` whose coefficients are not penalised; none by default.
    """

    weights: scipy.sparse.csr_array
    multipliers: Sequence[Multiplier]
    targets: Columns
    centre: np.ndarray | None = None
    free: Sequence[Columns] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, training examples, test examples."""
        return len(self.multipliers), self.weights.shape[1], self.targets.shape[1]

    @property
    def is_shared(self) -> bool:
        """Whether all test examples have the same normal matrix, but for their L2."""
        return not self.free and all(multiplier is None for multiplier in self.multipliers)

    def block(self, some: slice) -> Problem:
        """The problem of some of the test examples."""
        count = some.stop - some.start

        def part(columns: Columns) -> Lazy:
            def taken(of: slice) -> np.ndarray:
                start, stop, _ = of.indices(count)
                return columns[:, some.start + start : some.start + stop]

            return Lazy((columns.shape[0], count), taken)

        multipliers = [None if multiplier is None else part(multiplier) for multiplier in self.multipliers]
        free = [part(columns) for columns in self.free]
        return Problem(self.weights, multipliers, part(self.targets), self.centre, free)


class SharedWeights:
    """The centred weights on the device, with their transpose; shared by all blocks."""

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
        """``[rows, k]`` of ``[train, k]``."""
        product = x.new_empty(self.weights.shape[0], x.shape[1]).addmm_(self.weights, x, beta=0)
        return product if self.centre is None else product.sub_(self.centre.T @ x)

    def sums(self, values: torch.Tensor) -> torch.Tensor:
        """The transpose: ``[train, k]`` of ``[rows, k]``."""
        product = values.new_empty(self.transpose.shape[0], values.shape[1]).addmm_(self.transpose, values, beta=0)
        return product if self.centre is None else product.sub_(self.centre * values.sum(0))

    def sums_of_squares(self, values: torch.Tensor) -> torch.Tensor:
        """Σ_r (w_ri − c_i)² of ``[rows, k]``: ``[train, k]``."""
        product = self.squares @ values
        if self.centre is None:
            return product
        return product + self.centre * (self.centre * values.sum(0) - 2 * (self.transpose @ values))

    def gram(self, values: torch.Tensor) -> torch.Tensor:
        """Σ_r (w_r − c)(w_r − c)ᵀ of ``[rows, k]``: ``[k, train, train]``."""
        train = self.transpose.shape[0]
        gram = (self.pairs @ values).T.reshape(-1, train, train)
        if self.centre is None:
            return gram
        cross = (self.transpose @ values).T[:, :, None] * self.centre.T
        return gram - cross - cross.mT + values.sum(0)[:, None, None] * (self.centre @ self.centre.T)


class Block:
    """The least-squares problem of ``some`` test examples, in tensors."""

    def __init__(self, problem: Problem, batches: SharedWeights, some: slice) -> None:
        self.some, self.batches = some, batches
        self.tests = some.stop - some.start
        self.multipliers = [None if m is None else self.tensor(m[:, some]) for m in problem.multipliers]
        self.targets = self.tensor(problem.targets[:, some])
        self.free, self.triangle = _orthonormal([self.tensor(column[:, some]) for column in problem.free])
        self.is_shared = problem.is_shared

    def tensor(self, values: np.ndarray) -> torch.Tensor:
        copied = np.array(values, np.float64, order="C")  # as columns of an array, or read-only, they are of no use
        return torch.as_tensor(copied, device=self.batches.device)

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """What ``[channels, train, block]`` says of the targets, ``[rows, block]``, without the free columns."""
        values = torch.empty(0)
        for k in reversed(range(len(x))):  # the channel without a multiplier comes last, and costs least as a start
            product, multiplier = self.batches.times(x[k]), self.multipliers[k]
            if k == len(x) - 1:
                values = product if multiplier is None else product.mul_(multiplier)
            else:
                values = values.add_(product) if multiplier is None else values.addcmul_(product, multiplier)
        return values

    def transposed(self, values: torch.Tensor) -> torch.Tensor:
        """The transpose of ``predict``: ``[channels, train, block]`` of ``[rows, block]``."""
        return torch.stack([self.batches.sums(values if m is None else m * values) for m in self.multipliers])

    def projected(self, values: torch.Tensor) -> torch.Tensor:
        """``[rows, block]`` without what the free columns explain."""
        for column in self.free:
            values = values - column * (column * values).sum(0)
        return values

    def free_part(self, values: torch.Tensor) -> torch.Tensor:
        """The free columns' coefficients that explain most of ``[rows, block]``: ``[free, block]``."""
        coefficients = values.new_zeros(len(self.free), self.tests)
        for j in reversed(range(len(self.free))):
            above = (self.triangle[j, j + 1 :] * coefficients[j + 1 :]).sum(0)
            coefficients[j] = ((self.free[j] * values).sum(0) - above) / self.triangle[j, j]
        return coefficients

    def right(self) -> torch.Tensor:
        """The normal equations' right-hand side, ``[channels, train, block]``."""
        return self.transposed(self.projected(self.targets))

    def normal(self, x: torch.Tensor) -> torch.Tensor:
        """The normal matrices, without the penalty, times ``[channels, train, block]``."""
        return self.transposed(self.projected(self.predict(x)))

    def products(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """For each pair of channels the product of their multipliers, ``[rows, block]``; one column where shared."""
        ones = self.targets.new_ones(len(self.targets), 1 if self.is_shared else self.tests)
        columns = [ones if m is None else m for m in self.multipliers]
        for k, left in enumerate(columns):
            for other, right in enumerate(columns[: k + 1]):
                yield k, other, left * right

    def channel_matrices(self) -> torch.Tensor:
        """The normal matrices' blocks of each training example, ``[channels, channels, train, block]``, as if no
        column were free: a few columns take little from each of many examples."""
        channels, train = len(self.multipliers), self.batches.transpose.shape[0]
        matrices = self.targets.new_empty(channels, channels, train, self.tests)
        for k, other, product in self.products():
            matrices[k, other] = matrices[other, k] = self.batches.sums_of_squares(product)
        return matrices

    def normal_matrices(self) -> torch.Tensor:
        """``[block, channels · train, channels · train]``, or ``[1, …]`` where all are the same."""
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
    """Gram and Schmidt's, for each test example: orthonormal columns in place of those given, ``[rows, block]``, and
    the triangle ``[free, free, block]`` that makes the given ones of them. A column that depends on those before it
    becomes 0, with 1 on the diagonal, so that its coefficient is 0."""
    found: list[torch.Tensor] = []
    triangle = (
        torch.stack([torch.zeros_like(column[: len(columns)]) for column in columns]) if columns else torch.empty(0)
    )
    for j, column in enumerate(columns):
        rest = column
        for _ in range(2):  # once is not enough where columns nearly depend on each other
            for i, other in enumerate(found):
                along = (other * rest).sum(0)
                triangle[i, j] += along
                rest = rest - other * along
        length = rest.norm(dim=0)
        depends = length <= 1e-12 * column.norm(dim=0)
        triangle[j, j] = torch.where(depends, 1.0, length)
        found.append(torch.where(depends, 0.0, rest / triangle[j, j]))
    return found, triangle


def sparse_tensor(matrix: scipy.sparse.csr_array, device: Any = "cpu") -> torch.Tensor:
    """``matrix`` as a tensor of compressed rows in double precision."""
    indices = torch.as_tensor(matrix.indptr.astype(np.int32)), torch.as_tensor(matrix.indices.astype(np.int32))
    values = torch.as_tensor(matrix.data.astype(np.float64))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Ss]parse")  # that its interface may still change
        return torch.sparse_csr_tensor(*indices, values, matrix.shape).to(device)


def _row_pairs(weights: scipy.sparse.csr_array) -> scipy.sparse.csr_array:
    """``w_ri · w_rj`` for every pair (i, j) and row r, sparse ``[train · train, rows]``.

    Times any ``[rows, test]`` it gives that many weighted Gram matrices in one sparse product.
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
