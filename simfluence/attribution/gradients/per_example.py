"""Which layers' gradients can be had by which means: every rule is tried on a few examples before it is believed."""

from __future__ import annotations

import fnmatch
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

#: Examples that the rules are tried on.
_TRIED = 3


def per_example_gradients(
    model: nn.Module, loss: Loss, data: Data, layers: Sequence[str] | None = None, mask: Mask = attention_mask
) -> Gradients:
    """The per-example gradients of a model, its layers found and tried on a few examples of ``data``.

    A parameter whose gradient by the rules of its modules is not the one that autograd gives (a weight used outside
    of its module, a batch that is not the first axis, a module without a rule) gets its gradient from
    ``torch.func``, or one example after the other, with a warning.

    Args:
        model: any module with parameters that require a gradient.
        loss: ``loss(outputs, targets)`` → ``[batch]``.
        data: ``(inputs, targets)``.
        layers: names of layers, or patterns such as ``"*.mlp.*"``; all of them by default.
        mask: inputs → which positions are no padding, ``[batch, positions]``; by default their "attention_mask".

    Raises:
        InvalidInput: nothing to attribute to, a forward pass that is random or mixes examples, a reduced loss.

    >>> data = torch.ones(5, 3), torch.ones(5, 2)
    >>> found = per_example_gradients(nn.Linear(3, 2), lambda outputs, targets: ((outputs - targets) ** 2).sum(1), data)
    >>> found.factors(data)["Linear"].matrices().shape  # the bias is the last column
    torch.Size([5, 2, 4])
    """
    if not len(data[1]):
        raise InvalidInput("no example to take gradients of: give some data")
    every = {layer.name: layer for layer in find_layers(model)}
    if not every:
        raise InvalidInput(
            f"{type(model).__name__} has no parameter that requires a gradient, so nothing to attribute to: "
            "set requires_grad on the parameters that were trained"
        )
    chosen = every if layers is None else {name: every[name] for name in _matching(layers, list(every))}
    gradients = Gradients(model, loss, chosen, mask)
    few = gradients.placed(rows_of(data, slice(0, _TRIED)))
    _check_forward(gradients, few)
    return _with_means(_freed(gradients, few), few)


def _freed(gradients: Gradients, few: Data) -> Gradients:
    """Without the sources of those layers whose rules do not give autograd's gradients."""
    wrong = _disagreeing(gradients, few)
    layers: dict[str, Layer] = {}
    for name, layer in gradients.layers.items():
        parts = [alone(part, gradients.parameters[part]) for part in layer.parameters] if name in wrong else [layer]
        layers |= {part.name: part for part in parts}
    return replace(gradients, layers=layers)


def _with_means(gradients: Gradients, few: Data) -> Gradients:
    """With the means for layers without sources chosen, and a warning about them."""
    unhooked = [name for name, layer in gradients.layers.items() if not layer.sources]
    if not unhooked:
        return gradients
    plain = not _can_map(gradients, few)
    how = "one example after the other, as torch.func fails on this model" if plain else "by torch.func"
    message = f"no rule gives the gradients of {', '.join(unhooked)}: taken {how}, slowly; layers=[…] leaves them out"
    warnings.warn(message, PlainGradientsWarning, stacklevel=2)
    return replace(gradients, plain=plain)


def _disagreeing(gradients: Gradients, few: Data) -> set[str]:
    """The layers whose factors do not make the gradients that autograd gives each example alone."""
    hooked = {name: layer for name, layer in gradients.layers.items() if layer.sources}
    if not hooked:
        return set()
    calls, _ = gradients.calls(*few)
    true = one_by_one(gradients, [part for layer in hooked.values() for part in layer.parameters], *few)
    scale = _scale(true)
    wrong = set()
    for name, layer in hooked.items():
        try:
            made = layer.to_parameters(gathered(layer, calls, lambda positions: [], len(few[1])).matrices())
        except InvalidInput:  # other rows than examples, or never called
            wrong.add(name)
            continue
        if not all(_close(made[part], true[part], scale) for part in made):
            wrong.add(name)
    return wrong


def _can_map(gradients: Gradients, few: Data) -> bool:
    names = [layer.weight for layer in gradients.layers.values() if not layer.sources]
    try:
        found = mapped(gradients, names, *few)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
    true = one_by_one(gradients, names, *few)
    scale = _scale(true)
    return all(_close(found[name], true[name], scale) for name in names)


def _close(made: Tensor, true: Tensor, scale: float) -> bool:
    """Equal up to rounding, for gradients beside others of size ``scale``.

    What is not finite is no fault of the rule: whoever takes these gradients is told of the example.
    """
    if not made.isfinite().all():
        return True
    return float((made - true).norm()) <= _tolerance(true) * max(float(true.norm()), 1e-3 * scale)


def _scale(gradients: dict[str, Tensor]) -> float:
    """The largest finite norm."""
    return max((float(g.norm()) for g in gradients.values() if g.isfinite().all()), default=0.0)


def _tolerance(like: Tensor) -> float:
    return 10 * float(torch.finfo(like.dtype).eps) ** 0.5


def _matching(patterns: Sequence[str], names: list[str]) -> list[str]:
    """The names that match a pattern, in their order."""
    if isinstance(patterns, str):
        raise InvalidInput(
            f"layers must be a list of names or patterns, got the text {patterns!r}: write [{patterns!r}]"
        )
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InvalidInput(f"no layer {pattern!r}, {did_you_mean(pattern, names)}")
    if not patterns:
        raise InvalidInput(f"layers is an empty list: name some of {', '.join(names)}, or give None for all")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _check_forward(gradients: Gradients, few: Data) -> None:
    """Two passes must agree, and one example alone must have the loss that it has among others."""
    once, again = gradients.losses(few), gradients.losses(few)
    each = torch.cat([gradients.losses(rows_of(few, slice(row, row + 1))) for row in range(len(few[1]))])
    tolerance = _tolerance(gradients.like)
    if not torch.allclose(once, again, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise InvalidInput(
            "two passes over the same examples differ in evaluation mode: something random is left on, such as "
            "functional.dropout without training=self.training. Turn it off to attribute"
        )
    if not torch.allclose(once, each, rtol=tolerance, atol=tolerance, equal_nan=True):
        raise InvalidInput(
            "an example's loss depends on the others in its batch, so it has no gradient of its own: leave out what "
            "mixes examples (batch statistics, contrastive losses)"
        )
