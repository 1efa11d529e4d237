"""Per-example losses ``(outputs, targets) → [batch]``."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of logits ``[batch, classes]`` and class numbers ``[batch]``."""
    return functional.cross_entropy(outputs, targets, reduction="none")


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """``(output − target)²``, averaged over the outputs of an example if there are several."""
    squares = (outputs.reshape(targets.shape) - targets) ** 2
    return squares.flatten(1).mean(1) if squares.ndim > 1 else squares


BY_NAME = {"cross_entropy": cross_entropy, "squared_error": squared_error}
