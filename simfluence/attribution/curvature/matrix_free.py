"""Gradients of all layers as one vector, and products of such vectors with a curvature matrix that is never formed.

The vector holds the layers' matrices one after the other, in the model's order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


def flatten(gradients: Gradients, queries: Mapping[str, Query]) -> Float[Tensor, "n parameters"]:
    """The layers' matrices as one vector per example."""
    return torch.cat([matrices(queries[name]).flatten(1) for name in gradients.layers], 1)


def unflatten(gradients: Gradients, flat: Float[Tensor, "n parameters"]) -> dict[str, Tensor]:
    """The reverse of ``flatten``: ``[n, rows, columns]`` of each layer."""
    parts = flat.split([layer.size for layer in gradients.layers.values()], 1)
    return {
        name: part.reshape(len(flat), layer.rows, layer.columns)
        for (name, layer), part in zip(gradients.layers.items(), parts, strict=True)
    }


def curvature_product(name: str, gradients: Gradients, data: Data, batch_size: int) -> Product:
    """Products with the curvature of the mean loss over ``data``.

    Raises:
        InvalidInput: there is no curvature of that name.
    """
    if name not in CURVATURES:
        raise InvalidInput(f"unknown curvature {name!r}, {did_you_mean(name, CURVATURES)}")
    return CURVATURES[name](gradients, data, batch_size)


def _empirical_fisher(gradients: Gradients, data: Data, batch_size: int) -> Product:
    """``(1/N) Σ g_i ⟨g_i, v⟩``."""

    def product(vectors: Tensor) -> Tensor:
        queries, total = unflatten(gradients, vectors), torch.zeros_like(vectors)
        for _, factors in gradients.batches(data, batch_size):
            weights = torch.stack([products(queries[name], each) for name, each in factors.items()]).sum(0)
            total += flatten(gradients, {name: combined(weights, each) for name, each in factors.items()})
        return total / len(data[1])

    return product


def _hessian(gradients: Gradients, data: Data, batch_size: int) -> Product:
    """``∇ ⟨∇ℓ, v⟩``, backwards twice."""

    def of_batch(batch: Data, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        def slope(parameters: dict[str, Tensor]) -> dict[str, Tensor]:
            found: dict[str, Tensor] = torch.func.grad(_total(gradients, batch))(parameters)
            return found

        _, pull = _vjp(slope, _parameters(gradients))
        found: dict[str, Tensor] = pull(vector)[0]
        return found

    return _summed(gradients, data, batch_size, of_batch)


def _gauss_newton(gradients: Gradients, data: Data, batch_size: int) -> Product:
    """``Jᵀ H J v``: J v by pulling back a pull-back, H by the loss's own second derivative."""

    def of_batch(batch: Data, vector: dict[str, Tensor]) -> dict[str, Tensor]:
        def outputs(parameters: dict[str, Tensor]) -> Tensor:
            found: Tensor = called(gradients.model, parameters, batch[0])
            return found

        present, pull = _vjp(outputs, _parameters(gradients))
        _, push = _vjp(lambda cotangent: pull(cotangent)[0], torch.zeros_like(present))
        (moved,) = push(vector)  # J v
        slope = torch.func.grad(lambda at: gradients.loss(at, batch[1]).sum())
        _, curve = _vjp(slope, present)
        found: dict[str, Tensor] = pull(curve(moved)[0])[0]
        return found

    return _summed(gradients, data, batch_size, of_batch)


def _summed(
    gradients: Gradients,
    data: Data,
    batch_size: int,
    of_batch: Callable[[Data, dict[str, Tensor]], dict[str, Tensor]],
) -> Product:
    """The mean over ``data`` of products batch by batch, for many vectors at a time."""

    def product(vectors: Tensor) -> Tensor:
        parts = {
            parameter: values
            for name, matrix in unflatten(gradients, vectors).items()
            for parameter, values in gradients.layers[name].to_parameters(matrix).items()
        }
        total = torch.zeros_like(vectors)
        for start in range(0, len(data[1]), batch_size):
            batch = gradients.placed(rows_of(data, slice(start, start + batch_size)))
            with evaluating(gradients.model):
                found = torch.func.vmap(lambda vector, batch=batch: of_batch(batch, vector))(parts)
            rows = {name: layer.from_parameters(found) for name, layer in gradients.layers.items()}
            total += flatten(gradients, rows).detach()
        return total / len(data[1])

    return product


def _vjp(function: Callable[[Any], Any], at: Any) -> tuple[Any, Callable[[Any], tuple[Any]]]:
    value, pull = torch.func.vjp(function, at)[:2]
    return value, pull


def _total(gradients: Gradients, batch: Data) -> Callable[[dict[str, Tensor]], Tensor]:
    def total(parameters: dict[str, Tensor]) -> Tensor:
        return gradients.loss(called(gradients.model, parameters, batch[0]), batch[1]).sum()

    return total


def _parameters(gradients: Gradients) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in gradients.parameters.items()}


#: The curvature matrices that have products, by name.
CURVATURES: dict[str, Callable[[Gradients, Data, int], Product]] = {
    "gauss_newton": _gauss_newton,
    "hessian": _hessian,
    "empirical_fisher": _empirical_fisher,
}
