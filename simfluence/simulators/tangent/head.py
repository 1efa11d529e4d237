"""The head of a model: the linear layer that gives its outputs, which are bilinear in its weight and its inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simfluence.attribution.gradients.hooks import evaluating
from simfluence.task import forward, take, tensors

#: Number of examples on which a head is tried.
_TRIED = 8

__all__ = ["Head"]


@dataclass(frozen=True)
class Head:
    """The layer that gives a model's outputs.

    Args:
        name: name of the ``nn.Linear``; None if the outputs come from no trained linear layer. Then the outputs
            themselves are the features, and the head is the identity.
        bias: whether the layer has a bias.
        alone: run the model on one example at a time, because inside of it the rows of a batch are in another order.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> head = Head.of(model, torch.ones(5, 4))
    >>> features, weight = head.read(model, torch.ones(5, 4))
    >>> head.name, features.shape, weight.shape  # three features, and a 1 for the bias
    ('2', torch.Size([5, 4]), torch.Size([2, 4]))
    >>> torch.allclose(features @ weight.T, model(torch.ones(5, 4)))
    True
    """

    name: str | None
    bias: bool = False
    alone: bool = False

    @classmethod
    def of(cls, model: nn.Module, inputs: Any) -> Head:
        """Find the trained linear layer, called once, whose output is the model's own, whatever values it has.

        A few examples from all over the inputs are tried, in two orders: a model may sort its batch inside. If it does,
        the layer is sought for one example at a time.
        """
        count = len(tensors(inputs)[0])
        rows = torch.linspace(0, count - 1, min(_TRIED, count)).round().long()
        batches = {False: [rows, rows.flip(0)], True: list(rows.split(1))}
        uses = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
        for alone, parts in batches.items():
            for name, module in model.named_modules():
                if not isinstance(module, nn.Linear):
                    continue
                if not all(p.requires_grad and uses.count(id(p)) == 1 for p in module.parameters()):
                    continue
                if all(_is_last(model, module, take(inputs, part)) for part in parts):
                    return cls(name, module.bias is not None, alone)
        return cls(None)

    def layer(self, model: nn.Module) -> nn.Linear | None:
        """Return the head's module, or None."""
        module = None if self.name is None else model.get_submodule(self.name)
        return module if isinstance(module, nn.Linear) else None

    def read(self, model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
        """Return the head's input features, ``[examples, width]``, and its weight, ``[outputs, width]``.

        With a bias, the last column of the features is 1 and that of the weight is the bias.
        """
        layer = self.layer(model)
        if layer is None:
            outputs, _ = _outputs_of(model, inputs, layer)
            return outputs, torch.eye(outputs.shape[1], dtype=outputs.dtype)
        parts = _singles(inputs) if self.alone else [inputs]
        features = torch.cat([_outputs_of(model, part, layer)[1][0] for part in parts])
        features = torch.cat([features, torch.ones_like(features[:, :1])], 1) if self.bias else features
        return features, self.joined({name: parameter.detach() for name, parameter in model.named_parameters()})

    def joined(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """Join the head's weight and bias, looked up by name, into one matrix ``[outputs, width]``."""
        prefix = f"{self.name}." if self.name else ""
        weight = parameters[prefix + "weight"]
        return torch.cat([weight, parameters[prefix + "bias"][:, None]], 1) if self.bias else weight.clone()

    def n_tracked(self, weight: Tensor, further: int) -> int:
        """Return the number of tracked features: those that the outputs first depend on, and ``further`` ones."""
        outputs, width = weight.shape
        return outputs if self.name is None else min(width - self.bias, outputs + further)

    def basis(self, features: Tensor, weight: Tensor) -> Tensor:
        """Return orthonormal directions of the features, ``[width, width]``, the most important to the outputs first.

        The rows of the initial weight come first, then the principal directions of the features' remainder. The
        column of a bias stays the last.

        Args:
            features: features at a few steps, ``[times, examples, width]``.
            weight: the weight before training, ``[outputs, width]``.
        """
        if self.name is None:
            return torch.eye(features.shape[-1], dtype=features.dtype)
        width = features.shape[-1] - self.bias
        rows = features[..., :width].flatten(0, 1).double()
        read = torch.linalg.qr(weight[:, :width].T.double())[0]  # [width, outputs]
        remainder = rows - rows @ read @ read.T
        principal = torch.linalg.eigh(remainder.T @ remainder)[1].flip(1)
        basis = torch.eye(features.shape[-1], dtype=torch.float64)
        basis[:width, :width] = torch.linalg.qr(torch.cat([read, principal], 1))[0].T
        return basis.to(features.dtype)

    def body(self, model: nn.Module, directions: Tensor) -> nn.Module:
        """Freeze the head of ``model``; return the module of the features along ``directions``.

        Args:
            model: changed in place; the module that is returned runs it.
            directions: the first rows of ``basis``, ``[n_tracked, width]``.
        """
        return _Body(model, self.layer(model), directions[:, : directions.shape[1] - self.bias], self.alone)


class _Body(nn.Module):
    """The head's input features along some directions, or the outputs if there is no head."""

    directions: Tensor

    def __init__(self, model: nn.Module, head: nn.Linear | None, directions: Tensor, alone: bool) -> None:
        super().__init__()
        self.model = model
        self.alone = alone
        self.register_buffer("directions", directions)
        self._head = [] if head is None else [head.requires_grad_(False)]  # a list's modules are not registered

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        inputs = kwargs or args[0]
        parts = _singles(inputs) if self.alone else [inputs]
        return torch.cat([self._features(part) for part in parts]) @ self.directions.T

    def _features(self, inputs: Any) -> Tensor:
        """Return the head's input, ``[examples, width]``, or the outputs if there is no head."""
        read: list[Tensor] = []
        handles = [head.register_forward_pre_hook(lambda _, args: read.append(args[0])) for head in self._head]
        try:
            outputs = forward(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        return read[0] if self._head else outputs.reshape(len(outputs), -1)


def _singles(inputs: Any) -> list[Any]:
    """Return the examples, each as a batch of one."""
    first = tensors(inputs)[0]
    return [take(inputs, torch.tensor([row], device=first.device)) for row in range(len(first))]


def _is_last(model: nn.Module, layer: nn.Linear, inputs: Any) -> bool:
    """Decide whether the layer's output becomes the model's unchanged, and nothing trained comes after it.

    Random numbers take the place of the output: with its own values, a scale that is still 1 would not be noticed.
    """
    given: list[Tensor] = []

    def replaced(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        drawn = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output.detach())
        given.append(drawn)
        return drawn.clone()  # the model may change it in place

    handle = layer.register_forward_hook(replaced)
    try:
        with evaluating(model), torch.enable_grad():
            outputs = forward(model, inputs)
    finally:
        handle.remove()
    if len(given) != 1 or given[0].ndim != 2 or not isinstance(outputs, Tensor) or outputs.requires_grad:
        return False
    flat = outputs.reshape(len(outputs), -1)
    return flat.shape == given[0].shape and torch.equal(flat, given[0])


def _outputs_of(model: nn.Module, inputs: Any, layer: nn.Linear | None) -> tuple[Tensor, list[Tensor]]:
    """Return the outputs, ``[examples, outputs]``, in evaluation mode, and the input of each call of ``layer``."""
    read: list[Tensor] = []
    layers = [] if layer is None else [layer]
    handles = [
        module.register_forward_pre_hook(lambda _, args: read.append(args[0].detach().clone())) for module in layers
    ]
    try:
        with evaluating(model), torch.no_grad():
            outputs = forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs.reshape(len(outputs), -1).detach().clone(), read
