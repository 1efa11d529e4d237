"""L2-regularised least squares for all test examples at once.

With the weights ``w`` [rows, train] of the batches, shared by all test examples, their centre ``c`` [train], and for
each channel k a multiplier ``v_k`` [rows, test], minimise for every test example z

    Σ_r ( y_rz − Σ_j f_j,rz a_jz − Σ_k v_k,rz Σ_i (w_ri − c_i) x_k,iz )² + l2_z Σ_k,i x_k,iz²

where ``a_j``, the coefficients of the free columns f_j, are not penalised: they are projected out. The simulators
differ in their channels only: the previous loss for effects on the slope, 1 for additive ones.

Test examples are solved in blocks, so that only one block's multipliers are in memory. The cheaper method is used:
Cholesky factorisation of the normal matrices; conjugate gradients with a preconditioner that solves for each training
example's channels together; or, for many L2 values, conjugate gradients that solve for all of them in the Krylov space
of the smallest.
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

__all__ = ["Method", "Solution", "SolutionPath", "free_coefficients", "ridge", "ridge_path"]

Solution = Float[np.ndarray, "channels train test"]
SolutionPath = Float[np.ndarray, "path channels train test"]
Method = Literal["direct", "iterative"]

# Estimates by which the method is chosen: throughputs of one core, overhead included, and numbers of iterations.
_DENSE_FLOPS = 3e9
_SPARSE_FLOPS = 8e9
_ITERATIONS = 40
_PATH_ITERATIONS = 130
#: Size of a block's ``[rows, block]`` array, so that it stays in a core's cache between the two sparse products.
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
    """Return the minimiser, ``[channels, train, test]``.

    Args:
        problem: problem with finite values.
        l2: penalty above 0, one for all or one for each test example, ``[test]``.
        method: by default the one estimated to cost less.
        tolerance: tolerance of conjugate gradients' residuals, relative to the right-hand side.
        memory: bytes of working memory besides the solution; one test example is never divided.
        device: device to compute on. On a CPU, each of PyTorch's threads solves a block of test examples of its own.

    Raises:
        InvalidInput: an L2 is not above 0.
        SimfluenceError: conjugate gradients did not converge in 20 · unknowns iterations.
    """
    strengths = np.broadcast_to(_checked(l2), problem.shape[2:])
    chosen = method or _cheapest(problem, 1)

    def solve(block: Block) -> torch.Tensor:
        strength = block.tensor(strengths[block.span])
        if chosen == "direct":
            return _direct(block, strength[None])
        return _preconditioned(block, strength, tolerance)[None]

    solution = np.empty(problem.shape)
    for span, solutions in _in_blocks(problem, solve, chosen, 1, memory, device):
        solution[..., span] = solutions[0]
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
    """Solve ``ridge`` for several L2 values, ``[path]``, at little more than the cost of the smallest.

    Yields, block by block, a slice of the test examples and their solutions ``[path, channels, train, block]`` in the
    order of ``l2s``. Arguments and errors are the same as in ``ridge``.
    """
    strengths = _checked(l2s)
    chosen = method or _cheapest(problem, len(strengths))

    def solve(block: Block) -> torch.Tensor:
        if chosen == "direct":
            return _direct(block, block.tensor(strengths)[:, None].expand(-1, block.tests))
        return _multi_shift(block, strengths, tolerance)

    return _in_blocks(problem, solve, chosen, len(strengths), memory, device)


def free_coefficients(
    problem: Problem, solution: np.ndarray, *, memory: float = 2**30, device: str | torch.device = "cpu"
) -> Float[np.ndarray, "free test"]:
    """Return the free columns' coefficients for ``solution``; 0 where a column depends on those before it."""

    def solve(block: Block) -> torch.Tensor:
        residual = block.targets - block.predict(block.tensor(solution[..., block.span]))
        return block.free_part(residual)[None, :, None]

    coefficients = np.empty((len(problem.free), problem.shape[2]))
    for span, values in _in_blocks(problem, solve, "iterative", 1, memory, device):
        coefficients[:, span] = values[0, :, 0]
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
    problem: Problem, solve: Callable[[Block], torch.Tensor], method: Method, path: int, memory: float, device: Any
) -> Iterator[tuple[slice, np.ndarray]]:
    """Yield the slice and the solution of each block, ``[path, channels, train, block]``.

    Each thread solves a block of its own: narrow blocks stay in its cache, and threads never wait for each other
    within an iteration.
    """
    on_cpu = torch.device(device).type == "cpu"
    threads = torch.get_num_threads() if on_cpu else 1
    most = int(memory / _bytes_per_test(problem, method, path) / threads)
    if on_cpu and method == "iterative":
        most = min(most, max(16, min(64, _CACHE_BYTES // (8 * problem.weights.shape[0]))))
    slices = _slices(problem.shape[2], most, threads)
    batches = SharedWeights(problem, device, with_pairs=method == "direct")

    def work(span: slice) -> tuple[slice, np.ndarray]:
        return span, solve(Block(problem, batches, span)).cpu().numpy()

    for start in range(0, len(slices), threads):
        yield from _in_parallel(work, slices[start : start + threads], threads)


def _slices(tests: int, most: int, threads: int) -> list[slice]:
    """Split test examples into slices of at most ``most``, about as many per thread; eights fill vector registers."""
    most = most // 8 * 8 or max(1, most)
    rounds = math.ceil(tests / (threads * most))
    size = min(most, math.ceil(tests / (8 * threads * rounds)) * 8)
    return [slice(start, min(start + size, tests)) for start in range(0, tests, size)]


def _in_parallel(work: Callable[[slice], Any], slices: list[slice], threads: int) -> list[Any]:
    if threads == 1:
        return [work(span) for span in slices]
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            return list(pool.map(work, slices))
        finally:
            torch.set_num_threads(threads)  # the pool's setting also applies to later threads


def _bytes_per_test(problem: Problem, method: Method, path: int) -> int:
    """Estimate, from above, the bytes of all arrays in memory at once per test example."""
    channels, train, tests = problem.shape
    unknowns = channels * train
    rows: int = problem.weights.shape[0] * (5 * channels + 3 * len(problem.free) + 4)
    vectors = unknowns * (3 * path + 8 + 2 * channels)
    matrices = 4 * unknowns**2 if method == "direct" else 0
    return 8 * (rows + vectors + (matrices // tests if problem.is_shared else matrices))


# --- the methods, on one block ---


def _direct(block: Block, l2: torch.Tensor) -> torch.Tensor:
    """Solve by Cholesky factorisation, ``[path, channels, train, block]`` for L2 ``[path, block]``."""
    matrices, right = block.normal_matrices(), block.right()
    flat = right.flatten(0, 1)  # [channels · train, block]
    return torch.stack([_solved(matrices, flat, strengths).reshape(right.shape) for strengths in l2])


def _solved(matrices: torch.Tensor, right: torch.Tensor, l2: torch.Tensor) -> torch.Tensor:
    """Solve for ``[unknowns, block]``; equal matrices are factorised once for each value of ``l2``."""
    if len(matrices) > 1:
        return torch.cholesky_solve(right.T[:, :, None], _factors(matrices, l2))[:, :, 0].T
    solution = torch.empty_like(right)
    for strength in sorted(set(l2.tolist())):
        chosen = l2 == strength
        solution[:, chosen] = torch.cholesky_solve(right[:, chosen], _factors(matrices, l2[chosen][:1])[0])
    return solution


def _factors(matrices: torch.Tensor, l2: torch.Tensor) -> torch.Tensor:
    penalised = matrices.clone()
    penalised.diagonal(dim1=1, dim2=2).add_(l2[:, None])
    factors: torch.Tensor
    factors, failed = torch.linalg.cholesky_ex(penalised)
    if failed.any():
        raise SimfluenceError(f"the equations are singular in double precision: use a larger l2 than {l2.min():g}")
    return factors


def _preconditioned(block: Block, l2: torch.Tensor, tolerance: float) -> torch.Tensor:
    """Solve by conjugate gradients, one recurrence per test example: ``[channels, train, block]`` for L2 ``[block]``.

    The preconditioner solves for the channels of each training example: losses change little compared with their level,
    so the slope and the intercept of one example are far more alike than two examples are.
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
        last_slope, slope = slope, _dot(residual, scaled)
        direction.mul_(_ratio(slope, last_slope)).add_(scaled)
    raise _not_converged(tolerance, float(l2.min()))


def _multi_shift(block: Block, l2s: np.ndarray, tolerance: float) -> torch.Tensor:
    """Solve for all L2 values by conjugate gradients for the smallest, ``[path, channels, train, block]``.

    The residuals of all ``l2s`` [path] are multiples of one another, so that each further L2 costs three vector
    operations and no matrix product (Jegerlehner 1996, hep-lat/9612014). That rules out a preconditioner.
    """
    order = np.argsort(l2s)
    smallest = l2s[order[0]]
    residual = block.right()  # [channels, train, block]
    shifts = block.tensor(l2s[order] - smallest)[:, None]
    solutions = residual.new_zeros(len(l2s), *residual.shape)
    directions = residual.expand_as(solutions).clone()
    factor = shifts.new_ones(len(l2s), block.tests)  # multiple of the residual, for each L2 and test example
    change = torch.ones_like(factor)  # ratio of the factor to its last value
    slope = _dot(residual, residual)  # [block]
    goal = tolerance * slope.sqrt()
    length, turn = torch.ones_like(slope), torch.zeros_like(slope)
    active = len(l2s)  # the smallest L2 values, not yet converged: larger ones converge sooner
    for _ in range(20 * residual[..., 0].numel()):
        while active and (factor[active - 1] * slope.sqrt() <= goal).all():
            active -= 1
        if not active:
            return solutions[np.argsort(order)]
        image = block.normal(directions[0]).add_(directions[0], alpha=smallest)
        last_length, length = length, _ratio(slope, _dot(directions[0], image))
        change = 1 / (1 + shifts * length + _ratio(length * turn, last_length) * (1 - change))
        factor = factor * change
        residual.addcmul_(image, -length)
        last_slope, slope = slope, _dot(residual, residual)
        turn = _ratio(slope, last_slope)
        lengths, turns = length * change, turn * change**2
        for k in range(active):
            solutions[k].addcmul_(directions[k], lengths[k])
            directions[k].mul_(turns[k]).addcmul_(residual, factor[k])
    raise _not_converged(tolerance, smallest)


def _not_converged(tolerance: float, l2: float) -> SimfluenceError:
    return SimfluenceError(f"conjugate gradients did not converge to {tolerance:g}: use a larger l2 than {l2:g}")


def _inverse(matrices: torch.Tensor, l2: torch.Tensor) -> torch.Tensor:
    """Invert ``[channels, channels, train, block]`` plus ``l2`` [block] on the diagonal, in place, by Gauss–Jordan.

    LAPACK would be called once for each of many tiny matrices.
    """
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
    """Divide; 0 where a test example's system is solved exactly, so that the denominator is 0."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
