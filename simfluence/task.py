"""The ``Task``: a model factory, training and test examples, and a per-example loss."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Annotated, Any

import pandas as pd
import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from simfluence._internal.deprecation import renamed_names
from simfluence._internal.fields import check_fields
from simfluence._internal.generator import lent_generator
from simfluence._internal.html import card, picture
from simfluence.errors import InvalidInput, SimfluenceError
from simfluence.examples import Examples

__all__ = [
    "EVALUATION_BATCH",
    "Data",
    "ExternalTask",
    "Inputs",
    "Task",
    "TaskInfo",
    "cast",
    "convert",
    "forward",
    "set_seed",
    "take",
    "tensors",
]

#: Model inputs: a tensor, or a mapping or sequence of tensors; the first axis of each counts examples.
Inputs = Any
Data = tuple[Inputs, Tensor]

#: Test examples per forward pass: bounds memory, does not change the losses.
EVALUATION_BATCH = 1024

#: Largest number of inputs per example that are used as its features where a task gives none.
_MOST_FEATURES = 4096

#: Largest number of distinct values of a column that a notebook's summary counts.
_MOST_VALUES = 20


@dataclass(frozen=True)
class TaskInfo:
    """A store's description of its task: enough to refuse another task, and to rebuild a ready-made one."""

    name: str
    arguments: Mapping[str, Any]
    fingerprint: str
    n_train: int
    n_test: int


@dataclass(frozen=True, eq=False)
class ExternalTask:
    """A task that is trained outside simfluence: its name, and its training and test examples."""

    name: str
    train: Examples
    test: Examples
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over name and ids; data and model are not available."""
        described = {"outline": self.name, "ids": [self.train.ids, self.test.ids]}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()

    @property
    def info(self) -> TaskInfo:
        return TaskInfo(self.name, self.arguments, self.fingerprint, len(self.train), len(self.test))


@dataclass(frozen=True, eq=False)
class Task:
    """A model factory, training examples, test examples, and a per-example loss.

    Args:
        name: name of the task.
        model: function without arguments that returns a fresh module, called after torch was seeded with the recipe's
            seed; or a module, with whose weights every run starts.
        train_data, test_data: ``(inputs, targets)``. Inputs are a tensor, or a mapping or sequence of tensors.
            A mapping is passed to the model as keyword arguments, anything else as one argument.
        loss: ``loss(outputs, targets)`` → losses ``[batch]``, not reduced.
        train, test: ids and metadata of the training and test examples. Examples without features get the flattened
            inputs if these are one tensor of numbers; examples without targets get the task's targets.
        arguments: arguments that rebuild a ready-made task.
        measures: other numbers to record of each test example, by name: ``measure(outputs, targets)`` → ``[batch]``.
        l2: L2 penalty of the objective: training minimises the batch's mean loss + ``l2/2 · ‖θ‖²``. Recorded losses
            do not include it.
        trim: ``trim(data)`` → the same examples without the padding that all of them have at the end of any axis but
            the first, such as ``tasks.padding.trimmed``. It saves time; losses must not depend on it.

    Raises:
        InvalidInput: a field has the wrong type; the numbers of examples, inputs and targets differ; the model cannot
            be built or copied; or the loss is reduced to one number.

    ``tasks.from_arrays`` builds a task from arrays with less code.

    >>> X, y = torch.eye(3), torch.tensor([0, 1, 0])
    >>> loss = nn.CrossEntropyLoss(reduction="none")
    >>> train, test = Examples(["a", "b", "c"]), Examples(["d"])
    >>> Task("toy", lambda: nn.Linear(3, 2), (X, y), (X[:1], y[:1]), loss, train, test)
    Task('toy', train=3, test=1)
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
    l2: Annotated[float, Ge(0)] = 0.0
    trim: Callable[[Data], Data] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _check_loss(self.name, self.loss)
        _check_model(self.name, self.model)
        if "loss" in self.measures:
            raise InvalidInput("'loss' is the name of the loss itself: give the measure another name")
        for part, examples, data in (("train", self.train, self.train_data), ("test", self.test, self.test_data)):
            if len(data) != 2 or not isinstance(data[1], Tensor) or any(tensor.ndim == 0 for tensor in tensors(data)):
                raise InvalidInput(f"{part}_data must be (inputs, targets), tensors with one row per example")
            counts = {len(examples)} | {len(tensor) for tensor in tensors(data)}
            if len(counts) > 1 or 0 in counts:
                raise InvalidInput(f"{part} examples, inputs and targets must be equally many and not empty: {counts}")
            object.__setattr__(self, part, _described(examples, data))  # frozen

    def build_model(self, seed: int) -> nn.Module:
        """Build a model with the initial weights of ``seed``, without changing torch's global random state.

        Raises:
            InvalidInput: the function fails or returns no module, or the module cannot be trained or copied.
        """
        if isinstance(self.model, nn.Module):
            return _copied(self.name, self.model)
        with lent_generator():
            set_seed(seed)
            model = _built(self.name, self.model)
        return _copied(self.name, model)  # a factory may return the same module each time

    def read(self, outputs: Any, targets: Tensor, measures: Iterable[str] = ()) -> dict[str, Tensor]:
        """Compute the loss and the named measures of each example, each ``[batch]``.

        Raises:
            InvalidInput: the loss or a measure is not one number per example.
        """
        readings = {"loss": self.loss(outputs, targets)}
        readings |= {name: self.measures[name](outputs, targets) for name in measures}
        for name, values in readings.items():
            if not isinstance(values, Tensor):
                raise InvalidInput(
                    f"{name} of task {self.name!r} returned {type(values).__name__}: return a tensor, [batch]"
                )
            if values.shape != targets.shape[:1]:
                raise InvalidInput(
                    f"{name} of task {self.name!r} has shape {tuple(values.shape)} for {len(targets)} examples: "
                    "give one number per example, [batch] (in torch: reduction='none', and a mean over other axes)"
                )
        return readings

    def some(self, data: Data, rows: Tensor) -> Data:
        """Return the examples ``rows`` of ``data``, without the padding that all of them have."""
        chosen: Data = take(data, rows)
        return self.trim(chosen) if self.trim else chosen

    def sizes(self, data: Data) -> list[int]:
        """Return the size of each example: how many numbers its largest tensor has without padding."""
        singles = (self.some(data, torch.tensor([row])) for row in range(len(data[1])))
        return [max(tensor.numel() for tensor in tensors(example)) for example in singles]

    def batch_losses(self, model: nn.Module, data: Data) -> Tensor:
        """Compute the loss of each example of ``data``, ``[batch]``, in the model's present mode."""
        return self.read(forward(model, data[0]), data[1])["loss"]

    def evaluate(self, model: nn.Module, data: Data, measures: Iterable[str] = ()) -> dict[str, Tensor]:
        """Compute the loss and the named measures of each example of ``data``, without gradients.

        The model stays in its present mode.
        """
        with torch.no_grad():
            if len(data[1]) <= EVALUATION_BATCH:
                return self.read(forward(model, data[0]), data[1], measures)
            chunks = torch.arange(len(data[1]), device=data[1].device).split(EVALUATION_BATCH)
            parts = [self.evaluate(model, take(data, chunk), measures) for chunk in chunks]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over data, ids, loss name, model structure and, if the model is a module, its weights.

        It distinguishes data sets, splits, architectures and losses by name, but not the code of functions.
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
        """Draw the number of examples per value, for the first metadata column with few distinct values."""
        from simfluence import plots

        def drawn(table: pd.DataFrame) -> str:
            return picture(lambda ax: plots.counts(table, ax))

        for name in self.train.table.columns.intersection(self.test.table.columns):
            columns = {"train": self.train.table[name], "test": self.test.table[name]}
            if not all(isinstance(value, Hashable) for values in columns.values() for value in values):
                continue  # such as lists
            table = pd.DataFrame({part: values.value_counts() for part, values in columns.items()}).fillna(0)
            if len(table) <= _MOST_VALUES:
                table = table.sort_index(key=lambda index: index if index.dtype.kind in "biuf" else index.astype(str))
                return drawn(table.rename_axis(name))
        return ""


def _described(examples: Examples, data: Data) -> Examples:
    """Fill missing features and targets of ``examples`` from ``data``."""
    inputs, targets = data
    features = examples.features
    if features is None and isinstance(inputs, Tensor) and inputs.is_floating_point():
        flat = inputs.detach().reshape(len(inputs), -1)
        features = flat.cpu().float().numpy() if flat.shape[1] <= _MOST_FEATURES and flat.isfinite().all() else None
    plain = targets.ndim == 1 or (targets.ndim == 2 and targets.is_floating_point())  # others are tokens of a text
    added_targets = targets if examples.targets is None and plain and targets.isfinite().all() else None
    if features is examples.features and added_targets is None:
        return examples
    return examples.with_features(features, None if added_targets is None else added_targets.detach().cpu().numpy())


def _check_loss(name: str, loss: Callable[..., Any]) -> None:
    """Check that the loss is not one of torch's classes, or a loss of torch that averages over the batch."""
    if isinstance(loss, type):
        raise InvalidInput(
            f"the loss of task {name!r} is the class {loss.__name__}: pass {loss.__name__}(reduction='none')"
        )
    reduction = getattr(loss, "reduction", "none") if isinstance(loss, nn.Module) else "none"
    if reduction != "none":
        kind = type(loss).__name__
        raise InvalidInput(
            f"the loss of task {name!r}, {kind}(), returns one number for the whole batch (reduction={reduction!r}): "
            f"pass {kind}(reduction='none'), so that each example has a loss of its own"
        )


def _check_model(name: str, model: nn.Module | Callable[[], nn.Module]) -> None:
    """Check, without building it, that the model can be trained, or that its function needs no arguments."""
    if isinstance(model, nn.Module):
        _check_module(name, model)
        return
    try:
        inspect.signature(model).bind()
    except TypeError as error:
        called = getattr(model, "__name__", type(model).__name__)
        raise InvalidInput(
            f"the model of task {name!r} cannot be built by {called}(): {error}. Pass a function without arguments, "
            f"such as lambda: {called}(…)"
        ) from None
    except ValueError:  # a built-in function without a signature
        return


def _check_module(name: str, model: nn.Module) -> None:
    """Check that a module has all its weights, that they are real numbers, and that no old hook computes them.

    Raises:
        InvalidInput: naming the layer or the parameter.
    """
    for path, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if is_lazy(tensor):
            raise InvalidInput(
                f"the model of task {name!r} has no weights yet ({path!r} is lazy): run it once on an example of its "
                "inputs in the function that builds it, or use layers with their sizes given"
            )
        if tensor.is_complex() and isinstance(tensor, nn.Parameter):
            raise InvalidInput(
                f"the model of task {name!r} has complex weights ({path!r}), but a recipe trains real ones: keep the "
                "real and imaginary parts as a last axis of 2, and use torch.view_as_complex in forward"
            )
    for path, module in model.named_modules():
        hooks = [type(hook).__name__ for hook in module._forward_pre_hooks.values()]
        old = {"WeightNorm": "weight_norm", "SpectralNorm": "spectral_norm"}
        for hook in (hook for hook in hooks if hook in old):
            raise InvalidInput(
                f"layer {path!r} of the model of task {name!r} has torch.nn.utils.{old[hook]}, and such a layer cannot "
                f"be copied: use torch.nn.utils.parametrizations.{old[hook]}, which computes the same"
            )


def _built(name: str, function: Callable[[], Any]) -> nn.Module:
    try:
        model = function()
    except (SimfluenceError, Warning, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InvalidInput(f"the model of task {name!r} cannot be built: {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InvalidInput(f"task {name!r}: model() returned {type(model).__name__}, not a torch module")
    return model


def _copied(name: str, model: nn.Module) -> nn.Module:
    """Return a copy of a module that shares nothing with it."""
    _check_module(name, model)
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InvalidInput(
            f"the model of task {name!r} cannot be copied ({reason}): runs start from copies of it. Keep computed "
            "tensors, locks and open files out of its attributes"
        ) from error


def set_seed(seed: int) -> None:
    """Seed torch; ``torch.manual_seed`` would also queue a call, with a stack trace, for every unused backend."""
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)


def forward(model: Callable[..., Any], inputs: Inputs) -> Any:
    """Compute the model's outputs; a mapping of inputs is passed as keyword arguments."""
    return model(**inputs) if isinstance(inputs, Mapping) else model(inputs)


def convert(function: Callable[[Tensor], Tensor], data: Any) -> Any:
    """Apply ``function`` to every tensor in the mappings and sequences of ``data``."""
    if isinstance(data, Tensor):
        return function(data)
    if isinstance(data, Mapping):
        return {name: convert(function, part) for name, part in data.items()}
    if isinstance(data, tuple | list):
        return type(data)([convert(function, part) for part in data])
    raise SimfluenceError(f"task data must be tensors, or mappings and sequences of them; got {type(data).__name__}")


def take(data: Any, indices: Tensor) -> Any:
    """Return the examples ``indices`` of ``data``."""
    return convert(lambda tensor: tensor[indices], data)


def tensors(data: Any) -> list[Tensor]:
    """Return all tensors in ``data``, in order."""
    collected: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        collected.append(tensor)
        return tensor

    convert(collect, data)
    return collected


def cast(data: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Move ``data`` to ``device`` and its floating-point tensors to ``dtype``."""
    return convert(lambda t: t.to(device, dtype if t.is_floating_point() else t.dtype), data)


__getattr__ = renamed_names(__name__, {"Outline": "simfluence.task:ExternalTask"})
