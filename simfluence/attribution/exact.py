"""What attribution approximates, computed slowly and plainly in float64: curvature matrices, influence, retraining.

Everything is over one flat vector θ of the parameters that require a gradient, in the order of
``model.named_parameters()``; matrices are ``[parameters, parameters]``, so these are for models of up to a few
thousand parameters. The tests compare everything else with what stands here.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simfluence.attribution.gradients.hooks import Loss, called, rows_of
from simfluence.attribution.gradients.labels import relabelling
from simfluence.errors import ConvergenceWarning, InvalidInput
from simfluence.task import Data, cast
from simfluence.tasks.losses import cross_entropy, squared_error

#: Newton's steps that end a minimisation, and the largest problem that has a dense Hessian for them.
_NEWTON_STEPS = 20
_NEWTON_PARAMETERS = 2000

Matrix = Float[Tensor, "parameters parameters"]


@dataclass(frozen=True, eq=False)
class _Problem:
    """A model and a loss as functions of one flat vector."""

    model: nn.Module
    loss: Loss

    @classmethod
    def of(cls, model: nn.Module, loss: Loss) -> _Problem:
        return cls(copy.deepcopy(model).double().eval(), loss)

    @property
    def theta(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters() if p.requires_grad])

    def outputs(self, theta: Tensor, inputs: Any) -> Any:
        own = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        parts = theta.split([p.numel() for p in own.values()])
        chosen = {name: part.reshape(p.shape) for (name, p), part in zip(own.items(), parts, strict=True)}
        return called(self.model, chosen, inputs)

    def losses(self, theta: Tensor, data: Data) -> Tensor:
        return self.loss(self.outputs(theta, data[0]), data[1])

    def total(self, theta: Tensor, data: Data) -> Tensor:
        return self.losses(theta, data).sum()


def gradients(model: nn.Module, data: Data, loss: Loss) -> Float[Tensor, "examples parameters"]:
    """The gradient of each example's loss, one pass each."""
    problem = _Problem.of(model, loss)
    return torch.stack([torch.func.grad(problem.total)(problem.theta, one) for one in _each(data)])


def hessian(model: nn.Module, data: Data, loss: Loss) -> Matrix:
    """``∇² (1/N) Σ ℓ_i``."""
    problem = _Problem.of(model, loss)
    return _second(lambda theta: problem.losses(theta, _double(data)).mean(), problem.theta)


def gauss_newton(model: nn.Module, data: Data, loss: Loss) -> Matrix:
    """``(1/N) Σ Jᵀ H J``: J the outputs' Jacobian, H the loss's Hessian by the outputs (Martens 2020, equation 6)."""
    problem = _Problem.of(model, loss)
    return torch.stack([_gauss_newton_of_one(problem, one) for one in _each(data)]).mean(0)


def _gauss_newton_of_one(problem: _Problem, one: Data) -> Tensor:
    inputs, target = one
    outputs = problem.outputs(problem.theta, inputs).detach()
    J = torch.func.jacrev(lambda theta: problem.outputs(theta, inputs).flatten())(problem.theta).detach()
    H = _second(lambda flat: problem.loss(flat.reshape(outputs.shape), target).sum(), outputs.flatten())
    return J.T @ H @ J


def true_fisher(model: nn.Module, data: Data, loss: Loss) -> Matrix:
    """``(1/N) Σ E[∇ℓ ∇ℓᵀ]``, the expectation over labels from the model, taken exactly.

    Args:
        loss: the library's ``cross_entropy`` of ``[batch, classes]``, or its ``squared_error``.

    Raises:
        InvalidInput: another loss.
    """
    problem = _Problem.of(model, loss)
    total = torch.zeros(len(problem.theta), len(problem.theta), dtype=torch.float64)
    for inputs, target in _each(data):
        outputs = problem.outputs(problem.theta, inputs).detach()
        for weight, label in _labels(loss, outputs, target):
            g = torch.func.grad(problem.total)(problem.theta, (inputs, label))
            total += weight * torch.outer(g, g)
    return total / len(data[1])


def sampled_fisher(model: nn.Module, data: Data, loss: Loss, seed: int = 0, draws: int = 1) -> Matrix:
    """The same from ``draws`` labels per example, drawn as for fitted factors; draw d has the seed ``seed + d``."""
    problem, (inputs, targets) = _Problem.of(model, loss), _double(data)
    found = []
    for draw in range(draws):
        relabel = relabelling("sampled", loss, seed + draw)
        assert relabel is not None  # noqa: S101 (for the type checker)
        labels = relabel(problem.outputs(problem.theta, inputs).detach(), targets, range(len(targets)))
        found.append(empirical_fisher(model, (inputs, labels), loss))
    return torch.stack(found).mean(0)


def empirical_fisher(model: nn.Module, data: Data, loss: Loss) -> Matrix:
    """``(1/N) Σ ∇ℓ_i ∇ℓ_iᵀ`` with the real labels."""
    g = gradients(model, data, loss)
    return g.T @ g / len(g)


def influence(
    curvature: Matrix,
    test: Float[Tensor, "test parameters"],
    train: Float[Tensor, "train parameters"],
    damping: float = 0.0,
) -> Float[Tensor, "test train"]:
    """``∇ℓ_zᵀ (G + λI)⁻¹ ∇ℓ_i / N``: the predicted rise of z's loss if i were removed (Koh & Liang 2017, equation 2).

    Args:
        curvature: G, of the mean loss.
        test, train: gradients; N is the number of rows of ``train``.
        damping: λ, together with the objective's own penalty.

    >>> influence(torch.eye(2) * 2, torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0, 1.0], [-2.0, 0.0]])).tolist()
    [[1.0, -0.5]]
    """
    damped = curvature + damping * torch.eye(len(curvature), dtype=curvature.dtype)
    return test @ torch.linalg.solve(damped, train.T) / len(train)


def retrain(
    model: nn.Module, data: Data, loss: Loss, l2: float = 0.0, weights: Tensor | None = None, tolerance: float = 1e-10
) -> nn.Module:
    """The model in float64 that minimises ``Σ w_i ℓ_i + l2/2 ‖θ‖²``, from the given one, by L-BFGS and Newton.

    Args:
        weights: ``[examples]``; by default 1/N each.
        tolerance: largest entry of the gradient that is left.

    Warns:
        ConvergenceWarning: the tolerance was not reached.
    """
    problem, data = _Problem.of(model, loss), _double(data)
    count = len(data[1])
    weights = torch.full((count,), 1 / count, dtype=torch.float64) if weights is None else weights.double()

    def objective(theta: Tensor) -> Tensor:
        return weights @ problem.losses(theta, data) + l2 / 2 * theta @ theta

    return _with(problem.model, _minimum(objective, problem.theta, tolerance))


def leave_one_out(
    model: nn.Module,
    train: Data,
    test: Data,
    loss: Loss,
    l2: float = 0.0,
    removed: Sequence[int] | None = None,
    weight: float | None = None,
) -> Float[Tensor, "test removed"]:
    """The rise of each test loss when one training example is left out, really retrained to convergence.

    The objective is ``Σ weight · ℓ_j + l2/2 ‖θ‖²`` over the examples that are left.

    Args:
        model: where training starts.
        removed: training examples to leave out, one at a time; by default each of them.
        weight: of each example that is left: by default 1/N as before the removal, which is what influence functions
            predict; 1/(N − 1) for the mean over those left, which weakens the penalty by as much, and so shifts all
            effects on a test example alike.
    """
    count, test = len(train[1]), _double(test)
    whole = retrain(model, train, loss, l2)
    before = loss(called(whole, {}, test[0]), test[1]).detach()
    columns = []
    for index in range(count) if removed is None else removed:
        weights = torch.full((count,), 1 / count if weight is None else weight, dtype=torch.float64)
        weights[index] = 0
        without = retrain(whole, train, loss, l2, weights)
        columns.append(loss(called(without, {}, test[0]), test[1]).detach() - before)
    return torch.stack(columns, 1)


def pbrf(
    model: nn.Module,
    train: Data,
    test: Data,
    loss: Loss,
    damping: float,
    removed: Sequence[int] | None = None,
    tolerance: float = 1e-10,
) -> Float[Tensor, "test removed"]:
    """The rise of each test loss under the proximal Bregman response to removing one training example.

    That is the objective which damped influence functions answer (Bae et al. 2022; Grosse et al. 2023, equation 9):
    ``argmin_θ (1/N) Σ D(h(θ, x_i), h(θˢ, x_i)) − (1/N) ℓ_m(θ) + λ/2 ‖θ − θˢ‖²``, D the loss's Bregman divergence in the
    outputs, θˢ the present weights.

    Args:
        damping: λ.
        removed: training examples m, one at a time; by default each of them.
    """
    problem, train, test = _Problem.of(model, loss), _double(train), _double(test)
    start, count = problem.theta, len(train[1])
    present = problem.outputs(start, train[0]).detach()
    slope = torch.func.grad(lambda outputs: loss(outputs, train[1]).sum())(present)  # [examples, …]

    def objective(theta: Tensor, index: int) -> Tensor:
        outputs = problem.outputs(theta, train[0])
        losses = loss(outputs, train[1])
        divergence = losses.sum() - (slope * (outputs - present)).sum()  # up to a constant
        return (divergence - losses[index]) / count + damping / 2 * (theta - start).square().sum()

    before = problem.losses(start, test)
    columns = []
    for index in range(count) if removed is None else removed:
        theta = _minimum(functools.partial(objective, index=index), start, tolerance)
        columns.append((problem.losses(theta, test) - before).detach())
    return torch.stack(columns, 1)


def _minimum(objective: Callable[[Tensor], Tensor], start: Tensor, tolerance: float) -> Tensor:
    """Where L-BFGS ends, and Newton's method after it, which does not stall at the rounding of the objective."""
    theta = _lbfgs(objective, start, tolerance)
    slope = torch.func.grad(objective)
    for _ in range(_NEWTON_STEPS):
        gradient = slope(theta)
        if len(theta) > _NEWTON_PARAMETERS or gradient.abs().max() <= tolerance:
            break
        step, failed = torch.linalg.solve_ex(_second(objective, theta), gradient)
        if failed or not slope(theta - step).norm() < gradient.norm():
            break
        theta = theta - step
    left = float(slope(theta).abs().max())
    if not left <= tolerance:
        message = f"the minimum was not reached: a gradient of {left:.2g} is left, more than {tolerance:.2g}"
        warnings.warn(message, ConvergenceWarning, stacklevel=3)
    return theta.detach()


def _lbfgs(objective: Callable[[Tensor], Tensor], start: Tensor, tolerance: float) -> Tensor:
    theta = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [theta], max_iter=1000, history_size=50, tolerance_grad=tolerance, tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = objective(theta)
        value.backward()
        return value

    optimizer.step(closure)
    return theta.detach()


def _second(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """The Hessian ``[n, n]``, backwards twice, row by row: ``torch.func`` gets a LayerNorm's wrong (torch 2.13)."""
    found = torch.autograd.functional.hessian(function, at)
    assert isinstance(found, Tensor)  # noqa: S101 (for the type checker)
    return found.detach()


def _with(model: nn.Module, theta: Tensor) -> nn.Module:
    changed = copy.deepcopy(model)
    own = [p for p in changed.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter, part in zip(own, theta.split([p.numel() for p in own]), strict=True):
            parameter.copy_(part.reshape(parameter.shape))
    return changed


def _labels(loss: Loss, outputs: Tensor, target: Tensor) -> list[tuple[float, Tensor]]:
    """Labels with weights whose gradients' outer products add up to the expectation over the model's labels."""
    if loss is cross_entropy and outputs.ndim == 2:
        p = outputs.softmax(1)[0]
        return [(float(p[c]), torch.full_like(target, c)) for c in range(len(p))]
    if loss is squared_error:  # the gradient is linear in the noise: one direction at a time, of its deviation
        present, sigma = outputs.reshape(target.shape), (target.numel() / 2) ** 0.5
        return [(1.0, present + sigma * unit.reshape(target.shape)) for unit in torch.eye(target.numel()).double()]
    raise InvalidInput("the exact Fisher matrix is known for cross_entropy and squared_error: take gauss_newton")


def _double(data: Data) -> Data:
    found: Data = cast(data, torch.device("cpu"), torch.float64)
    return found


def _each(data: Data) -> list[Data]:
    return [rows_of(_double(data), slice(row, row + 1)) for row in range(len(data[1]))]
