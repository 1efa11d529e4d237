"""Losses and measures of each example, ``(outputs, targets) → [batch]``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from simfluence.errors import InvalidInput, did_you_mean

__all__ = [
    "BY_NAME",
    "CLASSIFICATION",
    "LANGUAGE",
    "correct",
    "cross_entropy",
    "loss_named",
    "margin",
    "squared_error",
    "token_accuracy",
    "token_cross_entropy",
    "token_losses",
]


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross-entropy of logits ``[batch, classes]`` and class numbers ``[batch]``."""
    return functional.cross_entropy(outputs, targets, reduction="none")


def squared_error(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute ``(output − target)²``, averaged over the outputs of each example."""
    if outputs.numel() != targets.numel():
        raise InvalidInput(
            f"squared error of outputs {tuple(outputs.shape)} and targets {tuple(targets.shape)}: sizes must be equal"
        )
    squares = (outputs.reshape(targets.shape) - targets) ** 2
    return squares.flatten(1).mean(1) if squares.ndim > 1 else squares


def token_losses(outputs: Tensor, targets: Tensor) -> Tensor:
    """Compute the cross-entropy of each token, ``[batch, tokens]``, from logits ``[batch, tokens, words]``.

    It is 0 for tokens with a negative target (−100: prompts and padding).
    """
    losses = functional.cross_entropy(outputs.movedim(-1, 1), targets.clamp(min=0), reduction="none")
    return losses.where(targets >= 0, 0)


def token_cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Average ``token_losses`` over the tokens of each example that have a target."""
    return token_losses(outputs, targets).sum(1) / (targets >= 0).sum(1)


def token_accuracy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the fraction of each example's targets that have the largest logit."""
    correct_tokens = (outputs.argmax(-1) == targets) & (targets >= 0)
    return correct_tokens.sum(1).to(outputs.dtype) / (targets >= 0).sum(1)


def correct(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return 1 where the target has the largest of the logits ``[batch, classes]``, else 0."""
    return (outputs.argmax(1) == targets).to(outputs.dtype)


def margin(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the target's logit minus the largest other logit."""
    target_logits = outputs.gather(1, targets[:, None])
    others = outputs.scatter(1, targets[:, None], -float("inf"))
    return target_logits[:, 0] - others.amax(1)


CLASSIFICATION = {"correct": correct, "margin": margin}
LANGUAGE = {"token_accuracy": token_accuracy}
BY_NAME = {
    "cross_entropy": cross_entropy,
    "squared_error": squared_error,
    "token_cross_entropy": token_cross_entropy,
}

#: Other names of the losses in ``BY_NAME``, without underscores.
_OTHER_NAMES = {
    "mse": "squared_error", "mseloss": "squared_error", "meansquarederror": "squared_error", "l2": "squared_error",
    "ce": "cross_entropy", "crossentropyloss": "cross_entropy", "logloss": "cross_entropy",
    "categoricalcrossentropy": "cross_entropy", "softmaxcrossentropy": "cross_entropy",
}  # fmt: skip


def loss_named(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the loss called ``name``.

    Raises:
        InvalidInput: no loss has that name; the message has the nearest one.

    >>> loss_named("cross_entropy").__name__
    'cross_entropy'
    """
    if name in BY_NAME:
        return BY_NAME[name]
    letters = "".join(letter for letter in name.lower() if letter.isalnum())
    meant = _OTHER_NAMES.get(letters, name)
    raise InvalidInput(
        f"unknown loss {name!r}, {did_you_mean(meant, BY_NAME)} (known losses: {', '.join(BY_NAME)}). Pass any other "
        "as a function of outputs and targets that returns one number per example (in torch: reduction='none')"
    )
