"""Activation cache: the outputs of frozen layers below the first trained parameter, computed once per example.

The body of a model is its outermost modules whose outputs no training step can change. During a pass over cached
examples, their ``forward`` returns the cached outputs. The body is found by a few passes over a copy of the model,
before and after its trained parameters are perturbed. The cache is used only if the losses with it agree with those
without.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from simfluence.task import Data, Task, forward

__all__ = [
    "ACTIVATION_CACHE_BYTES",
    "ActivationCache",
    "CachedModel",
    "Output",
    "Outputs",
    "build_activation_cache",
    "fixed_outputs",
    "recorded_outputs",
]

#: Default size limit of an activation cache, in bytes.
ACTIVATION_CACHE_BYTES = 2**30

#: Types that a module's output may contain beside tensors.
_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Output:
    """A module's output: the leaves of nested tuples, mappings and similar containers, and their nesting."""

    leaves: Sequence[Any]
    nesting: Any

    @classmethod
    def of(cls, output: Any) -> Output:
        """Copy a module's output, so that later in-place changes do not affect it."""
        leaves, nesting = pytree.tree_flatten(output)
        return cls([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], nesting)

    def build(self) -> Any:
        """Return a fresh copy of the module's output."""
        leaves = [
            leaf.clone() if isinstance(leaf, Tensor) and not _takes_no_memory(leaf) else leaf for leaf in self.leaves
        ]
        return pytree.tree_unflatten(leaves, self.nesting)


#: Outputs by module name.
Outputs = Mapping[str, Output]


@dataclass
class ActivationCache:
    """The cached outputs of a model's body, shared by all runs of a recording.

    Args:
        needed: for each module of the body, which leaves of its output the losses depend on; the others are replaced
            by NaN that takes no memory.
        in_training: whether the body computes the same in training as in evaluation mode (no dropout, no running
            statistics), and all training examples fit into memory.
        memory: bytes that the cache may still take.
        examples: outputs for single training examples.
        test_batches: outputs for batches of test examples; None where they did not fit into memory.
    """

    needed: Mapping[str, Sequence[bool]]
    in_training: bool
    memory: int
    examples: dict[int, Outputs] = field(default_factory=dict)
    test_batches: dict[int, Outputs | None] = field(default_factory=dict)

    def drop_unneeded(self, outputs: Outputs) -> Outputs:
        """Replace the leaves of ``outputs`` that no loss depends on by NaN."""
        return {name: _drop_unneeded(outputs[name], needed) for name, needed in self.needed.items()}

    def batch_outputs(self, rows: Sequence[int]) -> Outputs:
        """Concatenate the outputs of cached training examples to those of a batch."""
        examples = [self.examples[row] for row in rows]
        return {
            name: _concatenated([outputs[name] for outputs in examples], needed) for name, needed in self.needed.items()
        }


class CachedModel:
    """A model whose body can take its outputs from an activation cache.

    Args:
        cache: activation cache of a model of the same task and recipe.
        model: the model that is trained.
        task: the task that the model is trained on.
        train_data: the task's training examples.
    """

    def __init__(self, cache: ActivationCache, model: nn.Module, task: Task, train_data: Data) -> None:
        self.cache, self.model, self.task, self.train_data = cache, model, task, train_data
        self.modules = {name: model.get_submodule(name) for name in cache.needed}

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Return the training examples that must be prepared before a training pass over ``rows``."""
        return [row for row in dict.fromkeys(rows) if row not in self.cache.examples] if self.cache.in_training else []

    def prepare(self, rows: Sequence[int]) -> None:
        """Compute and cache the outputs of training examples one by one; the model must be in evaluation mode."""
        for row in rows:
            with torch.no_grad(), recorded_outputs(self.modules) as calls:
                forward(self.model, self.task.some(self.train_data, torch.tensor([row]))[0])
            self.cache.examples[row] = self.cache.drop_unneeded(_first_calls(calls))

    def training(self, rows: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """Use the cache for a training pass over prepared examples."""
        if not self.cache.in_training:
            return contextlib.nullcontext()
        return fixed_outputs(self.modules, self.cache.batch_outputs(rows))

    @contextlib.contextmanager
    def reading(self, number: int) -> Iterator[None]:
        """Use the cache for a pass over test batch ``number``; the first pass fills it if there is enough memory."""
        if number in self.cache.test_batches:
            outputs = self.cache.test_batches[number]
            with fixed_outputs(self.modules, outputs) if outputs else contextlib.nullcontext():
                yield
            return
        with recorded_outputs(self.modules) as calls:
            yield
        outputs = self.cache.drop_unneeded(_first_calls(calls))
        size = _bytes(outputs)
        self.cache.test_batches[number] = outputs if size <= self.cache.memory else None
        self.cache.memory -= size if size <= self.cache.memory else 0


@contextlib.contextmanager
def fixed_outputs(modules: Mapping[str, nn.Module], outputs: Outputs) -> Iterator[None]:
    """Let modules return these outputs, whatever their inputs are."""
    before: dict[str, Any] = {name: vars(module).get("forward") for name, module in modules.items()}
    try:
        for name, module in modules.items():
            module.forward = _constant(outputs[name])
        yield
    finally:
        for name, module in modules.items():
            vars(module).pop("forward", None)
            if before[name] is not None:
                module.forward = before[name]


@contextlib.contextmanager
def recorded_outputs(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Output]]]:
    """Collect the outputs of modules, call by call."""
    calls: dict[str, list[Output]] = {}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda module, inputs, output: calls.setdefault(name, []).append(Output.of(output))

    handles = [module.register_forward_hook(hook(name)) for name, module in modules.items()]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def build_activation_cache(
    task: Task, model: nn.Module, data: Data, memory: int = ACTIVATION_CACHE_BYTES
) -> ActivationCache | None:
    """Build an empty activation cache, or return None if the model has no frozen layers worth caching.

    Args:
        task: the task that the model is trained on.
        model: the model; it is not changed.
        data: the training examples, on the model's device.
        memory: bytes that the cache may take. Test examples come first; training examples are cached only if all fit.
    """
    trained = [parameter.requires_grad for parameter in model.parameters()]
    if memory <= 0 or all(trained) or not any(trained) or len(data[1]) < 2:
        return None
    with torch.random.fork_rng(devices=[]):
        try:
            return _build(task, copy.deepcopy(model), data, memory)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            return None  # the model cannot be copied or cached; if it does not run at all, training reports why


def _build(task: Task, model: nn.Module, data: Data, memory: int) -> ActivationCache | None:
    rows = _trial_rows(task, data)
    batch = task.some(data, torch.tensor(rows))
    before = _module_outputs(model.eval(), batch)
    singles = [_module_outputs(model, task.some(data, torch.tensor([row]))) for row in rows]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    training = _module_outputs(model.train(), batch)
    after = _module_outputs(model.eval(), batch)
    constant = {
        name: calls[0]
        for name, calls in before.items()
        if _is_constant(calls, after.get(name), training.get(name))
        and _is_per_example(calls[0], [single.get(name) for single in singles])
    }
    names = _outermost(model, constant)
    if not _multiplies_matrices(model, names):
        return None
    examples = {row: {name: single[name][0] for name in names} for row, single in zip(rows, singles, strict=True)}
    same_in_training = all(_outputs_agree(constant[name], training[name][0], rtol=1e-5, atol=1e-6) for name in names)
    all_needed = {name: [True] * len(constant[name].leaves) for name in names}
    for needed in (_needed_leaves(task, model, batch, {name: constant[name] for name in names}), all_needed):
        cache = ActivationCache(needed, same_in_training, memory)
        cache.examples = {row: cache.drop_unneeded(outputs) for row, outputs in examples.items()}
        if _losses_agree(task, model, batch, cache, rows):
            return _limit_to_memory(cache, task)
    return None


def _limit_to_memory(cache: ActivationCache, task: Task) -> ActivationCache:
    """Empty the cache, and use it for training examples only if all of them fit beside the test examples."""
    largest = max(_bytes(outputs) for outputs in cache.examples.values())
    fits = largest * (len(task.train) + len(task.test)) <= cache.memory
    cache.in_training &= fits
    cache.memory -= largest * len(task.train) if cache.in_training else 0
    cache.examples = {}
    return cache


def _trial_rows(task: Task, data: Data) -> list[int]:
    """Choose up to five distinct examples, the shortest and the longest among them."""
    count = len(data[1])
    sizes = task.sizes(data)
    by_size = sorted(range(count), key=lambda row: sizes[row])
    return list(dict.fromkeys([by_size[0], by_size[-1], 0, count // 2, count - 1]))


def _module_outputs(model: nn.Module, batch: Data) -> dict[str, list[Output]]:
    """Run the model with gradients and collect the outputs of all its submodules, call by call."""
    with torch.enable_grad(), recorded_outputs({name: m for name, m in model.named_modules() if name}) as calls:
        forward(model, batch[0])
    return calls


def _first_calls(calls: Mapping[str, Sequence[Output]]) -> Outputs:
    return {name: outputs[0] for name, outputs in calls.items()}


def _is_constant(calls: Sequence[Output], after: Sequence[Output] | None, training: Sequence[Output] | None) -> bool:
    """Decide whether a module is called once and its output does not depend on trained parameters."""
    if after is None or training is None or not len(calls) == len(after) == len(training) == 1:
        return False
    leaves = [leaf for outputs in (calls, after, training) for leaf in outputs[0].leaves]
    if any(leaf.requires_grad if isinstance(leaf, Tensor) else not isinstance(leaf, _PLAIN) for leaf in leaves):
        return False
    return any(isinstance(leaf, Tensor) for leaf in leaves) and _outputs_agree(calls[0], after[0], rtol=0, atol=0)


def _outputs_agree(one: Output, two: Output, rtol: float, atol: float) -> bool:
    if one.nesting != two.nesting or len(one.leaves) != len(two.leaves):
        return False
    return all(_leaves_agree(*pair, rtol, atol) for pair in zip(one.leaves, two.leaves, strict=True))


def _leaves_agree(one: Any, two: Any, rtol: float, atol: float) -> bool:
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return bool(type(one) is type(two) and one == two)
    same_kind = one.shape == two.shape and one.dtype == two.dtype
    return same_kind and torch.allclose(one.double(), two.double(), rtol=rtol, atol=atol, equal_nan=True)


def _is_per_example(batch_output: Output, single_calls: Sequence[Sequence[Output] | None]) -> bool:
    """Decide whether a batch's output equals its examples' outputs, concatenated and padded at the end of other axes.

    Args:
        batch_output: the module's output for the batch.
        single_calls: the module's outputs for each example alone, call by call.
    """
    if any(calls is None or len(calls) != 1 or calls[0].nesting != batch_output.nesting for calls in single_calls):
        return False
    singles = [calls[0] for calls in single_calls if calls]
    for number, leaf in enumerate(batch_output.leaves):
        parts = [single.leaves[number] for single in singles]
        if not isinstance(leaf, Tensor):
            if any(part != leaf for part in parts):
                return False
            continue
        if leaf.ndim == 0 or _concatenated_shape(parts) != leaf.shape:
            return False
        start = 0
        for part in parts:
            unpadded = leaf[start : start + len(part)][tuple(slice(size) for size in part.shape)]
            if not _leaves_agree(unpadded, part, 1e-4, 1e-5):
                return False
            start += len(part)
    return True


def _outermost(module: nn.Module, constant: Outputs, prefix: str = "") -> list[str]:
    names = []
    for name, child in module.named_children():
        full_name = f"{prefix}{name}"
        names += [full_name] if full_name in constant else _outermost(child, constant, f"{full_name}.")
    return names


def _multiplies_matrices(model: nn.Module, names: Sequence[str]) -> bool:
    """Decide whether any of these modules multiplies matrices; an embedding lookup is as cheap as a cache lookup."""
    modules = [module for name in names for module in model.get_submodule(name).modules()]
    weights = [p for m in modules if not isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)]
    return any(weight.ndim >= 2 for weight in weights)


def _needed_leaves(task: Task, model: nn.Module, batch: Data, outputs: Outputs) -> dict[str, list[bool]]:
    """Find the leaves that the losses depend on: those with a gradient, and all that are not floating-point."""
    inputs = {
        (name, number): leaf.detach().clone().requires_grad_()
        for name, output in outputs.items()
        for number, leaf in enumerate(output.leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    tracked = {
        name: Output([inputs.get((name, n), leaf) for n, leaf in enumerate(output.leaves)], output.nesting)
        for name, output in outputs.items()
    }
    with torch.enable_grad(), fixed_outputs({name: model.get_submodule(name) for name in outputs}, tracked):
        losses = task.batch_losses(model, batch)
    gradients = torch.autograd.grad(losses.sum(), list(inputs.values()), allow_unused=True)
    unused = {key for key, gradient in zip(inputs, gradients, strict=True) if gradient is None}
    return {name: [(name, n) not in unused for n in range(len(output.leaves))] for name, output in outputs.items()}


def _losses_agree(task: Task, model: nn.Module, batch: Data, cache: ActivationCache, rows: Sequence[int]) -> bool:
    cached_model = CachedModel(cache, model, task, batch)
    try:
        with torch.no_grad():
            plain = task.batch_losses(model, batch)
            with fixed_outputs(cached_model.modules, cache.batch_outputs(rows)):
                cached = task.batch_losses(model, batch)
    except RuntimeError:  # for example, the model writes into NaN that takes no memory
        return False
    return torch.allclose(plain, cached, rtol=1e-4, atol=1e-5)


def _constant(output: Output) -> Callable[..., Any]:
    return lambda *args, **kwargs: output.build()


def _drop_unneeded(output: Output, needed: Sequence[bool]) -> Output:
    pairs = zip(output.leaves, needed, strict=True)
    return Output([leaf if is_needed else _nan(leaf, leaf.shape) for leaf, is_needed in pairs], output.nesting)


def _nan(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Return NaN of any shape in the memory of one number."""
    return like.new_full((), torch.nan).expand(*shape)


def _concatenated(outputs: Sequence[Output], needed: Sequence[bool]) -> Output:
    leaves = []
    for number, is_needed in enumerate(needed):
        parts = [output.leaves[number] for output in outputs]
        if not isinstance(parts[0], Tensor):
            leaves.append(parts[0])
        else:
            leaves.append(_padded(parts) if is_needed else _nan(parts[0], _concatenated_shape(parts)))
    return Output(leaves, outputs[0].nesting)


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Concatenate ``parts`` along the first axis, padding the end of the other axes with zeros."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    padded, start = parts[0].new_zeros(_concatenated_shape(parts)), 0
    for part in parts:
        padded[start : start + len(part)][tuple(slice(size) for size in part.shape)] = part
        start += len(part)
    return padded


def _concatenated_shape(parts: Sequence[Tensor]) -> torch.Size:
    if len({part.ndim for part in parts}) > 1:
        return torch.Size()
    sizes = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
    return torch.Size([sum(len(part) for part in parts), *sizes])


def _bytes(outputs: Outputs) -> int:
    leaves = [leaf for output in outputs.values() for leaf in output.leaves if isinstance(leaf, Tensor)]
    return sum(leaf.element_size() * (1 if _takes_no_memory(leaf) else leaf.numel()) for leaf in leaves)


def _takes_no_memory(leaf: Tensor) -> bool:
    return leaf.ndim > 0 and not any(leaf.stride())
