"""Influence functions by iterative solvers, which need products with the curvature matrix and never the matrix."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from simfluence.attribution.base import Attributor, LayerFactors, Queries
from simfluence.attribution.curvature.kronecker import (
    Block,
    Damping,
    Relative,
    check_damping,
    damped,
    ekfac,
)
from simfluence.attribution.curvature.matrix_free import Product, curvature_product, flatten, unflatten
from simfluence.errors import ConvergenceWarning, InvalidInput
from simfluence.task import take

Vectors = Float[Tensor, "n parameters"]


class _Iterative(Attributor):
    """``(G + λI)⁻¹ ∇ℓ_z`` by products with G over all training examples."""

    def __init__(self, damping: Damping, curvature: str, layers: Sequence[str] | None, batch_size: int) -> None:
        self.damping = damping
        self.curvature = curvature
        self.layers = layers
        self.batch_size = batch_size

    def _check_parameters(self) -> None:
        super()._check_parameters()
        check_damping(self.damping)
        if isinstance(self.damping, Relative):
            raise InvalidInput(f"{type(self).__name__} does not know the eigenvalues: damping must be a number")

    def _fit(self) -> None:
        self._check_training()
        product = curvature_product(self.curvature, self.gradients_, self.train_data_, self.batch_size)
        added = self._added
        self.product_: Product = lambda vectors: product(vectors) + added * vectors
        self._prepare()

    def _solve(self, factors: LayerFactors) -> Queries:
        return unflatten(self.gradients_, self._solve_flat(flatten(self.gradients_, factors)))

    @property
    def _added(self) -> float:
        """λ, the penalty's part included."""
        return self.l2_ + (0.0 if isinstance(self.damping, Relative) else self.damping)

    def _prepare(self) -> None:
        """What is needed once for all test examples."""

    @abstractmethod
    def _solve_flat(self, vectors: Vectors) -> Vectors: ...


class ConjugateGradients(_Iterative):
    """Influence functions by conjugate gradients, all test examples of a batch together (Martens 2010).

    Args:
        damping: λ, 0.01 by default.
        curvature: "gauss_newton", "hessian" or "empirical_fisher", of the mean training loss.
        tolerance: of the residual's norm, relative to the gradient's.
        iterations: the most; where they do not suffice, a warning says so.
        preconditioned: by EK-FAC with real labels, two more passes. It saves many where examples are more than
            parameters and scales differ; where they are fewer, G has a null space that EK-FAC does not know, and it
            costs some.
        layers, batch_size: as of ``EKFAC``.

    Raises:
        InvalidInput: a direction of negative curvature: the matrix with its damping is not positive definite.

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
        tolerance: float = 1e-6,
        iterations: int = 200,
        preconditioned: bool = False,
        layers: Sequence[str] | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__(damping, curvature, layers, batch_size)
        self.tolerance = tolerance
        self.iterations = iterations
        self.preconditioned = preconditioned

    def _prepare(self) -> None:
        self.blocks_: dict[str, Block] = {}
        if self.preconditioned:
            sides = self.gradients_, self.train_data_, self.batch_size
            self.blocks_ = ekfac(*sides)

    def _solve_flat(self, vectors: Vectors) -> Vectors:
        return conjugate_gradients(self.product_, vectors, self._precondition, self.tolerance, self.iterations)

    def _precondition(self, vectors: Vectors) -> Vectors:
        if not self.blocks_:
            return vectors
        added = self._added
        damping = added if added > 0 else Relative(1e-3)  # of the preconditioner alone
        parts = unflatten(self.gradients_, vectors)
        return flatten(self.gradients_, {n: block.divided(parts[n], damping) for n, block in self.blocks_.items()})


def conjugate_gradients(
    product: Product, right: Vectors, precondition: Product, tolerance: float, iterations: int
) -> Vectors:
    """Solve ``A x = b`` for each row b of ``right``. A row is left alone once it is good enough.

    Raises:
        InvalidInput: A is not positive definite.
    """
    x, residual = torch.zeros_like(right), right.clone()
    goal = tolerance * right.norm(dim=1)
    z = precondition(residual)
    direction, weight = z, (residual * z).sum(1)
    for _ in range(iterations):
        active = residual.norm(dim=1) > goal
        if not active.any():
            return x
        moved = product(direction)
        curve = (direction * moved).sum(1)
        if (curve[active] <= 0).any():
            raise InvalidInput("the curvature is not positive definite: give a larger damping, or gauss_newton")
        step = torch.where(active, weight / torch.where(active, curve, 1.0), 0.0)[:, None]
        x, residual = x + step * direction, residual - step * moved
        z = precondition(residual)
        new = (residual * z).sum(1)
        ratio = torch.where(active, new / torch.where(weight > 0, weight, 1.0), 0.0)[:, None]
        direction, weight = z + ratio * direction, torch.where(active, new, weight)  # rows at rest have no steps
    left = float((residual.norm(dim=1) / right.norm(dim=1).clamp(min=torch.finfo(right.dtype).tiny)).max())
    if left > tolerance:
        message = (
            f"conjugate gradients left a residual of {left:.2g} after {iterations} iterations, goal {tolerance:.2g}"
        )
        warnings.warn(f"{message}: raise iterations= or the damping", ConvergenceWarning, stacklevel=2)
    return x


class LiSSA(_Iterative):
    """Influence functions by the Neumann series ``v ← g + (I − (G + λI)/σ) v``, the answer being v/σ.

    Agarwal et al. 2017; Koh & Liang 2017, section 3.

    Args:
        damping: λ, 0.01 by default.
        curvature: "gauss_newton", "hessian" or "empirical_fisher".
        scale: σ, above half of the largest eigenvalue of G + λI; by default 1.1 times that eigenvalue, as 30 power
            iterations over all training examples find it.
        iterations: the most.
        tolerance: the series ends where it changes by less, relative to its sum; never with ``sample``.
        sample: training examples drawn for each iteration; by default all.
        seed: of the draws and of the power iterations.
        layers, batch_size: as of ``EKFAC``.

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
        scale: float | None = None,
        iterations: int = 5000,
        tolerance: float = 1e-6,
        sample: int | None = None,
        seed: int = 0,
        layers: Sequence[str] | None = None,
        batch_size: int = 64,
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
        product = self.product_ if self.sample is None else self._sampled()
        total = vectors
        for _ in range(self.iterations):
            new = vectors + total - product(total) / self.scale_
            change = (new - total).norm(dim=1) / new.norm(dim=1).clamp(min=torch.finfo(new.dtype).tiny)
            total = new
            if not bool(total.isfinite().all()):
                break
            if self.sample is None and bool((change <= self.tolerance).all()):
                return total / self.scale_
        self._check_sum(total, change)
        return total / self.scale_

    def _check_sum(self, total: Vectors, change: Tensor) -> None:
        if not bool(total.isfinite().all()):
            raise InvalidInput(f"LiSSA diverges with scale={self.scale_:.3g}: give a larger scale or a larger damping")
        if self.sample is None:
            message = f"LiSSA still changes by {float(change.max()):.2g} after {self.iterations} iterations"
            warnings.warn(f"{message}, goal {self.tolerance:.2g}", ConvergenceWarning, stacklevel=2)

    def _sampled(self) -> Product:
        """Products over examples drawn anew each time; the draws are the same for all test examples."""
        rng = torch.Generator().manual_seed(self.seed)
        data, added = self.train_data_, self._added

        def product(vectors: Tensor) -> Tensor:
            chosen = torch.randint(len(data[1]), (self.sample or 1,), generator=rng).to(data[1].device)
            part = curvature_product(self.curvature, self.gradients_, take(data, chosen), self.batch_size)
            return part(vectors) + added * vectors

        return product

    def _largest_eigenvalue(self) -> float:
        vector = _random_vector(self.gradients_.size, self.seed, self.gradients_.like)[None]
        size = torch.ones(())
        for _ in range(30):
            moved = self.product_(vector)
            size = moved.norm()
            vector = moved / size
        return float(size)


class Arnoldi(_Iterative):
    """Influence functions in the span of a few eigenvectors, found by Arnoldi's iteration (Schioppa et al. 2022).

    Outside of that span the gradients count for nothing. With as many iterations as parameters the inverse is exact.

    Args:
        damping: λ, 0.01 by default.
        curvature: "gauss_newton", "hessian" or "empirical_fisher".
        iterations: products with the matrix, and dimensions of the Krylov space.
        rank: how many of the largest eigenvalues found are used; by default all.
        seed: of the starting vector.
        layers, batch_size: as of ``EKFAC``.

    Raises:
        InvalidInput: an eigenvalue that is used is not above −λ.

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
        iterations: int = 100,
        rank: int | None = None,
        seed: int = 0,
        layers: Sequence[str] | None = None,
        batch_size: int = 64,
    ) -> None:
        super().__init__(damping, curvature, layers, batch_size)
        self.iterations = iterations
        self.rank = rank
        self.seed = seed

    def _prepare(self) -> None:
        basis, matrix = self._krylov(min(self.iterations, self.gradients_.size))
        eigenvalues, vectors = torch.linalg.eigh(matrix.triu() + matrix.triu(1).T)
        kept = eigenvalues.abs().argsort(descending=True)[: self.rank]
        # The products are damped already.
        self.eigenvalues_ = damped(eigenvalues[kept], 0.0, 0.0, f"the model ({self.curvature})")
        self.basis_ = vectors[:, kept].T @ basis  # [rank, parameters]

    def _solve_flat(self, vectors: Vectors) -> Vectors:
        return (vectors @ self.basis_.T / self.eigenvalues_) @ self.basis_

    def _krylov(self, iterations: int) -> tuple[Tensor, Tensor]:
        """An orthonormal basis ``[k, parameters]``, and the upper half of the matrix in it ``[k, k]``."""
        like = self.gradients_.like
        basis = torch.zeros(iterations, self.gradients_.size).to(like)
        matrix = torch.zeros(iterations, iterations).to(like)
        vector = _random_vector(self.gradients_.size, self.seed, like)
        for step in range(iterations):
            basis[step] = vector / vector.norm()
            moved = self.product_(basis[step][None])[0]
            matrix[:, step] = basis @ moved
            vector = _orthogonal(moved, basis[: step + 1])
            if vector.norm() <= 100 * torch.finfo(like.dtype).eps * moved.norm():  # an invariant space: start another
                fresh = _random_vector(self.gradients_.size, self.seed + step + 1, like)
                vector = _orthogonal(fresh, basis[: step + 1])
        return basis, matrix


def _orthogonal(vector: Tensor, basis: Tensor) -> Tensor:
    """Without its part in the span of ``basis``; twice, against rounding."""
    for _ in range(2):
        vector = vector - basis.T @ (basis @ vector)
    return vector


def _random_vector(size: int, seed: int, like: Tensor) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(like)
