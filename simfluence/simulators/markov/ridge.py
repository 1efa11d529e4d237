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
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float

from simfluence.errors import InvalidInput, SimfluenceError
from simfluence.simulators.markov.least_squares import Block, Problem, SharedWeights

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

    def solve(block: Block) -> torch.Tensor:
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

    def solve(block: Block) -> torch.Tensor:
        if how == "direct":
            return _direct(block, block.tensor(strengths)[:, None].expand(-1, block.tests))
        return _multi_shift(block, strengths, tolerance)

    return _in_blocks(problem, solve, how, len(strengths), memory, device)


def free_coefficients(
    problem: Problem, solution: np.ndarray, *, memory: float = 2**30, device: str | torch.device = "cpu"
) -> Float[np.ndarray, "free test"]:
    """The free columns' coefficients that go with ``solution``; 0 where a column depends on those before it."""

    def solve(block: Block) -> torch.Tensor:
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
    problem: Problem, solve: Callable[[Block], torch.Tensor], how: Method, path: int, memory: float, device: Any
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
    batches = SharedWeights(problem, device, with_pairs=how == "direct")

    def work(some: slice) -> tuple[slice, np.ndarray]:
        return some, solve(Block(problem, batches, some)).cpu().numpy()

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


# --- the methods, on one block ---


def _direct(block: Block, l2: torch.Tensor) -> torch.Tensor:
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


def _preconditioned(block: Block, l2: torch.Tensor, tolerance: float) -> torch.Tensor:
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


def _multi_shift(block: Block, l2s: np.ndarray, tolerance: float) -> torch.Tensor:
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
