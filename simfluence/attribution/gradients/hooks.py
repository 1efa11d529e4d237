"""Per-example gradients of a model's loss, one batch at a time, as factors of each layer.

Hooks read every layer's input and the loss's derivative by its output from one forward and one backward pass over a
batch: ``Factors``. The gradients themselves, examples × parameters, are formed only where no rule gives them.

Every batch is checked: its gradients, summed with random weights, against autograd's. A layer whose rule is found wrong
is computed one example at a time from then on.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from simfluence.attribution.gradients.checking import Sums, agrees, check_same_loss, random_weights
from simfluence.attribution.gradients.labels import Relabel
from simfluence.attribution.gradients.layers import Factors, Layer, concatenated, whole
from simfluence.errors import InvalidInput, PlainGradientsWarning
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
    "Pass",
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
class Pass:
    """One forward and backward pass over a batch.

    Args:
        inputs, targets: the batch; the targets are the labels used.
        losses: ``[batch]``.
        calls: the layers' module calls, with the loss's derivatives by their outputs.
        sums: autograd's gradients, summed over the batch with weights.
    """

    inputs: Any
    targets: Tensor
    losses: Float[Tensor, " batch"]
    calls: Calls
    sums: Sums

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True, eq=False)
class Gradients:
    """Per-example gradients of ``loss`` by the parameters of a model's layers, built by ``per_example_gradients``.

    Args:
        model: used in evaluation mode; its own mode is restored after each pass.
        loss: ``loss(outputs, targets)`` → ``[batch]``.
        layers: layers by name, in the model's order.
        mask: which positions of the inputs are no padding.
        plain: compute the gradients of layers without hooks one example at a time, not by ``torch.func``.
        alone: names of the layers whose rule is used for one example at a time, because it is wrong for batches; it
            grows as batches are checked.
        formed: names of the layers whose gradients are formed by autograd, likewise.
    """

    model: nn.Module
    loss: Loss
    layers: Mapping[str, Layer]
    mask: Mask = attention_mask
    plain: bool = False
    alone: set[str] = field(default_factory=set)
    formed: set[str] = field(default_factory=set)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of the layers, by name."""
        of_model = dict(self.model.named_parameters())
        return {name: of_model[name] for layer in self.layers.values() for name in layer.parameters}

    @property
    def like(self) -> Tensor:
        """A tensor with the model's device and dtype."""
        return next(iter(self.parameters.values()))

    @property
    def methods(self) -> tuple[frozenset[str], frozenset[str]]:
        """The names of the layers in ``alone`` and in ``formed`` at present."""
        return frozenset(self.alone), frozenset(self.formed)

    @property
    def hooked(self) -> list[str]:
        """The names of the layers whose modules have a rule."""
        return [name for name, layer in self.layers.items() if layer.sources]

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

        Warns:
            PlainGradientsWarning: a layer's rule is wrong for a batch; a slower method computes it from then on.
        """
        for number, start in enumerate(range(first, len(data[1]), batch_size)):
            rows = slice(start, min(start + batch_size, len(data[1])))
            # one example alone in batches 0, 1, 2, 4, 8, …: rarer and rarer, as it takes a pass of its own
            alone = number % (rows.stop - start) if number & (number - 1) == 0 else None
            yield rows, self.factors(rows_of(data, rows), first=start, relabel=relabel, side=side, alone=alone)

    def factors(
        self,
        batch: Data,
        *,
        first: int = 0,
        relabel: Relabel | None = None,
        side: str = "training",
        alone: int | None = None,
    ) -> dict[str, Factors]:
        """Return the factors of all layers for one batch.

        Args:
            batch: ``(inputs, targets)``.
            first: index of the batch's first example in its data.
            relabel, side: as in ``batches``.
            alone: position in the batch of an example whose gradients are also compared with those of it alone.

        Raises:
            InvalidInput: as in ``batches``.
        """
        inputs, targets = self.placed(batch)
        done = self.passed(inputs, targets, first=first, relabel=relabel, side=side)
        trusted = [name for name in self.hooked if name not in self.alone | self.formed]
        factors = self.by_rule(done, trusted)
        if alone is not None and len(done) > 1:
            factors = self.same_alone(done, factors, alone, first, side)
        self._distrust([name for name in trusted if name not in factors], side, first, len(done))
        factors |= self.one_at_a_time(done, [name for name in self.hooked if name in self.alone])
        self.formed.update(name for name in self.alone if name not in factors)
        self.alone.difference_update(self.formed)
        factors |= self._formed(done)
        for name, layer_factors in factors.items():
            _check_finite(name, layer_factors, side, first)
        return {name: factors[name] for name in self.layers}

    def passed(
        self,
        inputs: Any,
        targets: Tensor,
        *,
        first: int = 0,
        relabel: Relabel | None = None,
        side: str = "training",
        weights: Tensor | None = None,
    ) -> Pass:
        """Run one forward and backward pass over a batch that is ``placed``.

        Args:
            weights: weights of the examples in the sums of autograd's gradients, ``[batch]``; random by default.

        Raises:
            InvalidInput: as in ``batches``.
        """
        hooked = {module for layer in self.layers.values() for module, _ in layer.sources}
        with evaluating(self.model), recording(hooked) as recorded:
            with explained(side, first, len(targets)):
                outputs = forward(self.model, _copied(inputs))
                if relabel is not None:
                    targets = relabel(outputs, targets, range(first, first + len(targets)))
                losses = self.loss(outputs, targets)
            calls = list(recorded)  # activation checkpointing calls the modules again in the backward pass
            check_losses(losses, len(targets), side, first)
            check_not_hidden(losses)
            with explained(side, first, len(targets), "the derivative of the loss"):
                derived = _derived(losses, calls)
                sums = self._summed(losses, weights)
        return Pass(inputs, targets, losses.detach(), derived, sums)

    def _summed(self, losses: Tensor, weights: Tensor | None) -> Sums:
        """Return autograd's gradients of the weighted sum of the losses."""
        weights = random_weights(losses) if weights is None else weights.to(losses)
        parameters = self.parameters
        values = torch.autograd.grad(
            (weights * losses).sum(), list(parameters.values()), allow_unused=True, materialize_grads=True
        )
        dense = [value.to_dense() if value.is_sparse else value for value in values]
        return Sums(weights.detach(), dict(zip(parameters, dense, strict=True)))

    def by_rule(self, done: Pass, names: Sequence[str]) -> dict[str, Factors]:
        """Return the factors, by their rules, of those of the layers ``names`` that agree with autograd."""
        masks = partial(masks_of, self.mask, done.inputs)
        factors: dict[str, Factors] = {}
        for name in names:
            layer = self.layers[name]
            try:
                found = gathered(layer, done.calls, masks, len(done))
            except (InvalidInput, RuntimeError, ValueError, IndexError, TypeError):
                continue  # its rows do not count examples, or it is called in a way that the rule does not know
            if agrees(layer, found, done.sums):
                factors[name] = found
        return factors

    def same_alone(
        self, done: Pass, factors: Mapping[str, Factors], row: int, first: int = 0, side: str = "training"
    ) -> dict[str, Factors]:
        """Return those of ``factors`` whose gradient of one example is that of the example alone.

        Raises:
            InvalidInput: the example has another loss alone than in its batch.
        """
        inputs, target = self.single(done, row)
        one = self.passed(inputs, target, first=first + row, side=side, weights=torch.ones(1))
        check_same_loss(float(done.losses[row]), float(one.losses[0]), done.losses.dtype)
        rows = slice(row, row + 1)
        return {
            name: layer_factors
            for name, layer_factors in factors.items()
            if agrees(self.layers[name], layer_factors.part(rows), one.sums)
        }

    def one_at_a_time(self, done: Pass, names: Sequence[str]) -> dict[str, Factors]:
        """Return the factors, by rules for one example at a time, of the layers for which these agree with autograd."""
        parts: dict[str, list[Factors]] = {name: [] for name in names}
        for row in range(len(done) if names else 0):
            inputs, target = self.single(done, row)
            found = self.by_rule(self.passed(inputs, target), list(parts))
            parts = {name: [*parts[name], found[name]] for name in found}
        return {name: concatenated(column) for name, column in parts.items()}

    def losses(self, batch: Data, side: str = "training", first: int = 0) -> Float[Tensor, " batch"]:
        """Return the loss of each example, without gradients."""
        inputs, targets = self.placed(batch)
        with evaluating(self.model), torch.no_grad(), explained(side, first, len(targets)):
            losses = self.loss(forward(self.model, _copied(inputs)), targets)
        check_shape(losses, len(targets))
        return losses

    def placed(self, batch: Data) -> Data:
        """Move ``batch`` to the model's device and dtype."""
        placed: Data = cast(batch, self.like.device, self.like.dtype)
        return placed

    def single(self, done: Pass, row: int) -> Data:
        """Return one example of a batch."""
        one: Data = take((done.inputs, done.targets), torch.tensor([row], device=done.targets.device))
        return one

    def _distrust(self, names: Sequence[str], side: str, first: int, count: int) -> None:
        """Compute layers one example at a time from now on, and warn."""
        if not names:
            return
        self.alone.update(names)
        warnings.warn(
            f"the rule for the gradients of {', '.join(names)} is wrong for {side} examples {first} to "
            f"{first + count - 1}: from here on they are computed one example at a time, which is slow. To leave them "
            "out, pass layers=[…]",
            PlainGradientsWarning,
            stacklevel=3,
        )

    def _formed(self, done: Pass) -> dict[str, Factors]:
        """Return the gradients of the layers without a usable rule, as factors of whole matrices."""
        names = [name for name, layer in self.layers.items() if name in self.formed or not layer.sources]
        fast = [] if self.plain else [name for name in names if name not in self.formed]
        factors = self._mapped(done, fast)
        slow = [name for name in names if name not in factors]
        if slow:
            values = one_by_one(self, self._parameters_of(slow), done.inputs, done.targets)
            factors |= {name: whole(self.layers[name].from_parameters(values)) for name in slow}
        return factors

    def _mapped(self, done: Pass, names: Sequence[str]) -> dict[str, Factors]:
        """Return the gradients by ``torch.func`` of those layers for which they agree with autograd."""
        if not names:
            return {}
        try:
            values = mapped(self, self._parameters_of(names), done.inputs, done.targets)
        except (RuntimeError, TypeError, ValueError, NotImplementedError):
            return {}
        found = {name: whole(self.layers[name].from_parameters(values)) for name in names}
        return {n: f for n, f in found.items() if agrees(self.layers[n], f, done.sums)}

    def _parameters_of(self, names: Sequence[str]) -> list[str]:
        return [parameter for name in names for parameter in self.layers[name].parameters]


def one_by_one(gradients: Gradients, names: list[str], inputs: Any, targets: Tensor) -> dict[str, Tensor]:
    """Return the gradients ``[batch, *shape]`` by the parameters ``names``, by autograd, one example at a time."""
    parameters = [gradients.parameters[name] for name in names]
    rows = []
    with evaluating(gradients.model), torch.enable_grad():
        for index in range(len(targets)):
            one, target = take((inputs, targets), torch.tensor([index], device=targets.device))
            loss = gradients.loss(forward(gradients.model, one), target).sum()
            values = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
            rows.append([value.to_dense() if value.is_sparse else value for value in values])
    return {name: torch.stack(column) for name, column in zip(names, zip(*rows, strict=True), strict=True)}


def mapped(gradients: Gradients, names: list[str], inputs: Any, targets: Tensor) -> dict[str, Tensor]:
    """Return the same gradients as ``one_by_one``, by ``torch.func``, all examples at once."""
    parameters = {name: gradients.parameters[name].detach() for name in names}
    per_example = torch.func.vmap(torch.func.grad(partial(_loss_of_one, gradients)), in_dims=(None, 0, 0))
    with evaluating(gradients.model), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")  # the slow path has its own warning
        values: dict[str, Tensor] = per_example(parameters, _copied(inputs), targets)
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
        WrongBatch: the first axis of a call does not count examples.
    """
    parts = [
        _by_example(layer, extract(module, inputs, gradient), batch)
        for owner, extract in layer.sources
        for module, inputs, gradient in calls
        if module is owner
    ]
    if not parts:
        return layer.unused(batch)
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


def _copied(inputs: Any) -> Any:
    """Copy inputs, as a model may change its inputs in place."""
    return convert(torch.clone, inputs)


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


def _record(calls: Calls, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
    """Append a module call to ``calls``: a forward hook, once ``calls`` is bound."""
    inputs = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
    if inputs is None or not isinstance(output, Tensor):
        return output  # no rule is made for such a call; the check against autograd notices what it misses
    calls.append((module, inputs.detach(), output))
    return output.clone()  # the model may change it in place, as ReLU(inplace=True) does


def _derived(losses: Tensor, calls: Calls) -> Calls:
    """Replace the outputs in ``calls`` by the loss's derivatives: zeros for outputs that the loss does not use.

    An example's loss depends on its own outputs only, so the derivative of the summed loss has every example's own.
    """
    outputs = [output for _, _, output in calls if output.requires_grad]
    gradients = iter(
        torch.autograd.grad(losses.sum(), outputs, retain_graph=True, allow_unused=True) if outputs else ()
    )
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
def explained(side: str, first: int, count: int, what: str = "the model or its loss") -> Iterator[None]:
    """Name the examples on which the model or the loss fails.

    Raises:
        InvalidInput: instead of torch's own error.
    """
    try:
        yield
    except InvalidInput:
        raise
    except (RuntimeError, TypeError, IndexError, ValueError, AttributeError) as error:
        raise InvalidInput(
            f"{what} fails on {side} examples {first} to {first + count - 1}: {error}. Check the shapes, that inputs "
            "have the type that the model takes (tensors of whole numbers are not converted), and that the labels are "
            "in the model's range"
        ) from error


def check_shape(losses: Any, batch: int) -> None:
    """Refuse losses that are not one number per example."""
    shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
    if shape != (batch,):
        raise InvalidInput(
            f"the loss has shape {shape} for a batch of {batch}: return one loss per example, [batch] "
            "(in torch: reduction='none', then a sum or mean over any further axes)"
        )


def check_losses(losses: Any, batch: int, side: str, first: int) -> None:
    """Refuse losses that have the wrong shape, are not finite, or have no gradient."""
    check_shape(losses, batch)
    check_finite(losses, side, first)
    if not losses.requires_grad:
        raise InvalidInput(
            "the loss does not depend on the model's parameters: compute it in torch, without no_grad or detach"
        )


def check_not_hidden(losses: Tensor) -> None:
    """Refuse reentrant activation checkpointing: ``autograd.grad`` gives zeros there, without an error."""
    seen: set[Any] = set()
    left: list[Any] = [losses.grad_fn]
    while left:
        node = left.pop()
        if node is None or node in seen:
            continue
        if "CheckpointFunction" in node.name():
            raise InvalidInput(
                "the model uses activation checkpointing of the reentrant kind, which hides the parameters inside from "
                "autograd.grad: call torch.utils.checkpoint with use_reentrant=False (in transformers: "
                "gradient_checkpointing_kwargs={'use_reentrant': False}), or turn checkpointing off"
            )
        seen.add(node)
        left.extend(function for function, _ in node.next_functions)


def check_finite(losses: Tensor, side: str, first: int) -> None:
    """Refuse losses that are not finite, by their example."""
    if not losses.isfinite().all():
        bad = int((~losses.isfinite()).nonzero()[0])
        raise InvalidInput(
            f"the loss of {side} example {first + bad} is {losses[bad].item()}: correct the example or leave it out"
        )


def _check_finite(name: str, factors: Factors, side: str, first: int) -> None:
    for kind, values in (("gradient", factors.gradients), ("input", factors.inputs)):
        if not (values.sum().isfinite() or values.isfinite().all()):  # the sum is quicker, but may overflow
            bad = int((~values.flatten(1).isfinite().all(1)).nonzero()[0])
            raise InvalidInput(
                f"the {kind} of {side} example {first + bad} in layer {name!r} is not finite: check that example "
                "and the model's weights, or use a float64 model"
            )
