"""Gradients of all layers as one vector, and products of such vectors with a curvature matrix that is never formed.

The vector concatenates the layers' matrices in the model's order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from simfluence.attribution.gradients.hooks import Gradients, called, evaluating, rows_of
from simfluence.attribution.gradients.inner_products import Query, combined, matrices, products
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.task import Data

#: Vectors ``[n, parameters]`` → their products with a curvature matrix, row by row.
Product = Callable[[Tensor], Tensor]

__all__ = ["Product", "curvature_product", "flatten", "unflatten"]


def flatten(gradients: Gradients, queries: Mapping[str, Query]) -> Float[Tensor, "n parameters"]:
    """Concatenate the layers' matrices into one vector per example."""
    return torch.cat([matrices(queries[name]).flatten(1) for name in gradients.layers], 1)


def unflatten(gradients: Gradients, flat: Float[Tensor, "n parameters"]) -> dict[str, Tensor]:
    """Split vectors into matrices ``[n, rows, columns]`` by layer: the reverse of ``flatten``."""
    parts = torch.split(flat, [layer.size for layer in gradients.layers.values()], 1)
    return {
        name: part.reshape(len(flat), layer.rows, layer.columns)
        for (name, layer), part in zip(gradients.layers.items(), parts, strict=True)
    }


def curvature_product(name: str, gradients: Gradients, data: Data, batch_size: int) -> Product:
    """Return the product with the curvature of the mean loss over ``data``.

    Raises:
        InvalidInput: there is no curvature of that name.
    """
    if name not in CURVATURES:
        raise InvalidInput(f"unknown curvature {name!r}, {did_you_mean(name, CURVATURES)}")
    return partial(CURVATURES[name], gradients, data, batch_size)


def _empirical_fisher(gradients: Gradients, data: Data, batch_size: int, vectors: Tensor) -> Tensor:
    """Return ``(1/N) Σ g_i ⟨g_i, v⟩`` for each vector v."""
    queries, total = unflatten(gradients, vectors), torch.zeros_like(vectors)
    for _, factors in gradients.batches(data, batch_size=batch_size):
        weights = torch.stack([products(queries[name], layer) for name, layer in factors.items()]).sum(0)
        total += flatten(gradients, {name: combined(weights, layer) for name, layer in factors.items()})
    return total / len(data[1])


def _hessian(gradients: Gradients, data: Data, batch_size: int, vectors: Tensor) -> Tensor:
    """Return ``∇ ⟨∇ℓ, v⟩`` for each vector v, by differentiating backwards twice."""
    return _summed(_hessian_of_batch, gradients, data, batch_size, vectors)


def _gauss_newton(gradients: Gradients, data: Data, batch_size: int, vectors: Tensor) -> Tensor:
    """Return ``Jᵀ H J v`` for each vector v, with J the outputs' Jacobian and H the loss's Hessian by the outputs."""
    return _summed(_gauss_newton_of_batch, gradients, data, batch_size, vectors)


def _hessian_of_batch(gradients: Gradients, batch: Data, vector: dict[str, Tensor]) -> dict[str, Tensor]:
    _, pull = _vjp(torch.func.grad(partial(_total_loss, gradients, batch)), _parameters(gradients))
    product: dict[str, Tensor] = pull(vector)[0]
    return product


def _gauss_newton_of_batch(gradients: Gradients, batch: Data, vector: dict[str, Tensor]) -> dict[str, Tensor]:
    """Compute J v by pulling back a pull-back, and the product with H by the loss's second derivative."""
    outputs, pull = _vjp(partial(_outputs, gradients, batch), _parameters(gradients))
    _, push = _vjp(lambda cotangent: pull(cotangent)[0], torch.zeros_like(outputs))
    (tangent,) = push(vector)  # J v
    _, curve = _vjp(torch.func.grad(lambda at: gradients.loss(at, batch[1]).sum()), outputs)
    product: dict[str, Tensor] = pull(curve(tangent)[0])[0]
    return product


def _summed(
    of_batch: Callable[[Gradients, Data, dict[str, Tensor]], dict[str, Tensor]],
    gradients: Gradients,
    data: Data,
    batch_size: int,
    vectors: Tensor,
) -> Tensor:
    """Sum the products of all batches, for all vectors at once, and divide by the number of examples."""
    by_parameter = {
        parameter: values
        for name, matrix in unflatten(gradients, vectors).items()
        for parameter, values in gradients.layers[name].to_parameters(matrix).items()
    }
    total = torch.zeros_like(vectors)
    for start in range(0, len(data[1]), batch_size):
        batch = gradients.placed(rows_of(data, slice(start, start + batch_size)))
        with evaluating(gradients.model), _needing_torch_func():
            tensors = torch.func.vmap(partial(of_batch, gradients, batch))(by_parameter)
        rows = {name: layer.from_parameters(tensors) for name, layer in gradients.layers.items()}
        total += flatten(gradients, rows).detach()
    return total / len(data[1])


@contextlib.contextmanager
def _needing_torch_func() -> Iterator[None]:
    """Say what else there is where ``torch.func`` cannot differentiate a model.

    Raises:
        InvalidInput: instead of torch's own error.
    """
    try:
        yield
    except InvalidInput:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError, NotImplementedError) as error:
        raise InvalidInput(
            f"products with this curvature need torch.func, which fails on this model or its loss: {error}. Pass "
            "curvature='empirical_fisher', or use EKFAC, KFAC or Diagonal, which do without"
        ) from error


def _vjp(function: Callable[[Any], Any], at: Any) -> tuple[Any, Callable[[Any], tuple[Any]]]:
    """Return the value of ``function``, and the product of a cotangent with its Jacobian."""
    value, pull = torch.func.vjp(function, at)[:2]
    return value, pull


def _outputs(gradients: Gradients, batch: Data, parameters: dict[str, Tensor]) -> Any:
    return called(gradients.model, parameters, batch[0])


def _total_loss(gradients: Gradients, batch: Data, parameters: dict[str, Tensor]) -> Tensor:
    return gradients.loss(_outputs(gradients, batch, parameters), batch[1]).sum()


def _parameters(gradients: Gradients) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in gradients.parameters.items()}


#: The products ``(gradients, data, batch size, vectors)`` → products, by the name of the curvature matrix.
CURVATURES: dict[str, Callable[[Gradients, Data, int, Tensor], Tensor]] = {
    "gauss_newton": _gauss_newton,
    "hessian": _hessian,
    "empirical_fisher": _empirical_fisher,
}
