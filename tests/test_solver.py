from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse
import torch

from simfluence.errors import InvalidInput, SimfluenceError
from simfluence.simulators.markov import ridge as solver
from simfluence.simulators.markov.least_squares import Lazy, Problem
from simfluence.simulators.markov.ridge import free_coefficients, ridge, ridge_path

ROWS, TRAIN, TESTS = 60, 9, 7
METHODS = ["direct", "iterative"]
CHANNELS = {
    "additive": lambda v: [None],
    "multiplicative": lambda v: [v],
    "linear": lambda v: [v, None],
    "three": lambda v: [v, v[::-1], None],
}


def problem(channels="linear", centre=False, free=0, seed=0, tests=TESTS):
    rng = np.random.default_rng(seed)
    weights = scipy.sparse.random_array((ROWS, TRAIN), density=0.3, rng=rng, format="csr")
    v, targets = rng.normal(size=(ROWS, tests)), rng.normal(size=(ROWS, tests))
    columns = [rng.normal(size=(ROWS, tests)) for _ in range(free)]
    return Problem(weights, CHANNELS[channels](v), targets, rng.normal(size=TRAIN) if centre else None, columns)


def dense(problem, l2):
    """One test example at a time, by NumPy's least squares on the stacked system: solution and free coefficients."""
    channels, train, tests = problem.shape
    W = problem.weights.toarray() - (0 if problem.centre is None else problem.centre)
    solution, coefficients = np.empty((channels, train, tests)), np.empty((len(problem.free), tests))
    for z, strength in enumerate(np.broadcast_to(l2, tests)):
        blocks = [W if m is None else m[:, [z]] * W for m in problem.multipliers]
        columns = np.hstack(blocks + [column[:, [z]] for column in problem.free])
        penalty = np.sqrt(strength) * np.eye(columns.shape[1])[: channels * train]
        right = np.concatenate([problem.targets[:, z], np.zeros(len(penalty))])
        found = np.linalg.lstsq(np.vstack([columns, penalty]), right)[0]
        solution[:, :, z] = found[: channels * train].reshape(channels, train)
        coefficients[:, z] = found[channels * train :]
    return solution, coefficients


def path(problem, l2s, **how):
    return np.concatenate([found for _, found in ridge_path(problem, l2s, **how)], axis=-1)


def assert_close(found, expected, tolerance=1e-8):
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@pytest.fixture(params=[1, 2], ids=["one thread", "two threads"])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    assert torch.get_num_threads() == request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("l2", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("channels", CHANNELS)
def test_equals_dense_least_squares(method, l2, channels):
    given = problem(channels)
    assert_close(ridge(given, l2, method=method), dense(given, l2)[0])


@pytest.mark.parametrize("channels", CHANNELS)
def test_the_default_method_equals_dense_least_squares(channels):
    given = problem(channels)
    assert_close(ridge(given, 1.0), dense(given, 1.0)[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("l2", [1e-4, 1e4])
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize(("centre", "free"), [(True, 0), (False, 1), (True, 1), (True, 3)])
def test_centre_and_free_columns_equal_dense_least_squares(method, l2, channels, centre, free):
    given = problem(channels, centre, free)
    expected, coefficients = dense(given, l2)
    solution = ridge(given, l2, method=method)
    assert_close(solution, expected)
    if free:
        assert_close(free_coefficients(given, solution), coefficients)


@pytest.mark.parametrize("method", METHODS)
def test_l2_of_each_test_example(method, threads):
    l2 = np.logspace(-2, 3, TESTS)
    for given in (problem("linear", centre=True, free=1), problem("additive")):
        assert_close(ridge(given, l2, method=method), dense(given, l2)[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("free", [0, 2])
def test_a_path_is_that_of_separate_solutions(method, channels, free):
    given, l2s = problem(channels, centre=bool(free), free=free), [10.0, 1e-3, 1e5, 1.0]
    found = path(given, l2s, method=method)
    for each, l2 in zip(found, l2s, strict=True):
        assert_close(each, dense(given, l2)[0], 1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_blocks_of_any_size_give_the_same(method, threads):
    given = problem("linear", centre=True, free=1, tests=12)
    whole, *others = (ridge(given, 0.1, method=method, memory=memory) for memory in (1e9, 1e5, 1))
    for other in others:
        assert_close(other, whole)
    blocks = list(ridge_path(given, [0.1, 1.0], method=method, memory=1))
    assert [some.start for some, _ in blocks] == list(range(12))
    assert_close(np.concatenate([found[0] for _, found in blocks], axis=-1), whole)
    assert_close(free_coefficients(given, whole, memory=1), free_coefficients(given, whole))


@pytest.mark.parametrize("method", METHODS)
def test_free_columns_that_depend_on_others_have_coefficient_0(method):
    base = problem(free=2, centre=True)
    first, second = base.free
    zero, mixed = np.zeros_like(first), first + 2 * second
    given = Problem(base.weights, base.multipliers, base.targets, base.centre, [zero, first, 3 * first, second, mixed])
    expected, coefficients = dense(base, 1.0)
    solution = ridge(given, 1.0, method=method)
    assert_close(solution, expected)
    found = free_coefficients(given, solution)
    assert_close(found[[1, 3]], coefficients)
    assert (found[[0, 2, 4]] == 0).all()


def test_no_free_column_has_no_coefficients():
    assert free_coefficients(problem(), np.zeros((2, TRAIN, TESTS))).shape == (0, TESTS)


@pytest.mark.parametrize("method", METHODS)
def test_columns_may_be_lazy_single_precision_or_read_only(method, tmp_path):
    rng = np.random.default_rng(0)
    losses = rng.normal(size=(ROWS + 1, TESTS)).astype(np.float32)
    np.save(tmp_path / "losses.npy", losses)
    mapped = np.load(tmp_path / "losses.npy", mmap_mode="r")
    lazy = Lazy((ROWS, TESTS), lambda some: np.diff(mapped[:, some].astype(np.float64), axis=0))
    weights = problem().weights
    given = Problem(weights, [mapped[:-1], None], lazy, None, [mapped[1:]])
    exact = losses.astype(np.float64)
    plain = Problem(weights, [exact[:-1], None], np.diff(exact, axis=0), None, [exact[1:]])
    assert_close(ridge(given, 1.0, method=method), dense(plain, 1.0)[0])


@pytest.mark.parametrize("method", METHODS)
def test_an_example_without_rows_and_a_target_of_zeros(method):
    base = problem("linear")
    weights = scipy.sparse.csr_array(scipy.sparse.hstack([base.weights, scipy.sparse.csr_array((ROWS, 1))]))
    targets = np.array(base.targets)
    targets[:, 1] = 0
    given = Problem(weights, base.multipliers, targets)
    for found in (ridge(given, 0.1, method=method), *path(given, [0.1, 1e6], method=method)):
        assert np.isfinite(found).all()
        assert np.abs(found[:, -1]).max() == 0
        assert np.abs(found[:, :, 1]).max() == 0


@pytest.mark.parametrize("method", METHODS)
def test_channels_that_say_the_same(method):
    """The 2 × 2 blocks of the preconditioner are then singular but for the penalty."""
    base = problem("multiplicative")
    given = Problem(base.weights, [*base.multipliers, 2 * base.multipliers[0]], base.targets)
    assert_close(ridge(given, 1e-4, method=method), dense(given, 1e-4)[0], 1e-6)


def test_methods_agree_where_unknowns_are_many():
    rng = np.random.default_rng(1)
    weights = scipy.sparse.random_array((250, 120), density=0.05, rng=rng, format="csr")
    before = 1 + 0.2 * rng.normal(size=(250, 4))
    given = Problem(weights, [before, None], rng.normal(size=before.shape), np.full(120, 0.05), [before])
    for l2 in (1e-2, 1.0, 100.0):
        assert_close(ridge(given, l2, method="iterative"), ridge(given, l2, method="direct"), 1e-6)
    found, expected = (path(given, [1e-2, 1.0, 100.0], method=method) for method in ("iterative", "direct"))
    assert_close(found, expected, 1e-6)


def test_the_cheaper_method_is_chosen():
    assert solver._cheapest(problem(), 1) == "direct"
    weights = scipy.sparse.random_array((4000, 2000), density=0.005, rng=np.random.default_rng(0), format="csr")
    many = np.broadcast_to(1.0, (4000, 300))
    assert solver._cheapest(Problem(weights, [many, None], many), 10) == "iterative"
    assert solver._cheapest(Problem(weights[:, :500], [None], many), 10) == "direct"  # one matrix for all


@pytest.mark.parametrize("solve", [ridge, path])
def test_no_convergence_is_said(solve, threads):
    with pytest.raises(SimfluenceError, match=r"did not converge to -1: use a larger l2 than 1e-12"):
        solve(problem("additive"), np.full(TESTS, 1e-12), method="iterative", tolerance=-1.0)


def test_singular_equations_are_said():
    weights = scipy.sparse.csr_array(np.ones((5, 3)))
    given = Problem(weights, [None], np.ones((5, 2)))
    with pytest.raises(SimfluenceError, match="a larger l2 than 1e-30"):
        ridge(given, 1e-30, method="direct")


@pytest.mark.parametrize("l2", [0.0, -1.0, float("nan")])
def test_l2_must_be_above_0(l2):
    with pytest.raises(InvalidInput, match="l2 must be above 0"):
        ridge(problem(), l2)
    with pytest.raises(InvalidInput, match="l2 must be above 0"):
        ridge_path(problem(), [1.0, l2])
