"""L2-regularised least squares for all test examples at once.

With the weights ``w`` [rows, train] of the batches, shared by all test examples, their centre ``c`` [train], and for
each channel k a multiplier ``v_k`` [rows, test], minimise for every test example z

    Σ_r ( y_rz − Σ_j f_j,rz a_jz − Σ_k v_k,rz Σ_i (w_ri − c_i) x_k,iz )² + l2_z Σ_k,i x_k,iz²

where ``a_j``, the coefficients of the free columns f_j, are not penalised: they are projected out. The simulators
differ in their channels only: the previous loss for effects on the slope, 1 for additive ones.

Test examples are solved in blocks, so that only a block's multipliers are in memory, by whichever costs less: Cholesky
factorisation of the normal matrices; conjugate gradients with a preconditioner that treats each training example's
channels together; or, for many L2 values, conjugate gradients that solve for all of them in the space spanned for the
smallest.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Float

from simfluence.errors import InvalidInput, SimfluenceError

Solution = Float[np.ndarray, "channels train test"]
SolutionPath = Float[np.ndarray, "path channels train test"]
Method = Literal["direct", "iterative"]

# Throughputs of one core with all that surrounds the products, and usual numbers of iterations: only to choose by.
_DENSE_FLOPS = 3e9
_SPARSE_FLOPS = 8e9
_ITERATIONS = 40
_PATH_ITERATIONS = 130
#: Of a block's column per row, so that a core's cache holds what lies between the two sparse products.
_CACHE_BYTES = 2 * 2**20


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


def ridge(
    problem: Problem,
    l2: float | np.ndarray,
    *,
    method: Method | None = None,
    tolerance: float = 1e-8,
    memory: float = 2**30,
    device: str | torch.device = "cpu",
) -> Solution:
    """The minimiser, ``[channels, train, test]``.

    Args:
        problem: with finite values.
        l2: above 0, one for all or one for each test example, ``[test]``.
        method: by default the one estimated to cost less.
        tolerance: of the residuals of conjugate gradients, relative to the right-hand side.
        memory: bytes to work with beside the solution; a single test example's work is not divided.
        device: where to compute. On a CPU, as many blocks of test examples at a time as PyTorch has threads.

    Raises:
        InvalidInput: an L2 that is not above 0.
        SimfluenceError: conjugate gradients have not converged after 20 · unknowns iterations.
    """
    strengths = np.broadcast_to(_checked(l2), problem.shape[2:])
    how = method or _cheapest(problem, 1)

    def solve(block: _Block) -> torch.Tensor:
        strength = block.tensor(strengths[block.some])
        return _direct(block, strength[None]) if how == "direct" else _preconditioned(block, strength, tolerance)[None]

    solution = np.empty(problem.shape)
    for some, found in _in_blocks(problem, solve, how, 1, memory, device):
        solution[..., some] = found[0]
    return solution


def ridge_path(
    problem: Problem,
    l2s: Sequence[float] | np.ndarray,
    *,
    method: Method | None = None,
    tolerance: float = 1e-8,
    memory: float = 2**30,
    device: str | torch.device = "cpu",
) -> Iterator[tuple[slice, SolutionPath]]:
    """``ridge`` for several L2 values, ``[path]``, at little more than the cost of the smallest.

    Test examples are independent, so whole paths come block by block: pairs of a slice of the test examples and their
    solutions ``[path, channels, train, block]``, in the order of ``l2s``. Arguments and errors as in ``ridge``.
    """
    strengths = _checked(l2s)
    how = method or _cheapest(problem, len(strengths))

    def solve(block: _Block) -> torch.Tensor:
        if how == "direct":
            return _direct(block, block.tensor(strengths)[:, None].expand(-1, block.tests))
        return _multi_shift(block, strengths, tolerance)

    return _in_blocks(problem, solve, how, len(strengths), memory, device)


def free_coefficients(
    problem: Problem, solution: np.ndarray, *, memory: float = 2**30, device: str | torch.device = "cpu"
) -> Float[np.ndarray, "free test"]:
    """The free columns' coefficients that go with ``solution``; 0 where a column depends on those before it."""

    def solve(block: _Block) -> torch.Tensor:
        rest = block.targets - block.predict(block.tensor(solution[..., block.some]))
        return block.free_part(rest)[None, :, None]

    coefficients = np.empty((len(problem.free), problem.shape[2]))
    for some, found in _in_blocks(problem, solve, "iterative", 1, memory, device):
        coefficients[:, some] = found[0, :, 0]
    return coefficients


def _checked(l2: Any) -> np.ndarray:
    strengths = np.asarray(l2, np.float64)
    if not np.all(strengths > 0):
        raise InvalidInput(f"l2 must be above 0, got {l2}")
    return strengths


def _cheapest(problem: Problem, path: int) -> Method:
    channels, train, tests = problem.shape
    unknowns, nonzeros = channels * train, problem.weights.nnz
    factorisations = path * (1 if problem.is_shared else tests)
    direct = factorisations * unknowns**3 / 3 / _DENSE_FLOPS
    iterations = _ITERATIONS if path == 1 else _PATH_ITERATIONS
    iterative = iterations * tests * 4 * channels * (nonzeros + 4 * path * train) / _SPARSE_FLOPS
    return "direct" if direct < iterative else "iterative"


# --- blocks of test examples ---


def _in_blocks(
    problem: Problem, solve: Callable[[_Block], torch.Tensor], how: Method, path: int, memory: float, device: Any
) -> Iterator[tuple[slice, np.ndarray]]:
    """What ``solve`` says of each block, ``[path, channels, train, block]``.

    Each thread has a block of its own: narrow blocks stay in its cache, and it waits for no other within an iteration.
    """
    on_cpu = torch.device(device).type == "cpu"
    threads = torch.get_num_threads() if on_cpu else 1
    most = int(memory / _bytes_per_test(problem, how, path) / threads)
    if on_cpu and how == "iterative":
        most = min(most, max(16, min(64, _CACHE_BYTES // (8 * problem.weights.shape[0]))))
    slices = _slices(problem.shape[2], most, threads)
    batches = _Batches(problem, device, with_pairs=how == "direct")

    def work(some: slice) -> tuple[slice, np.ndarray]:
        return some, solve(_Block(problem, batches, some)).cpu().numpy()

    for start in range(0, len(slices), threads):
        yield from _at_once(work, slices[start : start + threads], threads)


def _slices(tests: int, most: int, threads: int) -> list[slice]:
    """Slices of at most ``most`` test examples, about as many for each thread; eights fill the processor's vectors."""
    most = most // 8 * 8 or max(1, most)
    rounds = math.ceil(tests / (threads * most))
    size = min(most, math.ceil(tests / (8 * threads * rounds)) * 8)
    return [slice(start, min(start + size, tests)) for start in range(0, tests, size)]


def _at_once(work: Callable[[slice], Any], slices: list[slice], threads: int) -> list[Any]:
    if threads == 1:
        return [work(some) for some in slices]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(pool.map(work, slices))
        finally:
            torch.set_num_threads(threads)  # what a pool's thread sets is also for threads to come


def _bytes_per_test(problem: Problem, how: Method, path: int) -> int:
    """Of the arrays alive at once while a test example is solved for, generously."""
    channels, train, tests = problem.shape
    unknowns = channels * train
    rows = problem.weights.shape[0] * (5 * channels + 3 * len(problem.free) + 4)
    vectors = unknowns * (3 * path + 8 + 2 * channels)
    matrices = 4 * unknowns**2 if how == "direct" else 0
    return 8 * (rows + vectors + (matrices // tests if problem.is_shared else matrices))


class _Batches:
    """The centred weights on the device, with their transpose; shared by all blocks."""

    def __init__(self, problem: Problem, device: Any, with_pairs: bool = False) -> None:
        transpose = problem.weights.T.tocsr()
        self.device = device
        self.weights = _sparse(problem.weights, device)  # [rows, train]
        self.transpose = _sparse(transpose, device)  # [train, rows]
        self.squares = _sparse(transpose.power(2), device)
        self.pairs = _sparse(_row_pairs(problem.weights) if with_pairs else transpose[:0], device)
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


class _Block:
    """The least-squares problem of ``some`` test examples, in tensors."""

    def __init__(self, problem: Problem, batches: _Batches, some: slice) -> None:
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


# --- the methods, on one block ---


def _direct(block: _Block, l2: torch.Tensor) -> torch.Tensor:
    """By Cholesky factorisation, ``[path, channels, train, block]`` for L2 ``[path, block]``."""
    matrices, right = block.normal_matrices(), block.right()
    flat = right.flatten(0, 1)  # [channels · train, block]
    return torch.stack([_solved(matrices, flat, each).reshape(right.shape) for each in l2])


def _solved(matrices: torch.Tensor, right: torch.Tensor, l2: torch.Tensor) -> torch.Tensor:
    """``[unknowns, block]``; where the matrices are the same, with one factorisation for each value of ``l2``."""
    if len(matrices) > 1:
        return torch.cholesky_solve(right.T[:, :, None], _factors(matrices, l2))[:, :, 0].T
    solution = torch.empty_like(right)
    for strength in l2.unique():
        chosen = l2 == strength
        solution[:, chosen] = torch.cholesky_solve(right[:, chosen], _factors(matrices, strength[None])[0])
    return solution


def _factors(matrices: torch.Tensor, l2: torch.Tensor) -> torch.Tensor:
    penalised = matrices.clone()
    penalised.diagonal(dim1=1, dim2=2).add_(l2[:, None])
    try:
        return torch.linalg.cholesky(penalised)
    except torch.linalg.LinAlgError:
        message = f"the equations are singular in double precision; a larger l2 than {l2.min():g} would help"
        raise SimfluenceError(message) from None


def _preconditioned(block: _Block, l2: torch.Tensor, tolerance: float) -> torch.Tensor:
    """By conjugate gradients, one recurrence per test example: ``[channels, train, block]`` for L2 ``[block]``.

    The preconditioner solves for the channels of each training example: losses move little beside their level, so that
    slope and intercept of an example are far more alike than different examples are.
    """
    residual = block.right()  # [channels, train, block], as all vectors here
    inverse = _inverse(block.channel_matrices(), l2)
    solution = torch.zeros_like(residual)
    direction = _applied(inverse, residual)
    slope = _dot(residual, direction)  # [block]
    goal = tolerance * slope.sqrt()
    for _ in range(20 * residual[..., 0].numel()):
        if (slope.sqrt() <= goal).all():
            return solution
        image = block.normal(direction).addcmul_(direction, l2)
        length = _ratio(slope, _dot(direction, image))
        solution.addcmul_(direction, length)
        residual.addcmul_(image, -length)
        scaled = _applied(inverse, residual)
        before, slope = slope, _dot(residual, scaled)
        direction.mul_(_ratio(slope, before)).add_(scaled)
    raise _not_converged(tolerance, float(l2.min()))


def _multi_shift(block: _Block, l2s: np.ndarray, tolerance: float) -> torch.Tensor:
    """By conjugate gradients for the smallest L2 that carry the others along, ``[path, channels, train, block]``.

    The residuals of all of ``l2s`` [path] are multiples of one another, so that each further one costs three vector
    operations and no product with a matrix (Jegerlehner 1996, hep-lat/9612014). That rules out a preconditioner.
    """
    order = np.argsort(l2s)
    smallest = l2s[order[0]]
    residual = block.right()  # [channels, train, block]
    shifts = block.tensor(l2s[order] - smallest)[:, None]
    solutions = residual.new_zeros(len(l2s), *residual.shape)
    directions = residual.expand_as(solutions).clone()
    factor = shifts.new_ones(len(l2s), block.tests)  # of the residual for each L2 and test example
    change = torch.ones_like(factor)  # of the factor in the last iteration
    slope = _dot(residual, residual)  # [block]
    goal = tolerance * slope.sqrt()
    length, turn = torch.ones_like(slope), torch.zeros_like(slope)
    left = len(l2s)  # not yet converged, from the smallest on: a larger one converges sooner
    for _ in range(20 * residual[..., 0].numel()):
        while left and (factor[left - 1] * slope.sqrt() <= goal).all():
            left -= 1
        if not left:
            return solutions[np.argsort(order)]
        image = block.normal(directions[0]).add_(directions[0], alpha=smallest)
        before, length = length, _ratio(slope, _dot(directions[0], image))
        change = 1 / (1 + shifts * length + _ratio(length * turn, before) * (1 - change))
        factor = factor * change
        residual.addcmul_(image, -length)
        last, slope = slope, _dot(residual, residual)
        turn = _ratio(slope, last)
        lengths, turns = length * change, turn * change**2
        for k in range(left):
            solutions[k].addcmul_(directions[k], lengths[k])
            directions[k].mul_(turns[k]).addcmul_(residual, factor[k])
    raise _not_converged(tolerance, smallest)


def _not_converged(tolerance: float, l2: float) -> SimfluenceError:
    return SimfluenceError(f"conjugate gradients did not converge to {tolerance:g}; a larger l2 than {l2:g} would help")


def _inverse(matrices: torch.Tensor, l2: torch.Tensor) -> torch.Tensor:
    """Of ``[channels, channels, train, block]`` plus ``l2`` [block] on the diagonal, in place, by Gauss and Jordan:
    LAPACK would be called for each of many tiny matrices."""
    for k in range(len(matrices)):
        matrices[k, k] += l2
    least = 1e-12 * matrices.diagonal()  # [train, block, channels]; keeps rounding from making a pivot negative
    for k in range(len(matrices)):
        pivot = 1 / torch.maximum(matrices[k, k], least[..., k])  # [train, block]
        row, column = matrices[k] * pivot, matrices[:, k].clone()
        matrices -= column[:, None] * row
        matrices[k], matrices[:, k], matrices[k, k] = row, -column * pivot, pivot
    return matrices


def _applied(inverse: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    result = inverse[:, 0] * vectors[0]
    for k in range(1, len(inverse)):
        result.addcmul_(inverse[:, k], vectors[k])
    return result


def _dot(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    return (left * right).sum((0, 1))


def _ratio(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """0 where a test example's system is solved exactly and nothing is left to divide."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)


def _sparse(matrix: scipy.sparse.csr_array, device: Any) -> torch.Tensor:
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
