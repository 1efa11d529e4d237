"""How each layer's gradients are computed: every rule is checked against autograd on a few examples before use."""

from __future__ import annotations

import fnmatch
import warnings
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from simfluence._internal.checked import checked
from simfluence._internal.types import Count
from simfluence.attribution.gradients.checking import check_same_loss, tolerance
from simfluence.attribution.gradients.hooks import (
    Gradients,
    Loss,
    Mask,
    Pass,
    attention_mask,
    check_finite,
    mapped,
    one_by_one,
)
from simfluence.attribution.gradients.layers import Layer, alone, find_layers
from simfluence.errors import InvalidInput, PlainGradientsWarning, did_you_mean
from simfluence.task import Data, take, tensors

#: Number of examples that are looked at, and number of them on which the rules are checked.
_CANDIDATES = 16
_CHECKED = 8
#: Largest layer whose gradients are formed where its rule is right for one example at a time.
_LARGEST_FORMED = 2**14

__all__ = ["per_example_gradients"]


@checked
def per_example_gradients(
    model: nn.Module,
    loss: Loss,
    data: Data,
    layers: Sequence[str] | None = None,
    mask: Mask = attention_mask,
    batch_size: Count = _CHECKED,
) -> Gradients:
    """Find a model's layers, check their rules on a few examples of ``data``, and return its per-example gradients.

    Where a rule disagrees with autograd, or a module has none (a weight used outside of its module, a batch that is
    not the first axis), the parameter's gradients come from ``torch.func``, or from one pass per example, with a
    warning. Rules that pass are checked again in every batch.

    Args:
        model: any module with parameters that require a gradient.
        loss: ``loss(outputs, targets)`` → ``[batch]``.
        data: ``(inputs, targets)``.
        layers: names of layers, or patterns such as ``"*.mlp.*"``; all of them by default.
        mask: inputs → which positions are no padding, ``[batch, positions]``; by default their "attention_mask".
        batch_size: most examples per pass in the check.

    Raises:
        InvalidInput: there is no example, no such layer or nothing to attribute to; the forward pass is random or
            mixes examples; the loss is reduced; or a parameter is complex.

    >>> data = torch.ones(5, 3), torch.ones(5, 2)
    >>> squared = lambda outputs, targets: ((outputs - targets) ** 2).sum(1)
    >>> gradients = per_example_gradients(nn.Linear(3, 2), squared, data)
    >>> gradients.factors(data)["Linear"].matrices().shape  # the bias is the last column
    torch.Size([5, 2, 4])
    """
    if not len(data[1]):
        raise InvalidInput("data has no example to take gradients of: pass at least one")
    _check_parameters(model)
    all_layers = {layer.name: layer for layer in find_layers(model)}
    if not all_layers:
        raise InvalidInput(
            f"{type(model).__name__} has no parameter that requires a gradient, so there is nothing to attribute to: "
            "set requires_grad on the parameters that were trained"
        )
    names = list(all_layers) if layers is None else _matching(layers, list(all_layers))
    gradients = Gradients(model, loss, {name: all_layers[name] for name in names}, mask)
    few = gradients.placed(take(data, _chosen(gradients, data, min(batch_size, _CHECKED)).to(data[1].device)))
    _check_forward(gradients, few)
    return _without_wrong_rules(gradients, gradients.passed(*few))


def _check_parameters(model: nn.Module) -> None:
    """Refuse parameters that have no real gradient."""
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise InvalidInput(f"parameter {name!r} has no shape yet: run the model once on an example, then fit again")
        if parameter.requires_grad and parameter.is_complex():
            raise InvalidInput(
                f"parameter {name!r} is complex, and gradients by complex numbers have no inner product here: store "
                "its real and imaginary parts as two real parameters, or freeze it with requires_grad_(False)"
            )


def _chosen(gradients: Gradients, data: Data, most: int) -> Tensor:
    """Return the rows of a few examples, in a random order: the shortest, the longest, those with the largest losses.

    They are chosen among examples from all over the data. An example with a large loss has a gradient; one without
    would agree with any rule. A random order lets a model that sorts its batch be noticed.

    Raises:
        InvalidInput: the model or the loss fails on an example, or a loss is not finite.
    """
    rows = torch.linspace(0, len(data[1]) - 1, min(_CANDIDATES, len(data[1]))).round().long()
    losses, lengths = [], []
    for row in rows.tolist():
        one = take(data, torch.tensor([row], device=data[1].device))
        loss = gradients.losses(one, first=row)
        check_finite(loss, "training", row)
        losses.append(float(loss))
        lengths.append(sum(int((tensor != 0).sum()) for tensor in tensors(one[0])))
    by_length, by_loss = (torch.tensor(values).argsort(stable=True).tolist() for values in (lengths, losses))
    wanted = [by_loss[-1], by_length[0], by_length[-1], *reversed(by_loss)]
    unique = torch.tensor(list(dict.fromkeys(wanted))[:most])
    order = torch.randperm(len(unique), generator=torch.Generator().manual_seed(0))
    return rows[unique[order]]


def _without_wrong_rules(gradients: Gradients, few: Pass) -> Gradients:
    """Choose how to compute the layers whose rules disagree with autograd or that have none, and warn about them."""
    right = gradients.by_rule(few, gradients.hooked)
    for row in range(min(2, len(few))):
        right = gradients.same_alone(few, right, row)
    wrong = [name for name in gradients.hooked if name not in right]
    large = [name for name in wrong if gradients.layers[name].size > _LARGEST_FORMED]
    right_alone = set(gradients.one_at_a_time(few, large))
    split = _split(gradients, [name for name in wrong if name not in right_alone])
    split = replace(split, plain=not _can_map(split, few))
    split.alone.update(right_alone)
    _warn(split)
    return split


def _split(gradients: Gradients, names: Sequence[str]) -> Gradients:
    """Replace layers by their parameters, as layers without sources."""
    layers: dict[str, Layer] = {}
    for name, layer in gradients.layers.items():
        parts = [alone(part, gradients.parameters[part]) for part in layer.parameters] if name in names else [layer]
        layers |= {part.name: part for part in parts}
    return replace(gradients, layers=layers)


def _warn(gradients: Gradients) -> None:
    """Warn about the layers that are not computed by rules for whole batches."""
    unhooked = [name for name, layer in gradients.layers.items() if not layer.sources]
    one_by_one = [name for name in gradients.layers if name in gradients.alone]
    if gradients.plain:
        one_by_one, unhooked, why = unhooked + one_by_one, [], " because torch.func fails on this model"
    else:
        why = ""
    parts = [f"{', '.join(unhooked)}: they are computed by torch.func"] if unhooked else []
    parts += [f"{', '.join(one_by_one)}: they are computed one example at a time{why}"] if one_by_one else []
    if parts:
        message = f"no rule gives the gradients of {'; and of '.join(parts)}, which is slow. To leave them out, pass "
        warnings.warn(message + "layers=[…]", PlainGradientsWarning, stacklevel=4)


def _can_map(gradients: Gradients, few: Pass) -> bool:
    """Decide whether ``torch.func`` gives autograd's gradients for the layers without sources."""
    names = [layer.weight for layer in gradients.layers.values() if not layer.sources]
    if not names:
        return True
    try:
        by_func = mapped(gradients, names, few.inputs, few.targets)
    except (RuntimeError, TypeError, ValueError, NotImplementedError):
        return False
    inputs, targets = take((few.inputs, few.targets), torch.arange(min(2, len(few)), device=few.targets.device))
    expected = one_by_one(gradients, names, inputs, targets)
    scale = max((float(g.norm()) for g in expected.values() if g.isfinite().all()), default=0.0)
    return all(_close(by_func[name][: len(targets)], expected[name], scale) for name in names)


def _close(values: Tensor, expected: Tensor, scale: float) -> bool:
    """Decide whether gradients are equal up to rounding, where the largest gradient has norm ``scale``.

    Gradients that are not finite pass: the rule is not at fault, and a later error names the example.
    """
    if not values.isfinite().all():
        return True
    bound = tolerance(expected.dtype) * max(float(expected.norm()), 1e-3 * scale)
    return float((values - expected).norm()) <= bound


def _matching(patterns: Sequence[str], names: list[str]) -> list[str]:
    """Return the names that match a pattern, in the order of ``names``."""
    for pattern in patterns:
        if not fnmatch.filter(names, pattern):
            raise InvalidInput(f"there is no layer {pattern!r}, {did_you_mean(pattern, names)}")
    if not patterns:
        raise InvalidInput(f"layers is an empty list: name some of {', '.join(names)}, or pass None for all layers")
    return [name for name in names if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)]


def _check_forward(gradients: Gradients, few: Data) -> None:
    """Check that two passes agree, and that an example has the same loss on its own as in a batch."""
    first, second = gradients.losses(few), gradients.losses(few)
    bound = tolerance(first.dtype)
    if not torch.allclose(first, second, rtol=bound, atol=bound, equal_nan=True):
        raise InvalidInput(
            "two passes over the same examples differ in evaluation mode: the model still does something random, such "
            "as functional.dropout without training=self.training. Turn that off for attribution"
        )
    for row, together in enumerate(first.tolist()):
        separate = gradients.losses(take(few, torch.tensor([row], device=few[1].device)))
        check_same_loss(together, float(separate), first.dtype)
