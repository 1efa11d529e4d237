"""Kronecker-factored curvature: one block per layer, estimated in passes over the training data.

A layer's block of the Fisher matrix ``G = E[g gᵀ]``, with g = ``Σ_p s_p a_pᵀ`` as in ``gradients.layers``, is
approximated by ``S ⊗ A`` (K-FAC: Martens & Grosse 2015), where ``A = E[a aᵀ]`` over the positions that are no padding
and ``S = E[Σ_p s_p s_pᵀ]``. EK-FAC (George et al. 2018) uses the same eigenvectors, ``Q_S`` and ``Q_A``, but the second
moments of whole gradients in that basis as eigenvalues: ``Λ = E[(Q_Sᵀ g Q_A)²]``. Without a rotation, Λ is the diagonal
of G. A vector (a bias without its weight, a normalisation's weight) has ``a = 1``, so its block is exact.
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

#: Most numbers in the gradients formed at a time: limits memory, does not change results.
FORMED = 2**24
#: Numbers that fit into a processor's cache: products of this size are consumed before they reach memory.
CACHED = 2**20
#: Most rows or columns of a layer for which a Kronecker factor is computed.
LONGEST_SIDE = 20_000
#: Rows and columns of the blocks in which a symmetric product is computed.
_SQUARE = 256

__all__ = [
    "FORMED",
    "Block",
    "Damping",
    "Kronecker",
    "Relative",
    "TrainingPasses",
    "check_damping",
    "damped",
    "diagonal",
    "ekfac",
    "formed",
    "kfac",
    "kronecker_factors",
    "squares",
]


@dataclass(frozen=True)
class Relative:
    """A damping of ``share`` times the mean eigenvalue of each block, or of the whole matrix if there are no blocks.

    >>> Relative(0.1)
    Relative(share=0.1)
    """

    share: float


Damping = float | Relative


def check_damping(damping: Any) -> None:
    """Check that ``damping`` is valid.

    Raises:
        InvalidInput: it is neither a number from 0 up nor ``Relative`` of one.
    """
    try:
        number("damping", damping.share if isinstance(damping, Relative) else damping, least=0)
    except InvalidInput:
        raise InvalidInput(f"damping must be a number from 0 up, or Relative(number), got {damping!r}") from None


def damped(eigenvalues: Tensor, damping: Damping, l2: float, name: str) -> Tensor:
    """Return ``eigenvalues + λ + l2``, checked to be positive.

    Raises:
        InvalidInput: one of them is negative, or zero up to rounding.
    """
    added = l2 + (damping.share * float(eigenvalues.mean()) if isinstance(damping, Relative) else damping)
    shifted = eigenvalues + added
    rounding = torch.finfo(eigenvalues.dtype).eps * len(eigenvalues) * float(eigenvalues.abs().max())
    floor = 0.0 if added > 0 else rounding
    if not float(shifted.min()) > floor:
        raise InvalidInput(
            f"the curvature of {name} is singular or not positive: its smallest eigenvalue is "
            f"{float(eigenvalues.min()):.3g}, and the damping adds {added:.3g}. Pass a larger damping, such as "
            f"damping={max(1e-3, -2 * float(eigenvalues.min())):.2g}"
        )
    return shifted


@dataclass(frozen=True, eq=False)
class Kronecker:
    """The Kronecker factors of one layer's block.

    Args:
        inputs: A.
        gradients: S.
    """

    inputs: Float[Tensor, "columns columns"]
    gradients: Float[Tensor, "rows rows"]


@dataclass(frozen=True, eq=False)
class Block:
    """One layer's curvature: its eigenvalues in a basis of Kronecker products.

    Args:
        eigenvalues: Λ.
        inputs: Q_A, eigenvectors in columns; None for no rotation.
        gradients: Q_S, likewise.
    """

    eigenvalues: Float[Tensor, "rows columns"]
    inputs: Float[Tensor, "columns columns"] | None = None
    gradients: Float[Tensor, "rows rows"] | None = None

    def rotated(self, factors: Factors) -> Factors:
        """Rotate factors into the block's basis: ``Q_Aᵀ a`` and ``Q_Sᵀ s``."""
        if self.inputs is None or self.gradients is None:
            return factors
        return replace(factors, inputs=factors.inputs @ self.inputs, gradients=factors.gradients @ self.gradients)

    def solve(
        self, factors: Factors, damping: Damping, l2: float = 0.0, name: str = "a layer"
    ) -> Float[Tensor, "batch rows columns"]:
        """Return ``(G + (λ + l2) I)⁻¹ g`` for the gradient g of each example.

        Raises:
            InvalidInput: the block with its damping is singular.
        """
        divisor, rotated = damped(self.eigenvalues, damping, l2, name), self.rotated(factors)
        solved = divisor.new_empty(len(factors), *divisor.shape)
        start = 0
        for part in formed(rotated, cached(divisor)):
            solved[start : start + len(part)] = self._rotated_back(part.div_(divisor))
            start += len(part)
        return solved

    def divided(self, matrices: Float[Tensor, "n rows columns"], damping: Damping) -> Float[Tensor, "n rows columns"]:
        """Return ``(G + λI)⁻¹ v`` for matrices v."""
        if self.inputs is not None and self.gradients is not None:
            matrices = self.gradients.T @ matrices @ self.inputs
        return self._rotated_back(matrices / damped(self.eigenvalues, damping, 0.0, "a layer"))

    def _rotated_back(self, matrices: Tensor) -> Tensor:
        if self.inputs is None or self.gradients is None:
            return matrices
        return self.gradients @ matrices @ self.inputs.T


@dataclass(frozen=True, eq=False)
class TrainingPasses:
    """The settings of the passes over the training data that estimate curvature.

    Args:
        gradients: the model's per-example gradients.
        data: training examples ``(inputs, targets)``.
        batch_size: examples per batch.
        relabel: replaces the real labels by others; None keeps the real ones.
        cache: a file for the sums, from which a stopped pass resumes.
    """

    gradients: Gradients
    data: Data
    batch_size: int
    relabel: Relabel | None = None
    cache: CurvatureCache | None = None

    def run(
        self,
        stage: str,
        sums: dict[str, Tensor],
        add: Callable[[str, Factors], None],
        basis: Mapping[str, Tensor] | None = None,
    ) -> None:
        """Call ``add`` with every layer's name and factors, batch by batch, to update ``sums``.

        Args:
            stage: name of this pass in the cache.
            basis: tensors that the cache saves with the sums.
        """
        first = 0 if self.cache is None else self.cache.restored(stage, sums)
        while not self._ran(stage, sums, add, basis, first):
            first = 0
            for total in sums.values():
                total.zero_()

    def _ran(
        self,
        stage: str,
        sums: dict[str, Tensor],
        add: Callable[[str, Factors], None],
        basis: Mapping[str, Tensor] | None,
        first: int,
    ) -> bool:
        """Make the pass from the example ``first`` on, and return True if all factors are of the same kind.

        A layer whose rule is found wrong on the way has other factors from then on, whose products do not add up with
        those before.
        """
        methods = self.gradients.methods if first else None
        batches = self.gradients.batches(self.data, batch_size=self.batch_size, first=first, relabel=self.relabel)
        for rows, factors in batches:
            if methods not in (None, self.gradients.methods):
                return False
            methods = self.gradients.methods
            for name, layer_factors in factors.items():
                add(name, layer_factors)
            if self.cache is not None:
                self.cache.save(stage, {**sums, **(basis or {})}, rows.stop, last=rows.stop == len(self.data[1]))
        return True


def kronecker_factors(passes: TrainingPasses) -> dict[str, Kronecker]:
    """Estimate A and S of every layer, in one pass.

    Raises:
        InvalidInput: a layer has too many inputs or outputs for a square matrix.
    """
    gradients = passes.gradients
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

    passes.run("factors", sums, add)
    return {
        name: Kronecker(
            _mirrored(sums[f"A/{name}"]) / max(1.0, sums[f"positions/{name}"].item()),
            _mirrored(sums[f"S/{name}"]) / len(passes.data[1]),
        )
        for name in gradients.layers
    }


def _add_squared(total: Float[Tensor, "width width"], rows: Float[Tensor, "positions width"]) -> None:
    """Add ``rowsᵀ rows`` to ``total``, but only the blocks on and above the diagonal."""
    for start in range(0, len(total), _SQUARE):
        stop = start + _SQUARE
        total[start:stop, start:].addmm_(rows[:, start:stop].T, rows[:, start:])


def _mirrored(total: Float[Tensor, "width width"]) -> Float[Tensor, "width width"]:
    """Return the symmetric matrix with the upper triangle of ``total``."""
    return total.triu() + total.triu(1).T


def kfac(factors: Mapping[str, Kronecker]) -> dict[str, Block]:
    """Return K-FAC's blocks: the eigenvalues of ``S ⊗ A`` are products of those of S and A."""
    return {name: _decomposed(layer_factors) for name, layer_factors in factors.items()}


def _with_second_moments(blocks: Mapping[str, Block], passes: TrainingPasses) -> dict[str, Block]:
    """Replace the blocks' eigenvalues by second moments of gradients, in one pass: EK-FAC's blocks from K-FAC's."""
    sums = {f"eigenvalues/{name}": torch.zeros_like(block.eigenvalues) for name, block in blocks.items()}

    def add(name: str, factors: Factors) -> None:
        sums[f"eigenvalues/{name}"] += squares(blocks[name].rotated(factors))

    passes.run("eigenvalues", sums, add, _bases(blocks))
    return {
        name: Block(sums[f"eigenvalues/{name}"] / len(passes.data[1]), block.inputs, block.gradients)
        for name, block in blocks.items()
    }


def ekfac(passes: TrainingPasses) -> dict[str, Block]:
    """Estimate EK-FAC's blocks, in two passes.

    Raises:
        InvalidInput: same as in ``kronecker_factors``.
    """
    gradients, cache = passes.gradients, passes.cache
    if cache is not None and cache.stage == "eigenvalues":
        blocks = {name: _cached_basis(cache, layer, gradients.own(layer)) for name, layer in gradients.layers.items()}
    else:
        blocks = kfac(kronecker_factors(passes))
    return _with_second_moments(blocks, passes)


def _bases(blocks: Mapping[str, Block]) -> dict[str, Tensor]:
    """Return the blocks' eigenvectors by their name in the cache."""
    bases = {f"Q_A/{name}": block.inputs for name, block in blocks.items()}
    bases |= {f"Q_S/{name}": block.gradients for name, block in blocks.items()}
    return {name: basis for name, basis in bases.items() if basis is not None}


def _cached_basis(cache: CurvatureCache, layer: Layer, like: Tensor) -> Block:
    """Return a layer's block with the cached eigenvectors and unfinished sums of eigenvalues."""
    shapes = {"eigenvalues": (layer.rows, layer.columns), "Q_A": (layer.columns,) * 2, "Q_S": (layer.rows,) * 2}
    return Block(*(cache.sum(f"{part}/{layer.name}", like.new_empty(shape)) for part, shape in shapes.items()))


def diagonal(passes: TrainingPasses) -> dict[str, Block]:
    """Estimate the diagonal of the Fisher matrix in one pass: second moments of gradients, without a rotation."""
    unrotated = {
        name: Block(torch.zeros(layer.rows, layer.columns).to(passes.gradients.own(layer)))
        for name, layer in passes.gradients.layers.items()
    }
    return _with_second_moments(unrotated, passes)


def squares(factors: Factors) -> Float[Tensor, "rows columns"]:
    """Return ``Σ_i g_i²``, entry by entry. With one position it is ``(s²)ᵀ(a²)``: no gradient is formed."""
    if factors.positions == 1:
        return factors.gradients[:, 0].square().T @ factors.inputs[:, 0].square()
    total = torch.zeros(factors.gradients.shape[-1], factors.inputs.shape[-1]).to(factors.inputs)
    for part in formed(factors, cached(factors.inputs)):
        total += part.square_().sum(0)
    return total


def formed(factors: Factors, numbers: int | None = None) -> Iterator[Float[Tensor, "chunk rows columns"]]:
    """Yield the gradients of a few examples at a time, at most ``numbers`` or ``FORMED`` numbers."""
    per_example = factors.gradients.shape[-1] * factors.inputs.shape[-1]
    step = max(1, (numbers or FORMED) // per_example)
    for start in range(0, len(factors), step):
        yield factors.part(slice(start, start + step)).matrices()


def cached(like: Tensor) -> int:
    """Return how many numbers to form at a time if each is used only once."""
    return FORMED if like.is_cuda else min(CACHED, FORMED)


def _decomposed(factors: Kronecker) -> Block:
    """Return the block of ``S ⊗ A`` from the eigendecompositions of S and A."""
    like = factors.inputs
    values_A, Q_A = torch.linalg.eigh(factors.inputs.double())  # in double precision: small eigenvalues matter
    values_S, Q_S = torch.linalg.eigh(factors.gradients.double())
    eigenvalues = torch.outer(values_S.clamp(min=0), values_A.clamp(min=0))
    return Block(eigenvalues.to(like), Q_A.to(like), Q_S.to(like))


def _check_sides(gradients: Gradients) -> None:
    for name, layer in gradients.layers.items():
        longest = max(layer.rows, layer.columns)
        if longest > LONGEST_SIDE:
            raise InvalidInput(
                f"layer {name!r} is {layer.rows} × {layer.columns}: a factor of {longest}² numbers is too large. Leave "
                "the layer out with layers=[…], or use Diagonal"
            )
