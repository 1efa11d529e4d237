"""What is trained: a model factory, training and test examples, and a per-example loss."""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from simfluence._internal.html import card, picture
from simfluence.errors import InvalidInput, SimfluenceError
from simfluence.examples import Examples

#: Model inputs: a tensor, or a mapping or sequence of tensors; the first axis of each counts examples.
Inputs = Any
Data = tuple[Inputs, Tensor]

#: Test examples per forward pass: bounds memory, does not change the losses.
EVALUATION_BATCH = 1024

#: Inputs of at most so many numbers are their examples' features, unless a task gives others.
_MOST_FEATURES = 4096

#: Values of a column that a notebook's summary counts.
_MOST_VALUES = 20


@dataclass(frozen=True)
class TaskInfo:
    """What a store remembers of its task: enough to refuse another one, and to rebuild a ready-made one."""

    name: str
    arguments: Mapping[str, Any]
    fingerprint: str
    n_train: int
    n_test: int


@dataclass(frozen=True, eq=False)
class ExternalTask:
    """A task that is trained elsewhere, as a store knows it: its name, and the examples of its two sides."""

    name: str
    train: Examples
    test: Examples
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over name and ids: neither data nor model is known."""
        described = {"outline": self.name, "ids": [self.train.ids, self.test.ids]}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    @property
    def info(self) -> TaskInfo:
        return TaskInfo(self.name, self.arguments, self.fingerprint, len(self.train), len(self.test))


@dataclass(frozen=True, eq=False)
class Task:
    """A model factory, training examples, test examples, and a per-example loss.

    Args:
        name: of the task, for people and files.
        model: called without arguments after torch was seeded by the recipe, returns a fresh module; or a
            module, whose present weights every run starts from.
        train_data, test_data: ``(inputs, targets)``. Inputs are a tensor, or a mapping or sequence of tensors.
            A mapping is passed to the model as keyword arguments, anything else as one argument.
        loss: ``loss(outputs, targets)`` → losses ``[batch]``, not reduced.
        train, test: ids and metadata of the two sides. Without features of their own they get the inputs, flattened,
            where those are one tensor of numbers; without targets, the task's.
        arguments: what rebuilds a ready-made task from its name.
        measures: further numbers to record of each test example, by name: ``measure(outputs, targets)`` → ``[batch]``.
        l2: the objective's own penalty: training minimises the batch's mean loss + ``l2/2 · ‖θ‖²``. Recorded losses
            are without it.
        trim: ``trim(data)`` → the same examples without what is padding in all of them, at the end of any axis but
            the first, such as ``tasks.padding.trimmed``; losses must not depend on it. Saves time, nothing else.

    Raises:
        InvalidInput: the number of examples, inputs and targets differ on a side.

    ``tasks.from_arrays`` makes one of arrays with less to write.

    >>> X, y = torch.eye(3), torch.tensor([0, 1, 0])
    >>> loss = nn.CrossEntropyLoss(reduction="none")
    >>> sides = Examples(["a", "b", "c"]), Examples(["d"])
    >>> Task("mine", lambda: nn.Linear(3, 2), (X, y), (X[:1], y[:1]), loss, *sides)
    Task('mine', train=3, test=1)
    """

    name: str
    model: nn.Module | Callable[[], nn.Module]
    train_data: Data
    test_data: Data
    loss: Callable[[Any, Tensor], Tensor]
    train: Examples
    test: Examples
    arguments: Mapping[str, Any] = field(default_factory=dict)
    measures: Mapping[str, Callable[[Any, Tensor], Tensor]] = field(default_factory=dict)
    l2: float = 0.0
    trim: Callable[[Data], Data] | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.l2) and self.l2 >= 0):
            raise InvalidInput(f"l2 must be a number from 0 up, got {self.l2!r}")
        if "loss" in self.measures:
            raise InvalidInput("'loss' is recorded always: give the measure another name")
        for side, examples, data in (("train", self.train, self.train_data), ("test", self.test, self.test_data)):
            counts = {len(examples)} | {len(tensor) for tensor in tensors(data)}
            if len(counts) > 1 or 0 in counts:
                raise InvalidInput(f"{side} examples, inputs and targets must be equally many and some: {counts}")
            object.__setattr__(self, side, _described(examples, data))  # frozen

    def build_model(self, seed: int) -> nn.Module:
        """A fresh model with the initial weights that ``seed`` gives. Leaves torch's global seed as it was."""
        if isinstance(self.model, nn.Module):
            return copy.deepcopy(self.model)
        with torch.random.fork_rng(devices=[]):
            set_seed(seed)
            model = self.model()
        if not isinstance(model, nn.Module):
            raise InvalidInput(f"task {self.name!r}: model() returned {type(model).__name__}, not a torch module")
        return copy.deepcopy(model)  # a factory may return the same module each time

    def read(self, outputs: Any, targets: Tensor, measures: Iterable[str] = ()) -> dict[str, Tensor]:
        """The loss and the named measures of each example, each ``[batch]``.

        Raises:
            InvalidInput: one of them is not one number per example.
        """
        readings = {"loss": self.loss(outputs, targets)}
        readings |= {name: self.measures[name](outputs, targets) for name in measures}
        for name, values in readings.items():
            if values.shape != targets.shape[:1]:
                raise InvalidInput(
                    f"{name} of task {self.name!r} has shape {tuple(values.shape)} for {len(targets)} examples: "
                    "give one loss per example, [batch] (in torch: reduction='none', and a mean over further axes)"
                )
        return readings

    def some(self, data: Data, rows: Tensor) -> Data:
        """The examples ``rows`` of ``data``, without the padding that they have in common."""
        chosen: Data = take(data, rows)
        return self.trim(chosen) if self.trim else chosen

    def sizes(self, data: Data) -> list[int]:
        """How many numbers the longest tensor of each example has without its padding."""
        alone = (self.some(data, torch.tensor([row])) for row in range(len(data[1])))
        return [max(tensor.numel() for tensor in tensors(example)) for example in alone]

    def batch_losses(self, model: nn.Module, data: Data) -> Tensor:
        """The loss of each example of ``data``, ``[batch]``, in the model's present mode."""
        return self.read(forward(model, data[0]), data[1])["loss"]

    def evaluate(self, model: nn.Module, data: Data, measures: Iterable[str] = ()) -> dict[str, Tensor]:
        """The loss and the named measures of each example of ``data``, in the model's present mode, no gradients."""
        with torch.no_grad():
            if len(data[1]) <= EVALUATION_BATCH:
                return self.read(forward(model, data[0]), data[1], measures)
            chunks = torch.arange(len(data[1]), device=data[1].device).split(EVALUATION_BATCH)
            parts = [self.evaluate(model, take(data, chunk), measures) for chunk in chunks]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over data, ids, loss name, model structure and, for a given module, its weights.

        It finds another data set, split, architecture or loss; it does not see inside the code of functions.
        """
        digest = hashlib.sha256()
        model = self.build_model(0)
        described = {
            "name": self.name,
            "modules": [[name, type(m).__name__, m.extra_repr()] for name, m in model.named_modules()],
            "parameters": [[name, list(p.shape), p.requires_grad] for name, p in model.named_parameters()],
            "loss": getattr(self.loss, "__qualname__", type(self.loss).__qualname__),
            "ids": [self.train.ids, self.test.ids],
        } | ({"l2": self.l2} if self.l2 else {})
        digest.update(json.dumps(described, sort_keys=True).encode())
        weights = tuple(self.model.state_dict().values()) if isinstance(self.model, nn.Module) else ()
        for tensor in tensors((self.train_data, self.test_data, weights)):
            digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    @property
    def info(self) -> TaskInfo:
        return TaskInfo(self.name, self.arguments, self.fingerprint, len(self.train), len(self.test))

    def __repr__(self) -> str:
        return f"Task({self.name!r}, train={len(self.train)}, test={len(self.test)})"

    def _repr_html_(self) -> str:
        facts: dict[str, object] = {"training examples": len(self.train), "test examples": len(self.test)}
        facts["loss"] = getattr(self.loss, "__name__", type(self.loss).__name__)
        facts |= {"measures": ", ".join(self.measures)} if self.measures else {}
        facts["metadata"] = ", ".join(self.train.table.columns)
        return card(f"Task {self.name}", facts, self._counts_as_html())

    def _counts_as_html(self) -> str:
        """How many examples have each value of the first column of metadata with few of them."""
        from simfluence import plots

        def drawn(table: pd.DataFrame) -> str:
            return picture(lambda ax: plots.counts(table, ax))

        for name in self.train.table.columns.intersection(self.test.table.columns):
            sides = {"train": self.train.table[name], "test": self.test.table[name]}
            if not all(isinstance(value, Hashable) for values in sides.values() for value in values):
                continue  # lists, say
            table = pd.DataFrame({side: values.value_counts() for side, values in sides.items()}).fillna(0)
            if len(table) <= _MOST_VALUES:
                table = table.sort_index(key=lambda index: index if index.dtype.kind in "biuf" else index.astype(str))
                return drawn(table.rename_axis(name))
        return ""


def _described(examples: Examples, data: Data) -> Examples:
    """``examples`` with the features and targets that ``data`` gives where they have none."""
    inputs, targets = data
    features = examples.features
    if features is None and isinstance(inputs, Tensor) and inputs.is_floating_point():
        flat = inputs.detach().reshape(len(inputs), -1)
        features = flat.cpu().float().numpy() if flat.shape[1] <= _MOST_FEATURES and flat.isfinite().all() else None
    plain = targets.ndim == 1 or (targets.ndim == 2 and targets.is_floating_point())  # others are words of a text
    wanted = targets if examples.targets is None and plain and targets.isfinite().all() else None
    if features is examples.features and wanted is None:
        return examples
    return examples.with_features(features, None if wanted is None else wanted.detach().cpu().numpy())


def set_seed(seed: int) -> None:
    """Seed torch. ``torch.manual_seed`` also queues a call, with a stack trace, for every backend not in use."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def forward(model: Callable[..., Any], inputs: Inputs) -> Any:
    """The model's outputs; a mapping of inputs is passed as keyword arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def convert(function: Callable[[Tensor], Tensor], data: Any) -> Any:
    """``data`` with ``function`` applied to every tensor in its mappings and sequences."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, Mapping):
        return {name: convert(function, part) for name, part in data.items()}
    if isinstance(data, tuple | list):
        return type(data)([convert(function, part) for part in data])
    raise SimfluenceError(f"task data must be tensors, or mappings and sequences of them; found {type(data).__name__}")


def take(data: Any, indices: Tensor) -> Any:
    """The examples ``indices`` of ``data``."""
    return convert(lambda tensor: tensor[indices], data)


def tensors(data: Any) -> list[Tensor]:
    """All tensors in ``data``, in order."""
    found: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    convert(keep, data)
    return found


def cast(data: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """``data`` on ``device``, its floating tensors as ``dtype``."""
    return convert(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), data)
