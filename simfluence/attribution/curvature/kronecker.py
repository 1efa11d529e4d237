"""Kronecker-factored curvature: one block per layer, estimated in passes over the training data.

With ``s`` and ``a`` of ``layers``, a layer's block of the Fisher matrix ``G = E[g gᵀ]``, g = ``Σ_p s_p a_pᵀ``, is
approximated by ``S ⊗ A`` (K-FAC: Martens & Grosse 2015), ``A = E[a aᵀ]`` over the positions that are no padding and
``S = E[Σ_p s_p s_pᵀ]``. EK-FAC (George et al. 2018) keeps the eigenvectors, ``Q_S`` and ``Q_A``, and takes the second
moments of whole gradients in that basis as eigenvalues: ``Λ = E[(Q_Sᵀ g Q_A)²]``. The diagonal of G is the same with
no rotation. A vector (a bias alone, a normalisation's weight) has ``a = 1``, so its block is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from simfluence._internal.validation import number
from simfluence.attribution.curvature.cache import CurvatureCache
from simfluence.attribution.gradients.hooks import Gradients
from simfluence.attribution.gradients.labels import Relabel
from simfluence.attribution.gradients.layers import Factors, Layer
from simfluence.errors import InvalidInput
from simfluence.task import Data

#: Numbers that formed gradients may take at a time: bounds memory, does not change results.
FORMED = 2**24
#: Numbers that a processor's cache holds: products of this size are used up before they reach memory.
CACHED = 2**20
#: The longest side of a layer whose square matrix is still made.
LONGEST_SIDE = 20_000
#: The side of the blocks in which a symmetric product is computed.
_SQUARE = 256


@dataclass(frozen=True)
class Relative:
    """A damping of ``share`` times the mean eigenvalue: of each block, or of the whole matrix where there is one.

    >>> Relative(0.1)
    Relative(share=0.1)
    """

    share: float


Damping = float | Relative


def check_damping(damping: Any) -> None:
    """Refuse what is no damping.

    Raises:
        InvalidInput: it is neither a number from 0 up nor ``Relative`` of one.
    """
    try:
        number("damping", damping.share if isinstance(damping, Relative) else damping, least=0)
    except InvalidInput:
        raise InvalidInput(f"damping must be a number from 0 up, or Relative(number), got {damping!r}") from None


def damped(eigenvalues: Tensor, damping: Damping, l2: float, name: str) -> Tensor:
    """``eigenvalues + λ + l2``, checked to be invertible.

    Raises:
        InvalidInput: one of them is zero, up to rounding, or below.
    """
    added = l2 + (damping.share * float(eigenvalues.mean()) if isinstance(damping, Relative) else damping)
    found = eigenvalues + added
    rounding = torch.finfo(eigenvalues.dtype).eps * len(eigenvalues) * float(eigenvalues.abs().max())
    floor = 0.0 if added > 0 else rounding
    if not float(found.min()) > floor:
        raise InvalidInput(
            f"the curvature of {name} is singular or not positive: its smallest eigenvalue is "
            f"{float(eigenvalues.min()):.3g}, and the damping adds {added:.3g}. Give a larger damping, such as "
            f"damping={max(1e-3, -2 * float(eigenvalues.min())):.2g}"
        )
    return found


@dataclass(frozen=True, eq=False)
class Kronecker:
    """The factors of one layer's block.

    Args:
        inputs: A, gradients: S.
    """

    inputs: Float[Tensor, "columns columns"]
    gradients: Float[Tensor, "rows rows"]


@dataclass(frozen=True, eq=False)
class Block:
    """One layer's curvature: its eigenvalues in a basis of Kronecker products.

    Args:
        eigenvalues: Λ.
        inputs: Q_A, gradients: Q_S, eigenvectors in columns; None for no rotation.
    """

    eigenvalues: Float[Tensor, "rows columns"]
    inputs: Float[Tensor, "columns columns"] | None = None
    gradients: Float[Tensor, "rows rows"] | None = None

    def rotated(self, factors: Factors) -> Factors:
        """The factors in the basis: ``Q_Aᵀ a`` and ``Q_Sᵀ s``."""
        if self.inputs is None or self.gradients is None:
            return factors
        return replace(factors, inputs=factors.inputs @ self.inputs, gradients=factors.gradients @ self.gradients)

    def solve(
        self, factors: Factors, damping: Damping, l2: float = 0.0, name: str = "a layer"
    ) -> Float[Tensor, "batch rows columns"]:
        """``(G + (λ + l2) I)⁻¹ g`` for the gradient g of each example.

        Raises:
            InvalidInput: the block is singular and the damping does not help.
        """
        divisor, rotated = damped(self.eigenvalues, damping, l2, name), self.rotated(factors)
        found = divisor.new_empty(len(factors), *divisor.shape)
        start = 0
        for part in formed(rotated, cached(divisor)):
            found[start : start + len(part)] = self._back(part.div_(divisor))
            start += len(part)
        return found

    def divided(self, matrices: Float[Tensor, "n rows columns"], damping: Damping) -> Float[Tensor, "n rows columns"]:
        """``(G + λI)⁻¹ v`` for matrices v."""
        if self.inputs is not None and self.gradients is not None:
            matrices = self.gradients.T @ matrices @ self.inputs
        return self._back(matrices / damped(self.eigenvalues, damping, 0.0, "a layer"))

    def _back(self, matrices: Tensor) -> Tensor:
        if self.inputs is None or self.gradients is None:
            return matrices
        return self.gradients @ matrices @ self.inputs.T


def kronecker_factors(
    gradients: Gradients,
    data: Data,
    batch_size: int,
    relabel: Relabel | None = None,
    cache: CurvatureCache | None = None,
) -> dict[str, Kronecker]:
    """A and S of every layer, in one pass over ``data``.

    Args:
        cache: a file for the sums, from which the pass goes on where it stopped.

    Raises:
        InvalidInput: a layer has too many inputs or outputs for a square matrix.
    """
    _check_sides(gradients)
    sums = {f"positions/{name}": torch.zeros(1, dtype=torch.float64) for name in gradients.layers}
    for name, layer in gradients.layers.items():
        sums[f"A/{name}"] = torch.zeros(layer.columns, layer.columns).to(gradients.own(layer))
        sums[f"S/{name}"] = torch.zeros(layer.rows, layer.rows).to(gradients.own(layer))

    def add(name: str, factors: Factors) -> None:
        a, s = factors.unpadded()
        _add_squared(sums[f"A/{name}"], a)
        _add_squared(sums[f"S/{name}"], s)
        sums[f"positions/{name}"] += len(a)

    _stream("factors", sums, add, gradients, data, batch_size, relabel, cache)
    return {
        name: Kronecker(
            _mirrored(sums[f"A/{name}"]) / max(1.0, sums[f"positions/{name}"].item()),
            _mirrored(sums[f"S/{name}"]) / len(data[1]),
        )
        for name in gradients.layers
    }


def _add_squared(total: Float[Tensor, "width width"], rows: Float[Tensor, "kept width"]) -> None:
    """Add ``rowsᵀ rows``, of which only the blocks on and above the diagonal are computed."""
    for start in range(0, len(total), _SQUARE):
        stop = start + _SQUARE
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def _mirrored(total: Float[Tensor, "width width"]) -> Float[Tensor, "width width"]:
    """The symmetric matrix that has the same upper triangle."""
    return total.triu() + total.triu(1).T


def kfac(factors: Mapping[str, Kronecker]) -> dict[str, Block]:
    """K-FAC's blocks: the eigenvalues of ``S ⊗ A`` are products of those of S and A."""
    return {name: _decomposed(each) for name, each in factors.items()}


def with_eigenvalues(
    blocks: Mapping[str, Block],
    gradients: Gradients,
    data: Data,
    batch_size: int,
    relabel: Relabel | None = None,
    cache: CurvatureCache | None = None,
) -> dict[str, Block]:
    """The blocks with second moments of gradients as eigenvalues, in one pass over ``data``: EK-FAC's, from K-FAC's.

    Args:
        cache: a file for the sums and the basis, from which the pass goes on where it stopped.
    """
    sums = {f"eigenvalues/{name}": torch.zeros_like(block.eigenvalues) for name, block in blocks.items()}

    def add(name: str, factors: Factors) -> None:
        sums[f"eigenvalues/{name}"] += squares(blocks[name].rotated(factors))

    _stream("eigenvalues", sums, add, gradients, data, batch_size, relabel, cache, _bases(blocks))
    return {
        name: Block(sums[f"eigenvalues/{name}"] / len(data[1]), block.inputs, block.gradients)
        for name, block in blocks.items()
    }


def ekfac(
    gradients: Gradients,
    data: Data,
    batch_size: int,
    relabel: Relabel | None = None,
    cache: CurvatureCache | None = None,
) -> dict[str, Block]:
    """EK-FAC's blocks, in two passes over ``data``."""
    if cache is not None and cache.stage == "eigenvalues":
        blocks = {name: _cached_basis(cache, layer, gradients.own(layer)) for name, layer in gradients.layers.items()}
    else:
        blocks = kfac(kronecker_factors(gradients, data, batch_size, relabel, cache))
    return with_eigenvalues(blocks, gradients, data, batch_size, relabel, cache)


def _stream(
    stage: str,
    sums: dict[str, Tensor],
    add: Callable[[str, Factors], None],
    gradients: Gradients,
    data: Data,
    batch_size: int,
    relabel: Relabel | None,
    cache: CurvatureCache | None,
    beside: Mapping[str, Tensor] | None = None,
) -> None:
    """``add`` the factors of every layer, batch after batch, to ``sums``, kept in the file together with ``beside``."""
    first = 0 if cache is None else cache.restored(stage, sums)
    for rows, factors in gradients.batches(data, batch_size, relabel, first=first):
        for name, each in factors.items():
            add(name, each)
        if cache is not None:
            cache.save(stage, {**sums, **(beside or {})}, rows.stop, last=rows.stop == len(data[1]))


def _bases(blocks: Mapping[str, Block]) -> dict[str, Tensor]:
    found = {f"Q_A/{name}": block.inputs for name, block in blocks.items()}
    found |= {f"Q_S/{name}": block.gradients for name, block in blocks.items()}
    return {name: basis for name, basis in found.items() if basis is not None}


def _cached_basis(cache: CurvatureCache, layer: Layer, like: Tensor) -> Block:
    shapes = {"eigenvalues": (layer.rows, layer.columns), "Q_A": (layer.columns,) * 2, "Q_S": (layer.rows,) * 2}
    return Block(*(cache.sum(f"{part}/{layer.name}", like.new_empty(shape)) for part, shape in shapes.items()))


def diagonal(
    gradients: Gradients,
    data: Data,
    batch_size: int,
    relabel: Relabel | None = None,
    cache: CurvatureCache | None = None,
) -> dict[str, Block]:
    """The diagonal of the Fisher matrix: second moments of gradients as they are."""
    empty = {
        name: Block(torch.zeros(layer.rows, layer.columns).to(gradients.own(layer)))
        for name, layer in gradients.layers.items()
    }
    return with_eigenvalues(empty, gradients, data, batch_size, relabel, cache)


def squares(factors: Factors) -> Float[Tensor, "rows columns"]:
    """``Σ_i g_i²``, entry by entry. With one position, ``(s²)ᵀ(a²)``: no gradient is formed."""
    if factors.positions == 1:
        return factors.gradients[:, 0].square().T @ factors.inputs[:, 0].square()
    total = torch.zeros(factors.gradients.shape[-1], factors.inputs.shape[-1]).to(factors.inputs)
    for part in formed(factors, cached(factors.inputs)):
        total += part.square_().sum(0)
    return total


def formed(factors: Factors, numbers: int | None = None) -> Iterator[Float[Tensor, "chunk rows columns"]]:
    """The gradients of a few examples at a time, ``FORMED`` numbers or as many as given."""
    each = factors.gradients.shape[-1] * factors.inputs.shape[-1]
    step = max(1, (numbers or FORMED) // each)
    for start in range(0, len(factors), step):
        yield factors.part(slice(start, start + step)).matrices()


def cached(like: Tensor) -> int:
    """How many numbers to form at a time where each is used once."""
    return FORMED if like.is_cuda else min(CACHED, FORMED)


def _decomposed(factors: Kronecker) -> Block:
    like = factors.inputs
    along, Q_A = torch.linalg.eigh(factors.inputs.double())  # in double precision: small eigenvalues matter
    across, Q_S = torch.linalg.eigh(factors.gradients.double())
    eigenvalues = torch.outer(across.clamp(min=0), along.clamp(min=0))
    return Block(eigenvalues.to(like), Q_A.to(like), Q_S.to(like))


def _check_sides(gradients: Gradients) -> None:
    for name, layer in gradients.layers.items():
        side = max(layer.rows, layer.columns)
        if side > LONGEST_SIDE:
            raise InvalidInput(
                f"layer {name!r} is {layer.rows} × {layer.columns}: a factor of {side}² numbers is too large. Leave "
                "the layer out by layers=[…], or take Diagonal"
            )
