"""Per-example gradients of a model's loss, one batch at a time, as factors of each layer.

Hooks read every layer's input and the loss's derivative by its output from one forward and one backward pass over a
batch: ``Factors``. The gradients themselves, examples × parameters, are not formed here.
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
#: Inputs → which positions are no padding, ``[batch, positions]``, or None where there is no padding. A list of masks
#: for a model with several sequences, such as an encoder's and a decoder's.
Mask = Callable[[Any], Tensor | Sequence[Tensor] | None]
#: Module calls of one pass: the module, its input, and its output or the loss's derivative by its output.
Calls = list[tuple[nn.Module, Tensor, Tensor]]

__all__ = [
    "Calls",
    "Gradients",
    "Loss",
    "Mask",
    "attention_mask",
    "called",
    "evaluating",
    "explained",
    "gathered",
    "mapped",
    "masks_of",
    "one_by_one",
    "recording",
    "rows_of",
]


def attention_mask(inputs: Any) -> Bool[Tensor, "batch positions"] | list[Tensor] | None:
    """Return the padding mask of a mapping of inputs, stored under Hugging Face's name "attention_mask".

    The positions of several texts per example, ``[batch, texts, positions]``, are concatenated. If the inputs have a
    "decoder_attention_mask" too, return three masks: the decoder's, the encoder's, and the encoder's repeated for
    every decoded text.

    >>> attention_mask({"input_ids": torch.tensor([[5, 0]]), "attention_mask": torch.tensor([[1, 0]])}).tolist()
    [[True, False]]
    """
    encoder_mask, decoder_mask = (
        inputs.get(name) if isinstance(inputs, Mapping) else None
        for name in ("attention_mask", "decoder_attention_mask")
    )
    if not isinstance(encoder_mask, Tensor) or encoder_mask.ndim not in (2, 3):
        return None
    encoder = encoder_mask.bool().flatten(1)
    if not isinstance(decoder_mask, Tensor) or decoder_mask.ndim not in (2, 3):
        return encoder
    decoder = decoder_mask.bool().flatten(1)
    return [decoder, encoder, encoder.repeat(1, decoder.shape[1] // decoder_mask.shape[-1])]


def masks_of(mask: Mask, inputs: Any, positions: int) -> list[Tensor]:
    """Return the masks whose length is ``positions``, ``[batch, positions]`` each."""
    result = mask(inputs)
    masks = [result] if isinstance(result, Tensor) else result or []
    return [one_mask for one_mask in masks if one_mask.shape[1] == positions]


@dataclass(frozen=True, eq=False)
class Gradients:
    """Per-example gradients of ``loss`` by the parameters of a model's layers, built by ``per_example_gradients``.

    Args:
        model: used in evaluation mode; its own mode is restored after each pass.
        loss: ``loss(outputs, targets)`` → ``[batch]``.
        layers: layers by name, in the model's order.
        mask: which positions of the inputs are no padding.
        plain: compute the gradients of layers without hooks one example at a time, not by ``torch.func``.
    """

    model: nn.Module
    loss: Loss
    layers: Mapping[str, Layer]
    mask: Mask = attention_mask
    plain: bool = False

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the layers, by name."""
        of_model = dict(self.model.named_parameters())
        return {name: of_model[name] for layer in self.layers.values() for name in layer.parameters}

    @property
    def like(self) -> Tensor:
        """A tensor with the model's device and dtype."""
        return next(iter(self.parameters.values()))

    def own(self, layer: Layer) -> Tensor:
        """Return the weight of a layer."""
        return self.parameters[layer.weight].detach()

    @property
    def size(self) -> int:
        """The number of parameters in the layers."""
        return sum(layer.size for layer in self.layers.values())

    def batches(
        self,
        data: Data,
        *,
        batch_size: int,
        first: int = 0,
        relabel: Relabel | None = None,
        side: str = "training",
    ) -> Iterator[tuple[slice, dict[str, Factors]]]:
        """Yield the rows of each batch of ``data`` and the factors of all layers for it.

        Args:
            data: ``(inputs, targets)``.
            batch_size: examples per pass.
            first: index of the first example to use.
            relabel: replaces the real labels by others; None keeps the real ones.
            side: what error messages call the examples.

        Raises:
            InvalidInput: the model or the loss fails, the loss is not one number per example, or something is not
                finite.
        """
        for start in range(first, len(data[1]), batch_size):
            rows = slice(start, min(start + batch_size, len(data[1])))
            yield rows, self.factors(rows_of(data, rows), first=start, relabel=relabel, side=side)

    def factors(
        self, batch: Data, *, first: int = 0, relabel: Relabel | None = None, side: str = "training"
    ) -> dict[str, Factors]:
        """Return the factors of all layers for one batch.

        Args:
            batch: ``(inputs, targets)``.
            first: index of the batch's first example in its data.
            relabel, side: as in ``batches``.

        Raises:
            InvalidInput: as in ``batches``.
        """
        inputs, targets = self.placed(batch)
        calls, targets = self.calls(inputs, targets, first=first, relabel=relabel, side=side)
        masks = partial(masks_of, self.mask, inputs)
        factors = {n: gathered(layer, calls, masks, len(targets)) for n, layer in self.layers.items() if layer.sources}
        factors |= self._unhooked(inputs, targets)
        for name, layer_factors in factors.items():
            _check_finite(name, layer_factors, side, first)
        return {name: factors[name] for name in self.layers}

    def calls(
        self, inputs: Any, targets: Tensor, *, first: int = 0, relabel: Relabel | None = None, side: str = "training"
    ) -> tuple[Calls, Tensor]:
        """Run one forward and backward pass: the layers' module calls with derivatives, and the labels used."""
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
        """Return the loss of each example, without gradients."""
        inputs, targets = self.placed(batch)
        with evaluating(self.model), torch.no_grad(), explained(side, 0, len(targets)):
            losses = self.loss(forward(self.model, inputs), targets)
        check_shape(losses, len(targets))
        return losses

    def placed(self, batch: Data) -> Data:
        """Move ``batch`` to the model's device and dtype."""
        placed: Data = cast(batch, self.like.device, self.like.dtype)
        return placed

    def _unhooked(self, inputs: Any, targets: Tensor) -> dict[str, Factors]:
        """Return the gradients of the layers without sources, formed: ``[batch, 1, size]`` each."""
        names = {layer.weight: name for name, layer in self.layers.items() if not layer.sources}
        if not names:
            return {}
        formed = (one_by_one if self.plain else mapped)(self, list(names), inputs, targets)
        ones = self.like.new_ones(len(targets), 1, 1)
        return {layer: Factors(ones, formed[name].flatten(1)[:, None]) for name, layer in names.items()}


def one_by_one(gradients: Gradients, names: list[str], inputs: Any, targets: Tensor) -> dict[str, Tensor]:
    """Return the gradients ``[batch, *shape]`` by the parameters ``names``, by autograd, one example at a time."""
    parameters = [gradients.parameters[name] for name in names]
    rows = []
    with evaluating(gradients.model), torch.enable_grad():
        for index in range(len(targets)):
            one, target = take((inputs, targets), torch.tensor([index], device=targets.device))
            loss = gradients.loss(forward(gradients.model, one), target).sum()
            rows.append(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def mapped(gradients: Gradients, names: list[str], inputs: Any, targets: Tensor) -> dict[str, Tensor]:
    """Return the same gradients as ``one_by_one``, by ``torch.func``, all examples at once."""
    parameters = {name: gradients.parameters[name].detach() for name in names}
    per_example = torch.func.vmap(torch.func.grad(partial(_loss_of_one, gradients)), in_dims=(None, 0, 0))
    with evaluating(gradients.model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # the slow path has its own warning
        values: dict[str, Tensor] = per_example(parameters, inputs, targets)
    return {name: value.detach() for name, value in values.items()}


def _loss_of_one(gradients: Gradients, parameters: dict[str, Tensor], inputs: Any, target: Tensor) -> Tensor:
    """Return the loss of one example, whose tensors have no batch axis, at ``parameters``."""
    outputs = called(gradients.model, parameters, convert(lambda tensor: tensor[None], inputs))
    return gradients.loss(outputs, target[None]).sum()


def called(model: nn.Module, parameters: Mapping[str, Tensor], inputs: Any) -> Any:
    """Return the model's outputs with ``parameters`` in place of its own."""
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else ((inputs,), {})
    return torch.func.functional_call(model, dict(parameters), args, kwargs)


def gathered(layer: Layer, calls: Calls, masks: Callable[[int], list[Tensor]], batch: int) -> Factors:
    """Return the factors of one layer, the calls of its modules concatenated along the positions.

    Args:
        masks: number of positions → the padding masks of that length; an empty list where there is none.

    Raises:
        InvalidInput: the model never calls the layer.
        WrongBatch: the first axis of a call does not count examples.
    """
    parts = [
        _by_example(layer, extract(module, inputs, gradient), batch)
        for owner, extract in layer.sources
        for module, inputs, gradient in calls
        if module is owner
    ]
    if not parts:
        raise InvalidInput(f"the model never calls layer {layer.name!r}: leave it out with layers=[…]")
    a, s = parts[0] if len(parts) == 1 else (torch.cat(column, 1) for column in zip(*parts, strict=True))
    if layer.vector:
        return Factors(a[:, :1], s.sum(1, keepdim=True))
    by_call = [_valid(masks(part[0].shape[1]), *part) for part in parts]
    valid = [positions for positions in by_call if positions is not None]
    return Factors(a, s, torch.cat(valid, 1) if len(valid) == len(parts) else None, len(parts))


def _valid(
    masks: Sequence[Tensor], a: Float[Tensor, "batch positions columns"], s: Float[Tensor, "batch positions rows"]
) -> Bool[Tensor, "batch positions"] | None:
    """Return which positions of a call are no padding, or None if no mask fits.

    Where several masks fit, an example uses those that mask no position with a part in its loss.
    """
    if len(masks) < 2:
        return masks[0].to(a.device) if masks else None
    used = (a != 0).any(-1) & (s != 0).any(-1)
    valid = torch.ones_like(used)
    for mask in masks:
        applies = ~(used & ~mask.to(used.device)).any(1, keepdim=True)
        valid &= mask.to(used.device) | ~applies
    return valid


def _by_example(layer: Layer, factors: tuple[Tensor, Tensor], batch: int) -> tuple[Tensor, Tensor]:
    """Turn several rows per example (such as the choices of a multiple-choice model) into positions.

    Raises:
        WrongBatch: the examples do not all have the same number of rows.
    """
    a, s = factors
    if len(a) == len(s) == batch:
        return a, s
    if len(a) != len(s) or len(a) % batch or not len(a):
        raise WrongBatch(layer.name, len(a), batch)
    return a.reshape(batch, -1, a.shape[-1]), s.reshape(batch, -1, s.shape[-1])


def rows_of(data: Data, rows: slice) -> Data:
    """Return the examples in ``rows``."""
    return convert(lambda tensor: tensor[rows], data[0]), data[1][rows]


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set the model to evaluation mode (no dropout, fixed statistics) and restore its modules' modes afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def recording(modules: set[nn.Module]) -> Iterator[Calls]:
    """Record the inputs and outputs of all calls of ``modules``, in order."""
    calls: Calls = []
    handles = [module.register_forward_hook(partial(_record, calls), with_kwargs=True) for module in modules]
    try:
        with torch.enable_grad():
            yield calls
    finally:
        for handle in handles:
            handle.remove()


def _record(calls: Calls, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
    """Append a module call to ``calls``: a forward hook, once ``calls`` is bound."""
    inputs = args[0] if args else next(iter(kwargs.values()))
    calls.append((module, inputs.detach(), output))
    return output.clone()  # the model may change it in place, as ReLU(inplace=True) does


def _derived(losses: Tensor, calls: Calls) -> Calls:
    """Replace the outputs in ``calls`` by the loss's derivatives: zeros for outputs that the loss does not use.

    An example's loss depends on its own outputs only, so the derivative of the summed loss has every example's own.
    """
    outputs = [output for _, _, output in calls if output.requires_grad]
    gradients = iter(torch.autograd.grad(losses.sum(), outputs, allow_unused=True) if outputs else ())
    derived: Calls = []
    for module, inputs, output in calls:
        gradient = next(gradients) if output.requires_grad else None
        derived.append((module, inputs, torch.zeros_like(output) if gradient is None else gradient))
    return derived


class WrongBatch(InvalidInput):
    """The first axis of a layer's inputs does not count examples."""

    def __init__(self, layer: str, rows: int, batch: int) -> None:
        super().__init__(
            f"layer {layer!r} was called with {rows} rows for a batch of {batch} examples, so its gradient cannot "
            "be split by example: leave it out with layers=[…]"
        )


@contextlib.contextmanager
def explained(side: str, first: int, count: int) -> Iterator[None]:
    """Name the examples on which the model or the loss fails.

    Raises:
        InvalidInput: instead of torch's own error.
    """
    try:
        yield
    except InvalidInput:
        raise
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise InvalidInput(
            f"the model or its loss fails on {side} examples {first} to {first + count - 1}: {error}. Check the "
            "shapes, and that the labels are in the model's range"
        ) from error


def check_shape(losses: Any, batch: int) -> None:
    """Refuse losses that are not one number per example."""
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if shape != (batch,):
        raise InvalidInput(
            f"the loss has shape {shape} for {batch} examples: return one loss per example, [batch] "
            "(in torch: reduction='none', then a sum or mean over any further axes)"
        )


def check_losses(losses: Any, batch: int, side: str, first: int) -> None:
    """Refuse losses that have the wrong shape, are not finite, or have no gradient."""
    check_shape(losses, batch)
    if not losses.isfinite().all():
        bad = int((~losses.isfinite()).nonzero()[0])
        raise InvalidInput(
            f"the loss of {side} example {first + bad} is {losses[bad].item()}: correct the example or leave it out"
        )
    if not losses.requires_grad:
        raise InvalidInput(
            "the loss does not depend on the model's parameters: compute it in torch, without no_grad or detach"
        )


def _check_finite(name: str, factors: Factors, side: str, first: int) -> None:
    for kind, values in (("gradient", factors.gradients), ("input", factors.inputs)):
        if not (values.sum().isfinite() or values.isfinite().all()):  # the sum is quicker, but may overflow
            bad = int((~values.flatten(1).isfinite().all(1)).nonzero()[0])
            raise InvalidInput(
                f"the {kind} of {side} example {first + bad} in layer {name!r} is not finite: check that example "
                "and the model's weights, or use a float64 model"
            )
