"""Per-example losses and measures ``(outputs, targets) → [batch]``."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional

from simfluence.errors import InvalidInput


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Of logits ``[batch, classes]`` and class numbers ``[batch]``."""
    return functional.cross_entropy(outputs, targets, reduction="none")


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """``(output − target)²``, averaged over the outputs of an example if there are several."""
    if outputs.numel() != targets.numel():
        raise InvalidInput(f"squared error of outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}")
    squares = (outputs.reshape(targets.shape) - targets) ** 2
    return squares.flatten(1).mean(1) if squares.ndim > 1 else squares


def correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest of the logits ``[batch, classes]`` is the target's, else 0."""
    return (outputs.argmax(1) == targets).to(outputs.dtype)


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """The target's logit minus the largest other one."""
    wanted = outputs.gather(1, targets[:, None])
    others = outputs.scatter(1, targets[:, None], -float("inf"))
    return wanted[:, 0] - others.amax(1)


CLASSIFICATION = {"correct": correct, "margin": margin}
BY_NAME = {"cross_entropy": cross_entropy, "squared_error": squared_error}
