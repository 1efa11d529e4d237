"""Influence functions with iterative solvers, which multiply by the curvature matrix but never form it."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence
from functools import partial
from typing import Annotated

import torch
from annotated_types import Ge, Gt
from jaxtyping import Float
from torch import Tensor

from simfluence._internal.types import Count, Seed
from simfluence.attribution.base import Attributor, LayerFactors, Queries
from simfluence.attribution.curvature.kronecker import (
    Block,
    Damping,
    Relative,
    TrainingPasses,
    check_damping,
    damped,
    ekfac,
)
from simfluence.attribution.curvature.matrix_free import Product, curvature_product, flatten, unflatten
from simfluence.errors import ConvergenceWarning, InvalidInput
from simfluence.task import take

__all__ = ["Arnoldi", "ConjugateGradients", "LiSSA", "conjugate_gradients"]

Vectors = Float[Tensor, "n parameters"]
Positive = Annotated[float, Gt(0)]
NotNegative = Annotated[float, Ge(0)]


class _Iterative(Attributor):
    """``(G + λI)⁻¹ ∇ℓ_z`` from products with G over all training examples."""

    def __init__(self, damping: Damping, curvature: str, layers: Sequence[str] | None, batch_size: Count) -> None:
        self.damping = damping
        self.curvature = curvature
        self.layers = layers
        self.batch_size = batch_size

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_damping(self.damping)
        if isinstance(self.damping, Relative):
            raise InvalidInput(f"damping must be a number, as {type(self).__name__} does not compute the eigenvalues")

    def _fit(self) -> None:
        self._check_training()
        product = curvature_product(self.curvature, self.gradients_, self.train_data_, self.batch_size)
        added = self._total_damping
        self.product_: Product = partial(_damped, product, added)  # a lambda would not be copied with its model
        self._prepare()

    def _solve(self, factors: LayerFactors) -> Queries:
        return unflatten(self.gradients_, self._solve_flat(flatten(self.gradients_, factors)))

    @property
    def _total_damping(self) -> float:
        """λ plus the weight of the l2 penalty."""
        return self.l2_ + (0.0 if isinstance(self.damping, Relative) else self.damping)

    def _prepare(self) -> None:
        """Compute what all test examples share."""

    @abstractmethod
    def _solve_flat(self, vectors: Vectors) -> Vectors: ...


def _damped(product: Product, damping: float, vectors: Vectors) -> Vectors:
    """Return ``(G + λI) v`` for each vector v."""
    return product(vectors) + damping * vectors


class ConjugateGradients(_Iterative):
    """Influence functions by conjugate gradients, for all test examples of a batch at once (Martens 2010).

    Args:
        damping: λ, 0.01 by default.
        curvature: "gauss_newton", "hessian" or "empirical_fisher", of the mean training loss.
        tolerance: stop when the residual's norm is below this, relative to the gradient's norm.
        iterations: maximum number of iterations.
        preconditioned: precondition with EK-FAC with the true labels, which takes two more passes. It saves many
            iterations if there are more examples than parameters and scales differ; with fewer examples, G has a null
            space that EK-FAC lacks, and it costs some.
        layers, batch_size: same as in ``EKFAC``.

    Raises:
        InvalidInput: the damped matrix is not positive definite (a direction has negative curvature).

    Warns:
        ConvergenceWarning: the tolerance was not reached.

    >>> from torch import nn
    >>> from simfluence.attribution.influence import Exact
    >>> from simfluence.tasks.losses import cross_entropy
    >>> X, y = torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 0] * 4)
    >>> model = nn.Linear(3, 2)
    >>> scores = ConjugateGradients(damping=0.1).fit(model, (X, y), loss=cross_entropy).scores((X[:2], y[:2])).values
    >>> exact = Exact(damping=0.1).fit(model, (X, y), loss=cross_entropy).scores((X[:2], y[:2])).values
    >>> bool(abs(scores - exact).max() < 1e-3 * abs(exact).max())
    True
    """

    def __init__(
        self,
        damping: Damping = 1e-2,
        curvature: str = "gauss_newton",
        tolerance: NotNegative = 1e-6,
        iterations: Count = 200,
        preconditioned: bool = False,
        layers: Sequence[str] | None = None,
        batch_size: Count = 64,
    ) -> None:
        super().__init__(damping, curvature, layers, batch_size)
        self.tolerance = tolerance
        self.iterations = iterations
        self.preconditioned = preconditioned

    def _prepare(self) -> None:
        self.blocks_: dict[str, Block] = {}
        if self.preconditioned:
            self.blocks_ = ekfac(TrainingPasses(self.gradients_, self.train_data_, self.batch_size))

    def _solve_flat(self, vectors: Vectors) -> Vectors:
        return conjugate_gradients(self.product_, vectors, self._precondition, self.tolerance, self.iterations)

    def _precondition(self, vectors: Vectors) -> Vectors:
        if not self.blocks_:
            return vectors
        added = self._total_damping
        damping = added if added > 0 else Relative(1e-3)  # for the preconditioner only
        parts = unflatten(self.gradients_, vectors)
        return flatten(
            self.gradients_, {name: block.divided(parts[name], damping) for name, block in self.blocks_.items()}
        )


def conjugate_gradients(
    product: Product, right: Vectors, precondition: Product, tolerance: float, iterations: int
) -> Vectors:
    """Solve ``A x = b`` for each row b of ``right``. Rows that have converged do not change any more.

    Raises:
        InvalidInput: A is not positive definite.
    """
    x, residual = torch.zeros_like(right), right.clone()
    bound = tolerance * right.norm(dim=1)
    z = precondition(residual)
    direction, weight = z, (residual * z).sum(1)
    for _ in range(iterations):
        active = residual.norm(dim=1) > bound
        if not active.any():
            return x
        image = product(direction)
        curve = (direction * image).sum(1)
        if (curve[active] <= 0).any():
            raise InvalidInput(
                "the curvature is not positive definite: use a larger damping, or curvature='gauss_newton'"
            )
        step = torch.where(active, weight / torch.where(active, curve, 1.0), 0.0)[:, None]
        x, residual = x + step * direction, residual - step * image
        z = precondition(residual)
        new_weight = (residual * z).sum(1)
        ratio = torch.where(active, new_weight / torch.where(weight > 0, weight, 1.0), 0.0)[:, None]
        direction, weight = z + ratio * direction, torch.where(active, new_weight, weight)  # converged rows rest
    remaining = float((residual.norm(dim=1) / right.norm(dim=1).clamp(min=torch.finfo(right.dtype).tiny)).max())
    if remaining > tolerance:
        message = (
            f"conjugate gradients left a residual of {remaining:.2g} after {iterations} iterations, above the "
            f"tolerance of {tolerance:.2g}"
        )
        warnings.warn(f"{message}: raise iterations= or the damping", ConvergenceWarning, stacklevel=2)
    return x


class LiSSA(_Iterative):
    """Influence functions by the Neumann series ``v ← g + (I − (G + λI)/σ) v``; the solution is v/σ.

    Agarwal et al. 2017; Koh & Liang 2017, section 3.

    Args:
        damping: λ, 0.01 by default.
        curvature: "gauss_newton", "hessian" or "empirical_fisher".
        scale: σ, more than half of the largest eigenvalue of G + λI; by default 1.1 times that eigenvalue, estimated
            by 30 power iterations over all training examples.
        iterations: maximum number of terms.
        tolerance: stop when the sum changes by less than this, relative to its norm; unused with ``sample``.
        sample: number of training examples drawn for each term; by default all.
        seed: seed of the draws and of the power iterations.
        layers, batch_size: same as in ``EKFAC``.

    Raises:
        InvalidInput: the series diverges.

    Warns:
        ConvergenceWarning: the tolerance was not reached.

    >>> from torch import nn
    >>> from simfluence.attribution.influence import Exact
    >>> from simfluence.tasks.losses import cross_entropy
    >>> X, y = torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 0] * 4)
    >>> model = nn.Linear(3, 2)
    >>> scores = LiSSA(damping=0.1).fit(model, (X, y), loss=cross_entropy).scores((X[:2], y[:2])).values
    >>> exact = Exact(damping=0.1).fit(model, (X, y), loss=cross_entropy).scores((X[:2], y[:2])).values
    >>> bool(abs(scores - exact).max() < 1e-3 * abs(exact).max())
    True
    """

    def __init__(
        self,
        damping: Damping = 1e-2,
        curvature: str = "gauss_newton",
        scale: Positive | None = None,
        iterations: Count = 5000,
        tolerance: NotNegative = 1e-6,
        sample: Count | None = None,
        seed: Seed = 0,
        layers: Sequence[str] | None = None,
        batch_size: Count = 64,
    ) -> None:
        super().__init__(damping, curvature, layers, batch_size)
        self.scale = scale
        self.iterations = iterations
        self.tolerance = tolerance
        self.sample = sample
        self.seed = seed

    def _prepare(self) -> None:
        self.scale_ = 1.1 * self._largest_eigenvalue() if self.scale is None else self.scale

    def _solve_flat(self, vectors: Vectors) -> Vectors:
        product = self.product_ if self.sample is None else self._sampled_product()
        tiny, total = torch.finfo(vectors.dtype).tiny, vectors
        for _ in range(self.iterations):
            new_total = vectors + total - product(total) / self.scale_
            change = (new_total - total).norm(dim=1) / new_total.norm(dim=1).clamp(min=tiny)
            total = new_total
            if not bool(total.isfinite().all()):
                break
            if self.sample is None and bool((change <= self.tolerance).all()):
                return total / self.scale_
        self._check_sum(total, change)
        return total / self.scale_

    def _check_sum(self, total: Vectors, change: Tensor) -> None:
        if not bool(total.isfinite().all()):
            raise InvalidInput(f"LiSSA diverges with scale={self.scale_:.3g}: use a larger scale or a larger damping")
        if self.sample is None:
            message = f"LiSSA still changes by {float(change.max()):.2g} after {self.iterations} iterations"
            advice = f"above the tolerance of {self.tolerance:.2g}: raise iterations= or the damping"
            warnings.warn(f"{message}, {advice}", ConvergenceWarning, stacklevel=2)

    def _sampled_product(self) -> Product:
        """Return products over new random examples in each call; all test examples share the draws."""
        rng = torch.Generator().manual_seed(self.seed)
        data, added = self.train_data_, self._total_damping

        def product(vectors: Tensor) -> Tensor:
            chosen = torch.randint(len(data[1]), (self.sample or 1,), generator=rng).to(data[1].device)
            part = curvature_product(self.curvature, self.gradients_, take(data, chosen), self.batch_size)
            return part(vectors) + added * vectors

        return product

    def _largest_eigenvalue(self) -> float:
        vector = _random_vector(self.gradients_.size, self.seed, self.gradients_.like)[None]
        size = torch.ones(())
        for _ in range(30):
            image = self.product_(vector)
            size = image.norm()
            vector = image / size
        return float(size)


class Arnoldi(_Iterative):
    """Influence functions in the span of a few eigenvectors, from Arnoldi's iteration (Schioppa et al. 2022).

    Gradients outside of that span are ignored. With as many iterations as parameters, the inverse is exact.

    Args:
        damping: λ, 0.01 by default.
        curvature: "gauss_newton", "hessian" or "empirical_fisher".
        iterations: number of products with the matrix, and dimension of the Krylov space.
        rank: number of largest eigenvalues to use; by default all.
        seed: seed of the starting vector.
        layers, batch_size: same as in ``EKFAC``.

    Raises:
        InvalidInput: in ``fit``, one of these eigenvalues is not above −λ.

    >>> from torch import nn
    >>> from simfluence.attribution.influence import Exact
    >>> from simfluence.tasks.losses import cross_entropy
    >>> X, y = torch.eye(3).repeat(4, 1), torch.tensor([0, 1, 0] * 4)
    >>> model = nn.Linear(3, 2)
    >>> scores = Arnoldi(damping=0.1, iterations=8).fit(model, (X, y), loss=cross_entropy).scores((X[:2], y[:2])).values
    >>> exact = Exact(damping=0.1).fit(model, (X, y), loss=cross_entropy).scores((X[:2], y[:2])).values
    >>> bool(abs(scores - exact).max() < 1e-3 * abs(exact).max())
    True
    """

    def __init__(
        self,
        damping: Damping = 1e-2,
        curvature: str = "gauss_newton",
        iterations: Count = 100,
        rank: Count | None = None,
        seed: Seed = 0,
        layers: Sequence[str] | None = None,
        batch_size: Count = 64,
    ) -> None:
        super().__init__(damping, curvature, layers, batch_size)
        self.iterations = iterations
        self.rank = rank
        self.seed = seed

    def _prepare(self) -> None:
        basis, matrix = self._krylov(min(self.iterations, self.gradients_.size))
        eigenvalues, vectors = torch.linalg.eigh(matrix.triu() + matrix.triu(1).T)
        largest = eigenvalues.abs().argsort(descending=True)[: self.rank]
        # The products include the damping.
        self.eigenvalues_ = damped(eigenvalues[largest], 0.0, 0.0, f"the model ({self.curvature})")
        self.basis_ = vectors[:, largest].T @ basis  # [rank, parameters]

    def _solve_flat(self, vectors: Vectors) -> Vectors:
        solution: Tensor = (vectors @ self.basis_.T / self.eigenvalues_) @ self.basis_
        return solution

    def _krylov(self, iterations: int) -> tuple[Tensor, Tensor]:
        """Return an orthonormal basis ``[k, parameters]``, and the matrix in it ``[k, k]``, valid in its upper half."""
        like = self.gradients_.like
        basis = torch.zeros(iterations, self.gradients_.size).to(like)
        matrix = torch.zeros(iterations, iterations).to(like)
        vector = _random_vector(self.gradients_.size, self.seed, like)
        for step in range(iterations):
            basis[step] = vector / vector.norm()
            image = self.product_(basis[step][None])[0]
            matrix[:, step] = basis @ image
            vector = _orthogonal(image, basis[: step + 1])
            if vector.norm() <= 100 * torch.finfo(like.dtype).eps * image.norm():  # an invariant space: start another
                fresh = _random_vector(self.gradients_.size, self.seed + step + 1, like)
                vector = _orthogonal(fresh, basis[: step + 1])
        return basis, matrix


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """Subtract the part of ``vector`` in the span of ``basis``, twice because of rounding."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector


def _random_vector(size: int, seed: Seed, like: Tensor) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)
