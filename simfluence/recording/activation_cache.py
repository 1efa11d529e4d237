"""Frozen layers below the first trained parameter: their outputs are computed once per example, and kept.

A trunk is the outermost modules whose outputs no training step can change. In a pass over kept examples they are
stood in for: their ``forward`` gives back what they gave before. It is found by a few passes over a copy of the model,
before and after its trained parameters are disturbed, and believed only where the losses come out the same.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from simfluence.task import Data, Task, forward

#: Bytes that kept outputs may take, unless it is said otherwise.
ACTIVATION_CACHE_BYTES = 2**30

#: What a module's output may hold beside tensors.
_PLAIN = (type(None), bool, int, float, str)


@dataclass(frozen=True)
class Output:
    """What a module gave back: the leaves of nested tuples, mappings and their like, and how they were nested."""

    leaves: Sequence[Any]
    nesting: Any

    @classmethod
    def of(cls, output: Any) -> Output:
        """A copy, so that what is done to the output in place later does not show."""
        leaves, nesting = pytree.tree_flatten(output)
        return cls([leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves], nesting)

    def build(self) -> Any:
        """The output anew."""
        kept = [isinstance(leaf, Tensor) and not _takes_no_memory(leaf) for leaf in self.leaves]
        leaves = [leaf.clone() if own else leaf for leaf, own in zip(self.leaves, kept, strict=True)]
        return pytree.tree_unflatten(leaves, self.nesting)


#: By module name.
Outputs = Mapping[str, Output]


@dataclass
class ActivationCache:
    """The modules that are stood in for, and what is kept of them. One for all runs of a recording.

    Args:
        needed: for each module by name, which of its output's leaves the losses depend on; the others are replaced by
            NaN that takes no memory.
        in_training: whether the modules compute the same in training as in evaluation mode (no dropout, no running
            statistics), and all training examples fit.
        memory: bytes that may still be kept.
        examples: outputs for single training examples.
        test_batches: outputs for batches of the test side; None where there was no room.
    """

    needed: Mapping[str, Sequence[bool]]
    in_training: bool
    memory: int
    examples: dict[int, Outputs] = field(default_factory=dict)
    test_batches: dict[int, Outputs | None] = field(default_factory=dict)

    def thinned(self, outputs: Outputs) -> Outputs:
        """``outputs`` with NaN where nothing depends on them."""
        return {name: _thinned(outputs[name], needed) for name, needed in self.needed.items()}

    def joined(self, rows: Sequence[int]) -> Outputs:
        """What the modules give for a batch of kept examples."""
        kept = [self.examples[row] for row in rows]
        return {name: _joined([each[name] for each in kept], self.needed[name]) for name in self.needed}


class CachedModel:
    """A trunk's place in one model.

    Args:
        trunk: found for a model of the same task and recipe.
        model: the one that is trained.
        task, train_data: what it is trained on.
    """

    def __init__(self, trunk: ActivationCache, model: nn.Module, task: Task, train_data: Data) -> None:
        self.trunk, self.model, self.task, self.train_data = trunk, model, task, train_data
        self.modules = {name: model.get_submodule(name) for name in trunk.needed}

    def missing(self, rows: Sequence[int]) -> list[int]:
        """Which training examples must be prepared before a pass over them."""
        return [row for row in dict.fromkeys(rows) if row not in self.trunk.examples] if self.trunk.in_training else []

    def prepare(self, rows: Sequence[int]) -> None:
        """Compute and keep training examples, each by itself; the model is in evaluation mode."""
        for row in rows:
            with torch.no_grad(), watched(self.modules) as found:
                forward(self.model, self.task.some(self.train_data, torch.tensor([row]))[0])
            self.trunk.examples[row] = self.trunk.thinned({name: calls[0] for name, calls in found.items()})

    def training(self, rows: Sequence[int]) -> contextlib.AbstractContextManager[None]:
        """A pass over training examples that are prepared."""
        if not self.trunk.in_training:
            return contextlib.nullcontext()
        return standing_in(self.modules, self.trunk.joined(rows))

    @contextlib.contextmanager
    def reading(self, number: int) -> Iterator[None]:
        """A pass over the test batch of that number: kept the first time, if there is room."""
        if number in self.trunk.test_batches:
            outputs = self.trunk.test_batches[number]
            with standing_in(self.modules, outputs) if outputs else contextlib.nullcontext():
                yield
            return
        with watched(self.modules) as found:
            yield
        outputs = self.trunk.thinned({name: calls[0] for name, calls in found.items()})
        size = _bytes(outputs)
        self.trunk.test_batches[number] = outputs if size <= self.trunk.memory else None
        self.trunk.memory -= size if size <= self.trunk.memory else 0


@contextlib.contextmanager
def standing_in(modules: Mapping[str, nn.Module], outputs: Outputs) -> Iterator[None]:
    """Let modules give back these outputs, whatever they are given."""
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
def watched(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, list[Output]]]:
    """What modules give back, call by call."""
    found: dict[str, list[Output]] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: found.setdefault(name, []).append(Output.of(output))

    handles = [module.register_forward_hook(keep(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def find_trunk(
    task: Task, model: nn.Module, data: Data, memory: int = ACTIVATION_CACHE_BYTES
) -> ActivationCache | None:
    """The trunk of a model, if it has frozen layers worth keeping.

    Args:
        task, model: the model is left as it is.
        data: the training side, where the model is.
        memory: bytes that may be kept; the test side comes first, and the training side only as a whole.
    """
    trained = [parameter.requires_grad for parameter in model.parameters()]
    if memory <= 0 or all(trained) or not any(trained) or len(data[1]) < 2:
        return None
    with torch.random.fork_rng(devices=[]):
        try:
            return _found(task, copy.deepcopy(model), data, memory)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError):
            return None  # a model that cannot be copied, or runs on no stand-ins; training says if it does not run


def _found(task: Task, model: nn.Module, data: Data, memory: int) -> ActivationCache | None:
    rows = _trial_rows(task, data)
    batch = task.some(data, torch.tensor(rows))
    before = _passed(model.eval(), batch)
    alone = [_passed(model, task.some(data, torch.tensor([row]))) for row in rows]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    training = _passed(model.train(), batch)
    after = _passed(model.eval(), batch)
    constant = {
        name: calls[0]
        for name, calls in before.items()
        if _is_constant(calls, after.get(name), training.get(name)) and _adds_up(calls[0], [e.get(name) for e in alone])
    }
    names = _outermost(model, constant)
    if not _is_work(model, names):
        return None
    examples = {row: {name: each[name][0] for name in names} for row, each in zip(rows, alone, strict=True)}
    same_in_training = all(_same(constant[name], training[name][0], rtol=1e-5, atol=1e-6) for name in names)
    for needed in (_needed(task, model, batch, {name: constant[name] for name in names}), None):
        trunk = ActivationCache(
            needed or {name: [True] * len(constant[name].leaves) for name in names}, same_in_training, memory
        )
        trunk.examples = {row: trunk.thinned(outputs) for row, outputs in examples.items()}
        if _losses_agree(task, model, batch, trunk, rows):
            return _fitted(trunk, task)
    return None


def _fitted(trunk: ActivationCache, task: Task) -> ActivationCache:
    """The trunk, for the training side too if that fits beside the test side."""
    longest = max(_bytes(outputs) for outputs in trunk.examples.values())
    fits = longest * (len(task.train) + len(task.test)) <= trunk.memory
    trunk.in_training &= fits
    trunk.memory -= longest * len(task.train) if trunk.in_training else 0
    trunk.examples = {}
    return trunk


def _trial_rows(task: Task, data: Data) -> list[int]:
    """The shortest and the longest example, and some others; distinct."""
    count = len(data[1])
    sizes = task.sizes(data)
    by_size = sorted(range(count), key=lambda row: sizes[row])
    return list(dict.fromkeys([by_size[0], by_size[-1], 0, count // 2, count - 1]))


def _passed(model: nn.Module, batch: Data) -> dict[str, list[Output]]:
    """What every module but the model itself gives back in a pass, with gradients."""
    with torch.enable_grad(), watched({name: m for name, m in model.named_modules() if name}) as found:
        forward(model, batch[0])
    return found


def _is_constant(calls: Sequence[Output], after: Sequence[Output] | None, training: Sequence[Output] | None) -> bool:
    """Whether a module is called once, and gives the same whatever is trained."""
    if after is None or training is None or not len(calls) == len(after) == len(training) == 1:
        return False
    leaves = [leaf for each in (calls, after, training) for leaf in each[0].leaves]
    if any(leaf.requires_grad if isinstance(leaf, Tensor) else not isinstance(leaf, _PLAIN) for leaf in leaves):
        return False
    return any(isinstance(leaf, Tensor) for leaf in leaves) and _same(calls[0], after[0], rtol=0, atol=0)


def _same(one: Output, two: Output, rtol: float, atol: float) -> bool:
    if one.nesting != two.nesting or len(one.leaves) != len(two.leaves):
        return False
    return all(_close(*pair, rtol, atol) for pair in zip(one.leaves, two.leaves, strict=True))


def _close(one: Any, two: Any, rtol: float, atol: float) -> bool:
    if not isinstance(one, Tensor) or not isinstance(two, Tensor):
        return type(one) is type(two) and one == two
    same_kind = one.shape == two.shape and one.dtype == two.dtype
    return same_kind and torch.allclose(one.double(), two.double(), rtol=rtol, atol=atol, equal_nan=True)


def _adds_up(together: Output, alone: Sequence[Sequence[Output] | None]) -> bool:
    """Whether a batch's output is its examples' own, one after the other, padded at the end of further axes."""
    if any(calls is None or len(calls) != 1 or calls[0].nesting != together.nesting for calls in alone):
        return False
    outputs = [calls[0] for calls in alone if calls]
    for number, leaf in enumerate(together.leaves):
        parts = [output.leaves[number] for output in outputs]
        if not isinstance(leaf, Tensor):
            if any(part != leaf for part in parts):
                return False
            continue
        if leaf.ndim == 0 or _joined_shape(parts) != leaf.shape:
            return False
        start = 0
        for part in parts:
            own = leaf[start : start + len(part)][tuple(slice(size) for size in part.shape)]
            if not _close(own, part, 1e-4, 1e-5):
                return False
            start += len(part)
    return True


def _outermost(module: nn.Module, constant: Outputs, prefix: str = "") -> list[str]:
    names = []
    for name, child in module.named_children():
        full = f"{prefix}{name}"
        names += [full] if full in constant else _outermost(child, constant, f"{full}.")
    return names


def _is_work(model: nn.Module, names: Sequence[str]) -> bool:
    """Whether these modules multiply matrices; looking up embeddings is no more work than looking up what is kept."""
    modules = [part for name in names for part in model.get_submodule(name).modules()]
    weights = [p for part in modules if not isinstance(part, nn.Embedding) for p in part.parameters(recurse=False)]
    return any(weight.ndim >= 2 for weight in weights)


def _needed(task: Task, model: nn.Module, batch: Data, outputs: Outputs) -> dict[str, list[bool]]:
    """Which leaves the losses depend on, by the gradients that reach them; whole numbers are taken to be needed."""
    leaves = {
        (name, number): leaf.detach().clone().requires_grad_()
        for name, output in outputs.items()
        for number, leaf in enumerate(output.leaves)
        if isinstance(leaf, Tensor) and leaf.is_floating_point()
    }
    given = {
        name: Output([leaves.get((name, n), leaf) for n, leaf in enumerate(output.leaves)], output.nesting)
        for name, output in outputs.items()
    }
    with torch.enable_grad(), standing_in({name: model.get_submodule(name) for name in outputs}, given):
        losses = task.batch_losses(model, batch)
    gradients = torch.autograd.grad(losses.sum(), list(leaves.values()), allow_unused=True)
    unused = {place for place, gradient in zip(leaves, gradients, strict=True) if gradient is None}
    return {name: [(name, n) not in unused for n in range(len(output.leaves))] for name, output in outputs.items()}


def _losses_agree(task: Task, model: nn.Module, batch: Data, trunk: ActivationCache, rows: Sequence[int]) -> bool:
    cached_model = CachedModel(trunk, model, task, batch)
    try:
        with torch.no_grad():
            plain = task.batch_losses(model, batch)
            with standing_in(cached_model.modules, trunk.joined(rows)):
                stood_in = task.batch_losses(model, batch)
    except RuntimeError:  # NaN without memory is written to, say
        return False
    return bool(torch.allclose(plain, stood_in, rtol=1e-4, atol=1e-5))


def _constant(output: Output) -> Any:
    return lambda *args, **kwargs: output.build()


def _thinned(output: Output, needed: Sequence[bool]) -> Output:
    leaves = [leaf if keep else _nan(leaf, leaf.shape) for leaf, keep in zip(output.leaves, needed, strict=True)]
    return Output(leaves, output.nesting)


def _nan(like: Tensor, shape: Sequence[int]) -> Tensor:
    """Of any shape, in the memory of one number."""
    return like.new_full((), torch.nan).expand(*shape)


def _joined(outputs: Sequence[Output], needed: Sequence[bool]) -> Output:
    leaves = []
    for number, keep in enumerate(needed):
        parts = [output.leaves[number] for output in outputs]
        if not isinstance(parts[0], Tensor):
            leaves.append(parts[0])
        else:
            leaves.append(_padded(parts) if keep else _nan(parts[0], _joined_shape(parts)))
    return Output(leaves, outputs[0].nesting)


def _padded(parts: Sequence[Tensor]) -> Tensor:
    """Parts one after the other along the first axis, each padded with zeros at the end of the others."""
    if len({part.shape[1:] for part in parts}) == 1:
        return torch.cat(list(parts))
    joined, start = parts[0].new_zeros(_joined_shape(parts)), 0
    for part in parts:
        joined[start : start + len(part)][tuple(slice(size) for size in part.shape)] = part
        start += len(part)
    return joined


def _joined_shape(parts: Sequence[Tensor]) -> torch.Size:
    if len({part.ndim for part in parts}) > 1:
        return torch.Size()
    sizes = [max(part.shape[axis] for part in parts) for axis in range(1, parts[0].ndim)]
    return torch.Size([sum(len(part) for part in parts), *sizes])


def _bytes(outputs: Outputs) -> int:
    leaves = [leaf for output in outputs.values() for leaf in output.leaves if isinstance(leaf, Tensor)]
    return sum(leaf.element_size() * (1 if _takes_no_memory(leaf) else leaf.numel()) for leaf in leaves)


def _takes_no_memory(leaf: Tensor) -> bool:
    return leaf.ndim > 0 and not any(leaf.stride())
