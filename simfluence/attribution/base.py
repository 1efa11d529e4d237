"""What every attributor shares: checked input, the passes over test and training examples, scikit-learn's habits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import sklearn.base
import torch
from jaxtyping import Float
from torch import Tensor, nn

from simfluence._internal.progress import bar
from simfluence._internal.types import Indices
from simfluence._internal.validation import checked_indices, whole
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
from simfluence.errors import InvalidInput, NotFittedError
from simfluence.task import Data, Task, take, tensors

# Not typing.Self: the tests' runtime type checker wraps functions, not classes.
AttributorT = TypeVar("AttributorT", bound="Attributor")

#: Bytes that the test examples' share of products may take, 2 GiB: as many as fit are scored in one pass over training.
QUERIES = 2**31
#: Pairs of a test and a training example from which on a progress bar is shown.
_SHOWN = 10_000

LayerFactors = dict[str, Factors]
Queries = Mapping[str, Query]
Solve = Callable[[LayerFactors], Queries]


class Attributor(sklearn.base.BaseEstimator, ABC):
    """Says which training examples raise or lower the loss of a test example: ``fit``, then ``scores``.

    The common form is ``score(z, i) = Σ_k w_k ⟨P_k ∇ℓ_z(θ_k), ∇ℓ_i(θ_k)⟩`` over one or several states θ_k of the model;
    members choose P, often the inverse of a curvature matrix. Subclasses implement ``_fit()`` and ``_solve(factors)``,
    which applies P. Results do not depend on the batch size. Classes are abstract or final: to vary one, wrap it.

    ``P_k ∇ℓ_z`` of the test examples takes 2 GiB at most; where all of them need more, there are several passes over
    the training examples.
    """

    #: Units that the scores can have, the default first.
    units: ClassVar[tuple[str, ...]] = ("loss", "raw")
    layers: Sequence[str] | None
    batch_size: int

    def fit(
        self: AttributorT,
        model: nn.Module,
        data: Data | Task,
        loss: Loss | None = None,
        l2: float | None = None,
        mask: Mask = attention_mask,
    ) -> AttributorT:
        """Learn what is needed of the training side. The model is kept, not copied, and not changed.

        Args:
            model: as trained.
            data: training examples ``(inputs, targets)``, or a task, which brings its loss, l2, ids and test side.
            loss: ``loss(outputs, targets)`` → ``[batch]``, not reduced.
            l2: the objective's own penalty, ``l2/2 ‖θ‖²`` beside the mean loss; it adds to the damping.
            mask: inputs → which positions are no padding, ``[batch, positions]``; by default their "attention_mask".

        Raises:
            InvalidInput: no layers to attribute to, a reduced loss, labels out of range, gradients that are not
                finite, a random forward pass, or parameters out of range.
        """
        self._check_parameters()
        task = data if isinstance(data, Task) else None
        train = checked_data(task.train_data if task is not None else data)
        loss = loss if loss is not None or task is None else task.loss
        if loss is None:
            raise InvalidInput("a loss is needed: loss=… with loss(outputs, targets) → [batch]")
        self.task_, self.train_data_ = task, train
        self.l2_ = l2 if l2 is not None else (0.0 if task is None else task.l2)
        if not self.l2_ >= 0:
            raise InvalidInput(f"l2 must be a number from 0 up, got {self.l2_!r}")
        self.gradients_ = per_example_gradients(model, loss, train, self.layers, mask)
        self._fit()
        self.versions_ = versions(model)
        return self

    def scores(
        self,
        test_data: Data | None = None,
        unit: str | None = None,
        by_layer: bool = False,
        train: Sequence[int] | Indices | None = None,
    ) -> Scores:
        """The scores of all pairs, ``[test, train]``: positive where training on i lowers the loss of z.

        Args:
            test_data: ``(inputs, targets)``; by default the test side of the task that it was fitted on.
            unit: "loss" or "raw", see ``Scores``; by default the first of ``units``.
            by_layer: give ``[layer, test, train]``, which adds up to the scores over layers.
            train: indices of training examples, to score these alone: columns of the whole matrix, at their share of
                its cost. ``similarity.candidates`` proposes some.

        Raises:
            NotFittedError: before ``fit``.
            InvalidInput: the model's weights changed since, no such training example, or what ``fit`` refuses too.
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

    def self_influence(self, unit: str | None = None) -> Float[np.ndarray, " train"]:
        """The score of each training example for itself: large where the model has learned it by heart.

        Raises:
            NotFittedError, InvalidInput: as of ``scores``.
        """
        self._check_ready()
        scale = self._scale(unit)
        values = np.zeros(len(self.train_data_[1]), _numpy_dtype(self.gradients_.like))
        for gradients, solve in self._states():
            for rows, factors in self._batches(gradients, self.train_data_, "training", self._few(gradients)):
                values[rows] += scale * self._own(solve, factors).cpu().numpy()
        return values

    def top_k(self, k: int, test_data: Data | None = None, unit: str | None = None) -> TopScores:
        """The k training examples with the largest scores for each test example; the matrix is never whole.

        Raises:
            NotFittedError, InvalidInput: as of ``scores``; or k is not from 1 to the number of training examples.
        """
        test, scale = self._checked_test(test_data), self._scale(unit)
        n_test, n_train = len(test[1]), len(self.train_data_[1])
        if not 1 <= k <= n_train:
            raise InvalidInput(f"k must be from 1 to the number of training examples, {n_train}; got {k}")
        values = torch.full((n_test, k), -torch.inf, dtype=self.gradients_.like.dtype)
        indices = torch.zeros(n_test, k, dtype=torch.int64)
        for rows, columns, block in self._sums(test):
            new = torch.arange(columns.start, columns.stop).expand(rows.stop - rows.start, -1)
            every = torch.cat([values[rows], block], 1)
            values[rows], order = (part[:, :k] for part in every.sort(dim=1, descending=True, stable=True))
            indices[rows] = torch.cat([indices[rows], new], 1).gather(1, order)
        return TopScores(indices.numpy(), scale * values.numpy(), unit or self.units[0], type(self).__name__)

    def token_scores(
        self, test_data: Data | None = None, unit: str | None = None
    ) -> Float[np.ndarray, "test train positions"]:
        """The scores' shares of each position (token) of the training examples.

        Layers that are applied to whole examples (behind a pooling, or whose gradient is summed over positions, as of
        a bias alone) have no part; over the others the shares add up to the scores.

        Raises:
            NotFittedError, InvalidInput: as of ``scores``; or no layer is applied to positions, or layers to
                different numbers of them.
        """
        test, scale = self._checked_test(test_data), self._scale(unit)
        names, positions = self._positions()
        shape = (len(test[1]), len(self.train_data_[1]), positions)
        values = np.zeros(shape, _numpy_dtype(self.gradients_.like))
        for gradients, solve in self._states():
            for rows, columns, shares in self._pairs(gradients, solve, test, position_products, names):
                values[rows, columns] += scale * shares.sum(0).numpy()
        return values

    def _positions(self) -> tuple[list[str], int]:
        """The layers that are applied to positions, and how many those are."""
        factors = self.gradients_.factors(rows_of(self.train_data_, slice(0, 1)))
        counts = {name: each.positions // each.calls for name, each in factors.items()}
        found = {name: count for name, count in counts.items() if count > 1}
        if len(set(found.values())) != 1:
            raise InvalidInput(
                f"scores by token need layers that are applied to the same positions, found {found or 'none'}: "
                "name such layers by layers=[…]"
            )
        return list(found), next(iter(found.values()))

    @abstractmethod
    def _fit(self) -> None: ...

    @abstractmethod
    def _solve(self, factors: LayerFactors) -> Queries:
        """P applied to the gradients of a batch."""

    def _prepared(self, factors: LayerFactors) -> LayerFactors:
        """The gradients of either side as they enter the products."""
        return factors

    def _states(self) -> Iterator[tuple[Gradients, Solve]]:
        """The states of the model whose products are added up, with what to apply on the test side."""
        yield self.gradients_, self._solve

    def _own(self, solve: Solve, factors: LayerFactors) -> Float[Tensor, " batch"]:
        """The products of each example with itself, over all layers."""
        queries = solve(factors)
        return torch.stack([self_products(queries[name], each).cpu() for name, each in factors.items()]).sum(0)

    def _few(self, gradients: Gradients) -> int:
        """How many examples may have their products with P formed at a time."""
        return max(1, min(self.batch_size, QUERIES // (gradients.size * gradients.like.element_size())))

    def _check_parameters(self) -> None:
        """Raise ``InvalidInput`` for parameters out of range."""
        whole("batch_size", self.batch_size, 1)

    def _blocks(self, test: Data, chosen: Indices | None = None) -> Iterator[tuple[slice, slice, Tensor]]:
        """Test rows, training rows (of those chosen), and their products ``[layer, test, train]``."""
        for gradients, solve in self._states():
            yield from self._pairs(gradients, solve, test, products, list(gradients.layers), chosen)

    def _sums(self, test: Data) -> Iterator[tuple[slice, slice, Tensor]]:
        """Test rows, training rows, and their products ``[test, train]`` over all layers and states, each pair once."""
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
        """Test rows, training rows, and their products ``[layer, test, train, …]`` in some layers, each with each."""
        train, side = self.train_data_, "training"
        if chosen is not None:
            train, side = take(train, torch.from_numpy(chosen).to(train[1].device)), "chosen training"
        n_test, n_train = len(test[1]), len(train[1])
        with bar(f"{type(self).__name__}: pairs", n_test * n_train, n_test * n_train > _SHOWN) as advance:
            for rows, queries in self._groups(gradients, solve, test):
                for columns, factors in self._batches(gradients, train, side):
                    yield rows, columns, torch.stack([product(queries[n], factors[n]).cpu() for n in names])
                    advance((rows.stop - rows.start) * (columns.stop - columns.start))
                    del factors  # before the next ones are there
                del queries

    def _groups(self, gradients: Gradients, solve: Solve, test: Data) -> Iterator[tuple[slice, Queries]]:
        """As many test examples at a time as may be kept."""
        most = QUERIES // gradients.like.element_size()
        parts: list[dict[str, Query]] = []
        first = held = 0
        for rows, factors in self._batches(gradients, test, "test", self._few(gradients)):
            parts.append(dict(solve(factors)))
            del factors
            new = numbers(parts[-1].values())
            held += new
            if held + new > most and rows.stop < len(test[1]):  # another such batch would be too many
                yield slice(first, rows.stop), joined(parts)
                parts, first, held = [], rows.stop, 0
        yield slice(first, len(test[1])), joined(parts)

    def _batches(
        self, gradients: Gradients, data: Data, side: str, size: int | None = None
    ) -> Iterator[tuple[slice, LayerFactors]]:
        def prepared(batch: tuple[slice, LayerFactors]) -> tuple[slice, LayerFactors]:
            return batch[0], self._prepared(batch[1])

        return map(prepared, gradients.batches(data, size or self.batch_size, side=side))  # which keeps no batch alive

    def _scale(self, unit: str | None) -> float:
        unit = self.units[0] if unit is None else unit
        if unit not in self.units:
            known = f"{type(self).__name__} gives {' or '.join(map(repr, self.units))}"
            raise InvalidInput(f"no unit {unit!r}: {known}; a unit of its own has no meaning in losses")
        return 1 / len(self.train_data_[1]) if unit == "loss" else 1.0

    def _check_training(self) -> None:
        """One pass over the training side, which names what is wrong with an example."""
        for _ in self._batches(self.gradients_, self.train_data_, "training"):
            pass

    def _check_ready(self) -> None:
        if not hasattr(self, "versions_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit(model, data, loss=…) first")
        if versions(self.gradients_.model) != self.versions_:
            raise InvalidInput("the model's weights changed since fit: fit again, or fit on a copy of the model")

    def _checked_test(self, test_data: Data | None) -> Data:
        self._check_ready()
        if test_data is None and self.task_ is None:
            raise InvalidInput("give test_data=(inputs, targets): there is no task whose test side could be taken")
        return checked_data(test_data if test_data is not None or self.task_ is None else self.task_.test_data)

    def _ids(
        self, test_data: Data | None, chosen: Indices | None = None
    ) -> tuple[Sequence[Any] | None, Sequence[Any] | None]:
        train_ids = None if self.task_ is None else self.task_.train.ids
        if chosen is not None:
            train_ids = chosen.tolist() if train_ids is None else [train_ids[index] for index in chosen]
        return train_ids, self.task_.test.ids if self.task_ is not None and test_data is None else None


def checked_data(data: Any) -> Data:
    """``(inputs, targets)``.

    Raises:
        InvalidInput: it is no such pair, not as many of both, or none.
    """
    if not (isinstance(data, tuple | list) and len(data) == 2 and isinstance(data[1], Tensor)):
        raise InvalidInput(
            "data must be a pair (inputs, targets), the targets a tensor whose first axis counts examples"
        )
    counts = {len(tensor) for tensor in tensors(tuple(data))}
    if len(counts) > 1 or 0 in counts:
        raise InvalidInput(f"inputs and targets must be equally many, and some; found {sorted(counts)}")
    return data[0], data[1]


def versions(model: nn.Module) -> tuple[int, ...]:
    """Counts of in-place changes: an optimizer's step or ``load_state_dict`` raises them."""
    return tuple(parameter._version for parameter in model.parameters())


def _numpy_dtype(like: Tensor) -> type[np.floating[Any]]:
    return np.float64 if like.dtype == torch.float64 else np.float32
