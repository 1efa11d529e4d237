"""Which layers a model has, and how a module's inputs and output gradients make the gradient of its weight.

Every layer's gradient is a matrix: for one example ``Σ_p s_p a_pᵀ``, ``[rows, columns]``, over the positions p at which
the layer was applied (tokens, pixels, repeated calls), with ``a`` what came in and ``s`` the loss's derivative by what
came out. A bias is the last column, with 1 appended to ``a``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

#: ``(module, inputs, output gradients)`` → ``a [batch, positions, columns]``, ``s [batch, positions, rows]``.
Extract = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True, eq=False)
class Factors:
    """The gradients of one layer for a batch of examples, as factors.

    Args:
        inputs: ``a``, with 1 appended where the layer has a bias.
        gradients: ``s``, the derivatives of each example's loss.
        valid: which positions are no padding; all of them where None. Padding has no part in Kronecker
            factors; gradients are what they are.
        calls: how often the layer was applied; the positions of the calls stand one after the other.

    >>> one = Factors(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[[3.0]]]))
    >>> one.matrices().tolist()
    [[[3.0, 6.0]]]
    """

    inputs: Float[Tensor, "batch positions columns"]
    gradients: Float[Tensor, "batch positions rows"]
    valid: Bool[Tensor, "batch positions"] | None = None
    calls: int = 1

    def matrices(self) -> Float[Tensor, "batch rows columns"]:
        """The gradient of each example: the sum over its positions."""
        return self.gradients.mT @ self.inputs

    def unpadded(self) -> tuple[Float[Tensor, "kept columns"], Float[Tensor, "kept rows"]]:
        """Inputs and gradients at the positions that are no padding."""
        if self.valid is None:
            return self.inputs.flatten(0, 1), self.gradients.flatten(0, 1)
        return self.inputs[self.valid], self.gradients[self.valid]

    def part(self, rows: slice) -> Factors:
        """The factors of some of the examples."""
        valid = None if self.valid is None else self.valid[rows]
        return Factors(self.inputs[rows], self.gradients[rows], valid, self.calls)

    @property
    def positions(self) -> int:
        return self.inputs.shape[1]

    def __len__(self) -> int:
        return len(self.inputs)


def concatenated(parts: Sequence[Factors]) -> Factors:
    """The factors of several batches as those of one."""
    inputs, gradients = (torch.cat([getattr(part, side) for part in parts]) for side in ("inputs", "gradients"))
    valid = [part.valid for part in parts if part.valid is not None]
    return Factors(inputs, gradients, torch.cat(valid) if valid else None, parts[0].calls)


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight, and its bias where it has one, with the modules that apply it.

    Args:
        name: of the first module that has the weight, or of the parameter where it stands alone.
        rows, columns: of the gradient's matrix, a bias's column included.
        weight, bias: names of the parameters in the model.
        shape: of the weight.
        transposed: the weight is kept as ``[in, out]``.
        sources: the modules that apply the weight, and how their calls give factors; none: by ``torch.func``.
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
        """How many parameters."""
        return self.rows * self.columns

    @property
    def parameters(self) -> tuple[str, ...]:
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def to_parameters(self, matrices: Float[Tensor, "*n rows columns"]) -> dict[str, Tensor]:
        """Matrices of this layer as tensors by parameter name, each ``[*n, *shape]``."""
        weights = matrices if self.bias is None else matrices[..., :-1]
        weights = weights.mT if self.transposed else weights
        found = {self.weight: weights.reshape(*matrices.shape[:-2], *self.shape)}
        return found if self.bias is None else found | {self.bias: matrices[..., -1]}

    def from_parameters(self, tensors: Mapping[str, Tensor]) -> Float[Tensor, "*n rows columns"]:
        """The reverse of ``to_parameters``."""
        weights = tensors[self.weight]
        batch = weights.shape[: weights.ndim - len(self.shape)]
        flat = weights.reshape(*batch, *self.shape) if self.transposed else weights.reshape(*batch, self.rows, -1)
        flat = flat.mT if self.transposed else flat
        return flat if self.bias is None else torch.cat([flat, tensors[self.bias][..., None]], -1)


@dataclass(frozen=True)
class _Kind:
    """How modules of a kind give the factors of their weight, and of their bias where it stands alone."""

    weight: Extract
    bias: Extract | None = None
    joined: bool = False  # weight and bias make one matrix
    transposed: bool = False
    vector: bool = False
    local: str = "weight"  # what the module calls it


def find_layers(model: nn.Module) -> list[Layer]:
    """The layers of the parameters that are trained, in the model's order.

    Parameters without a rule for all modules that have them are layers without sources.
    """
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    modules = {module: name for name, module in model.named_modules()}
    owners: dict[str, list[tuple[nn.Module, str]]] = {name: [] for name in names.values()}
    for module in modules:
        for local, parameter in _own_parameters(module):
            owners[names[id(parameter)]].append((module, local))
    layers: list[Layer] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad or any(name in layer.parameters for layer in layers):
            continue
        layers.append(_layer(name, parameter, owners, names, modules))
    return layers


def _own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """A module's parameters, and those that it keeps in a dictionary, as adapters do."""
    if isinstance(module, nn.ParameterDict):
        return
    yield from module.named_parameters(recurse=False, remove_duplicate=False)
    for local, child in module.named_children():
        if isinstance(child, nn.ParameterDict):
            yield from ((local, parameter) for parameter in child.values())


def alone(name: str, parameter: Tensor) -> Layer:
    """A parameter as a layer without sources."""
    return Layer(name, parameter.numel(), 1, name, None, parameter.shape, vector=True)


def _layer(
    name: str,
    parameter: Tensor,
    owners: Mapping[str, list[tuple[nn.Module, str]]],
    names: Mapping[int, str],
    modules: Mapping[nn.Module, str],
) -> Layer:
    owning = [module for module, _ in owners[name]]
    kinds = [_kind(module) for module in owning]
    known = [kind for kind in kinds if kind is not None]
    if len(known) < len(kinds) or len({(kind.transposed, kind.vector) for kind in known}) > 1:
        return alone(name, parameter)
    called = {local for _, local in owners[name]}
    biases = [kind.bias for kind in known if kind.bias is not None]
    if called == {"bias"} and len(biases) == len(known):
        return replace(alone(name, parameter), sources=tuple(zip(owning, biases, strict=True)))
    if called != {known[0].local}:
        return alone(name, parameter)
    if known[0].vector:
        sources = tuple((module, kind.weight) for module, kind in zip(owning, known, strict=True))
        return replace(alone(name, parameter), sources=sources)
    bias = _joined_bias(owning, known, owners, names)
    columns, rows = parameter.shape if known[0].transposed else (parameter[0].numel(), len(parameter))
    rules = [with_one(kind.weight) if bias else kind.weight for kind in known]
    return Layer(
        modules[owning[0]] or type(owning[0]).__name__, rows, columns + (bias is not None), name, bias,
        parameter.shape, known[0].transposed, tuple(zip(owning, rules, strict=True)),
    )  # fmt: skip


def _joined_bias(
    owning: list[nn.Module],
    kinds: list[_Kind],
    owners: Mapping[str, list[tuple[nn.Module, str]]],
    names: Mapping[int, str],
) -> str | None:
    """The bias that the same modules share with the weight."""
    biases = [getattr(module, "bias", None) for module in owning]
    first = biases[0]
    same = isinstance(first, Tensor) and all(bias is first for bias in biases) and all(kind.joined for kind in kinds)
    if not same or first is None or not first.requires_grad:
        return None
    name = names[id(first)]
    return name if len(owners[name]) == len(owning) else None


def _kind(module: nn.Module) -> _Kind | None:
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
    """Whether ``unfold`` gives its patches."""
    return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)


def with_one(extract: Extract) -> Extract:
    """With 1 appended to the inputs, for a bias."""

    def extended(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
        a, s = extract(module, inputs, gradients)
        return torch.cat([a, a.new_ones(*a.shape[:-1], 1)], -1), s

    return extended


def _linear(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    return _positions(inputs), _positions(gradients)


def _linear_bias(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    return _column(_positions(gradients).sum(1))


def _convolution(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(module, nn.Conv1d | nn.Conv2d)  # noqa: S101 (for the type checker)
    sizes: list[Any] = [module.kernel_size, module.dilation, module.padding, module.stride]
    if isinstance(module, nn.Conv1d):  # an image of one row
        inputs = inputs.unsqueeze(2)
        sizes = [(across, *along) for across, along in zip((1, 1, 0, 1), sizes, strict=True)]
    patches = functional.unfold(inputs, *sizes)  # [batch, in · kernel, positions]
    return patches.mT, gradients.flatten(2).mT


def _convolution_bias(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    return _column(gradients.flatten(2).sum(2))


def _embedding(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """The weight ``[words, dimensions]`` has a row per word: here the words are on the side of the rows."""
    assert isinstance(module, nn.Embedding)  # noqa: S101 (for the type checker)
    words = inputs.reshape(len(inputs), -1)
    hot = gradients.new_zeros(*words.shape, module.num_embeddings).scatter_(2, words[..., None], 1.0)
    if module.padding_idx is not None:
        hot[..., module.padding_idx] = 0  # which torch never trains
    return gradients.reshape(len(inputs), -1, module.embedding_dim), hot


def _norm(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(module, nn.LayerNorm)  # noqa: S101 (for the type checker)
    products = functional.layer_norm(inputs, module.normalized_shape, eps=module.eps) * gradients
    return _column(products.reshape(len(inputs), -1, math.prod(module.normalized_shape)).sum(1))


def _norm_bias(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    assert isinstance(module, nn.LayerNorm)  # noqa: S101 (for the type checker)
    return _column(gradients.reshape(len(inputs), -1, math.prod(module.normalized_shape)).sum(1))


def _root_mean_square(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    epsilon: Any = module.variance_epsilon
    normed = inputs * (inputs.square().mean(-1, keepdim=True) + epsilon).rsqrt()
    return _column(_positions(normed * gradients).sum(1))


def _scaled(module: nn.Module, inputs: Tensor, gradients: Tensor) -> tuple[Tensor, Tensor]:
    """IA3 multiplies what a linear layer gives, ``l ∘ W a``, or, feed-forward, what comes in, ``W (l ∘ a)``."""
    base: Any = module.base_layer
    if not module.is_feedforward:
        with torch.no_grad():
            return _column(_positions(base(inputs) * gradients).sum(1))
    back = gradients @ (base.weight if isinstance(base, nn.Linear) else base.weight.T)
    return _column(_positions(inputs * back.detach()).sum(1))


def _positions(values: Tensor) -> Tensor:
    """``[batch, …, width]`` → ``[batch, positions, width]``."""
    return values.reshape(len(values), -1, values.shape[-1])


def _column(gradients: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``[batch, rows]`` of a vector as factors: one position whose input is 1."""
    return gradients.new_ones(len(gradients), 1, 1), gradients[:, None]
