"""The head of a model: the linear layer that gives its outputs, bilinear in its weight and in what it reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from simfluence.attribution.gradients.hooks import evaluating
from simfluence.task import forward, take


@dataclass(frozen=True)
class Head:
    """Which layer is the head.

    Args:
        name: of the ``nn.Linear``; None where the outputs come from no trained linear layer. Then the outputs
            themselves are the features, and the head is the identity.
        bias: whether it has one.

    >>> model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> head = Head.of(model, torch.ones(5, 4))
    >>> features, weight = head.read(model, torch.ones(5, 4))
    >>> head.name, features.shape, weight.shape  # three features, and the 1 that the bias is multiplied with
    ('2', torch.Size([5, 4]), torch.Size([2, 4]))
    >>> torch.allclose(features @ weight.T, model(torch.ones(5, 4)))
    True
    """

    name: str | None
    bias: bool = False

    @classmethod
    def of(cls, model: nn.Module, inputs: Any) -> Head:
        """The trained linear layer, called once, whose output is the model's own on the first few examples."""
        few = take(inputs, torch.arange(2))
        uses = [id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False)]
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            if not all(p.requires_grad and uses.count(id(p)) == 1 for p in module.parameters()):
                continue
            outputs, calls = _outputs_of(model, few, module)
            if len(calls) == 1 and calls[0].ndim == 2 and len(calls[0]) == len(outputs):
                with torch.no_grad():
                    given = module(calls[0])
                if given.shape == outputs.shape and torch.equal(given, outputs):
                    return cls(name, module.bias is not None)
        return cls(None)

    def layer(self, model: nn.Module) -> nn.Linear | None:
        """The head itself."""
        found = None if self.name is None else model.get_submodule(self.name)
        return found if isinstance(found, nn.Linear) else None

    def read(self, model: nn.Module, inputs: Any) -> tuple[Tensor, Tensor]:
        """What the head reads of each example, ``[examples, width]``, and its weight, ``[outputs, width]``.

        The last column is a bias's.
        """
        layer = self.layer(model)
        outputs, calls = _outputs_of(model, inputs, layer)
        if layer is None:
            return outputs, torch.eye(outputs.shape[1], dtype=outputs.dtype)
        features = torch.cat([calls[0], torch.ones_like(calls[0][:, :1])], 1) if self.bias else calls[0]
        return features, self.joined({name: parameter.detach() for name, parameter in model.named_parameters()})

    def joined(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The head's weight and bias, of parameters by name, as one matrix ``[outputs, width]``."""
        prefix = f"{self.name}." if self.name else ""
        weight = parameters[prefix + "weight"]
        return torch.cat([weight, parameters[prefix + "bias"][:, None]], 1) if self.bias else weight.clone()

    def n_tracked(self, weight: Tensor, further: int) -> int:
        """How many features move: those that the outputs read at first, and ``further`` ones."""
        outputs, width = weight.shape
        return outputs if self.name is None else min(width - self.bias, outputs + further)

    def basis(self, features: Tensor, weight: Tensor) -> Tensor:
        """Orthonormal directions of the features, ``[width, width]``, by their importance to the outputs: those that
        the first weight reads, then what is left of the features by its size. A bias's column stays the last.

        Args:
            features: at a few times, ``[times, examples, width]``.
            weight: before training, ``[outputs, width]``.
        """
        if self.name is None:
            return torch.eye(features.shape[-1], dtype=features.dtype)
        width = features.shape[-1] - self.bias
        read = weight[:, :width].T.double()  # [width, outputs]
        rows = features[..., :width].flatten(0, 1).double()
        own = torch.linalg.qr(read)[0]
        left = rows - rows @ own @ own.T
        by_size = torch.linalg.eigh(left.T @ left)[1].flip(1)
        found = torch.linalg.qr(torch.cat([own, by_size], 1))[0].T
        return torch.block_diag(found, *[torch.ones(1, 1).double()] * self.bias).to(features.dtype)

    def body(self, model: nn.Module, directions: Tensor) -> nn.Module:
        """A module that gives the features along ``directions`` ``[some, width]``; the head of ``model`` is frozen."""
        return _Body(model, self.layer(model), directions[:, : directions.shape[1] - self.bias])


class _Body(nn.Module):
    """What the head reads, along some directions; the outputs, where there is no head."""

    directions: Tensor

    def __init__(self, model: nn.Module, head: nn.Linear | None, directions: Tensor) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("directions", directions)
        self._head = [] if head is None else [head.requires_grad_(False)]  # a list's modules are not registered

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        read: list[Tensor] = []
        handles = [head.register_forward_pre_hook(lambda _, given: read.append(given[0])) for head in self._head]
        try:
            outputs = self.model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        features: Tensor = read[0] if self._head else outputs.reshape(len(outputs), -1)
        return features @ self.directions.T


def _outputs_of(model: nn.Module, inputs: Any, layer: nn.Linear | None) -> tuple[Tensor, list[Tensor]]:
    """``[examples, outputs]`` in evaluation mode, and what ``layer`` reads meanwhile."""
    read: list[Tensor] = []
    layers = [] if layer is None else [layer]
    handles = [
        each.register_forward_pre_hook(lambda _, given: read.append(given[0].detach().clone())) for each in layers
    ]
    try:
        with evaluating(model), torch.no_grad():
            outputs = forward(model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs.reshape(len(outputs), -1).detach().clone(), read
