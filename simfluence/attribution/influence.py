"""Influence functions with one curvature block per layer (EK-FAC, K-FAC, the diagonal) or with the full matrix."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from simfluence._internal.types import Count, Seed
from simfluence.attribution.base import Attributor, LayerFactors, Queries, Solve
from simfluence.attribution.curvature.cache import CurvatureCache, fingerprint
from simfluence.attribution.curvature.kronecker import (
    Block,
    Damping,
    Relative,
    TrainingPasses,
    check_damping,
    damped,
    diagonal,
    ekfac,
    kfac,
    kronecker_factors,
)
from simfluence.attribution.curvature.matrix_free import curvature_product, flatten, unflatten
from simfluence.attribution.gradients.hooks import rows_of
from simfluence.attribution.gradients.inner_products import low_rank, self_products
from simfluence.attribution.gradients.labels import Draw, Relabel, relabelling
from simfluence.attribution.gradients.layers import Factors
from simfluence.errors import InvalidInput

__all__ = ["DEFAULT_DAMPING", "EKFAC", "KFAC", "LARGEST", "Diagonal", "Exact"]

DEFAULT_DAMPING = Relative(0.1)
#: Largest number of parameters for which the full matrix is inverted.
LARGEST = 20_000


class _Blocks(Attributor):
    """``∇ℓ_zᵀ (G + λI)⁻¹ ∇ℓ_i / N`` with G block-diagonal over layers (Grosse et al. 2023, sections 2 and 3)."""

    def __init__(
        self,
        damping: Damping = DEFAULT_DAMPING,
        labels: str | Draw = "sampled",
        layers: Sequence[str] | None = None,
        batch_size: Count = 64,
        seed: Seed = 0,
        store: str | Path | None = None,
        rank: Count | None = None,
    ) -> None:
        self.damping = damping
        self.labels = labels
        self.layers = layers
        self.batch_size = batch_size
        self.seed = seed
        self.store = store
        self.rank = rank

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_damping(self.damping)

    def _fit(self) -> None:
        relabel = relabelling(self.labels, self.gradients_.loss, self.seed)
        self.blocks_ = self._estimated(relabel)
        for name in self.blocks_:
            self._divisor(name)  # raises if the block is singular
        factors = self.gradients_.factors(rows_of(self.train_data_, slice(0, 1)))
        self.rotated_ = {name for name, layer_factors in factors.items() if layer_factors.positions == 1}

    def _prepared(self, factors: LayerFactors) -> LayerFactors:
        """Rotate layers with one position into the eigenbasis, where P is an elementwise division."""
        rotated = {name: self.blocks_[name].rotated(factors[name]) for name in factors if name in self.rotated_}
        return factors | rotated

    def _solve(self, factors: LayerFactors) -> Queries:
        if self.rank is None:
            return {name: self._solved(name, factors[name]) for name in factors}
        return {name: low_rank(self._solved(name, factors[name]), self.rank, self.seed) for name in factors}

    def _solved(self, name: str, factors: Factors) -> Tensor:
        if name in self.rotated_:
            return factors.matrices() / self._divisor(name)
        return self.blocks_[name].solve(factors, self.damping, self.l2_, f"layer {name!r}")

    def _self_products(self, solve: Solve, factors: LayerFactors) -> Float[Tensor, " batch"]:
        return torch.stack([self._layer_self_products(name, factors[name]).cpu() for name in factors]).sum(0)

    def _layer_self_products(self, name: str, factors: Factors) -> Tensor:
        if name not in self.rotated_ or factors.positions > 1:  # rotated layers can have more in some batches
            return self_products(self._solved(name, factors), factors)
        along = factors.inputs[:, 0].square() @ (1 / self._divisor(name)).T  # (s²)ᵀ W a²: no gradient is formed
        return (along * factors.gradients[:, 0].square()).sum(1)

    def _divisor(self, name: str) -> Tensor:
        return damped(self.blocks_[name].eigenvalues, self.damping, self.l2_, f"layer {name!r}")

    def _passes(self, relabel: Relabel | None) -> TrainingPasses:
        return TrainingPasses(self.gradients_, self.train_data_, self.batch_size, relabel, self._cache())

    def _cache(self) -> CurvatureCache | None:
        if self.store is None:
            return None
        labels = getattr(self.labels, "__qualname__", self.labels)
        settings = type(self).__name__, labels, self.seed
        return CurvatureCache(Path(self.store), fingerprint(self.gradients_, self.train_data_, *settings))

    @abstractmethod
    def _estimated(self, relabel: Relabel | None) -> dict[str, Block]: ...


class EKFAC(_Blocks):
    """Influence functions with eigenvalue-corrected Kronecker factors (George et al. 2018; Grosse et al. 2023).

    Args:
        damping: a number is λ itself; ``Relative(0.1)``, the default, is 0.1 times each block's mean eigenvalue.
        labels: "sampled" from the model's outputs, for the true Fisher matrix, or "empirical", the true labels; or a
            function ``(outputs, targets, uniforms) → targets`` that draws labels, for custom losses.
        layers: names or patterns of the layers to attribute to; by default all.
        batch_size: examples per forward and backward pass: affects memory, not results.
        seed: seed of the sampled labels, and of the decomposition with ``rank``.
        store: safetensors file for the factors: a later ``fit`` reads it, or resumes an interrupted one.
        rank: store ``(G + λI)⁻¹ ∇ℓ_z`` of each test example and layer as a product of this rank (Grosse et al. 2023,
            section 3.2.2): more test examples fit into memory, and scores are faster for layers that are applied to
            few positions. The error of a layer's score is at most ``(Σ_{k > rank} σ_k²)^½ ‖∇ℓ_i‖``, or slightly more,
            with σ the singular values of the matrix; it is zero at full rank. Low ranks can be far off: choose the
            largest that memory allows. Self-influence stays exact. By default, no approximation.

    Raises:
        StoreError: in ``fit``, the file is damaged or belongs to another model, other data or other settings.
        InvalidInput: in ``fit``, a block is singular without damping, labels cannot be drawn, or a layer is too wide.

    >>> from torch import nn
    >>> from simfluence.tasks.losses import cross_entropy
    >>> X, y = torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 0] * 4)
    >>> model = nn.Linear(3, 2)
    >>> scores = EKFAC(damping=1e-2, labels="empirical").fit(model, (X, y), loss=cross_entropy).scores((X[:2], y[:2]))
    >>> scores
    Scores(EKFAC, 2 × 12 (test × train), unit='loss')
    >>> bool(scores.values[0, 0] > 0)  # an example helps its own copy
    True
    """

    def _estimated(self, relabel: Relabel | None) -> dict[str, Block]:
        return ekfac(self._passes(relabel))


class KFAC(_Blocks):
    """Influence functions with Kronecker factors (Martens & Grosse 2015); the damping is added to their product.

    Args:
        damping, labels, layers, batch_size, seed, store, rank: same as in ``EKFAC``.

    >>> from torch import nn
    >>> from simfluence.tasks.losses import cross_entropy
    >>> X, y = torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 0] * 4)
    >>> model = nn.Linear(3, 2)
    >>> fitted = KFAC(damping=1e-2, labels="empirical").fit(model, (X, y), loss=cross_entropy)
    >>> scores = fitted.scores((X[:2], y[:2])).values
    >>> bool(scores[0, 0] > 0)  # an example helps its own copy
    True
    """

    def _estimated(self, relabel: Relabel | None) -> dict[str, Block]:
        return kfac(kronecker_factors(self._passes(relabel)))


class Diagonal(_Blocks):
    """Influence functions with the diagonal of the Fisher matrix.

    Args:
        damping, labels, layers, batch_size, seed, store, rank: same as in ``EKFAC``.

    >>> from torch import nn
    >>> from simfluence.tasks.losses import cross_entropy
    >>> X, y = torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 0] * 4)
    >>> model = nn.Linear(3, 2)
    >>> fitted = Diagonal(damping=1e-2, labels="empirical").fit(model, (X, y), loss=cross_entropy)
    >>> scores = fitted.scores((X[:2], y[:2])).values
    >>> bool(scores[0, 0] > 0)  # an example helps its own copy
    True
    """

    def _estimated(self, relabel: Relabel | None) -> dict[str, Block]:
        return diagonal(self._passes(relabel))


class Exact(Attributor):
    """Influence functions with the full, dense curvature matrix: for models of up to a few thousand parameters.

    Args:
        damping: a number is λ itself, 0 by default; ``Relative(0.1)`` is 0.1 times the mean eigenvalue.
        curvature: "gauss_newton", "hessian" or "empirical_fisher", of the mean training loss.
        layers, batch_size: same as in ``EKFAC``.

    Raises:
        InvalidInput: in ``fit``, the damped matrix is not positive definite, or the curvature is unknown.

    >>> from torch import nn
    >>> from simfluence.tasks.losses import cross_entropy
    >>> X, y = torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 0] * 4)
    >>> model = nn.Linear(3, 2)
    >>> scores = Exact(damping=0.1).fit(model, (X, y), loss=cross_entropy).scores((X[:2], y[:2])).values
    >>> scores.shape, bool(scores[0, 0] > 0)  # an example helps its own copy
    ((2, 12), True)
    """

    def __init__(
        self,
        damping: Damping = 0.0,
        curvature: str = "gauss_newton",
        layers: Sequence[str] | None = None,
        batch_size: Count = 64,
    ) -> None:
        self.damping = damping
        self.curvature = curvature
        self.layers = layers
        self.batch_size = batch_size

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_damping(self.damping)

    def _fit(self) -> None:
        size = self.gradients_.size
        if size > LARGEST:
            raise InvalidInput(
                f"a matrix of {size}² numbers is too large to invert: choose fewer layers with layers=[…], or use "
                "ConjugateGradients or EKFAC"
            )
        self._check_training()
        product = curvature_product(self.curvature, self.gradients_, self.train_data_, self.batch_size)
        rows = torch.eye(size).to(self.gradients_.like)
        matrix = torch.cat([product(part) for part in torch.split(rows, self.batch_size)])
        eigenvalues, self.basis_ = torch.linalg.eigh((matrix + matrix.T) / 2)
        self.eigenvalues_ = damped(eigenvalues, self.damping, self.l2_, f"the model ({self.curvature})")

    def _solve(self, factors: LayerFactors) -> Queries:
        flat = flatten(self.gradients_, factors)
        return unflatten(self.gradients_, (flat @ self.basis_ / self.eigenvalues_) @ self.basis_.T)
