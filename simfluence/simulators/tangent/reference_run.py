"""Features, heads and kernels along a recorded run, which the tangent kernel simulator uses as a reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simfluence.attribution.curvature.kronecker import squares
from simfluence.attribution.gradients.per_example import per_example_gradients
from simfluence.attribution.gradients.tangent_kernel import kernel_bytes, tangent_kernel
from simfluence.errors import InvalidInput
from simfluence.recording import follow
from simfluence.runs import Run
from simfluence.simulators.batches import usual_batch_size
from simfluence.simulators.tangent.head import Head
from simfluence.task import Task, take

__all__ = ["GIB", "Reference", "SecondMoments", "collect_reference", "factors_of"]

GIB = 2**30


@dataclass(frozen=True, eq=False)
class Reference:
    """Arrays of one reference run; see ``FunctionSpace`` for their shapes."""

    learned: bool
    kernels: np.ndarray
    features: np.ndarray
    heads: np.ndarray
    basis: np.ndarray


@dataclass(frozen=True, eq=False)
class _Checkpoint:
    """Parameters during training, and under Adam the preconditioner, by parameter name."""

    parameters: dict[str, Tensor]
    preconditioner: dict[str, Tensor] | None


def collect_reference(
    task: Task,
    run: Run,
    data: Any,
    times: np.ndarray,
    features: int,
    landmarks: int | None,
    memory: float,
    advance: Callable[[], None],
) -> Reference:
    """Retrain a run to collect features and checkpoints, then compute the kernel at each checkpoint.

    Args:
        task: what the run trained.
        run: the reference run.
        data: training data, then test data.
        times: steps of the checkpoints, ``[checkpoints]``.
        features: number of tracked features besides those that the outputs first depend on.
        landmarks: number of landmarks of each kernel; None for whole kernels.
        memory: bytes that the reference may take.
        advance: called after each kernel.

    Raises:
        InvalidInput: the reference would take more than ``memory``.
    """
    n_train = len(task.train)
    head, n_tracked, readings, checkpoints = Head(None), 0, [], []
    moments: SecondMoments | None = None
    for training in follow(task, run):
        model = training.model
        if training.step == 0:
            head = Head.of(model, data[0])
        readings.append(head.read(model, data[0]))
        if training.step == 0:
            n_tracked = head.n_tracked(readings[0][1], features)
            _check_memory(readings[0][0], n_train, n_tracked, len(times), run.steps, landmarks, memory)
        if training.step not in times or training.finished:
            continue
        if isinstance(training.optimizer, torch.optim.Adam | torch.optim.RMSprop):  # AdamW is an Adam
            expected = _expected_squares(model, task, training.setup.train_data, usual_batch_size([run.curriculum]))
            moments = SecondMoments.after(moments, training.step, expected, training.optimizer.param_groups[0])
        parameters = {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}
        checkpoints.append(_Checkpoint(parameters, None if moments is None else moments.preconditioner()))
    path, weights = (torch.stack(tensors) for tensors in zip(*readings, strict=True))
    basis = head.basis(path[times[times <= run.steps]], weights[0])
    directions = basis[:n_tracked]
    kernels = []
    for checkpoint in checkpoints:
        kernels.append(_kernel_at(checkpoint, model, head, directions, data, n_train, landmarks))
        advance()
    kernels.extend([kernels[-1]] * (len(times) - len(kernels)))  # a shorter run repeats its last kernel
    tensors = torch.stack(kernels), path @ basis.T, weights @ basis.T, basis
    return Reference(head.name is not None, *(tensor.numpy() for tensor in tensors))


def _kernel_at(
    checkpoint: _Checkpoint,
    model: nn.Module,
    head: Head,
    directions: Tensor,
    data: Any,
    n_train: int,
    landmarks: int | None,
) -> Tensor:
    """Return the kernel of the features along some directions, or its factors; see ``FunctionSpace`` for shapes."""
    model.load_state_dict(checkpoint.parameters, strict=False)
    body = head.body(model, directions)
    if not any(parameter.requires_grad for parameter in body.parameters()):  # the head is the whole model
        return directions.new_zeros(n_train, 0, len(data[1]), 0)
    preconditioner = checkpoint.preconditioner
    if preconditioner is not None:
        preconditioner = {f"model.{name}": diagonal for name, diagonal in preconditioner.items()}
    if landmarks is None:
        return tangent_kernel(body, data, n_train, preconditioner)
    first = torch.randperm(n_train, generator=torch.Generator().manual_seed(0))[:landmarks]
    others = torch.ones(len(data[1]), dtype=torch.bool)
    others[first] = False
    order = torch.cat([first, others.nonzero()[:, 0]])
    kernel = tangent_kernel(body, take(data, order), landmarks, preconditioner)[:, :, torch.argsort(order)]
    return factors_of(kernel, first)


def factors_of(kernel: Tensor, landmarks: Tensor) -> Tensor:
    """Return Nyström factors of a kernel from its columns for a few landmarks (Williams and Seeger 2000).

    Args:
        kernel: ``[landmarks, outputs, examples, outputs]``.
        landmarks: indices of the landmarks among the examples.

    Returns:
        Φ, ``[examples, outputs, landmarks · outputs]``. ``ΦΦᵀ`` is exact where one example of a pair is a landmark,
        and an approximation for other pairs.
    """
    columns = kernel.flatten(0, 1).flatten(1).T.double()  # [examples · outputs, rank]
    block = kernel[:, :, landmarks].flatten(0, 1).flatten(1).double()
    eigenvalues, directions = torch.linalg.eigh((block + block.T) / 2)
    least = eigenvalues.max() * torch.finfo(kernel.dtype).eps * len(block)
    scales = torch.where(eigenvalues > least, eigenvalues.clamp(min=least).rsqrt(), 0.0)
    factors: Tensor = (columns @ directions) * scales
    return factors.to(kernel.dtype).reshape(*kernel.shape[2:], -1)


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """Adam's second moments along a reference, in expectation over random batches.

    The moments of a single run depend on its batches: where none of these has a gradient, the step of another run
    would be unbounded. Between checkpoints, squared gradients are assumed to change linearly.

    Args:
        step: number of updates so far.
        squares: expected squares of a batch's mean gradient at that step, by parameter name.
        sums: exponentially weighted sums of the squares so far, by parameter name.
        weight: sum of the weights, which corrects the bias of the first steps.
        beta, eps: Adam's second beta, or RMSprop's alpha, and ε.
    """

    step: int
    squares: Mapping[str, Tensor]
    sums: Mapping[str, Tensor]
    weight: float
    beta: float
    eps: float

    @classmethod
    def after(
        cls, before: SecondMoments | None, step: int, squares: Mapping[str, Tensor], group: Mapping[str, Any]
    ) -> SecondMoments:
        """Return the moments at a checkpoint, given those at the previous one."""
        beta, eps = float(group["alpha"] if "alpha" in group else group["betas"][1]), float(group["eps"])
        if before is None:
            return cls(
                step, squares, {name: (1 - beta) * square for name, square in squares.items()}, 1 - beta, beta, eps
            )
        decay = beta ** (step - before.step)
        means = {name: (square + before.squares[name]) / 2 for name, square in squares.items()}
        sums = {name: decay * before.sums[name] + (1 - decay) * mean for name, mean in means.items()}
        return cls(step, squares, sums, decay * before.weight + 1 - decay, beta, eps)

    def preconditioner(self) -> dict[str, Tensor]:
        """Return ``1 / (√v̂ + ε)`` by parameter name."""
        return {name: 1 / ((total / self.weight).sqrt() + self.eps) for name, total in self.sums.items()}


def _expected_squares(model: nn.Module, task: Task, data: Any, batch_size: int) -> dict[str, Tensor]:
    """Return the expected square of the mean gradient of B random training examples, ``ḡ² + (E[g²] − ḡ²) / B``."""
    gradients = per_example_gradients(model, task.loss, data)
    expected: dict[str, Tensor] = {}
    count = len(data[1])
    sums = {name: gradients.like.new_zeros(2, layer.rows, layer.columns) for name, layer in gradients.layers.items()}
    for _, factors in gradients.batches(data, batch_size=64):
        for name, pair in factors.items():
            sums[name][0] += torch.einsum("bpr,bpc->rc", pair.gradients, pair.inputs)
            sums[name][1] += squares(pair)
    for name, layer in gradients.layers.items():
        mean, second = sums[name] / count
        expected |= layer.to_parameters(mean**2 + (second - mean**2).clamp(min=0) / batch_size)
    return expected


def _check_memory(
    features: Tensor, n_train: int, n_tracked: int, kernels: int, steps: int, landmarks: int | None, memory: float
) -> None:
    examples, item = len(features), features.element_size()
    rows = n_train if landmarks is None else landmarks
    size = kernels * kernel_bytes(rows, examples - rows, n_tracked, item) + (steps + 1) * features.numel() * item
    if size > memory:
        raise InvalidInput(
            f"{kernels} kernels between {rows} training examples and {examples} examples with {n_tracked} features, "
            f"and the features at {steps} steps, take {size / GIB:.2g} GiB, but a reference may take "
            f"{memory / GIB:.2g} GiB: lower landmarks=, n_checkpoints=, n_references= or n_features=, or raise memory="
        )
