"""Inner products of test and training gradients, computed from factors; gradients are formed only where necessary."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from simfluence._internal.generator import lent_generator
from simfluence.attribution.curvature.kronecker import FORMED, formed
from simfluence.attribution.gradients.layers import Factors, concatenated

#: The test gradients of a layer: their factors, or matrices ``[test, rows, columns]``.
Query = Factors | Tensor

#: Numbers per block of training gradients in a product: enough for a fast matrix product, few enough for the cache.
BLOCK = 2**22
#: Oversampling of the randomized decomposition: extra directions beyond the rank.
_OVERSAMPLED = 8

__all__ = [
    "Query",
    "combined",
    "joined",
    "low_rank",
    "matrices",
    "numbers",
    "position_products",
    "products",
    "self_products",
]


def products(query: Query, factors: Factors) -> Float[Tensor, "test train"]:
    """Return ``⟨q_z, g_i⟩`` for all pairs, in one layer."""
    if isinstance(query, Factors):
        return _by_positions(query, factors) if _few_positions(query, factors) else _by_rows(query, factors)
    if factors.positions > 1:
        return _by_blocks(query, factors)
    step = max(1, FORMED // (len(query) * min(query.shape[1:])))
    starts = range(0, len(factors), step)
    return torch.cat([_one_position(query, factors.part(slice(start, start + step))) for start in starts], 1)


def self_products(query: Query, factors: Factors) -> Float[Tensor, " batch"]:
    """Return ``⟨q_i, g_i⟩`` for each example, in one layer."""
    if isinstance(query, Factors) and query.positions == factors.positions == 1:
        along, across = (query.inputs * factors.inputs).sum((1, 2)), (query.gradients * factors.gradients).sum((1, 2))
        return along * across
    if isinstance(query, Factors):
        pairs = zip(formed(query), formed(factors), strict=True)
        return torch.cat([(q * g).sum((1, 2)) for q, g in pairs])
    return torch.einsum("npo,noi,npi->n", factors.gradients, query, factors.inputs)


def position_products(query: Query, factors: Factors) -> Float[Tensor, "test train positions"]:
    """Return ``⟨q_z, s_p a_pᵀ⟩`` for all pairs and each position p of the training example, summed over calls."""
    V = matrices(query)
    chunks = []
    step = max(1, FORMED // (len(V) * factors.positions * V.shape[1]))
    for start in range(0, len(factors), step):
        part = factors.part(slice(start, start + step))
        along = torch.einsum("toi,npi->tnpo", V, part.inputs)
        chunks.append((along * part.gradients).sum(-1))
    by_call = torch.cat(chunks, 1).reshape(len(V), len(factors), factors.calls, -1)  # [test, train, calls, positions]
    return by_call.sum(2)


def joined(parts: Sequence[dict[str, Query]]) -> dict[str, Query]:
    """Concatenate batches layer by layer. This empties ``parts``, so that memory holds one layer at most twice."""
    if len(parts) == 1:
        return parts[0]
    return {name: _concatenated([part.pop(name) for part in parts]) for name in list(parts[0])}


def _concatenated(parts: list[Any]) -> Query:
    return torch.cat(parts) if isinstance(parts[0], Tensor) else concatenated(parts)


def low_rank(matrices: Float[Tensor, "batch rows columns"], rank: int, seed: int) -> Factors:
    """Return the best approximations of ``rank`` as factors, whose number of positions is the rank.

    The randomized decomposition (Halko et al. 2011, algorithms 4.4 and 5.1) has an error norm close to the smallest
    possible one, ``(Σ_{k > rank} σ_k²)^½`` with σ the singular values; from full rank on the error is zero.
    """
    full_rank = min(matrices.shape[1:])
    devices = [matrices.device] if matrices.is_cuda else []
    with lent_generator(), torch.random.fork_rng(devices), torch.no_grad():
        torch.manual_seed(seed)
        U, sizes, V = torch.svd_lowrank(matrices, min(rank + _OVERSAMPLED, full_rank), niter=2)
    leading = slice(min(rank, full_rank))
    return Factors(V[..., leading].mT.contiguous(), (U * sizes[:, None])[..., leading].mT.contiguous())


def numbers(queries: Iterable[Query]) -> int:
    """Count the numbers that the queries hold."""
    return sum(q.inputs.numel() + q.gradients.numel() if isinstance(q, Factors) else q.numel() for q in queries)


def combined(weights: Float[Tensor, "test train"], factors: Factors) -> Float[Tensor, "test rows columns"]:
    """Return ``Σ_i w_zi g_i`` for each row of weights."""
    total = torch.zeros(len(weights), factors.gradients.shape[-1] * factors.inputs.shape[-1]).to(factors.inputs)
    start = 0
    for part in formed(factors):
        total += weights[:, start : start + len(part)] @ part.flatten(1)
        start += len(part)
    return total.reshape(len(weights), factors.gradients.shape[-1], -1)


def matrices(query: Query) -> Float[Tensor, "test rows columns"]:
    """Return a query's gradients as matrices, formed if it holds factors."""
    return query.matrices() if isinstance(query, Factors) else query


def _few_positions(query: Factors, factors: Factors) -> bool:
    """Decide whether to multiply all pairs of positions instead of forming gradients, because it is cheaper."""
    rows, columns = factors.gradients.shape[-1], factors.inputs.shape[-1]
    pairs = query.positions * factors.positions
    return pairs == 1 or pairs * (rows + columns) < rows * columns


def _by_positions(query: Factors, factors: Factors) -> Tensor:
    """Return ``Σ_pq (s_p·s'_q) (a_p·a'_q)``, which is ``⟨Σ_p s_p a_pᵀ, Σ_q s'_q a'_qᵀ⟩``."""
    step = max(1, FORMED // (len(query) * query.positions * factors.positions))
    chunks = []
    for start in range(0, len(factors), step):
        part = factors.part(slice(start, start + step))
        across = query.gradients.flatten(0, 1) @ part.gradients.flatten(0, 1).T  # [test · positions, train · positions]
        along = query.inputs.flatten(0, 1) @ part.inputs.flatten(0, 1).T
        pairs = across.mul_(along).view(len(query), query.positions, len(part), part.positions)
        chunks.append(pairs.sum((1, 3)))
    return torch.cat(chunks, 1)


def _by_rows(query: Factors, factors: Factors) -> Tensor:
    """Form the test gradients, a few examples at a time, and multiply each chunk with the training factors."""
    return torch.cat([products(part, factors) for part in formed(query)])


def _by_blocks(query: Tensor, factors: Factors) -> Tensor:
    """Form a few rows of all training gradients at a time, always in the same memory, and multiply them."""
    flat, width = query.flatten(1), query.shape[2]
    total = flat.new_zeros(len(query), len(factors))
    step = min(query.shape[1], max(1, BLOCK // (len(factors) * width)))
    memory = flat.new_empty(len(factors) * step * width)
    for start in range(0, query.shape[1], step):
        s = factors.gradients[..., start : start + step]
        block = memory[: len(s) * s.shape[2] * width].view(len(s), -1, width)
        torch.bmm(s.mT, factors.inputs, out=block)
        total.addmm_(flat[:, start * width : (start + step) * width], block.flatten(1).T)
    return total


def _one_position(query: Tensor, factors: Factors) -> Tensor:
    """Return ``s_iᵀ Q_z a_i``: sum over the longer axis by matrix products, then over the shorter one."""
    s, a = factors.gradients[:, 0], factors.inputs[:, 0]
    if query.shape[1] < query.shape[2]:
        query, s, a = query.mT, a, s
    along = torch.bmm(s.expand(len(query), -1, -1), query)  # [test, train, shorter axis]
    return (along * a).sum(2)
