"""What all attributors share: input checks, loops over test and training examples, scikit-learn's conventions."""

from __future__ import annotations

import copy
import typing
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import sklearn.base
import torch
from jaxtyping import Float
from torch import Tensor, nn

from simfluence._internal.checked import checked, fitting
from simfluence._internal.progress import bar
from simfluence._internal.types import Indices
from simfluence._internal.validation import checked_indices, number, whole
from simfluence.attribution.gradients.hooks import Gradients, Loss, Mask, attention_mask, rows_of
from simfluence.attribution.gradients.inner_products import (
    Query,
    joined,
    numbers,
    position_products,
    products,
    self_products,
)
from simfluence.attribution.gradients.layers import Factors
from simfluence.attribution.gradients.per_example import per_example_gradients
from simfluence.attribution.scores import Scores, TopScores
from simfluence.attribution.snapshot import Snapshot
from simfluence.errors import InvalidInput, NotFittedError, did_you_mean
from simfluence.task import Data, Task, take, tensors

__all__ = [
    "QUERIES",
    "Attributor",
    "AttributorT",
    "LayerFactors",
    "Queries",
    "Solve",
    "check_parameters",
    "checked_data",
]

# Not typing.Self: the tests' runtime type checker wraps functions, not classes.
AttributorT = TypeVar("AttributorT", bound="Attributor")

#: Bytes for the solved gradients of test examples, 2 GiB: those that fit are scored in one pass over the training data.
QUERIES = 2**31
#: A progress bar is shown for more pairs (test example, training example) than this.
_PROGRESS_BAR_PAIRS = 10_000

LayerFactors = dict[str, Factors]
Queries = Mapping[str, Query]
Solve = Callable[[LayerFactors], Queries]


class Attributor(sklearn.base.BaseEstimator, ABC):  # type: ignore[misc]  # scikit-learn is untyped
    """Scores how much each training example lowers the loss of a test example: call ``fit``, then ``scores``.

    The common form is ``score(z, i) = Σ_k w_k ⟨P_k ∇ℓ_z(θ_k), ∇ℓ_i(θ_k)⟩`` over one or several states θ_k of the model;
    P is often the inverse of a curvature matrix. Subclasses implement ``_fit()`` and ``_solve(factors)``, which applies
    P. Results do not depend on the batch size. Classes are abstract or final: to change one, wrap it.

    The ``P_k ∇ℓ_z`` of the test examples take at most 2 GiB; if all of them need more, there are several passes over
    the training examples.
    """

    #: Units of the scores; the first is the default.
    units: ClassVar[tuple[str, ...]] = ("loss", "raw")
    layers: Sequence[str] | None
    batch_size: int

    @checked
    def fit(
        self: AttributorT,
        model: nn.Module,
        data: Data | Sequence[Any] | Task,
        loss: Loss | None = None,
        l2: float | None = None,
        mask: Mask = attention_mask,
    ) -> AttributorT:
        """Prepare scoring against the training examples. The model is not changed.

        It is not copied either, except for a model in half precision (bfloat16, float16): gradients are those of a
        copy in float32.

        Args:
            model: the trained model.
            data: training examples ``(inputs, targets)``, or a task, which also gives loss, l2, ids and test examples.
            loss: ``loss(outputs, targets)`` → ``[batch]``, not reduced.
            l2: penalty of the objective, ``l2/2 ‖θ‖²`` added to the mean loss; it is added to the damping.
            mask: function from inputs to the positions that are not padding, ``[batch, positions]``; by default the
                inputs' "attention_mask".

        Raises:
            InvalidInput: there are no layers to attribute to, the loss is reduced, a label is out of range, a gradient
                is not finite, the forward pass is random, or a parameter is out of range.
        """
        check_parameters(self)
        self._check_parameters()
        task = data if isinstance(data, Task) else None
        train = checked_data(task.train_data if task is not None else data)
        loss = loss if loss is not None or task is None else task.loss
        if loss is None:
            raise InvalidInput("a loss is required: pass loss=…, a function (outputs, targets) → [batch]")
        self.task_, self.train_data_ = task, train
        self.l2_ = l2 if l2 is not None else (0.0 if task is None else task.l2)
        number("l2", self.l2_, least=0)
        precise = _in_single_precision(model)
        self.gradients_ = per_example_gradients(precise, loss, train, self.layers, mask, self.batch_size)
        snapshot = Snapshot.of(model)
        self._fit()
        self.snapshot_ = snapshot
        return self

    @checked
    def scores(
        self,
        test_data: Data | Sequence[Any] | None = None,
        unit: str | None = None,
        by_layer: bool = False,
        train: Sequence[int] | Indices | None = None,
    ) -> Scores:
        """Compute the scores of all pairs, ``[test, train]``: positive if training on i lowers the loss of z.

        Args:
            test_data: ``(inputs, targets)``; by default the test examples of the task that was passed to ``fit``.
            unit: "loss" or "raw", see ``Scores``; by default the first of ``units``.
            by_layer: return ``[layer, test, train]``, whose sum over layers gives the scores.
            train: indices of the training examples to score, by default all; the cost is in proportion to their
                number. ``candidates`` suggests indices.

        Raises:
            NotFittedError: before ``fit``.
            InvalidInput: the model's weights changed since ``fit``, an index is out of range, or the test data are
                invalid in a way that ``fit`` rejects too.
        """
        test, scale = self._checked_test(test_data), self._scale(unit)
        chosen = None if train is None else checked_indices(train, len(self.train_data_[1]))
        n_test, n_train = len(test[1]), len(self.train_data_[1]) if chosen is None else len(chosen)
        names = list(self.gradients_.layers)
        shape = (len(names), n_test, n_train) if by_layer else (n_test, n_train)
        values = np.zeros(shape, _numpy_dtype(self.gradients_.like))
        for rows, columns, block in self._blocks(test, chosen):
            values[..., rows, columns] += scale * (block if by_layer else block.sum(0)).numpy()
        train_ids, test_ids = self._ids(test_data, chosen)
        layers = tuple(names) if by_layer else None
        return Scores(values, unit or self.units[0], type(self).__name__, layers, train_ids, test_ids)

    @checked
    def self_influence(self, unit: str | None = None) -> Float[np.ndarray, " train"]:
        """Compute the score of each training example for itself: large if the model has memorised the example.

        Raises:
            NotFittedError, InvalidInput: same as in ``scores``.
        """
        self._check_ready()
        scale = self._scale(unit)
        values = np.zeros(len(self.train_data_[1]), _numpy_dtype(self.gradients_.like))
        for gradients, solve in self._states():
            for rows, factors in self._batches(
                gradients, self.train_data_, "training", self._solve_batch_size(gradients)
            ):
                values[rows] += scale * self._self_products(solve, factors).cpu().numpy()
        return values

    @checked
    def top_k(self, k: int, test_data: Data | Sequence[Any] | None = None, unit: str | None = None) -> TopScores:
        """Find the k training examples with the largest scores for each test example, without the full matrix.

        Raises:
            NotFittedError, InvalidInput: same as in ``scores``; or k is not from 1 to the number of training examples.
        """
        test, scale = self._checked_test(test_data), self._scale(unit)
        n_test, n_train = len(test[1]), len(self.train_data_[1])
        if not 1 <= k <= n_train:
            raise InvalidInput(f"k must be from 1 to the number of training examples, {n_train}; got {k}")
        values = torch.full((n_test, k), -torch.inf, dtype=self.gradients_.like.dtype)
        indices = torch.zeros(n_test, k, dtype=torch.int64)
        for rows, columns, block in self._sums(test):
            block_indices = torch.arange(columns.start, columns.stop).expand(rows.stop - rows.start, -1)
            merged = torch.cat([values[rows], block], 1)
            values[rows], order = (part[:, :k] for part in merged.sort(dim=1, descending=True, stable=True))
            indices[rows] = torch.cat([indices[rows], block_indices], 1).gather(1, order)
        return TopScores(indices.numpy(), scale * values.numpy(), unit or self.units[0], type(self).__name__)

    @checked
    def token_scores(
        self, test_data: Data | Sequence[Any] | None = None, unit: str | None = None
    ) -> Float[np.ndarray, "test train positions"]:
        """Split the scores by position (token) of the training examples.

        Layers that are applied to whole examples are left out (those after a pooling, and those whose gradient is
        summed over positions, such as a bias alone); over the other layers, the shares add up to the scores.

        Raises:
            NotFittedError, InvalidInput: same as in ``scores``; or no layer is applied to positions, or layers differ
                in their number of positions.
        """
        test, scale = self._checked_test(test_data), self._scale(unit)
        names, positions = self._positions()
        shape = (len(test[1]), len(self.train_data_[1]), positions)
        values = np.zeros(shape, _numpy_dtype(self.gradients_.like))
        for gradients, solve in self._states():
            for rows, columns, shares in self._pairs(gradients, solve, test, position_products, names):
                if shares.shape[-1] != positions:  # such as a layer that is computed one example at a time
                    raise InvalidInput(
                        f"token scores need layers with the same positions in every batch, but some have {positions} "
                        f"and then {shares.shape[-1]}: leave these layers out with layers=[…]"
                    )
                values[rows, columns] += scale * shares.sum(0).numpy()
        return values

    def _positions(self) -> tuple[list[str], int]:
        """Return the names of the layers that are applied to positions, and the number of positions."""
        factors = self.gradients_.factors(rows_of(self.train_data_, slice(0, 1)))
        counts = {name: layer_factors.positions // layer_factors.calls for name, layer_factors in factors.items()}
        by_position = {name: count for name, count in counts.items() if count > 1}
        if len(set(by_position.values())) != 1:
            raise InvalidInput(
                f"token scores need layers that are applied to the same positions, got {by_position or 'none'}: "
                "choose such layers with layers=[…]"
            )
        return list(by_position), next(iter(by_position.values()))

    @abstractmethod
    def _fit(self) -> None: ...

    @abstractmethod
    def _solve(self, factors: LayerFactors) -> Queries:
        """Apply P to the gradients of a batch."""

    def _prepared(self, factors: LayerFactors) -> LayerFactors:
        """Transform the gradients of training and test examples before they are multiplied."""
        return factors

    def _states(self) -> Iterator[tuple[Gradients, Solve]]:
        """Yield the model states whose products are summed, each with the function to apply to test gradients."""
        yield self.gradients_, self._solve

    def _self_products(self, solve: Solve, factors: LayerFactors) -> Float[Tensor, " batch"]:
        """Compute the product of each example with itself, summed over layers."""
        queries = solve(factors)
        return torch.stack([self_products(queries[name], factors[name]).cpu() for name in factors]).sum(0)

    def _solve_batch_size(self, gradients: Gradients) -> int:
        """Return how many examples may have their gradients solved at a time."""
        batch_size = whole("batch_size", self.batch_size, least=1)
        return max(1, min(batch_size, QUERIES // (gradients.size * gradients.like.element_size())))

    def _check_parameters(self) -> None:
        """Raise ``InvalidInput`` if a parameter is out of a range that its annotation does not say."""

    def _blocks(self, test: Data, chosen: Indices | None = None) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield test rows, training rows (counted among the chosen) and their products ``[layer, test, train]``."""
        for gradients, solve in self._states():
            yield from self._pairs(gradients, solve, test, products, list(gradients.layers), chosen)

    def _sums(self, test: Data) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield test rows, training rows and their products ``[test, train]``, summed over layers and states."""
        for rows, columns, block in self._blocks(test):
            yield rows, columns, block.sum(0)

    def _pairs(
        self,
        gradients: Gradients,
        solve: Solve,
        test: Data,
        product: Callable[[Query, Factors], Tensor],
        names: Sequence[str],
        chosen: Indices | None = None,
    ) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield test rows, training rows and their products ``[layer, test, train, …]`` in the layers ``names``."""
        train, part = self.train_data_, "training"
        if chosen is not None:
            train, part = take(train, torch.from_numpy(chosen).to(train[1].device)), "chosen training"
        n_test, n_train = len(test[1]), len(train[1])
        with bar(f"{type(self).__name__}: pairs", n_test * n_train, n_test * n_train > _PROGRESS_BAR_PAIRS) as advance:
            for rows, queries in self._groups(gradients, solve, test):
                for columns, factors in self._batches(gradients, train, part):
                    yield rows, columns, torch.stack([product(queries[name], factors[name]).cpu() for name in names])
                    advance((rows.stop - rows.start) * (columns.stop - columns.start))
                    del factors  # before the next batch is computed
                del queries

    def _groups(self, gradients: Gradients, solve: Solve, test: Data) -> Iterator[tuple[slice, Queries]]:
        """Yield the test examples in groups, as large as ``QUERIES`` allows, with their solved gradients."""
        limit = QUERIES // gradients.like.element_size()
        parts: list[dict[str, Query]] = []
        first = total = 0
        for rows, factors in self._batches(gradients, test, "test", self._solve_batch_size(gradients)):
            parts.append(dict(solve(factors)))
            del factors
            size = numbers(parts[-1].values())
            total += size
            if total + size > limit and rows.stop < len(test[1]):  # another such batch would not fit
                yield slice(first, rows.stop), joined(parts)
                parts, first, total = [], rows.stop, 0
        yield slice(first, len(test[1])), joined(parts)

    def _batches(
        self, gradients: Gradients, data: Data, part: str, size: int | None = None
    ) -> Iterator[tuple[slice, LayerFactors]]:
        def prepared(batch: tuple[slice, LayerFactors]) -> tuple[slice, LayerFactors]:
            return batch[0], self._prepared(batch[1])

        batches = gradients.batches(data, batch_size=size or self.batch_size, side=part)
        return map(prepared, batches)  # unlike a loop, map keeps no batch alive

    def _scale(self, unit: str | None) -> float:
        unit = self.units[0] if unit is None else unit
        if unit not in self.units:
            raise InvalidInput(f"{type(self).__name__} has no unit {unit!r}, {did_you_mean(unit, self.units)}")
        return 1 / len(self.train_data_[1]) if unit == "loss" else 1.0

    def _check_training(self) -> None:
        """Pass over the training examples once, so that an error names the faulty one."""
        for _ in self._batches(self.gradients_, self.train_data_, "training"):
            pass

    def _check_ready(self) -> None:
        if not hasattr(self, "snapshot_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit(model, data, loss=…) first")
        self._check_weights()

    def _check_weights(self) -> None:
        """Raise ``InvalidInput`` if the model's weights changed since ``fit``."""
        self.snapshot_.check()

    def _checked_test(self, test_data: Data | Sequence[Any] | None) -> Data:
        self._check_ready()
        if test_data is None and self.task_ is None:
            raise InvalidInput(
                "test_data is required, as fit got no task with test examples: pass test_data=(inputs, targets)"
            )
        return checked_data(test_data if test_data is not None or self.task_ is None else self.task_.test_data)

    def _ids(
        self, test_data: Data | Sequence[Any] | None, chosen: Indices | None = None
    ) -> tuple[Sequence[Any] | None, Sequence[Any] | None]:
        train_ids = None if self.task_ is None else self.task_.train.ids
        if chosen is not None:
            train_ids = chosen.tolist() if train_ids is None else [train_ids[index] for index in chosen]
        return train_ids, self.task_.test.ids if self.task_ is not None and test_data is None else None


def checked_data(data: Any) -> Data:
    """Return ``data`` as a pair ``(inputs, targets)``.

    Raises:
        InvalidInput: ``data`` is not such a pair, is empty, or has different numbers of inputs and targets.
    """
    if not (isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor)):
        raise InvalidInput(
            "data must be a pair (inputs, targets), with targets a tensor whose first axis counts examples"
        )
    counts = {len(tensor) for tensor in tensors(tuple(data))}
    if len(counts) > 1 or 0 in counts:
        raise InvalidInput(f"inputs and targets must be equally many and not empty, got {sorted(counts)}")
    return data[0], data[1]


def check_parameters(estimator: sklearn.base.BaseEstimator) -> None:
    """Check the parameters of an estimator against the annotations of its ``__init__``.

    Raises:
        InvalidInput: one is of another type or out of range.
    """
    hints = typing.get_type_hints(type(estimator).__init__, include_extras=True)
    for name, value in estimator.get_params(deep=False).items():
        try:
            fitting(name, value, hints.get(name, Any))
        except InvalidInput as error:
            raise InvalidInput(f"{type(estimator).__name__}: {error}") from None


def _in_single_precision(model: nn.Module) -> nn.Module:
    """Return the model, or a copy in float32 if a parameter has half precision, in which products overflow."""
    half = any(parameter.dtype in (torch.float16, torch.bfloat16) for parameter in model.parameters())
    return copy.deepcopy(model).float() if half else model


def _numpy_dtype(like: Tensor) -> type[np.floating[Any]]:
    return np.float64 if like.dtype == torch.float64 else np.float32
