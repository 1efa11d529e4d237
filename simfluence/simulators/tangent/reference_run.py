"""What the tangent kernel simulator takes of a recorded run: features, heads and kernels along it."""

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

GIB = 2**30


@dataclass(frozen=True, eq=False)
class Reference:
    """What is taken of one reference run; arrays as of ``FunctionSpace``."""

    learned: bool
    kernels: np.ndarray
    features: np.ndarray
    heads: np.ndarray
    basis: np.ndarray


@dataclass(frozen=True, eq=False)
class _Checkpoint:
    """A model on the way, and under Adam its step sizes by parameter name."""

    parameters: dict[str, Tensor]
    rates: dict[str, Tensor] | None


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
    """Trains once for the features and their basis, and takes the kernels at the checkpoints afterwards.

    Of each kernel it tells ``advance``.
    """
    n_train = len(task.train)
    head, n_tracked, read, checkpoints = Head(None), 0, [], []
    moments: SecondMoments | None = None
    for training in follow(task, run):
        model = training.model
        if training.step == 0:
            head = Head.of(model, data[0])
        read.append(head.read(model, data[0]))
        if training.step == 0:
            n_tracked = head.n_tracked(read[0][1], features)
            _check_memory(read[0][0], n_train, n_tracked, len(times), run.steps, landmarks, memory)
        if training.step not in times or training.finished:
            continue
        if isinstance(training.optimizer, torch.optim.Adam):  # AdamW is one
            expected = _expected_squares(model, task, training.setup.train_data, usual_batch_size([run.curriculum]))
            moments = SecondMoments.after(moments, training.step, expected, training.optimizer.param_groups[0])
        parameters = {name: each.detach().clone() for name, each in model.named_parameters() if each.requires_grad}
        checkpoints.append(_Checkpoint(parameters, None if moments is None else moments.steps()))
    seen, weights = (torch.stack(each) for each in zip(*read, strict=True))
    basis = head.basis(seen[times[times <= run.steps]], weights[0])
    directions = basis[:n_tracked]
    kernels = []
    for checkpoint in checkpoints:
        kernels.append(_kernel_at(checkpoint, model, head, directions, data, n_train, landmarks))
        advance()
    kernels.extend([kernels[-1]] * (len(times) - len(kernels)))  # a run that is shorter than others keeps its last
    arrays = torch.stack(kernels), seen @ basis.T, weights @ basis.T, basis
    return Reference(head.name is not None, *(each.numpy() for each in arrays))


def _kernel_at(
    checkpoint: _Checkpoint,
    model: nn.Module,
    head: Head,
    directions: Tensor,
    data: Any,
    n_train: int,
    landmarks: int | None,
) -> Tensor:
    """Of the features along some directions: the kernel or its factors, as of ``FunctionSpace``."""
    model.load_state_dict(checkpoint.parameters, strict=False)
    body = head.body(model, directions)
    if not any(parameter.requires_grad for parameter in body.parameters()):  # the head is all there is
        return directions.new_zeros(n_train, 0, len(data[1]), 0)
    rates = checkpoint.rates and {f"model.{name}": each for name, each in checkpoint.rates.items()}
    if landmarks is None:
        return tangent_kernel(body, data, n_train, rates)
    first = torch.randperm(n_train, generator=torch.Generator().manual_seed(0))[:landmarks]
    others = torch.ones(len(data[1]), dtype=torch.bool)
    others[first] = False
    order = torch.cat([first, others.nonzero()[:, 0]])
    kernel = tangent_kernel(body, take(data, order), landmarks, rates)[:, :, torch.argsort(order)]
    return factors_of(kernel, first)


def factors_of(kernel: Tensor, landmarks: Tensor) -> Tensor:
    """Nyström's factors of a kernel from its part with some examples (Williams and Seeger 2000).

    Args:
        kernel: ``[landmarks, outputs, examples, outputs]``.
        landmarks: which of the examples they are.

    Returns:
        Φ, ``[examples, outputs, landmarks · outputs]``, with ``ΦΦᵀ`` the kernel on and with the landmarks, and for
        other pairs what these say of them.
    """
    side = kernel.flatten(0, 1).flatten(1).T.double()  # [examples · outputs, rank]
    own = kernel[:, :, landmarks].flatten(0, 1).flatten(1).double()
    sizes, directions = torch.linalg.eigh((own + own.T) / 2)
    least = sizes.max() * torch.finfo(kernel.dtype).eps * len(own)
    scales = torch.where(sizes > least, sizes.clamp(min=least).rsqrt(), 0.0)
    factors = (side @ directions) * scales
    return factors.to(kernel.dtype).reshape(*kernel.shape[2:], -1)


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """Adam's second moments along a reference, as they are expected over random batches.

    Those of one run are of its own batches: where none of them had a gradient, a step of another run would be without
    bounds. Between checkpoints the squares are taken to change in a straight line.

    Args:
        step: number of updates so far.
        squares: expected squares of a batch's mean gradient at that step, by parameter name.
        sums: of the squares so far, weighted as Adam does.
        weight: sum of those weights, which corrects for the first steps.
        beta, eps: Adam's.
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
        """The moments at a checkpoint, from those at the one before it."""
        beta, eps = float(group["betas"][1]), float(group["eps"])
        if before is None:
            return cls(step, squares, {name: (1 - beta) * each for name, each in squares.items()}, 1 - beta, beta, eps)
        kept = beta ** (step - before.step)
        between = {name: (each + before.squares[name]) / 2 for name, each in squares.items()}
        sums = {name: kept * before.sums[name] + (1 - kept) * each for name, each in between.items()}
        return cls(step, squares, sums, kept * before.weight + 1 - kept, beta, eps)

    def steps(self) -> dict[str, Tensor]:
        """``1 / (√v̂ + ε)`` by parameter name."""
        return {name: 1 / ((each / self.weight).sqrt() + self.eps) for name, each in self.sums.items()}


def _expected_squares(model: nn.Module, task: Task, data: Any, batch_size: int) -> dict[str, Tensor]:
    """``ḡ² + (E[g²] − ḡ²) / B``: of the mean gradient of B random training examples, by parameter name."""
    gradients = per_example_gradients(model, task.loss, data)
    found: dict[str, Tensor] = {}
    count = len(data[1])
    sums = {name: gradients.like.new_zeros(2, layer.rows, layer.columns) for name, layer in gradients.layers.items()}
    for _, factors in gradients.batches(data, 64):
        for name, each in factors.items():
            sums[name][0] += torch.einsum("bpr,bpc->rc", each.gradients, each.inputs)
            sums[name][1] += squares(each)
    for name, layer in gradients.layers.items():
        mean, second = sums[name] / count
        found |= layer.to_parameters(mean**2 + (second - mean**2).clamp(min=0) / batch_size)
    return found


def _check_memory(
    seen: Tensor, n_train: int, n_tracked: int, kernels: int, steps: int, landmarks: int | None, most: float
) -> None:
    examples, item = len(seen), seen.element_size()
    rows = n_train if landmarks is None else landmarks
    size = kernels * kernel_bytes(rows, examples - rows, n_tracked, item) + (steps + 1) * seen.numel() * item
    if size > most:
        raise InvalidInput(
            f"{kernels} kernels of {rows} training examples with {examples}, {n_tracked} features each, and the "
            f"features at {steps} steps take {size / GIB:.2g} GiB of a reference's {most / GIB:.2g}: fewer "
            "landmarks=, checkpoints, references or features, or more memory="
        )
