"""The empirical tangent kernel: inner products of the outputs' gradients, layer by layer.

    Θ[(x, o), (i, p)] = ⟨∂f_o(x)/∂θ, P ∂f_p(i)/∂θ⟩

A linear layer that is applied once has gradients ``s aᵀ``, so its share is ``(a_x · a_i)(s_xo · s_ip)``: no gradient is
formed. Layers with several positions, and products through a diagonal P, form theirs, a few rows of the weight at a
time. Jacot et al. 2018 for the kernel.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simfluence.attribution.gradients.hooks import Gradients, Loss, Mask, attention_mask, rows_of
from simfluence.attribution.gradients.layers import Factors, Layer, concatenated
from simfluence.attribution.gradients.per_example import per_example_gradients
from simfluence.errors import InvalidInput
from simfluence.task import Data, forward

#: Numbers that formed gradients may take at a time: bounds memory, does not change results.
FORMED = 2**25
#: Products that are formed at a time, few enough to stay in a processor's cache.
CACHED = 2**20


def tangent_kernel(
    model: nn.Module,
    data: Data,
    columns: int | None = None,
    precondition: Mapping[str, Tensor] | None = None,
    batch_size: int = 256,
    mask: Mask = attention_mask,
) -> Float[Tensor, "columns outputs examples outputs"]:
    """The kernel between the first ``columns`` examples and all of them, ``Θ[i, p, x, o]``.

    Args:
        model: as it is; used in evaluation mode. Its outputs are ``[batch, …]``, flattened to ``[batch, outputs]``.
        data: ``(inputs, targets)``; targets are not looked at.
        columns: how many examples, from the first, the kernel is with; all by default.
        precondition: diagonal of P by parameter name; the identity by default.
        batch_size: examples per pass: memory, not results.
        mask: as of ``per_example_gradients``.

    Raises:
        InvalidInput: as ``per_example_gradients``; outputs that are not one tensor.

    >>> model = nn.Linear(2, 1)
    >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> tangent_kernel(model, (X, torch.zeros(2)))[:, 0, :, 0].tolist()  # x·x' + 1 for the bias
    [[2.0, 1.0], [1.0, 5.0]]
    """
    count = len(data[1])
    columns = count if columns is None else columns
    gradients = per_example_gradients(model, _picked(0), data, mask=mask)
    outputs = _outputs(gradients, data)
    kernel = gradients.like.new_zeros(columns * outputs, count * outputs)
    for layer, factors in _factors(gradients, data, outputs, batch_size):
        steps = None if precondition is None else layer.from_parameters(dict(precondition))
        _add(kernel, factors, columns, steps)
    return kernel.reshape(columns, outputs, count, outputs)


def _picked(output: int) -> Loss:
    """One output of each example, as if it were the loss."""

    def pick(outputs: Any, targets: Tensor) -> Tensor:
        return one_tensor(outputs).reshape(len(outputs), -1)[:, output]

    return pick


def one_tensor(outputs: Any) -> Tensor:
    """A model's outputs, checked to be that.

    Raises:
        InvalidInput: they are not.
    """
    if not isinstance(outputs, Tensor):
        raise InvalidInput(f"the tangent kernel is of outputs that are one tensor, not {type(outputs).__name__}")
    return outputs


def _outputs(gradients: Gradients, data: Data) -> int:
    inputs, _ = gradients.placed(rows_of(data, slice(0, 1)))
    with torch.no_grad():
        return int(forward(gradients.model, inputs).numel())


def _factors(gradients: Gradients, data: Data, outputs: int, batch_size: int) -> Iterator[tuple[Layer, list[Factors]]]:
    """Of each layer, the factors of all examples for each output."""
    found: dict[str, list[list[Factors]]] = {name: [] for name in gradients.layers}
    for output in range(outputs):
        of_output = dataclasses.replace(gradients, loss=_picked(output))
        parts: dict[str, list[Factors]] = {name: [] for name in gradients.layers}
        for _, factors in of_output.batches(data, batch_size):
            for name, each in factors.items():
                parts[name].append(each)
        for name, several in parts.items():
            found[name].append(several)
    for name, layer in gradients.layers.items():
        yield layer, [concatenated(several) for several in found.pop(name)]


def _add(kernel: Tensor, factors: list[Factors], columns: int, steps: Tensor | None) -> None:
    """A layer's share."""
    inputs, rows = factors[0].inputs, factors[0].gradients.shape[-1]
    if inputs.shape[1] == 1 and steps is None:
        _add_factored(kernel, factors, columns)
        return
    each = len(inputs) * len(factors) * inputs.shape[-1]
    size = max(1, FORMED // each)
    for start in range(0, rows, size):
        some = slice(start, min(start + size, rows))
        formed = torch.stack([part.gradients[..., some].mT @ part.inputs for part in factors], 1)
        left = formed[:columns] if steps is None else formed[:columns] * steps[some]
        kernel.addmm_(left.flatten(0, 1).flatten(1), formed.flatten(0, 1).flatten(1).T)


def _add_factored(kernel: Tensor, factors: list[Factors], columns: int) -> None:
    """``(a_x · a_i)(s_xo · s_ip)``, a few columns at a time."""
    a = factors[0].inputs[:, 0]  # [examples, in]: the same for each output
    s = torch.stack([part.gradients[:, 0] for part in factors], 1)  # [examples, outputs, out]
    count, outputs = s.shape[:2]
    size = max(1, CACHED // (outputs * count * outputs))
    view, every = kernel.view(columns, outputs, count, outputs), s.flatten(0, 1).T
    products = kernel.new_empty(size * outputs, count * outputs)  # the same memory for each block
    for start in range(0, columns, size):
        some = slice(start, min(start + size, columns))
        rows = s[some].flatten(0, 1)
        gram = torch.mm(rows, every, out=products[: len(rows)]).view(-1, outputs, count, outputs)
        view[some].addcmul_(gram, (a[some] @ a.T)[:, None, :, None])


def kernel_bytes(n_train: int, n_test: int, outputs: int, itemsize: int) -> int:
    """What one kernel between the training examples and all of them takes."""
    return math.prod((n_train, outputs, n_train + n_test, outputs, itemsize))
