"""The layers of a model, and the rules that compute a weight's gradient from a module's inputs and output gradients.

Every layer's gradient is a matrix: for one example ``Σ_p s_p a_pᵀ``, ``[rows, columns]``, over the positions p at which
the layer was applied (tokens, pixels, repeated calls), with ``a`` the layer's input and ``s`` the loss's derivative by
its output. A bias is the last column, with 1 appended to ``a``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

#: ``(module, inputs, output gradients)`` → ``a [batch, positions, columns]``, ``s [batch, positions, rows]``.
Extract = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]

__all__ = ["Extract", "Factors", "Layer", "alone", "concatenated", "find_layers", "whole"]


@dataclass(frozen=True, eq=False)
class Factors:
    """The gradients of one layer for a batch of examples, as factors.

    Args:
        inputs: ``a``, with 1 appended if the layer has a bias.
        gradients: ``s``, the derivatives of each example's loss.
        valid: which positions are no padding; None if all of them are. Kronecker factors leave padding out;
            gradients include all positions.
        calls: how often the layer was applied; the positions of the calls are concatenated.

    >>> one = Factors(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]]))
    >>> one.matrices().tolist()
    [[[3.0, 6.0]]]
    """

    inputs: Float[Tensor, "batch positions columns"]
    gradients: Float[Tensor, "batch positions rows"]
    valid: Bool[Tensor, "batch positions"] | None = None
    calls: int = 1

    def matrices(self) -> Float[Tensor, "batch rows columns"]:
        """Return the gradient of each example: the sum over its positions."""
        return self.gradients.mT @ self.inputs

    def unpadded(self) -> tuple[Float[Tensor, "positions columns"], Float[Tensor, "positions rows"]]:
        """Return inputs and gradients at the positions that are no padding."""
        if self.valid is None:
            return self.inputs.flatten(0, 1), self.gradients.flatten(0, 1)
        return self.inputs[self.valid], self.gradients[self.valid]

    def part(self, rows: slice) -> Factors:
        """Return the factors of the examples in ``rows``."""
        valid = None if self.valid is None else self.valid[rows]
        return Factors(self.inputs[rows], self.gradients[rows], valid, self.calls)

    @property
    def positions(self) -> int:
        return self.inputs.shape[1]

    def __len__(self) -> int:
        return len(self.inputs)


def concatenated(parts: Sequence[Factors]) -> Factors:
    """Return the factors of several batches as one batch; the shorter ones are padded at the end of each call."""
    calls = {part.calls for part in parts}
    parts = parts if len(calls) == 1 else [replace(part, calls=1) for part in parts]
    longest = max(part.positions // part.calls for part in parts)
    parts = [_padded(part, longest) for part in parts]
    inputs = torch.cat([part.inputs for part in parts])
    gradients = torch.cat([part.gradients for part in parts])
    if all(part.valid is None for part in parts):
        return Factors(inputs, gradients, None, parts[0].calls)
    return Factors(inputs, gradients, torch.cat([_validity(part) for part in parts]), parts[0].calls)


def _validity(factors: Factors) -> Bool[Tensor, "batch positions"]:
    shape, device = factors.inputs.shape[:2], factors.inputs.device
    return torch.ones(shape, dtype=torch.bool, device=device) if factors.valid is None else factors.valid


def _padded(factors: Factors, longest: int) -> Factors:
    """Append positions whose inputs and gradients are zero to each call, up to ``longest``."""
    missing = longest - factors.positions // factors.calls
    if not missing:
        return factors

    def lengthened(values: Tensor) -> Tensor:  # [batch, calls · positions, …]
        by_call = values.unflatten(1, (factors.calls, -1))
        more = by_call.new_zeros(*by_call.shape[:2], missing, *by_call.shape[3:])
        return torch.cat([by_call, more], 2).flatten(1, 2)

    inputs, gradients = lengthened(factors.inputs), lengthened(factors.gradients)
    return Factors(inputs, gradients, lengthened(_validity(factors)), factors.calls)


def whole(matrices: Float[Tensor, "batch rows columns"]) -> Factors:
    """Return gradients that are formed as factors: one of the two is the identity.

    >>> whole(torch.tensor([[[1.0, 2.0, 3.0]]])).matrices().tolist()
    [[[1.0, 2.0, 3.0]]]
    """
    rows, columns = matrices.shape[1:]
    identity = torch.eye(min(rows, columns)).to(matrices).expand(len(matrices), -1, -1)
    return Factors(identity, matrices.mT) if columns <= rows else Factors(matrices, identity)


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight, with its bias if it has one, and the modules that apply it.

    Args:
        name: name of the first module with this weight, or of the parameter if it has no module's rule.
        rows, columns: shape of the gradient's matrix, including the bias's column.
        weight, bias: names of the parameters in the model.
        shape: shape of the weight.
        transposed: the weight is stored as ``[in, out]``.
        sources: the modules that apply the weight, with the rules for their factors; empty: use ``torch.func``.
        vector: the gradient is one column, already summed over positions.
    """

    name: str
    rows: int
    columns: int
    weight: str
    bias: str | None
    shape: torch.Size
    transposed: bool = False
    sources: tuple[tuple[nn.Module, Extract], ...] = ()
    vector: bool = False

    @property
    def size(self) -> int:
        """The number of parameters."""
        return self.rows * self.columns

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def unused(self, batch: int) -> Factors:
        """Return the factors where a batch does not call the layer: zeros, at a position that does not count."""
        like = next(iter(self.sources[0][0].parameters()))
        inputs, gradients = like.new_zeros(batch, 1, self.columns), like.new_zeros(batch, 1, self.rows)
        return Factors(inputs, gradients, torch.zeros(batch, 1, dtype=torch.bool, device=like.device))

    def to_parameters(self, matrices: Float[Tensor, "*n rows columns"]) -> dict[str, Tensor]:
        """Convert matrices of this layer to tensors by parameter name, each ``[*n, *shape]``."""
        weights = matrices if self.bias is None else matrices[..., :-1]
        weights = weights.mT if self.transposed else weights
        tensors = {self.weight: weights.reshape(*matrices.shape[:-2], *self.shape)}
        return tensors if self.bias is None else tensors | {self.bias: matrices[..., -1]}

    def from_parameters(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "*n rows columns"]:
        """Convert tensors by parameter name to matrices: the reverse of ``to_parameters``."""
        weights = tensors[self.weight]
        batch = weights.shape[: weights.ndim - len(self.shape)]
        flat = weights.reshape(*batch, *self.shape) if self.transposed else weights.reshape(*batch, self.rows, -1)
        flat = flat.mT if self.transposed else flat
        return flat if self.bias is None else torch.cat([flat, tensors[self.bias][..., None]], -1)


@dataclass(frozen=True)
class _Kind:
    """The rules for one kind of module: factors of its weight, and of its bias if that is a layer of its own."""

    weight: Extract
    bias: Extract | None = None
    joined: bool = False  # weight and bias make one matrix
    transposed: bool = False
    vector: bool = False
    local: str = "weight"  # the parameter's name in the module


def find_layers(model: nn.Module) -> list[Layer]:
    """Return the layers of the parameters that require a gradient, in the model's order.

    A parameter becomes a layer without sources if one of its modules has no rule.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = {module: name for name, module in model.named_modules()}
    owners: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names.values()}
    for module in modules:
        for local, parameter in _own_parameters(module):
            owners[names[id(parameter)]].append((module, local))
    layers: list[Layer] = []
    for name, parameter in model.named_parameters():
        if not (parameter.requires_grad and parameter.numel()) or any(name in layer.parameters for layer in layers):
            continue
        layers.append(_layer(name, parameter, owners, names, modules))
    return layers


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a module's parameters, including those in a ``ParameterDict``, which adapters use."""
    if isinstance(module, nn.ParameterDict):
        return
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    for local, child in module.named_children():
        if isinstance(child, nn.ParameterDict):
            yield from ((local, parameter) for parameter in child.values())


def alone(name: str, parameter: Tensor) -> Layer:
    """Return a parameter as a layer without sources."""
    return Layer(name, parameter.numel(), 1, name, None, parameter.shape, vector=True)


def _layer(
    name: str,
    parameter: Tensor,
    owners: Mapping[str, list[tuple[nn.Module, str]]],
    names: Mapping[int, str],
    modules: Mapping[nn.Module, str],
) -> Layer:
    """Return the layer of a parameter: with sources if all of its modules have the same kind of rule."""
    users = [module for module, _ in owners[name]]
    kinds = [kind for kind in map(_kind, users) if kind is not None]
    if len(kinds) < len(users) or len({(kind.transposed, kind.vector) for kind in kinds}) > 1:
        return alone(name, parameter)
    local_names = {local for _, local in owners[name]}
    biases = [kind.bias for kind in kinds if kind.bias is not None]
    if local_names == {"bias"} and len(biases) == len(kinds):
        return replace(alone(name, parameter), sources=tuple(zip(users, biases, strict=True)))
    if local_names != {kinds[0].local}:
        return alone(name, parameter)
    if kinds[0].vector:
        sources = tuple((module, kind.weight) for module, kind in zip(users, kinds, strict=True))
        return replace(alone(name, parameter), sources=sources)
    bias = _joined_bias(users, kinds, owners, names)
    columns, rows = parameter.shape if kinds[0].transposed else (parameter[0].numel(), len(parameter))
    rules = [partial(_with_one, kind.weight) if bias else kind.weight for kind in kinds]
    return Layer(
        modules[users[0]] or type(users[0]).__name__, rows, columns + (bias is not None), name, bias,
        parameter.shape, kinds[0].transposed, tuple(zip(users, rules, strict=True)),
    )  # fmt: skip


def _joined_bias(
    users: list[nn.Module],
    kinds: list[_Kind],
    owners: Mapping[str, list[tuple[nn.Module, str]]],
    names: Mapping[int, str],
) -> str | None:
    """Return the name of the bias that all modules with the weight share, if it has no other module."""
    biases = [getattr(module, "bias", None) for module in users]
    first = biases[0]
    same = isinstance(first, Tensor) and all(bias is first for bias in biases) and all(kind.joined for kind in kinds)
    if not same or first is None or not first.requires_grad:
        return None
    name = names[id(first)]
    return name if len(owners[name]) == len(users) else None


def _kind(module: nn.Module) -> _Kind | None:
    """Return the rules for a module, or None if there are none."""
    if isinstance(module, nn.Linear):
        return _Kind(_linear, _linear_bias, joined=True)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):  # of transformers: a linear layer, [in, out]
        return _Kind(_linear, _linear_bias, joined=True, transposed=True)
    if isinstance(module, nn.Conv1d | nn.Conv2d) and _plain(module):
        return _Kind(_convolution, _convolution_bias, joined=True)
    if isinstance(module, nn.Embedding) and module.max_norm is None and not module.scale_grad_by_freq:
        return _Kind(_embedding)
    if isinstance(module, nn.LayerNorm):
        return _Kind(_norm, _norm_bias, vector=True)
    if isinstance(getattr(module, "variance_epsilon", None), float):  # RMSNorm of transformers
        return _Kind(_root_mean_square, vector=True)
    scales = getattr(module, "ia3_l", None)  # of peft
    if isinstance(scales, nn.ParameterDict) and len(scales) == 1 and hasattr(module, "is_feedforward"):
        return _Kind(_scaled, vector=True, local="ia3_l")
    return None


def _plain(module: nn.Conv1d | nn.Conv2d) -> bool:
    """Decide whether ``unfold`` gives the convolution's patches."""
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def _with_one(extract: Extract, module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Append 1 to the inputs that ``extract`` returns, for a bias."""
    a, s = extract(module, inputs, gradients)
    return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1), s


def _linear(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    return _positions(inputs), _positions(gradients)


def _linear_bias(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    return _column(_positions(gradients).sum(1))


def _convolution(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    convolution = cast(nn.Conv1d | nn.Conv2d, module)
    sizes: list[Any] = [convolution.kernel_size, convolution.dilation, convolution.padding, convolution.stride]
    if isinstance(module, nn.Conv1d):  # an image of one row
        inputs = inputs.unsqueeze(2)
        sizes = [(across, *along) for across, along in zip((1, 1, 0, 1), sizes, strict=True)]
    patches = functional.unfold(inputs, *sizes)  # [batch, in · kernel, positions]
    return patches.mT, gradients.flatten(2).mT


def _convolution_bias(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    return _column(gradients.flatten(2).sum(2))


def _embedding(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Return the output gradients as ``a`` and one-hot words as ``s``: the weight ``[words, width]`` has word rows."""
    embedding = cast(nn.Embedding, module)
    words = inputs.reshape(len(inputs), -1)
    one_hot = gradients.new_zeros(*words.shape, embedding.num_embeddings).scatter_(2, words[..., None], 1.0)
    if embedding.padding_idx is not None:
        one_hot[..., embedding.padding_idx] = 0  # torch never trains this row
    return gradients.reshape(len(inputs), -1, embedding.embedding_dim), one_hot


def _norm(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    norm = cast(nn.LayerNorm, module)
    products = functional.layer_norm(inputs, norm.normalized_shape, eps=norm.eps) * gradients
    return _column(products.reshape(len(inputs), -1, math.prod(norm.normalized_shape)).sum(1))


def _norm_bias(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    shape = cast(nn.LayerNorm, module).normalized_shape
    return _column(gradients.reshape(len(inputs), -1, math.prod(shape)).sum(1))


def _root_mean_square(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    epsilon: Any = module.variance_epsilon
    normed = inputs * (inputs.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return _column(_positions(normed * gradients).sum(1))


def _scaled(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Return the factors of IA3's ``l``, which scales a layer's output, ``l ∘ W a``; if feed-forward, ``W (l ∘ a)``."""
    base: Any = module.base_layer
    if not module.is_feedforward:
        with torch.no_grad():
            return _column(_positions(base(inputs) * gradients).sum(1))
    input_gradients = gradients @ (base.weight if isinstance(base, nn.Linear) else base.weight.T)
    return _column(_positions(inputs * input_gradients.detach()).sum(1))


def _positions(values: Tensor) -> Tensor:
    """Reshape ``[batch, …, width]`` to ``[batch, positions, width]``."""
    return values.reshape(len(values), -1, values.shape[-1])


def _column(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients ``[batch, rows]`` of a vector as factors: one position whose input is 1."""
    return gradients.new_ones(len(gradients), 1, 1), gradients[:, None]
