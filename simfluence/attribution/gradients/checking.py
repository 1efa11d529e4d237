"""Checks of per-example gradients against autograd's, without forming them.

A batch's gradients are summed with random weights ``w_i`` and projected on random vectors u and v:
``Σ_i w_i Σ_p (u·s_ip)(v·a_ip)`` from factors, and ``uᵀ (∂ Σ_i w_i ℓ_i / ∂W) v`` by autograd. The weights notice factors
that belong to another example of the batch, which a plain sum would not.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from simfluence.attribution.gradients.layers import Factors, Layer
from simfluence.errors import InvalidInput

#: Number of projections: a wrong gradient passes one of them, by chance, in about one of a hundred cases.
_PROJECTIONS = 4

__all__ = ["Sums", "agrees", "check_same_loss", "random_weights", "tolerance"]


@dataclass(frozen=True, eq=False)
class Sums:
    """Autograd's gradients of a batch, summed with weights.

    Args:
        weights: weights of the examples.
        gradients: the summed gradients by parameter name.
    """

    weights: Float[Tensor, " batch"]
    gradients: Mapping[str, Tensor]

    @cached_property
    def scale(self) -> float:
        """The largest finite norm of a parameter's gradient."""
        norms = [float(gradient.norm()) for gradient in self.gradients.values()]
        return max((norm for norm in norms if math.isfinite(norm)), default=0.0)


def random_weights(like: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """Return weights of random sign and a size from 1 to 2, the same for the same length."""
    drawn = torch.rand(2, len(like), generator=torch.Generator().manual_seed(0))
    weights = (1 + drawn[0]) * torch.where(drawn[1] < 0.5, -1.0, 1.0)
    return weights.to(like.device, like.dtype)


def agrees(layer: Layer, factors: Factors, sums: Sums) -> bool:
    """Decide whether a layer's factors have autograd's gradients, up to rounding.

    Factors that are not finite pass: the rule is not at fault, and a later error names the example.
    """
    expected = layer.from_parameters(sums.gradients)  # [rows, columns]
    u, v = _directions(layer.rows, 1).to(expected), _directions(layer.columns, 2).to(expected)
    by_position = (factors.gradients @ u) * (factors.inputs @ v)  # [batch, positions, projections]
    found = sums.weights.to(expected) @ by_position.sum(1)
    if not found.isfinite().all():
        return True
    difference = (found - (u * (expected @ v)).sum(0)).norm() / math.sqrt(_PROJECTIONS)
    return float(difference) <= tolerance(expected.dtype) * max(float(expected.norm()), 1e-3 * sums.scale)


def _directions(size: int, seed: int) -> Float[Tensor, "size projections"]:
    return torch.randn(size, _PROJECTIONS, generator=torch.Generator().manual_seed(seed))


def tolerance(dtype: torch.dtype) -> float:
    """Return the relative tolerance for numbers of a dtype.

    In float64 it is that of rounding in float32, in which some models compute a softmax whatever their own dtype.
    """
    return max(10 * math.sqrt(torch.finfo(dtype).eps), 100 * torch.finfo(torch.float32).eps)


def check_same_loss(together: float, alone: float, dtype: torch.dtype) -> None:
    """Check that an example has the same loss on its own as in a batch; losses that are not finite pass.

    Raises:
        InvalidInput: it has another loss.
    """
    bound = tolerance(dtype)
    if not (math.isfinite(together) and math.isfinite(alone)):
        return
    if not math.isclose(together, alone, rel_tol=bound, abs_tol=bound):
        raise InvalidInput(
            "an example's loss depends on the others in its batch, so it has no gradient of its own: remove what "
            "mixes examples (batch statistics, contrastive losses)"
        )
