"""Inner products of test and training gradients, from factors, without forming gradients where that can be helped."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from simfluence.attribution.curvature import FORMED, cached, formed
from simfluence.attribution.layers import Factors

#: What stands for the test gradients of a layer: their factors, or matrices ``[test, rows, columns]``.
Query = Factors | Tensor


def products(query: Query, factors: Factors) -> Float[Tensor, "test train"]:
    """``⟨q_z, g_i⟩`` for all pairs, in one layer."""
    if isinstance(query, Factors):
        if query.positions == factors.positions == 1:  # ⟨s aᵀ, s' a'ᵀ⟩ = (s·s') (a·a')
            return (query.gradients[:, 0] @ factors.gradients[:, 0].T) * (query.inputs[:, 0] @ factors.inputs[:, 0].T)
        return _by_rows(query, factors)
    if factors.positions > 1:
        return _by_blocks(query, factors)
    step = max(1, FORMED // (len(query) * min(query.shape[1:])))
    starts = range(0, len(factors), step)
    return torch.cat([_one_position(query, factors.part(slice(start, start + step))) for start in starts], 1)


def own_products(query: Query, factors: Factors) -> Float[Tensor, " batch"]:
    """``⟨q_i, g_i⟩`` for each example, in one layer."""
    if isinstance(query, Factors) and query.positions == factors.positions == 1:
        along, across = (query.inputs * factors.inputs).sum((1, 2)), (query.gradients * factors.gradients).sum((1, 2))
        return along * across
    if isinstance(query, Factors):
        pairs = zip(formed(query), formed(factors), strict=True)
        return torch.cat([(mine * theirs).sum((1, 2)) for mine, theirs in pairs])
    return torch.einsum("npo,noi,npi->n", factors.gradients, query, factors.inputs)


def position_products(query: Query, factors: Factors) -> Float[Tensor, "test train positions"]:
    """``⟨q_z, s_p a_pᵀ⟩`` for all pairs and each position p of the training example, summed over calls."""
    V, found = matrices(query), []
    step = max(1, FORMED // (len(V) * factors.positions * V.shape[1]))
    for start in range(0, len(factors), step):
        part = factors.part(slice(start, start + step))
        along = torch.einsum("toi,npi->tnpo", V, part.inputs)
        found.append((along * part.gradients).sum(-1))
    each = torch.cat(found, 1)  # [test, train, calls · positions]
    return each.unflatten(2, (factors.calls, -1)).sum(2)


def combined(weights: Float[Tensor, "test train"], factors: Factors) -> Float[Tensor, "test rows columns"]:
    """``Σ_i w_zi g_i`` for each row of weights."""
    found = torch.zeros(len(weights), factors.gradients.shape[-1] * factors.inputs.shape[-1]).to(factors.inputs)
    start = 0
    for part in formed(factors):
        found += weights[:, start : start + len(part)] @ part.flatten(1)
        start += len(part)
    return found.reshape(len(weights), factors.gradients.shape[-1], -1)


def matrices(query: Query) -> Float[Tensor, "test rows columns"]:
    """The query formed."""
    return query.matrices() if isinstance(query, Factors) else query


def _by_rows(query: Factors, factors: Factors) -> Tensor:
    """Gradients of both sides, a few test examples at a time."""
    return torch.cat([products(part, factors) for part in formed(query)])


def _by_blocks(query: Tensor, factors: Factors) -> Tensor:
    """A few rows of all training gradients at a time, so that what is formed stays in the cache."""
    flat, width = query.flatten(1), query.shape[2]
    found = flat.new_zeros(len(query), len(factors))
    step = max(1, cached(flat) // (len(factors) * width))
    for start in range(0, query.shape[1], step):
        part = factors.gradients[..., start : start + step].mT @ factors.inputs
        found.addmm_(flat[:, start * width : (start + step) * width], part.flatten(1).T)
    return found


def _one_position(query: Tensor, factors: Factors) -> Tensor:
    """``s_iᵀ Q_z a_i``: over the longer side by matrix products, then over the other."""
    s, a = factors.gradients[:, 0], factors.inputs[:, 0]
    if query.shape[1] < query.shape[2]:
        query, s, a = query.mT, a, s
    along = torch.bmm(s.expand(len(query), -1, -1), query)  # [test, train, shorter side]
    return (along * a).sum(2)
