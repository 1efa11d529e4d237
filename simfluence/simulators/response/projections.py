"""Derivatives of a model's outputs by its trained parameters, along the main directions of all of them."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simfluence.attribution.gradients.hooks import Gradients
from simfluence.attribution.gradients.per_example import per_example_gradients
from simfluence.attribution.gradients.tangent_kernel import one_tensor
from simfluence.errors import PlainGradientsWarning
from simfluence.simulators.response.mean_path import MeanPath
from simfluence.simulators.response.optimizers import Optimizer, preconditioners
from simfluence.task import Data, Task

__all__ = ["Projections", "project"]

_FORMED = 2**25  # most numbers in the derivatives formed at a time
_OVERSAMPLED = 2  # sketched rows per direction


@dataclass(frozen=True, eq=False)
class Projections:
    """The derivatives J of the outputs at each checkpoint along k orthonormal directions U, after scaling by D.

    Args:
        reads: ``J D U``, ``[checkpoints, examples, outputs, directions]``: the change of the outputs with the state.
        writes: ``J P D⁻¹ U`` of the training examples: the change of the state by a step down the gradient. None if
            nothing is scaled: then they are ``reads``.
        decays: ``Uᵀ P U``, ``[checkpoints, directions, directions]``: what weight decay in the gradient does.
        kept: share of the squares of J D along the directions, ``[checkpoints]``.
    """

    reads: Tensor
    writes: Tensor | None
    decays: Tensor | None
    kept: Tensor


def project(
    task: Task,
    model: nn.Module,
    path: MeanPath,
    data: Data,
    times: np.ndarray,
    optimizer: Optimizer,
    directions: int,
    batch_size: int,
    decayed: bool,
    advance: Callable[[], None],
) -> Projections:
    """Form the derivatives at each checkpoint twice: first to find the directions, then to project on them.

    Args:
        task: gives the loss.
        model: a model of the task, whose weights are set to those of the mean path.
        path: the mean path.
        data: training data, then test data.
        times: steps of the checkpoints.
        optimizer: gives P.
        directions: most directions.
        batch_size: of the batches that second moments are expected of.
        decayed: whether ``decays`` are needed.
        advance: called after each checkpoint of each pass.
    """
    jacobians = _Jacobians.of(task, model, path, data)
    count, size, n_train = jacobians.outputs, jacobians.size, len(task.train)
    rows = min(_OVERSAMPLED * directions, size)
    sketch = jacobians.like.new_zeros(rows, size)
    random = torch.Generator().manual_seed(0)
    squares, seen = [], 0
    for weights, time in zip(path.weights, times, strict=True):
        sums = sketch.new_zeros(2, size)
        slopes = _slopes(task, path.outputs[time], path.shape, data[1])
        for part, formed in jacobians.at(weights):
            flat = formed.flatten(0, 1)
            if rows < size:
                signs = torch.randint(2, (len(flat), 1), generator=random).to(flat) * 2 - 1
                sketch.index_add_(0, torch.arange(seen, seen + len(flat)) % rows, flat * signs)
                seen += len(flat)
            if optimizer.scales:
                train = part[part < n_train]
                by_loss = torch.einsum("bo,bop->bp", slopes[train], formed[: len(train)])
                sums += torch.stack([by_loss.sum(0), by_loss.square().sum(0)])
        mean, second = sums / n_train
        squares.append(mean**2 + (second - mean**2).clamp(min=0) / batch_size)
        advance()
    diagonals = (
        preconditioners(optimizer, squares, times) if optimizer.scales else [torch.ones(size).to(sketch)] * len(times)
    )
    scale = diagonals[len(diagonals) // 2].sqrt()
    basis = _main_directions(sketch * scale, directions) if rows < size else torch.eye(size).to(sketch)  # [k, size]
    reads, writes, kept = [], [], []
    forward, backward = basis * scale, [basis * _divided(diagonal, scale) for diagonal in diagonals]
    for index, weights in enumerate(path.weights):
        around = path.samples[index] or [weights]
        read = sketch.new_zeros(len(data[1]), count, len(basis))
        write, total = read[:n_train].clone(), 0.0
        for part, formed in jacobians.at(*around):
            read[part] = formed @ forward.T
            total += float((formed * scale).square().sum())
            if optimizer.scales:
                train = part[part < n_train]
                write[train] = formed[: len(train)] @ backward[index].T
        reads.append(read)
        writes.append(write)
        kept.append(float(read.square().sum()) / total if total else 1.0)
        advance()
    decays = torch.stack([(basis * diagonal) @ basis.T for diagonal in diagonals]) if decayed else None
    return Projections(
        torch.stack(reads), torch.stack(writes) if optimizer.scales else None, decays, torch.tensor(kept)
    )


@dataclass(frozen=True, eq=False)
class _Jacobians:
    """Forms the derivatives of each example's outputs by the trained parameters."""

    task: Task
    gradients: Gradients
    data: Data
    outputs: int

    @classmethod
    def of(cls, task: Task, model: nn.Module, path: MeanPath, data: Data) -> _Jacobians:
        model.load_state_dict(path.weights[-1], strict=False)
        with _without_advice():
            gradients = per_example_gradients(model, partial(_output, 0), data)
        return cls(task, gradients, data, path.outputs.shape[-1])

    @property
    def size(self) -> int:
        return self.gradients.size

    @property
    def like(self) -> Tensor:
        return self.gradients.like.detach()

    def at(self, *weights: dict[str, Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield rows of examples and their mean derivatives, ``[batch, outputs, parameters]``, over some weights."""
        batch = max(1, min(256, _FORMED // (self.outputs * self.size)))
        with _without_advice():
            for rows in torch.arange(len(self.data[1])).split(batch):
                part = self.task.some(self.data, rows)
                formed = sum(self._at_one(part, int(rows[0]), one) for one in weights)
                yield rows, torch.as_tensor(formed) / len(weights)

    def _at_one(self, part: Data, first: int, weights: dict[str, Tensor]) -> Tensor:
        self.gradients.model.load_state_dict(weights, strict=False)
        return torch.stack([self._formed(part, output, first) for output in range(self.outputs)], 1)

    def _formed(self, part: Data, output: int, first: int) -> Tensor:
        gradients = dataclasses.replace(self.gradients, loss=partial(_output, output))
        factors = gradients.factors(part, first=first)
        return torch.cat([layer.matrices().flatten(1) for layer in factors.values()], 1)


def _output(number: int, outputs: Any, targets: Tensor) -> Tensor:
    """Return one output of each example, as a loss."""
    return one_tensor(outputs).flatten(1)[:, number] if outputs.ndim > 1 else outputs


def _slopes(task: Task, outputs: Tensor, shape: tuple[int, ...], targets: Tensor) -> Tensor:
    """Return the derivatives of each example's loss by its outputs, ``[examples, outputs]``."""
    outputs = outputs.detach().clone().requires_grad_()
    losses = task.loss(outputs.reshape(-1, *shape), targets)
    return torch.autograd.grad(losses.sum(), outputs)[0]


def _main_directions(rows: Tensor, count: int) -> Tensor:
    """Return the main directions of rows ``[many, size]`` as orthonormal rows, ``[count, size]``."""
    values, vectors = torch.linalg.eigh((rows @ rows.T).double())
    used = values > values[-1] * torch.finfo(rows.dtype).eps * len(rows)
    values, vectors = values[used][-count:], vectors[:, used][:, -count:]
    directions = (vectors / values.sqrt()).to(rows).T @ rows
    orthonormal: Tensor = torch.linalg.qr(directions.T)[0].T
    return orthonormal


def _divided(diagonal: Tensor, scale: Tensor) -> Tensor:
    """Return ``diagonal / scale``; 0 where the scale is 0, as then no gradient ever comes."""
    return torch.where(scale > 0, diagonal / torch.where(scale > 0, scale, 1.0), 0.0)


def _without_advice() -> Any:
    """Silence the advice to leave out layers, which a simulation cannot follow."""
    return warnings.catch_warnings(action="ignore", category=PlainGradientsWarning)
