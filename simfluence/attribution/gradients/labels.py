"""Labels for curvature: the real ones, or labels drawn from the model's predictions.

The Fisher matrix is an expectation over the model's own predictions (Martens 2020, section 5); with the real labels it
is a different matrix, the empirical Fisher. The labels drawn for an example depend only on the seed and its index, so
they are the same in every pass and for every batch size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simfluence.errors import InvalidInput, did_you_mean
from simfluence.tasks.losses import cross_entropy, squared_error, token_cross_entropy

#: ``(outputs, targets, uniforms)`` → targets drawn from the model; ``uniforms`` has a number in (0, 1) per target.
Draw = Callable[[Any, Tensor, Tensor], Tensor]
#: ``(outputs, targets, indices of the examples)`` → targets.
Relabel = Callable[[Any, Tensor, range], Tensor]

__all__ = ["Draw", "Relabel", "draw_classes", "draw_normal", "relabelling"]


def draw_classes(outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
    """Draw classes from the softmax of logits; negative targets (such as −100, which losses ignore) stay.

    Args:
        outputs: logits, ``[*targets.shape, classes]``, or ``[batch, classes, …]`` as in torch's own loss.
        targets: integers, ``[batch]`` or ``[batch, …]``.
        uniforms: numbers in (0, 1), in the shape of the targets.

    >>> logits = torch.log(torch.tensor([[0.2, 0.8], [0.9, 0.1]]))
    >>> draw_classes(logits, torch.tensor([0, 0]), torch.tensor([0.5, 0.5])).tolist()
    [1, 0]
    """
    logits: Tensor = outputs if outputs.shape[:-1] == targets.shape else outputs.movedim(1, -1)
    below = logits.double().softmax(-1).cumsum(-1) < uniforms[..., None]
    drawn = below.sum(-1).clamp(max=logits.shape[-1] - 1)
    return torch.where(targets < 0, targets, drawn.to(targets.dtype))


def draw_normal(outputs: Tensor, targets: Tensor, uniforms: Tensor) -> Tensor:
    """Draw targets around the outputs so that the Fisher matrix is the Gauss–Newton matrix of the squared error.

    The mean of K squares has the Hessian 2/K; normal targets of variance K/2 give gradients with that variance.

    >>> draw_normal(torch.tensor([[1.0]]), torch.tensor([7.0]), torch.tensor([0.5])).tolist()
    [1.0]
    """
    deviation = math.sqrt((targets[0].numel() if len(targets) else 1) / 2)
    noise = torch.special.ndtri(uniforms.double()) * deviation
    drawn: Tensor = outputs.detach().reshape(targets.shape) + noise
    return drawn.to(targets.dtype)


#: How to draw labels for each of the library's losses.
DRAWS: dict[Callable[..., Tensor], Draw] = {
    cross_entropy: draw_classes,
    token_cross_entropy: draw_classes,
    squared_error: draw_normal,
}


def relabelling(labels: str | Draw, loss: Callable[..., Tensor], seed: int) -> Relabel | None:
    """Return the function that replaces the real labels, or None to use the real ones.

    Raises:
        InvalidInput: ``labels`` is unknown, or there is no rule to draw labels for this loss.
    """
    if not (isinstance(labels, str) or callable(labels)):
        raise InvalidInput(f"labels must be 'sampled', 'empirical' or a function that draws them, got {labels!r}")
    if isinstance(labels, str) and labels not in ("empirical", "sampled"):
        raise InvalidInput(f"unknown labels {labels!r}, {did_you_mean(labels, ['empirical', 'sampled'])}")
    if labels == "empirical":
        return None
    if labels == "sampled" and loss not in DRAWS:
        raise InvalidInput(
            f"there is no rule to draw labels for the loss {getattr(loss, '__name__', loss)!r}: pass "
            "labels='empirical', or a function of (outputs, targets, uniforms) such as attribution.draw_classes"
        )
    return partial(_relabel, DRAWS[loss] if isinstance(labels, str) else labels, seed)


def _relabel(draw: Draw, seed: int, outputs: Any, targets: Tensor, indices: range) -> Tensor:
    """Draw the labels of the examples ``indices``: a ``Relabel``, once ``draw`` and ``seed`` are bound."""
    shape = tuple(targets.shape[1:])
    uniforms = np.stack([np.random.default_rng([seed, index]).random(shape) for index in indices])
    positive = np.clip(uniforms, 1e-16, None)
    return draw(outputs, targets, torch.from_numpy(positive).to(targets.device))
