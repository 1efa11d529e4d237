"""Iterative solvers converge to the exact inverse, and say so where they do not."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from attribution_cases import CASES, Case, kronecker_case, mlp, regression, relative

from simfluence.attribution import Arnoldi, ConjugateGradients, Exact, LiSSA, Relative
from simfluence.attribution import exact as reference
from simfluence.attribution.iterative import conjugate_gradients
from simfluence.errors import ConvergenceWarning, InvalidInput

SOLVERS = {
    "cg": ConjugateGradients(damping=0.1, tolerance=1e-12, iterations=500, preconditioned=True),
    "cg-plain": ConjugateGradients(damping=0.1, tolerance=1e-12, iterations=500),
    "lissa": LiSSA(damping=0.5, tolerance=1e-12, iterations=5000),  # slow for a small damping
    "arnoldi": Arnoldi(damping=0.1, iterations=1000),
}
REFERENCES = {
    "gauss_newton": reference.gauss_newton,
    "hessian": reference.hessian,
    "empirical_fisher": reference.empirical_fisher,
}


def dense(case, curvature: str, damping: float, l2: float = 0.0) -> torch.Tensor:
    test, train = (reference.gradients(case.model, data, case.loss) for data in (case.test, case.train))
    return reference.influence(REFERENCES[curvature](case.model, case.train, case.loss), test, train, damping + l2)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("curvature", ["gauss_newton", "empirical_fisher"])
def test_exact_is_the_dense_inverse(name, curvature):
    case = CASES[name]()
    fitted = Exact(damping=0.1, curvature=curvature, batch_size=4).fit(case.model, case.train, case.loss)
    assert relative(fitted.scores(case.test), dense(case, curvature, 0.1)) < 1e-10


@pytest.mark.parametrize("name", CASES)
def test_exact_with_the_hessian(name):
    case = CASES[name]()
    smallest = float(torch.linalg.eigvalsh(reference.hessian(case.model, case.train, case.loss)).min())
    damping = 0.1 - 2 * min(0.0, smallest)
    fitted = Exact(damping=damping, curvature="hessian", batch_size=4).fit(case.model, case.train, case.loss)
    assert relative(fitted.scores(case.test), dense(case, "hessian", damping)) < 1e-10
    if smallest < -1e-3:
        with pytest.raises(InvalidInput, match=r"the model \(hessian\) is singular or not positive"):
            Exact(damping=-smallest / 2, curvature="hessian").fit(case.model, case.train, case.loss)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("name", ["mlp", "regression", "texts"])
def test_solvers_converge_to_the_exact_inverse(name, solver):
    case = CASES[name]()
    fitted = SOLVERS[solver].fit(case.model, case.train, case.loss, l2=0.05)
    assert relative(fitted.scores(case.test), dense(case, "gauss_newton", fitted.damping, 0.05)) < 1e-8


def products_needed(case, **parameters) -> int:
    fitted, calls = ConjugateGradients(**parameters).fit(case.model, case.train, case.loss), []
    product = fitted.product_
    fitted.product_ = lambda vectors: calls.append(1) or product(vectors)
    fitted.scores(case.test)
    return len(calls)


def test_the_preconditioner_saves_products():
    case, exact = scaled_inputs(), {"damping": 1e-6, "tolerance": 1e-8, "curvature": "empirical_fisher"}
    assert products_needed(case, **exact) > 1.5 * products_needed(case, **exact, preconditioned=True)
    kronecker = kronecker_case()  # its own inverse is the preconditioner
    assert products_needed(kronecker, **exact, preconditioned=True) == 1


def scaled_inputs() -> Case:
    """More examples than parameters, and inputs of very different size."""
    case, rng = mlp(), torch.Generator().manual_seed(0)
    X = torch.randn(400, 4, generator=rng, dtype=torch.float64) * torch.tensor([0.01, 0.1, 1.0, 10.0])
    y = torch.randint(0, 3, (400,), generator=rng)
    model = torch.nn.Linear(4, 3).double()
    return Case(model, case.loss, (X, y), (X[:5], y[:5]))


def test_conjugate_gradients_solve_rows_apart():
    rng = torch.Generator().manual_seed(0)
    A = torch.randn(6, 6, generator=rng, dtype=torch.float64)
    A = A @ A.T + 0.1 * torch.eye(6)
    right = torch.randn(3, 6, generator=rng, dtype=torch.float64)
    right[1] = 0
    found = conjugate_gradients(lambda v: v @ A, right, lambda v: v, 1e-12, 50)
    assert relative(found, torch.linalg.solve(A, right.T).T) < 1e-9
    assert (found[1] == 0).all()


def test_what_did_not_converge_is_told():
    case = mlp()
    with pytest.warns(ConvergenceWarning, match=r"left a residual of .* after 2 iterations"):
        ConjugateGradients(1e-3, iterations=2).fit(case.model, case.train, case.loss).scores(case.test)
    with pytest.warns(ConvergenceWarning, match=r"LiSSA still changes by .* after 3 iterations"):
        LiSSA(1e-3, iterations=3).fit(case.model, case.train, case.loss).scores(case.test)
    with pytest.raises(InvalidInput, match=r"LiSSA diverges with scale=0.001: use a larger scale"):
        LiSSA(1e-3, scale=1e-3).fit(case.model, case.train, case.loss).scores(case.test)


def test_negative_curvature_is_refused():
    case = regression()
    H = torch.linalg.eigvalsh(reference.hessian(case.model, case.train, case.loss))
    assert H[0] < -0.01
    with pytest.raises(InvalidInput, match="not positive definite: use a larger damping, or curvature="):
        ConjugateGradients(1e-4, "hessian", preconditioned=False).fit(case.model, case.train, case.loss).scores(
            case.test
        )
    with pytest.raises(InvalidInput, match="singular or not positive"):
        Arnoldi(1e-4, "hessian").fit(case.model, case.train, case.loss)


def test_bad_parameters():
    case = mlp()
    for solver in (ConjugateGradients, LiSSA, Arnoldi):
        with pytest.raises(InvalidInput, match="damping must be a number"):
            solver(damping=Relative(0.1)).fit(case.model, case.train, case.loss)
        with pytest.raises(InvalidInput, match="unknown curvature 'hesian', did you mean 'hessian'"):
            solver(curvature="hesian").fit(case.model, case.train, case.loss)


def test_sampled_lissa_is_near_and_the_same_each_time():
    case = mlp()
    exact = dense(case, "gauss_newton", 0.5)
    solver = LiSSA(0.5, sample=6, iterations=100, scale=20.0, seed=1)
    found = [solver.fit(case.model, case.train, case.loss).scores(case.test) for _ in range(2)]
    assert np.array_equal(found[0], found[1])
    assert relative(found[0], exact) < 0.2
    assert relative(found[0], exact) > 1e-6


def test_arnoldi_of_low_rank_keeps_the_largest_eigenvalues():
    case = mlp()
    G = reference.gauss_newton(case.model, case.train, case.loss)
    eigenvalues, vectors = torch.linalg.eigh(G)
    basis = vectors[:, -3:]
    test, train = (reference.gradients(case.model, data, case.loss) for data in (case.test, case.train))
    expected = (test @ basis / (eigenvalues[-3:] + 0.1)) @ (train @ basis).T / len(train)
    fitted = Arnoldi(0.1, iterations=30, rank=3).fit(case.model, case.train, case.loss)
    assert relative(fitted.scores(case.test), expected) < 1e-6


def test_a_model_too_large_for_a_dense_matrix(monkeypatch):
    case = mlp()
    monkeypatch.setattr("simfluence.attribution.influence.LARGEST", 42)
    with pytest.raises(InvalidInput, match="a matrix of 43² numbers is too large"):
        Exact().fit(case.model, case.train, case.loss)
