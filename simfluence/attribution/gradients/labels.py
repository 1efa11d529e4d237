"""Whose gradients make the curvature: those of the real labels, or of labels drawn from the model.

The Fisher matrix is an expectation over the model's own predictions (Martens 2020, section 5): with real labels it
is another matrix, the empirical Fisher. Each example's draws depend on the seed and its index alone, so they are the
same in every pass and for every batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simfluence.errors import InvalidInput, did_you_mean
from simfluence.tasks.losses import cross_entropy, squared_error, token_cross_entropy

#: ``(outputs, targets, uniforms)`` → targets drawn from the model, with a uniform number in (0, 1) per target.
Draw = Callable[[Any, Tensor, Tensor], Tensor]
#: ``(outputs, targets, indices of the examples)`` → targets.
Relabel = Callable[[Any, Tensor, range], Tensor]


def draw_classes(outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
    """Classes drawn from the softmax of logits; negative targets (such as −100, to be ignored) stay.

    Args:
        outputs: logits, ``[*targets.shape, classes]``, or ``[batch, classes, …]`` as in torch's own loss.
        targets: integers, ``[batch]`` or ``[batch, …]``.
        uniforms: in (0, 1), like the targets.

    >>> logits = torch.log(torch.tensor([[0.2, 0.8], [0.9, 0.1]]))
    >>> draw_classes(logits, torch.tensor([0, 0]), torch.tensor([0.5, 0.5])).tolist()
    [1, 0]
    """
    logits = outputs if outputs.shape[:-1] == targets.shape else outputs.movedim(1, -1)
    below = logits.double().softmax(-1).cumsum(-1) < uniforms[..., None]
    drawn = below.sum(-1).clamp(max=logits.shape[-1] - 1)
    return torch.where(targets < 0, targets, drawn.to(targets.dtype))


def draw_normal(outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
    """Targets drawn around the outputs so that the Fisher matrix is the Gauss–Newton matrix of the squared error.

    The mean of K squares has the Hessian 2/K; normal targets of variance K/2 give gradients of that variance.

    >>> draw_normal(torch.tensor([[1.0]]), torch.tensor([7.0]), torch.tensor([0.5])).tolist()
    [1.0]
    """
    deviation = math.sqrt((targets[0].numel() if len(targets) else 1) / 2)
    noise = torch.special.ndtri(uniforms.double()) * deviation
    return (outputs.detach().reshape(targets.shape) + noise).to(targets.dtype)


#: How to draw labels for losses that are known.
DRAWS: dict[Callable[..., Tensor], Draw] = {
    cross_entropy: draw_classes,
    token_cross_entropy: draw_classes,
    squared_error: draw_normal,
}


def relabelling(labels: str | Draw, loss: Callable[..., Tensor], seed: int) -> Relabel | None:
    """What puts labels in place of the real ones, or None for those themselves.

    Raises:
        InvalidInput: unknown labels, or a loss that does not tell what it is the likelihood of.
    """
    if isinstance(labels, str) and labels not in ("empirical", "sampled"):
        raise InvalidInput(f"unknown labels {labels!r}, {did_you_mean(labels, ['empirical', 'sampled'])}")
    if labels == "empirical":
        return None
    if labels == "sampled" and loss not in DRAWS:
        raise InvalidInput(
            f"cannot tell how to draw labels for the loss {getattr(loss, '__name__', loss)!r}: give "
            "labels='empirical', or a function of (outputs, targets, uniforms) such as attribution.draw_classes"
        )
    draw = DRAWS[loss] if isinstance(labels, str) else labels

    def relabel(outputs: Any, targets: Tensor, indices: range) -> Tensor:
        uniforms = np.stack(
            [np.random.default_rng([seed, index]).random(tuple(targets.shape[1:])) for index in indices]
        )
        inside = np.clip(uniforms, 1e-16, None)
        return draw(outputs, targets, torch.from_numpy(inside).to(targets.device))

    return relabel
