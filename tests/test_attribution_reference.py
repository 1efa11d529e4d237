"""The slow references against closed forms and against one another."""

from __future__ import annotations

import pytest
import torch
from attribution_cases import mlp, regression, relative, texts
from scipy.stats import spearmanr
from torch import nn

import simfluence as sf
from simfluence.attribution import exact as reference
from simfluence.errors import ConvergenceWarning, InvalidInput
from simfluence.tasks.losses import cross_entropy, squared_error


def linear_model() -> tuple[nn.Module, tuple, tuple]:
    """Least squares: every answer has a closed form."""
    rng = torch.Generator().manual_seed(0)
    X = torch.randn(9, 3, generator=rng, dtype=torch.float64)
    y = X @ torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + torch.randn(9, generator=rng, dtype=torch.float64)
    model = nn.Linear(3, 1, bias=False).double()
    return model, (X[:7], y[:7, None]), (X[7:], y[7:, None])


def test_gradients_are_those_of_autograd():
    case = texts()
    expected = torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in case.gradients(case.train)])
    assert relative(reference.gradients(case.model, case.train, case.loss), expected) < 1e-12


def test_curvature_of_least_squares():
    model, train, _ = linear_model()
    expected = 2 * train[0].T @ train[0] / 7
    for curvature in (reference.hessian, reference.gauss_newton, reference.true_fisher):
        assert relative(curvature(model, train, squared_error), expected) < 1e-12
    residual = (model(train[0]) - train[1]).detach()
    scores = 2 * residual * train[0]
    assert relative(reference.empirical_fisher(model, train, squared_error), scores.T @ scores / 7) < 1e-12


@pytest.mark.parametrize("case", [mlp(), regression()], ids=["mlp", "regression"])
def test_the_true_fisher_is_the_gauss_newton_matrix(case):
    exact = reference.gauss_newton(case.model, case.train, case.loss)
    assert relative(reference.true_fisher(case.model, case.train, case.loss), exact) < 1e-12
    assert relative(reference.hessian(case.model, case.train, case.loss), exact) > 1e-3  # the model is not linear


@pytest.mark.parametrize("case", [mlp(), regression()], ids=["mlp", "regression"])
def test_the_sampled_fisher_goes_to_the_true_one(case):
    exact = reference.true_fisher(case.model, case.train, case.loss)
    few = reference.sampled_fisher(case.model, case.train, case.loss, seed=0, draws=2)
    many = reference.sampled_fisher(case.model, case.train, case.loss, seed=0, draws=50)
    assert (many - exact).norm() < 0.2 * exact.norm() < (few - exact).norm()


def test_the_exact_fisher_of_other_losses_is_refused():
    case = mlp()
    with pytest.raises(InvalidInput, match="use gauss_newton"):
        reference.true_fisher(case.model, case.train, lambda outputs, targets: outputs.sum(1))


def test_retraining_reaches_the_closed_form():
    model, train, _ = linear_model()
    X, y = train
    found = reference.retrain(model, train, squared_error, l2=0.3)
    expected = torch.linalg.solve(2 * X.T @ X / 7 + 0.3 * torch.eye(3).double(), 2 * X.T @ y / 7)
    assert relative(found.weight, expected.T) < 1e-8


def test_leave_one_out_of_least_squares():
    model, train, test = linear_model()
    X, y = train

    def fitted(rows: list[int]) -> torch.Tensor:
        A = 2 * X[rows].T @ X[rows] / len(rows) + 0.1 * torch.eye(3).double()
        return torch.linalg.solve(A, 2 * X[rows].T @ y[rows] / len(rows))

    def losses(w: torch.Tensor) -> torch.Tensor:
        return ((test[0] @ w - test[1]) ** 2)[:, 0]

    expected = [losses(fitted([r for r in range(7) if r != i])) - losses(fitted(list(range(7)))) for i in (2, 5)]
    found = reference.leave_one_out(model, train, test, squared_error, l2=0.1, removed=[2, 5], weight=1 / 6)
    assert relative(found, torch.stack(expected, 1)) < 1e-6


def test_the_proximal_response_of_least_squares():
    """The outputs are linear, so the response to a removal is a quadratic's minimum."""
    model, train, test = linear_model()
    X, y = train
    w, count = model.weight.detach()[0], len(X)
    found = reference.pbrf(model, train, test, squared_error, damping=0.5, removed=[3])
    A = 2 * (X.T @ X - torch.outer(X[3], X[3])) / count + 0.5 * torch.eye(3).double()
    moved = w + torch.linalg.solve(A, 2 * (X[3] @ w - y[3]) * X[3] / count)
    expected = ((test[0] @ moved - test[1][:, 0]) ** 2 - (test[0] @ w - test[1][:, 0]) ** 2)[:, None]
    assert relative(found, expected) < 1e-7


def test_influence_answers_the_proximal_response():
    case = mlp()
    G = reference.gauss_newton(case.model, case.train, case.loss)
    test, train = (reference.gradients(case.model, data, case.loss) for data in (case.test, case.train))
    predicted = reference.influence(G, test, train, damping=2.0)
    removed = list(range(0, 13, 2))
    response = reference.pbrf(case.model, case.train, case.test, case.loss, damping=2.0, removed=removed)
    assert spearmanr(predicted[:, removed].flatten(), response.flatten()).statistic > 0.99
    assert relative(predicted[:, removed], response) < 0.2


def test_an_optimum_that_is_not_reached_is_told():
    model, train, _ = linear_model()
    with pytest.warns(ConvergenceWarning, match="the minimum was not reached"):
        reference.retrain(model, train, squared_error, l2=1e-12, tolerance=1e-30)


def test_influence_ranks_as_retraining_does():
    task = sf.tasks.breast_cancer()
    trained = reference.retrain(task.build_model(0), task.train_data, task.loss, task.l2)
    H = reference.hessian(trained, task.train_data, cross_entropy)
    test, train = (reference.gradients(trained, data, task.loss) for data in (task.test_data, task.train_data))
    removed = list(range(0, 200, 7))
    predicted = reference.influence(H, test, train, task.l2)[:, removed]
    sides = task.train_data, task.test_data, task.loss, task.l2, removed
    true = reference.leave_one_out(trained, *sides)
    assert spearmanr(predicted.flatten(), true.flatten()).statistic > 0.99
    # The mean over those left weakens the penalty too: at the optimum, as if l2 · θ were the mean gradient taken away.
    shifted = reference.influence(H, test, train - train.mean(0), task.l2)[:, removed]
    true = reference.leave_one_out(trained, *sides, weight=1 / 199)
    assert spearmanr(shifted.flatten(), true.flatten()).statistic > 0.99
    assert spearmanr(predicted.flatten(), true.flatten()).statistic < 0.9
