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


def token_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of each token, ``[batch, tokens]``, of logits ``[batch, tokens, words]``.

    Tokens whose target is negative (−100: prompts, padding) have 0.
    """
    losses = functional.cross_entropy(outputs.movedim(-1, 1), targets.clamp(min=0), reduction="none")
    return losses.where(targets >= 0, 0)


def token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The mean of ``token_losses`` over the tokens of an example that have a target."""
    return token_losses(outputs, targets).sum(1) / (targets >= 0).sum(1)


def token_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """The share of an example's targets that have the largest logit."""
    right = (outputs.argmax(-1) == targets) & (targets >= 0)
    return right.sum(1).to(outputs.dtype) / (targets >= 0).sum(1)


def correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """1 where the largest of the logits ``[batch, classes]`` is the target's, else 0."""
    return (outputs.argmax(1) == targets).to(outputs.dtype)


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """The target's logit minus the largest other one."""
    wanted = outputs.gather(1, targets[:, None])
    others = outputs.scatter(1, targets[:, None], -float("inf"))
    return wanted[:, 0] - others.amax(1)


CLASSIFICATION = {"correct": correct, "margin": margin}
LANGUAGE = {"token_accuracy": token_accuracy}
BY_NAME = {
    "cross_entropy": cross_entropy,
    "squared_error": squared_error,
    "token_cross_entropy": token_cross_entropy,
}
