"""The empirical neural tangent kernel: inner products of the outputs' gradients, layer by layer (Jacot et al. 2018).

    Θ[(x, o), (i, p)] = ⟨∂f_o(x)/∂θ, P ∂f_p(i)/∂θ⟩

A linear layer that is applied once has gradients ``s aᵀ``, so its part of the kernel is ``(a_x · a_i)(s_xo · s_ip)``:
no gradient is formed. For layers with several positions, and with a diagonal P, gradients are formed, a few rows of the
weight at a time.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from simfluence.attribution.gradients.hooks import Gradients, Mask, attention_mask, rows_of
from simfluence.attribution.gradients.layers import Factors, Layer, concatenated
from simfluence.attribution.gradients.per_example import per_example_gradients
from simfluence.errors import InvalidInput
from simfluence.task import Data, forward

#: Most numbers in the gradients formed at a time: limits memory, does not change results.
FORMED = 2**25
#: Products computed at a time, few enough to stay in a processor's cache.
CACHED = 2**20

__all__ = ["kernel_bytes", "one_tensor", "tangent_kernel"]


def tangent_kernel(
    model: nn.Module,
    data: Data,
    columns: int | None = None,
    precondition: Mapping[str, Tensor] | None = None,
    batch_size: int = 256,
    mask: Mask = attention_mask,
) -> Float[Tensor, "columns outputs examples outputs"]:
    """Return the kernel between the first ``columns`` examples and all examples, ``Θ[i, p, x, o]``.

    Args:
        model: used in evaluation mode. Its outputs are ``[batch, …]``, flattened to ``[batch, outputs]``.
        data: ``(inputs, targets)``; the targets are not used.
        columns: number of examples i, counted from the first; all by default.
        precondition: diagonal of P by parameter name; the identity by default.
        batch_size: examples per pass: changes memory, not results.
        mask: same as in ``per_example_gradients``.

    Raises:
        InvalidInput: same as in ``per_example_gradients``; or the outputs are not one tensor.

    >>> model = nn.Linear(2, 1)
    >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    >>> tangent_kernel(model, (X, torch.zeros(2)))[:, 0, :, 0].tolist()  # x·x' + 1 for the bias
    [[2.0, 1.0], [1.0, 5.0]]
    """
    count = len(data[1])
    columns = count if columns is None else columns
    gradients = per_example_gradients(model, partial(_pick, 0), data, mask=mask)
    outputs = _outputs(gradients, data)
    kernel = gradients.like.new_zeros(columns * outputs, count * outputs)
    for layer, factors in _factors(gradients, data, outputs, batch_size):
        steps = None if precondition is None else layer.from_parameters(dict(precondition))
        _add(kernel, factors, columns, steps)
    return kernel.reshape(columns, outputs, count, outputs)


def _pick(output: int, outputs: Any, targets: Tensor) -> Tensor:
    """Return one output of each example: a loss, once ``output`` is bound."""
    return one_tensor(outputs).reshape(len(outputs), -1)[:, output]


def one_tensor(outputs: Any) -> Tensor:
    """Check that a model's outputs are one tensor, and return it.

    Raises:
        InvalidInput: the outputs are something else.
    """
    if not isinstance(outputs, Tensor):
        raise InvalidInput(f"the tangent kernel needs outputs that are one tensor, not {type(outputs).__name__}")
    return outputs


def _outputs(gradients: Gradients, data: Data) -> int:
    """Return the number of outputs per example."""
    inputs, _ = gradients.placed(rows_of(data, slice(0, 1)))
    with torch.no_grad():
        return int(forward(gradients.model, inputs).numel())


def _factors(gradients: Gradients, data: Data, outputs: int, batch_size: int) -> Iterator[tuple[Layer, list[Factors]]]:
    """Yield each layer with a list over outputs of the factors of all examples."""
    batches: dict[str, list[list[Factors]]] = {name: [[] for _ in range(outputs)] for name in gradients.layers}
    for output in range(outputs):
        of_output = dataclasses.replace(gradients, loss=partial(_pick, output))
        for _, factors in of_output.batches(data, batch_size=batch_size):
            for name, layer_factors in factors.items():
                batches[name][output].append(layer_factors)
    for name, layer in gradients.layers.items():
        yield layer, [concatenated(parts) for parts in batches.pop(name)]


def _add(kernel: Tensor, factors: list[Factors], columns: int, steps: Tensor | None) -> None:
    """Add one layer's part to the kernel."""
    inputs, rows = factors[0].inputs, factors[0].gradients.shape[-1]
    same = all(part.positions == 1 and torch.equal(part.inputs, inputs) for part in factors)
    if same and steps is None:
        _add_factored(kernel, factors, columns)
        return
    per_row = len(inputs) * len(factors) * inputs.shape[-1]
    size = max(1, FORMED // per_row)
    for start in range(0, rows, size):
        block = slice(start, min(start + size, rows))
        formed = torch.stack([part.gradients[..., block].mT @ part.inputs for part in factors], 1)
        left = formed[:columns] if steps is None else formed[:columns] * steps[block]
        kernel.addmm_(left.flatten(0, 1).flatten(1), formed.flatten(0, 1).flatten(1).T)


def _add_factored(kernel: Tensor, factors: list[Factors], columns: int) -> None:
    """Add ``(a_x · a_i)(s_xo · s_ip)``, a few columns at a time."""
    a = factors[0].inputs[:, 0]  # [examples, in]: the same for all outputs
    s = torch.stack([part.gradients[:, 0] for part in factors], 1)  # [examples, outputs, out]
    count, outputs = s.shape[:2]
    size = max(1, CACHED // (outputs * count * outputs))
    view, all_columns = kernel.view(columns, outputs, count, outputs), s.flatten(0, 1).T
    products = kernel.new_empty(size * outputs, count * outputs)  # the same memory for all blocks
    for start in range(0, columns, size):
        block = slice(start, min(start + size, columns))
        rows = s[block].flatten(0, 1)
        gram = torch.mm(rows, all_columns, out=products[: len(rows)]).view(-1, outputs, count, outputs)
        view[block].addcmul_(gram, (a[block] @ a.T)[:, None, :, None])


def kernel_bytes(n_train: int, n_test: int, outputs: int, itemsize: int) -> int:
    """Return the bytes of one kernel between the training examples and all examples."""
    return math.prod((n_train, outputs, n_train + n_test, outputs, itemsize))
