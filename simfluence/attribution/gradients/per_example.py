"""How each layer's gradients are computed: every rule is checked against autograd on a few examples before use."""

from __future__ import annotations

import fnmatch
import math
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from simfluence.attribution.gradients.hooks import (
    Gradients,
    Loss,
    Mask,
    attention_mask,
    gathered,
    mapped,
    one_by_one,
    rows_of,
)
from simfluence.attribution.gradients.layers import Layer, alone, find_layers
from simfluence.errors import InvalidInput, PlainGradientsWarning, did_you_mean
from simfluence.task import Data

#: Number of examples that the rules are checked on.
_CHECKED = 3

__all__ = ["per_example_gradients"]


def per_example_gradients(
    model: nn.Module, loss: Loss, data: Data, layers: Sequence[str] | None = None, mask: Mask = attention_mask
) -> Gradients:
    """Find a model's layers, check their rules on a few examples of ``data``, and return its per-example gradients.

    Where a rule disagrees with autograd, or a module has none (a weight used outside of its module, a batch that is
    not the first axis), the parameter's gradients come from ``torch.func``, or from one pass per example, with a
    warning.

    Args:
        model: any module with parameters that require a gradient.
        loss: ``loss(outputs, targets)`` → ``[batch]``.
        data: ``(inputs, targets)``.
        layers: names of layers, or patterns such as ``"*.mlp.*"``; all of them by default.
        mask: inputs → which positions are no padding, ``[batch, positions]``; by default their "attention_mask".

    Raises:
        InvalidInput: there is no example, no such layer or nothing to attribute to; the forward pass is random or
            mixes examples; or the loss is reduced.

    >>> data = torch.ones(5, 3), torch.ones(5, 2)
    >>> squared = lambda outputs, targets: ((outputs - targets) ** 2).sum(1)
    >>> gradients = per_example_gradients(nn.Linear(3, 2), squared, data)
    >>> gradients.factors(data)["Linear"].matrices().shape  # the bias is the last column
    torch.Size([5, 2, 4])
    """
    if not len(data[1]):
        raise InvalidInput("data has no example to take gradients of: pass at least one")
    all_layers = {layer.name: layer for layer in find_layers(model)}
    if not all_layers:
        raise InvalidInput(
            f"{type(model).__name__} has no parameter that requires a gradient, so there is nothing to attribute to: "
            "set requires_grad on the parameters that were trained"
        )
    names = list(all_layers) if layers is None else _matching(layers, list(all_layers))
    chosen = {name: all_layers[name] for name in names}
    gradients = Gradients(model, loss, chosen, mask)
    few = gradients.placed(rows_of(data, slice(0, _CHECKED)))
    _check_forward(gradients, few)
    return _with_fallback(_without_wrong_rules(gradients, few), few)


def _without_wrong_rules(gradients: Gradients, few: Data) -> Gradients:
    """Drop the sources of the layers whose rules disagree with autograd."""
    wrong = _disagreeing(gradients, few)
    layers: dict[str, Layer] = {}
    for name, layer in gradients.layers.items():
        parts = [alone(part, gradients.parameters[part]) for part in layer.parameters] if name in wrong else [layer]
        layers |= {part.name: part for part in parts}
    return replace(gradients, layers=layers)


def _with_fallback(gradients: Gradients, few: Data) -> Gradients:
    """Choose between ``torch.func`` and one pass per example for layers without sources, and warn about them."""
    unhooked = [name for name, layer in gradients.layers.items() if not layer.sources]
    if not unhooked:
        return gradients
    plain = not _can_map(gradients, few)
    how = "one example at a time, because torch.func fails on this model" if plain else "by torch.func"
    message = (
        f"no rule gives the gradients of {', '.join(unhooked)}: they are computed {how}, which is slow. "
        "To leave them out, pass layers=[…]"
    )
    warnings.warn(message, PlainGradientsWarning, stacklevel=2)
    return replace(gradients, plain=plain)


def _disagreeing(gradients: Gradients, few: Data) -> set[str]:
    """Return the layers whose factors disagree with autograd's gradients, computed for each example on its own."""
    hooked = {name: layer for name, layer in gradients.layers.items() if layer.sources}
    if not hooked:
        return set()
    calls, _ = gradients.calls(*few)
    expected = one_by_one(gradients, [part for layer in hooked.values() for part in layer.parameters], *few)
    scale = _scale(expected)
    wrong = set()
    for name, layer in hooked.items():
        try:
            by_rule = layer.to_parameters(gathered(layer, calls, lambda positions: [], len(few[1])).matrices())
        except InvalidInput:  # its rows do not count examples, or it is never called
            wrong.add(name)
            continue
        if not all(_close(by_rule[part], expected[part], scale) for part in by_rule):
            wrong.add(name)
    return wrong


def _can_map(gradients: Gradients, few: Data) -> bool:
    """Decide whether ``torch.func`` gives autograd's gradients for the layers without sources."""
    names = [layer.weight for layer in gradients.layers.values() if not layer.sources]
    try:
        by_func = mapped(gradients, names, *few)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
    expected = one_by_one(gradients, names, *few)
    scale = _scale(expected)
    return all(_close(by_func[name], expected[name], scale) for name in names)


def _close(values: Tensor, expected: Tensor, scale: float) -> bool:
    """Decide whether gradients are equal up to rounding, where the largest gradient has norm ``scale``.

    Gradients that are not finite pass: the rule is not at fault, and a later error names the example.
    """
    if not values.isfinite().all():
        return True
    return float((values - expected).norm()) <= _tolerance(expected) * max(float(expected.norm()), 1e-3 * scale)


def _scale(gradients: dict[str, Tensor]) -> float:
    """Return the largest finite norm."""
    return max((float(g.norm()) for g in gradients.values() if g.isfinite().all()), default=0.0)


def _tolerance(like: Tensor) -> float:
    """Return the relative tolerance for the dtype of ``like``."""
    return 10 * math.sqrt(torch.finfo(like.dtype).eps)


def _matching(patterns: Sequence[str], names: list[str]) -> list[str]:
    """Return the names that match a pattern, in the order of ``names``."""
    if isinstance(patterns, str):
        raise InvalidInput(
            f"layers must be a list of names or patterns, got the string {patterns!r}: write [{patterns!r}]"
        )
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InvalidInput(f"there is no layer {pattern!r}, {did_you_mean(pattern, names)}")
    if not patterns:
        raise InvalidInput(f"layers is an empty list: name some of {', '.join(names)}, or pass None for all layers")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _check_forward(gradients: Gradients, few: Data) -> None:
    """Check that two passes agree, and that an example has the same loss on its own as in a batch."""
    first, second = gradients.losses(few), gradients.losses(few)
    separate = torch.cat([gradients.losses(rows_of(few, slice(row, row + 1))) for row in range(len(few[1]))])
    tolerance = _tolerance(gradients.like)
    if not torch.allclose(first, second, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise InvalidInput(
            "two passes over the same examples differ in evaluation mode: the model still does something random, such "
            "as functional.dropout without training=self.training. Turn that off for attribution"
        )
    if not torch.allclose(first, separate, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise InvalidInput(
            "an example's loss depends on the others in its batch, so it has no gradient of its own: remove what "
            "mixes examples (batch statistics, contrastive losses)"
        )
