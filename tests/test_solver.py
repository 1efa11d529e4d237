from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse

from simfluence.errors import SimfluenceError
from simfluence.simulators import solver
from simfluence.simulators.solver import Problem


def problem(rows=60, train=9, tests=4, seed=0):
    rng = np.random.default_rng(seed)
    weights = scipy.sparse.random_array((rows, train), density=0.3, rng=rng, format="csr")
    return weights, rng.normal(size=(rows, tests)), rng.normal(size=(rows, tests))


def dense(weights, multipliers, targets, l2):
    """One test example at a time, by NumPy's least squares on the stacked system."""
    W = weights.toarray()
    size = len(multipliers) * W.shape[1]
    solution = np.empty((size, targets.shape[1]))
    for z in range(targets.shape[1]):
        blocks = [W if m is None else m[:, [z]] * W for m in multipliers]
        system = np.vstack([np.hstack(blocks), np.sqrt(l2) * np.eye(size)])
        right = np.concatenate([targets[:, z], np.zeros(size)])
        solution[:, z] = np.linalg.lstsq(system, right)[0]
    return solution.reshape(len(multipliers), W.shape[1], -1)


@pytest.mark.parametrize("method", [solver.ridge_direct, solver.ridge_iterative, solver.ridge])
@pytest.mark.parametrize("l2", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("channels", ["additive", "multiplicative", "linear", "three"])
def test_equals_dense_least_squares(method, l2, channels):
    weights, multiplier, targets = problem()
    multipliers = {
        "additive": [None], "multiplicative": [multiplier], "linear": [multiplier, None],
        "three": [multiplier, multiplier[::-1], None],
    }[channels]  # fmt: skip
    expected = dense(weights, multipliers, targets, l2)
    found = method(Problem(weights, multipliers, targets), l2)
    assert np.linalg.norm(found - expected) <= 1e-8 * np.linalg.norm(expected)


def test_direct_method_in_pieces(monkeypatch):
    weights, multiplier, targets = problem()
    whole = solver.ridge_direct(Problem(weights, [multiplier, None], targets), 0.1)
    monkeypatch.setattr(solver, "_DIRECT_ENTRIES", 1)
    assert np.allclose(solver.ridge_direct(Problem(weights, [multiplier, None], targets), 0.1), whole, rtol=1e-12)


def test_an_example_without_rows_and_a_target_of_zeros():
    weights, multiplier, targets = problem()
    weights = scipy.sparse.csr_array(scipy.sparse.hstack([weights, scipy.sparse.csr_array((60, 1))]))
    targets[:, 1] = 0
    for method in (solver.ridge_direct, solver.ridge_iterative):
        found = method(Problem(weights, [multiplier, None], targets), 0.1)
        assert np.abs(found[:, -1]).max() == 0
        assert np.abs(found[:, :, 1]).max() == 0


def test_no_convergence_is_said():
    weights, multiplier, targets = problem()
    with pytest.raises(SimfluenceError, match="did not converge"):
        solver.ridge_iterative(Problem(weights, [multiplier, None], targets), 1e-12, tolerance=-1.0)


@pytest.mark.parametrize("method", [solver.ridge_direct, solver.ridge_iterative])
@pytest.mark.parametrize("l2", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("channels", ["additive", "multiplicative", "linear"])
@pytest.mark.parametrize("parts", ["centre", "free", "both"])
def test_centre_and_free_column_equal_dense_least_squares(method, l2, channels, parts):
    weights, multiplier, targets = problem()
    multipliers = {"additive": [None], "multiplicative": [multiplier], "linear": [multiplier, None]}[channels]
    rng = np.random.default_rng(3)
    centre = rng.normal(size=9) if parts != "free" else None
    free = rng.normal(size=targets.shape) if parts != "centre" else None
    found = Problem(weights, multipliers, targets, centre, free)
    solution = method(found, l2)
    W = weights.toarray() - (0 if centre is None else centre)
    size = len(multipliers) * 9
    for z in range(targets.shape[1]):
        blocks = [W if m is None else m[:, [z]] * W for m in multipliers]
        columns = np.hstack(blocks + ([] if free is None else [free[:, [z]]]))
        penalty = np.sqrt(l2) * np.eye(columns.shape[1])[:size]
        right = np.concatenate([targets[:, z], np.zeros(size)])
        expected = np.linalg.lstsq(np.vstack([columns, penalty]), right)[0]
        ours = solution[:, :, z].ravel()
        assert np.linalg.norm(ours - expected[:size]) <= 1e-8 * np.linalg.norm(expected)
        if free is not None:
            assert found.free_part(targets - found.predict(solution))[z] == pytest.approx(expected[-1], rel=1e-7)
