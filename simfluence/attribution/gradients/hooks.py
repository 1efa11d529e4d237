"""Per-example gradients of a model's loss, one batch at a time, as factors of each layer.

A forward and a backward pass over a batch give, by hooks, what came into every layer and the loss's derivative by
what came out: ``Factors``. The gradients themselves, examples × parameters, are not formed here.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from simfluence.attribution.gradients.labels import Relabel
from simfluence.attribution.gradients.layers import Factors, Layer
from simfluence.errors import InvalidInput
from simfluence.task import Data, cast, convert, forward, take

#: ``(outputs, targets)`` → ``[batch]``.
Loss = Callable[[Any, Tensor], Tensor]
#: Inputs → which positions are no padding, ``[batch, positions]``, or None where there is no padding. Several where a
#: model has sequences of its own, as an encoder and a decoder have.
Mask = Callable[[Any], Tensor | Sequence[Tensor] | None]
#: Module calls of one pass: what came in, and what came out or the loss's derivative by it.
Calls = list[tuple[nn.Module, Tensor, Tensor]]


def attention_mask(inputs: Any) -> Bool[Tensor, "batch positions"] | list[Tensor] | None:
    """The padding mask that a mapping of inputs carries under the name that Hugging Face's models give it.

    Several texts of one example, ``[batch, texts, positions]``, stand one after the other. With a
    "decoder_attention_mask" there are three: of what is decoded, of what is read, and that once for each text decoded.

    >>> attention_mask({"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[1, 0]])}).tolist()
    [[True, False]]
    """
    found, decoded = (
        inputs.get(name) if isinstance(inputs, Mapping) else None
        for name in ("attention_mask", "decoder_attention_mask")
    )
    if not isinstance(found, Tensor) or found.ndim not in (2, 3):
        return None
    read = found.bool().flatten(1)
    if not isinstance(decoded, Tensor) or decoded.ndim not in (2, 3):
        return read
    said = decoded.bool().flatten(1)
    return [said, read, read.repeat(1, said.shape[1] // decoded.shape[-1])]


def masks_of(mask: Mask, inputs: Any, positions: int) -> list[Tensor]:
    """The masks of so many positions, ``[batch, positions]`` each."""
    found = mask(inputs)
    several = [found] if isinstance(found, Tensor) else found or []
    return [each for each in several if each.shape[1] == positions]


@dataclass(frozen=True, eq=False)
class Gradients:
    """The per-example gradients of ``loss`` by the parameters of a model's layers. Made by ``per_example_gradients``.

    Args:
        model: used in evaluation mode, and left in the mode that it was in.
        loss: ``loss(outputs, targets)`` → ``[batch]``.
        layers: by name, in the model's order.
        mask: which positions of the inputs are no padding.
        plain: layers without hooks get their gradients one example after the other, not by ``torch.func``.
    """

    model: nn.Module
    loss: Loss
    layers: Mapping[str, Layer]
    mask: Mask = attention_mask
    plain: bool = False

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the layers, by name."""
        own = dict(self.model.named_parameters())
        return {name: own[name] for layer in self.layers.values() for name in layer.parameters}

    @property
    def like(self) -> Tensor:
        """A tensor of the device and dtype of the model."""
        return next(iter(self.parameters.values()))

    def own(self, layer: Layer) -> Tensor:
        """The weight of a layer."""
        return self.parameters[layer.weight].detach()

    @property
    def size(self) -> int:
        """How many parameters the layers have."""
        return sum(layer.size for layer in self.layers.values())

    def batches(
        self, data: Data, batch_size: int, relabel: Relabel | None = None, side: str = "training", first: int = 0
    ) -> Iterator[tuple[slice, dict[str, Factors]]]:
        """The factors of all layers, batch after batch of ``data``, with the rows that they are of.

        Args:
            relabel: puts other labels in place of the real ones.
            side: what to call the examples in messages.
            first: where to start.

        Raises:
            InvalidInput: the model or the loss fails, the loss is not one number per example, or something is not
                finite.
        """
        for start in range(first, len(data[1]), batch_size):
            rows = slice(start, min(start + batch_size, len(data[1])))
            yield rows, self.factors(rows_of(data, rows), start, relabel, side)

    def factors(
        self, batch: Data, first: int = 0, relabel: Relabel | None = None, side: str = "training"
    ) -> dict[str, Factors]:
        """The factors of all layers for one batch, whose first example is number ``first`` of its side."""
        inputs, targets = self.placed(batch)
        calls, targets = self.calls(inputs, targets, first, relabel, side)
        masks = partial(masks_of, self.mask, inputs)
        found = {n: gathered(layer, calls, masks, len(targets)) for n, layer in self.layers.items() if layer.sources}
        found |= self._unhooked(inputs, targets)
        for name, factors in found.items():
            _check_finite(name, factors, side, first)
        return {name: found[name] for name in self.layers}

    def calls(
        self, inputs: Any, targets: Tensor, first: int = 0, relabel: Relabel | None = None, side: str = "training"
    ) -> tuple[Calls, Tensor]:
        """One forward and backward pass: calls of the layers' modules with derivatives, and the labels used."""
        hooked = {module for layer in self.layers.values() for module, _ in layer.sources}
        with evaluating(self.model), recording(hooked) as calls:
            with explained(side, first, len(targets)):
                outputs = forward(self.model, inputs)
                if relabel is not None:
                    targets = relabel(outputs, targets, range(first, first + len(targets)))
                losses = self.loss(outputs, targets)
            check_losses(losses, len(targets), side, first)
            return _derived(losses, calls), targets

    def losses(self, batch: Data, side: str = "training") -> Float[Tensor, " batch"]:
        """The loss of each example, without gradients."""
        inputs, targets = self.placed(batch)
        with evaluating(self.model), torch.no_grad(), explained(side, 0, len(targets)):
            losses = self.loss(forward(self.model, inputs), targets)
        check_shape(losses, len(targets))
        return losses

    def placed(self, batch: Data) -> Data:
        """``batch`` on the model's device and in its dtype."""
        placed: Data = cast(batch, self.like.device, self.like.dtype)
        return placed

    def _unhooked(self, inputs: Any, targets: Tensor) -> dict[str, Factors]:
        """The layers without sources; their gradients are formed: ``[batch, 1, size]``."""
        names = {layer.weight: name for name, layer in self.layers.items() if not layer.sources}
        if not names:
            return {}
        formed = (one_by_one if self.plain else mapped)(self, list(names), inputs, targets)
        ones = self.like.new_ones(len(targets), 1, 1)
        return {layer: Factors(ones, formed[name].flatten(1)[:, None]) for name, layer in names.items()}


def one_by_one(gradients: Gradients, names: list[str], inputs: Any, targets: Tensor) -> dict[str, Tensor]:
    """Gradients ``[batch, *shape]`` by the parameters ``names``, by autograd, one example after the other."""
    parameters = [gradients.parameters[name] for name in names]
    rows = []
    with evaluating(gradients.model), torch.enable_grad():
        for index in range(len(targets)):
            one, target = take((inputs, targets), torch.tensor([index], device=targets.device))
            loss = gradients.loss(forward(gradients.model, one), target).sum()
            rows.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def mapped(gradients: Gradients, names: list[str], inputs: Any, targets: Tensor) -> dict[str, Tensor]:
    """The same by ``torch.func``, all examples at once."""
    parameters = {name: gradients.parameters[name].detach() for name in names}

    def loss_of(chosen: dict[str, Tensor], inputs: Any, target: Tensor) -> Tensor:
        outputs = called(gradients.model, chosen, convert(lambda tensor: tensor[None], inputs))
        return gradients.loss(outputs, target[None]).sum()

    with evaluating(gradients.model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # we have warned that it is slow
        found: dict[str, Tensor] = torch.func.vmap(torch.func.grad(loss_of), in_dims=(None, 0, 0))(
            parameters, inputs, targets
        )
    return {name: gradient.detach() for name, gradient in found.items()}


def called(model: nn.Module, parameters: Mapping[str, Tensor], inputs: Any) -> Any:
    """The model's outputs with ``parameters`` in place of those of its own."""
    args, named = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    return torch.func.functional_call(model, dict(parameters), args, named)


def gathered(layer: Layer, calls: Calls, masks: Callable[[int], list[Tensor]], batch: int) -> Factors:
    """The factors of one layer: all calls of its modules, one after the other along the positions.

    Args:
        masks: which positions are no padding, for so many positions; none where nothing is known.

    Raises:
        WrongBatch: the first axis of a call does not count the examples.
    """
    parts = [
        _by_example(layer, extract(module, inputs, gradient), batch)
        for owner, extract in layer.sources
        for module, inputs, gradient in calls
        if module is owner
    ]
    if not parts:
        raise InvalidInput(f"the model never called layer {layer.name!r}: leave it out by layers=[…]")
    a, s = parts[0] if len(parts) == 1 else (torch.cat(column, 1) for column in zip(*parts, strict=True))
    if layer.vector:
        return Factors(a[:, :1], s.sum(1, keepdim=True))
    valid = [_valid(masks(part[0].shape[1]), *part) for part in parts]
    if any(each is None for each in valid):
        return Factors(a, s, None, len(parts))
    return Factors(a, s, torch.cat([each for each in valid if each is not None], 1), len(parts))


def _valid(
    masks: Sequence[Tensor], a: Float[Tensor, "batch positions columns"], s: Float[Tensor, "batch positions rows"]
) -> Bool[Tensor, "batch positions"] | None:
    """Which positions of a call are no padding.

    Of several masks that fit, those hold for an example under which what is left out has no part in its loss.
    """
    if len(masks) < 2:
        return masks[0].to(a.device) if masks else None
    used = (a != 0).any(-1) & (s != 0).any(-1)
    valid = torch.ones_like(used)
    for mask in masks:
        holds = ~(used & ~mask.to(used.device)).any(1, keepdim=True)
        valid &= mask.to(used.device) | ~holds
    return valid


def _by_example(layer: Layer, factors: tuple[Tensor, Tensor], batch: int) -> tuple[Tensor, Tensor]:
    """Several rows of an example (the choices that it has, say) as its positions, one after the other.

    Raises:
        WrongBatch: the rows are not some for each example.
    """
    a, s = factors
    if len(a) == len(s) == batch:
        return a, s
    if len(a) != len(s) or len(a) % batch or not len(a):
        raise WrongBatch(layer.name, len(a), batch)
    return a.reshape(batch, -1, a.shape[-1]), s.reshape(batch, -1, s.shape[-1])


def rows_of(data: Data, rows: slice) -> Data:
    """Some of the examples."""
    return convert(lambda tensor: tensor[rows], data[0]), data[1][rows]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode (no dropout, fixed statistics), and back in the modes that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def recording(modules: set[nn.Module]) -> Iterator[Calls]:
    """What comes into and out of the calls of ``modules``, in order."""
    calls: Calls = []

    def record(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        given = args[0] if args else next(iter(kwargs.values()))
        calls.append((module, given.detach(), output))
        return output.clone()  # the model may change it in place, as ReLU(inplace=True) does

    handles = [module.register_forward_hook(record, with_kwargs=True) for module in modules]
    try:
        with torch.enable_grad():
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def _derived(losses: Tensor, calls: Calls) -> Calls:
    """The calls with the loss's derivatives in place of the outputs; zeros where the loss does not use them.

    An example's loss depends on its own outputs alone, so the derivative of the sum holds those of all.
    """
    wanted = [output for _, _, output in calls if output.requires_grad]
    found = iter(torch.autograd.grad(losses.sum(), wanted, allow_unused=True) if wanted else ())
    derived: Calls = []
    for module, inputs, output in calls:
        gradient = next(found) if output.requires_grad else None
        derived.append((module, inputs, torch.zeros_like(output) if gradient is None else gradient))
    return derived


class WrongBatch(InvalidInput):
    """A layer's first axis does not count examples."""

    def __init__(self, layer: str, found: int, batch: int) -> None:
        super().__init__(
            f"layer {layer!r} was called with {found} rows for a batch of {batch} examples, so its gradients cannot "
            "be told apart by example: leave it out by layers=[…]"
        )


@contextlib.contextmanager
def explained(side: str, first: int, count: int) -> Iterator[None]:
    """Say on which examples the model or the loss fails.

    Raises:
        InvalidInput: in place of torch's own errors.
    """
    try:
        yield
    except InvalidInput:
        raise
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise InvalidInput(
            f"the model or its loss fails on {side} examples {first} to {first + count - 1}: {error}. Check the "
            "shapes, and that labels are in the model's range"
        ) from error


def check_shape(losses: Any, batch: int) -> None:
    """Refuse losses that are not one number per example."""
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if shape != (batch,):
        raise InvalidInput(
            f"the loss has shape {shape} for {batch} examples: give one loss per example, [batch] "
            "(in torch: reduction='none', and a sum or mean over further axes)"
        )


def check_losses(losses: Any, batch: int, side: str, first: int) -> None:
    """Refuse losses of the wrong shape, not finite, or without a graph."""
    check_shape(losses, batch)
    if not losses.isfinite().all():
        bad = int((~losses.isfinite()).nonzero()[0])
        raise InvalidInput(
            f"the loss of {side} example {first + bad} is {losses[bad].item()}: correct it or leave it out"
        )
    if not losses.requires_grad:
        raise InvalidInput("the loss does not depend on the model's parameters: compute it with torch, and with grad")


def _check_finite(name: str, factors: Factors, side: str, first: int) -> None:
    for what, values in (("gradient", factors.gradients), ("input", factors.inputs)):
        if not (values.sum().isfinite() or values.isfinite().all()):  # the sum is the quicker, but may overflow
            bad = int((~values.flatten(1).isfinite().all(1)).nonzero()[0])
            raise InvalidInput(
                f"the {what} of {side} example {first + bad} in layer {name!r} is not finite: look at that example "
                "and at the weights, or take gradients in float64"
            )
