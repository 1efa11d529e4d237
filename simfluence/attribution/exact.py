"""The quantities that attribution approximates, computed exactly in float64: curvature, influence, retraining.

All functions use one flat vector θ of the parameters that require a gradient, in the order of
``model.named_parameters()``. Matrices are ``[parameters, parameters]``, so models may have up to a few thousand
parameters. The tests compare the attributors with these functions.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import torch
from annotated_types import Ge
from jaxtyping import Float
from torch import Tensor, nn

from simfluence._internal.checked import checked
from simfluence._internal.types import Count, Seed
from simfluence.attribution.gradients.hooks import Loss, called, rows_of
from simfluence.attribution.gradients.labels import relabelling
from simfluence.errors import ConvergenceWarning, InvalidInput
from simfluence.task import Data, cast
from simfluence.tasks.losses import cross_entropy, squared_error

#: Newton steps at the end of a minimisation, and most parameters for which they are taken (they need the Hessian).
_NEWTON_STEPS = 20
_NEWTON_PARAMETERS = 2000

NotNegative = Annotated[float, Ge(0)]

Matrix = Float[Tensor, "parameters parameters"]

__all__ = [
    "empirical_fisher",
    "gauss_newton",
    "gradients",
    "hessian",
    "influence",
    "leave_one_out",
    "pbrf",
    "retrain",
    "sampled_fisher",
    "true_fisher",
]

#: ``torch.autograd.functional.hessian`` has no type annotations.
_torch_hessian: Callable[..., Any] = torch.autograd.functional.hessian


@dataclass(frozen=True, eq=False)
class _Problem:
    """A model and its loss as functions of one flat parameter vector."""

    model: nn.Module
    loss: Loss

    @classmethod
    def of(cls, model: nn.Module, loss: Loss) -> _Problem:
        return cls(copy.deepcopy(model).double().eval(), loss)

    @property
    def theta(self) -> Tensor:
        return torch.cat([p.detach().flatten() for p in self.model.parameters() if p.requires_grad])

    def outputs(self, theta: Tensor, inputs: Any) -> Any:
        trained = {name: p for name, p in self.model.named_parameters() if p.requires_grad}
        parts = torch.split(theta, [p.numel() for p in trained.values()])
        values = {name: part.reshape(p.shape) for (name, p), part in zip(trained.items(), parts, strict=True)}
        return called(self.model, values, inputs)

    def losses(self, theta: Tensor, data: Data) -> Tensor:
        return self.loss(self.outputs(theta, data[0]), data[1])

    def total(self, theta: Tensor, data: Data) -> Tensor:
        return self.losses(theta, data).sum()


@checked
def gradients(model: nn.Module, data: Data, loss: Loss) -> Float[Tensor, "examples parameters"]:
    """Return the gradient of each example's loss, from one pass per example."""
    problem = _Problem.of(model, loss)
    return torch.stack([torch.func.grad(problem.total)(problem.theta, example) for example in _examples(data)])


@checked
def hessian(model: nn.Module, data: Data, loss: Loss) -> Matrix:
    """Return the Hessian of the mean loss, ``∇² (1/N) Σ ℓ_i``."""
    problem = _Problem.of(model, loss)
    return _hessian_at(lambda theta: problem.losses(theta, _double(data)).mean(), problem.theta)


@checked
def gauss_newton(model: nn.Module, data: Data, loss: Loss) -> Matrix:
    """Return ``(1/N) Σ Jᵀ H J``: J the outputs' Jacobian, H the loss's Hessian by the outputs (Martens 2020, eq. 6)."""
    problem = _Problem.of(model, loss)
    return torch.stack([_gauss_newton_of_one(problem, example) for example in _examples(data)]).mean(0)


def _gauss_newton_of_one(problem: _Problem, example: Data) -> Tensor:
    inputs, target = example
    outputs = problem.outputs(problem.theta, inputs).detach()
    J = torch.func.jacrev(lambda theta: problem.outputs(theta, inputs).flatten())(problem.theta).detach()
    H = _hessian_at(lambda flat: problem.loss(flat.reshape(outputs.shape), target).sum(), outputs.flatten())
    matrix: Tensor = J.T @ H @ J
    return matrix


@checked
def true_fisher(model: nn.Module, data: Data, loss: Loss) -> Matrix:
    """Return ``(1/N) Σ E[∇ℓ ∇ℓᵀ]``, with the exact expectation over the model's labels.

    Args:
        loss: the library's ``cross_entropy`` of ``[batch, classes]``, or its ``squared_error``.

    Raises:
        InvalidInput: another loss.
    """
    problem = _Problem.of(model, loss)
    total = torch.zeros(len(problem.theta), len(problem.theta), dtype=torch.float64)
    for inputs, target in _examples(data):
        outputs = problem.outputs(problem.theta, inputs).detach()
        for weight, label in _labels(loss, outputs, target):
            g = torch.func.grad(problem.total)(problem.theta, (inputs, label))
            total += weight * torch.outer(g, g)
    return total / len(data[1])


@checked
def sampled_fisher(model: nn.Module, data: Data, loss: Loss, seed: Seed = 0, draws: Count = 1) -> Matrix:
    """Estimate ``true_fisher`` from ``draws`` labels per example; draw d has the seed ``seed + d``.

    The labels are those that an attributor with ``labels="sampled"`` draws.
    """
    problem, (inputs, targets) = _Problem.of(model, loss), _double(data)
    outputs = problem.outputs(problem.theta, inputs).detach()
    total = torch.zeros(len(problem.theta), len(problem.theta), dtype=torch.float64)
    for draw in range(draws):
        relabel = relabelling("sampled", loss, seed + draw)
        labels = targets if relabel is None else relabel(outputs, targets, range(len(targets)))
        total += empirical_fisher(model, (inputs, labels), loss)
    return total / draws


@checked
def empirical_fisher(model: nn.Module, data: Data, loss: Loss) -> Matrix:
    """Return ``(1/N) Σ ∇ℓ_i ∇ℓ_iᵀ`` with the real labels."""
    g = gradients(model, data, loss)
    return g.T @ g / len(g)


@checked
def influence(
    curvature: Matrix,
    test: Float[Tensor, "test parameters"],
    train: Float[Tensor, "train parameters"],
    damping: NotNegative = 0.0,
) -> Float[Tensor, "test train"]:
    """Return ``∇ℓ_zᵀ (G + λI)⁻¹ ∇ℓ_i / N``: how much z's loss would rise without i (Koh & Liang 2017, equation 2).

    Args:
        curvature: G, the curvature of the mean loss.
        test, train: gradients; N is the number of rows of ``train``.
        damping: λ, including the objective's l2 penalty.

    >>> influence(torch.eye(2) * 2, torch.tensor([[1.0, 0.0]]), torch.tensor([[4.0, 1.0], [-2.0, 0.0]])).tolist()
    [[1.0, -0.5]]
    """
    damped = curvature + damping * torch.eye(len(curvature), dtype=curvature.dtype)
    scores: Tensor = test @ torch.linalg.solve(damped, train.T) / len(train)
    return scores


@checked
def retrain(
    model: nn.Module,
    data: Data,
    loss: Loss,
    l2: NotNegative = 0.0,
    weights: Tensor | None = None,
    tolerance: NotNegative = 1e-10,
) -> nn.Module:
    """Minimise ``Σ w_i ℓ_i + l2/2 ‖θ‖²``, starting at ``model``, by L-BFGS and Newton's method in float64.

    Args:
        weights: w, ``[examples]``; by default 1/N each.
        tolerance: largest absolute entry of the gradient at the minimum.

    Warns:
        ConvergenceWarning: the tolerance was not reached.
    """
    problem, data = _Problem.of(model, loss), _double(data)
    count = len(data[1])
    weights = torch.full((count,), 1 / count, dtype=torch.float64) if weights is None else weights.double()

    def objective(theta: Tensor) -> Tensor:
        value: Tensor = weights @ problem.losses(theta, data) + l2 / 2 * theta @ theta
        return value

    return _with_parameters(problem.model, _minimum(objective, problem.theta, tolerance))


@checked
def leave_one_out(
    model: nn.Module,
    train: Data,
    test: Data,
    loss: Loss,
    l2: NotNegative = 0.0,
    removed: Sequence[int] | None = None,
    weight: float | None = None,
) -> Float[Tensor, "test removed"]:
    """Return how much each test loss rises when one training example is left out, by retraining to convergence.

    The objective is ``Σ weight · ℓ_j + l2/2 ‖θ‖²`` over the remaining examples.

    Args:
        model: where training starts.
        removed: training examples to leave out, one at a time; all by default.
        weight: weight of each remaining example: by default 1/N as before the removal, which influence functions
            predict. 1/(N − 1) gives the mean over the remaining examples, which weakens the penalty relative to the
            losses and so shifts all effects on a test example equally.
    """
    count, test = len(train[1]), _double(test)
    full = retrain(model, train, loss, l2)
    before = loss(called(full, {}, test[0]), test[1]).detach()
    columns = []
    for index in range(count) if removed is None else removed:
        weights = torch.full((count,), 1 / count if weight is None else weight, dtype=torch.float64)
        weights[index] = 0
        without = retrain(full, train, loss, l2, weights)
        columns.append(loss(called(without, {}, test[0]), test[1]).detach() - before)
    return torch.stack(columns, 1)


@checked
def pbrf(
    model: nn.Module,
    train: Data,
    test: Data,
    loss: Loss,
    damping: NotNegative,
    removed: Sequence[int] | None = None,
    tolerance: NotNegative = 1e-10,
) -> Float[Tensor, "test removed"]:
    """Return how much each test loss rises under the proximal Bregman response to removing one training example.

    Damped influence functions approximate this response (Bae et al. 2022; Grosse et al. 2023, equation 9):
    ``argmin_θ (1/N) Σ D(h(θ, x_i), h(θˢ, x_i)) − (1/N) ℓ_m(θ) + λ/2 ‖θ − θˢ‖²``, with D the loss's Bregman divergence
    in the outputs and θˢ the model's current weights.

    Args:
        damping: λ.
        removed: training examples m, one at a time; all by default.
    """
    problem, train, test = _Problem.of(model, loss), _double(train), _double(test)
    start, count = problem.theta, len(train[1])
    before_outputs = problem.outputs(start, train[0]).detach()
    slope = torch.func.grad(lambda outputs: loss(outputs, train[1]).sum())(before_outputs)  # [examples, …]

    def objective(theta: Tensor, index: int) -> Tensor:
        outputs = problem.outputs(theta, train[0])
        losses = loss(outputs, train[1])
        divergence = losses.sum() - (slope * (outputs - before_outputs)).sum()  # up to a constant
        value: Tensor = (divergence - losses[index]) / count + damping / 2 * (theta - start).square().sum()
        return value

    before = problem.losses(start, test)
    columns = []
    for index in range(count) if removed is None else removed:
        theta = _minimum(functools.partial(objective, index=index), start, tolerance)
        columns.append((problem.losses(theta, test) - before).detach())
    return torch.stack(columns, 1)


def _minimum(objective: Callable[[Tensor], Tensor], start: Tensor, tolerance: float) -> Tensor:
    """Minimise by L-BFGS, then by Newton's method, which does not stall at the objective's rounding error."""
    theta = _lbfgs(objective, start, tolerance)
    slope = torch.func.grad(objective)
    for _ in range(_NEWTON_STEPS):
        gradient = slope(theta)
        if len(theta) > _NEWTON_PARAMETERS or gradient.abs().max() <= tolerance:
            break
        step, failed = torch.linalg.solve_ex(_hessian_at(objective, theta), gradient)
        if failed or not slope(theta - step).norm() < gradient.norm():
            break
        theta = theta - step
    largest = float(slope(theta).abs().max())
    if not largest <= tolerance:
        message = f"the minimum was not reached: the gradient is still {largest:.2g}, more than {tolerance:.2g}"
        warnings.warn(message, ConvergenceWarning, stacklevel=3)
    return theta.detach()


def _lbfgs(objective: Callable[[Tensor], Tensor], start: Tensor, tolerance: float) -> Tensor:
    theta = start.clone().requires_grad_()
    optimizer: torch.optim.Optimizer = torch.optim.LBFGS(
        [theta], max_iter=1000, history_size=50, tolerance_grad=tolerance, tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> float:
        optimizer.zero_grad()
        value = objective(theta)
        torch.autograd.backward(value)
        return float(value.detach())

    optimizer.step(closure)
    return theta.detach()


def _hessian_at(function: Callable[[Tensor], Tensor], at: Tensor) -> Tensor:
    """Return the Hessian ``[n, n]``, row by row; ``torch.func`` gets that of a LayerNorm wrong (torch 2.13)."""
    matrix: Tensor = _torch_hessian(function, at)
    return matrix.detach()


def _with_parameters(model: nn.Module, theta: Tensor) -> nn.Module:
    """Return a copy of the model with the parameters ``theta``."""
    changed = copy.deepcopy(model)
    trained = [p for p in changed.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter, part in zip(trained, torch.split(theta, [p.numel() for p in trained]), strict=True):
            parameter.copy_(part.reshape(parameter.shape))
    return changed


def _labels(loss: Loss, outputs: Tensor, target: Tensor) -> list[tuple[float, Tensor]]:
    """Return weights and labels: the weighted sum of their gradients' outer products is the exact expectation."""
    if loss is cross_entropy and outputs.ndim == 2:
        p = outputs.softmax(1)[0]
        return [(float(p[c]), torch.full_like(target, c)) for c in range(len(p))]
    if loss is squared_error:  # the gradient is linear in the noise, so one label per unit direction is enough
        mean, sigma = outputs.reshape(target.shape), (target.numel() / 2) ** 0.5
        return [(1.0, mean + sigma * unit.reshape(target.shape)) for unit in torch.eye(target.numel()).double()]
    raise InvalidInput("true_fisher supports only cross_entropy and squared_error: use gauss_newton for other losses")


def _double(data: Data) -> Data:
    """Move data to the CPU in float64."""
    double: Data = cast(data, torch.device("cpu"), torch.float64)
    return double


def _examples(data: Data) -> list[Data]:
    """Split data into batches of one example."""
    return [rows_of(_double(data), slice(row, row + 1)) for row in range(len(data[1]))]
