"""Attribution without gradients: training examples similar to the test example, in a model's activations or as text.

These are baselines, and cheap enough to propose ``candidates`` for a costly attributor to score.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import sklearn.base
import torch
from jaxtyping import Float, Int
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.preprocessing import normalize
from torch import Tensor, nn

from simfluence._internal.checked import checked
from simfluence._internal.types import Count, Indices
from simfluence._internal.validation import checked_indices
from simfluence.attribution.base import check_parameters, checked_data
from simfluence.attribution.gradients.hooks import (
    Calls,
    Mask,
    attention_mask,
    evaluating,
    explained,
    masks_of,
    recording,
    rows_of,
)
from simfluence.attribution.scores import Scores
from simfluence.attribution.snapshot import Snapshot
from simfluence.errors import InvalidInput, NotFittedError, did_you_mean
from simfluence.examples import Examples
from simfluence.task import Data, Task, cast, forward

#: Texts, examples with a column of texts, or a task with such examples.
Texts = Sequence[str] | Examples | Task

SimilarityT = TypeVar("SimilarityT", bound="_Similarity")

__all__ = ["HiddenSimilarity", "NGrams", "Texts", "TfIdf", "candidates"]


class _Similarity(sklearn.base.BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """Inner products of features. ``fit`` sets ``train_features_`` and ``train_ids_``."""

    @checked
    def scores(
        self, test_data: Any = None, unit: str | None = None, train: Sequence[int] | Indices | None = None
    ) -> Scores:
        """Return the similarities ``[test, train]``, in the unit "raw".

        Args:
            test_data: data of the kind that ``fit`` accepts; by default the test examples of the fitted task.
            unit: "raw".
            train: indices of the training examples to score; all by default.

        Raises:
            NotFittedError: ``fit`` was not called.
            InvalidInput: there is no test data, or data that ``fit`` refuses too; another unit; or no such training
                example.
        """
        if not hasattr(self, "train_features_"):
            raise NotFittedError(f"this {type(self).__name__} is not fitted yet: call fit first")
        if unit not in (None, "raw"):
            raise InvalidInput(f"there is no unit {unit!r}: the only unit of a similarity is 'raw'")
        if test_data is None and self.task_ is None:
            raise InvalidInput("test data is required: only an attributor fitted on a task has its own")
        chosen = np.arange(len(self.train_ids_)) if train is None else checked_indices(train, len(self.train_ids_))
        products = self._features(test_data, "test") @ self.train_features_[chosen].T
        values = np.asarray(products.todense() if hasattr(products, "todense") else products)
        test_ids = self.task_.test.ids if self.task_ is not None and test_data is None else None
        return Scores(values, "raw", type(self).__name__, None, [self.train_ids_[i] for i in chosen], test_ids)

    def _take(self, task: Task | None, train: Any, ids: Sequence[Any] | None) -> None:
        """Compute and store the features of the training examples."""
        self.task_ = task
        self.train_features_ = self._features(train, "training")
        self.train_ids_ = list(range(self.train_features_.shape[0]) if ids is None else ids)

    @abstractmethod
    def _features(self, data: Any, side: str) -> Any:
        """Return features ``[examples, features]``, dense or sparse; None means the task's test examples."""


class HiddenSimilarity(_Similarity):
    """Cosine or inner product of one module's inputs: the model's representations of the examples.

    Inputs ``[batch, positions, features]`` are averaged over the positions that are no padding; inputs of any other
    shape are flattened. If a module is called several times, its inputs are averaged over the calls.

    Args:
        layer: name of the module; by default the model's last ``Linear``.
        cosine: divide by the norms (0 if a norm is zero); otherwise the plain inner product.
        batch_size: examples per pass: changes memory, not results.

    >>> model = nn.Sequential(nn.ReLU(), nn.Linear(2, 1))
    >>> X, y = torch.tensor([[3.0, 4.0], [-1.0, 2.0]]), torch.zeros(2)
    >>> HiddenSimilarity().fit(model, (X, y)).scores((X, y)).values.round(2)
    array([[1. , 0.8],
           [0.8, 1. ]], dtype=float32)
    """

    def __init__(self, layer: str | None = None, cosine: bool = True, batch_size: Count = 64) -> None:
        self.layer = layer
        self.cosine = cosine
        self.batch_size = batch_size

    @checked
    def fit(self, model: nn.Module, data: Data | Sequence[Any] | Task, mask: Mask = attention_mask) -> HiddenSimilarity:
        """Compute the training examples' representations. The model is referenced, not copied or changed.

        Args:
            model: the trained model.
            data: training examples ``(inputs, targets)``, or a task. Targets are not used.
            mask: inputs → which positions are no padding, ``[batch, positions]``; by default their "attention_mask".

        Raises:
            InvalidInput: there is no such module, it is never called, or not with one row per example; the model
                fails; or a representation is not finite.
        """
        check_parameters(self)
        task = data if isinstance(data, Task) else None
        self.layer_ = _named(model, self.layer)
        self.model_, self.mask_, self.snapshot_ = model, mask, Snapshot.of(model)
        self._take(task, data if task is None else task.train_data, None if task is None else task.train.ids)
        return self

    def _features(self, data: Data | None, side: str) -> Float[np.ndarray, "examples features"]:
        self.snapshot_.check()
        data = checked_data(self.task_.test_data if data is None and self.task_ is not None else data)
        starts = range(0, len(data[1]), self.batch_size)
        batches = [self._of_batch(rows_of(data, slice(s, s + self.batch_size)), s, side) for s in starts]
        features = torch.cat(batches).to(torch.promote_types(batches[0].dtype, torch.float32))  # numpy has no bfloat16
        if not features.isfinite().all():
            bad = int((~features.isfinite().all(1)).nonzero()[0])
            raise InvalidInput(f"the input of {side} example {bad} in layer {self.layer_!r} is not finite")
        values: np.ndarray = features.cpu().numpy()
        return normalize(values) if self.cosine else values

    def _of_batch(self, batch: Data, first: int, side: str) -> Float[Tensor, "batch features"]:
        like = next(self.model_.parameters())
        inputs, targets = cast(batch, like.device, like.dtype)
        module = self.model_.get_submodule(self.layer_)
        with evaluating(self.model_), recording({module}) as calls, explained(side, first, len(targets)):
            forward(self.model_, inputs)
        return _pooled(calls, partial(masks_of, self.mask_, inputs), len(targets), self.layer_)


def _named(model: nn.Module, layer: str | None) -> str:
    """Return the name of the module, checked; by default the last ``Linear``."""
    if layer is None:
        linear: list[str] = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise InvalidInput(f"{type(model).__name__} has no Linear layer: name a module with layer=…")
        return linear[-1]
    names = [name for name, _ in model.named_modules()]
    if layer not in names:
        raise InvalidInput(f"there is no layer {layer!r}, {did_you_mean(layer, names[1:])}")
    return layer


def _pooled(
    calls: Calls, masks: Callable[[int], list[Tensor]], batch: int, layer: str
) -> Float[Tensor, "batch features"]:
    """Average a module's inputs over its calls and their positions: one row per example."""
    if not calls:
        raise InvalidInput(f"the model never calls layer {layer!r}: name another module with layer=…")
    if not all(inputs.is_floating_point() for _, inputs, _ in calls):
        raise InvalidInput(f"the inputs of layer {layer!r} are whole numbers, not representations: name a later layer")
    rows = {len(inputs) for _, inputs, _ in calls}
    if rows != {batch}:
        raise InvalidInput(f"layer {layer!r} was called with {max(rows)} rows for {batch} examples: name another layer")
    return torch.stack([_averaged(inputs, masks) for _, inputs, _ in calls]).mean(0)


def _averaged(inputs: Tensor, masks: Callable[[int], list[Tensor]]) -> Float[Tensor, "batch features"]:
    """Average ``[batch, positions, features]`` over the positions that are no padding; flatten any other shape."""
    if inputs.ndim != 3:
        return inputs.flatten(1)
    fitting = masks(inputs.shape[1])
    if not fitting:
        return inputs.mean(1)
    weights = fitting[0].to(inputs)[..., None]
    return (inputs * weights).sum(1) / weights.sum(1).clamp(min=1)


class _TextSimilarity(_Similarity):
    """Cosine of bags of words or n-grams, by a scikit-learn vectorizer; 0 for a text without known words."""

    column: str

    @checked
    def fit(self: SimilarityT, texts: Texts) -> SimilarityT:
        """Learn the vocabulary of the training texts.

        Args:
            texts: a list of texts, examples with texts in the metadata column ``column``, or a task of such examples.

        Raises:
            InvalidInput: there is no text, a text is not a string, there is no such column, the texts have no words,
                or scikit-learn refuses the parameters.
        """
        task = texts if isinstance(texts, Task) else None
        train = texts if task is None else task.train
        self.vectorizer_ = self._vectorizer()
        try:
            self.vectorizer_.fit(self._texts(train, "training"))
        except ValueError as error:
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"scikit-learn cannot learn a vocabulary from the training texts: {error}") from error
        self._take(task, train, train.ids if isinstance(train, Examples) else None)
        return self

    def _features(self, data: Sequence[str] | Examples | None, side: str) -> Any:
        examples = self.task_.test if data is None and self.task_ is not None else data
        return normalize(self.vectorizer_.transform(self._texts(examples, side)))

    def _texts(self, examples: Any, side: str) -> list[str]:
        """Return the texts of a list or of examples, checked."""
        texts = examples.column(self.column) if isinstance(examples, Examples) else examples
        if isinstance(texts, str) or not isinstance(texts, Sequence | np.ndarray):
            raise InvalidInput(f"{side} texts must be a list of texts or Examples, got {type(texts).__name__}")
        wrong = [index for index, text in enumerate(texts) if not isinstance(text, str)]
        if wrong:
            raise InvalidInput(f"{side} text {wrong[0]} must be a string, got {texts[wrong[0]]!r}")
        if not len(texts):
            raise InvalidInput(f"there are no {side} texts: pass at least one")
        return list(texts)

    @abstractmethod
    def _vectorizer(self) -> CountVectorizer: ...


class NGrams(_TextSimilarity):
    """Cosine of bags of n-grams: counts of scikit-learn's words (of two letters or more, in lower case).

    Args:
        n: number of words; a pair (shortest, longest) for several lengths.
        column: the metadata column with the examples' texts.

    >>> NGrams(n=1).fit(["a red fox", "a blue bird"]).scores(["red fox, red fox", "fox and bird"]).values.round(2)
    array([[1. , 0. ],
           [0.5, 0.5]])
    """

    def __init__(self, n: int | tuple[int, int] = 1, column: str = "text") -> None:
        self.n = n
        self.column = column

    def _vectorizer(self) -> CountVectorizer:
        return CountVectorizer(ngram_range=_lengths(self.n))


class TfIdf(_TextSimilarity):
    """Cosine of bags of n-grams, with less weight for n-grams in many texts (TF-IDF; Salton & Buckley 1988).

    Args:
        n, column: same as in ``NGrams``.

    >>> scores = TfIdf().fit(["the red fox", "the bird", "the blue bird"]).scores(["what did the fox eat?"])
    >>> scores.values.round(2)
    array([[0.76, 0.31, 0.22]])
    """

    def __init__(self, n: int | tuple[int, int] = 1, column: str = "text") -> None:
        self.n = n
        self.column = column

    def _vectorizer(self) -> CountVectorizer:
        return TfidfVectorizer(ngram_range=_lengths(self.n))


def _lengths(n: Any) -> tuple[int, int]:
    low, high = n if isinstance(n, tuple) and len(n) == 2 else (n, n)
    if not (isinstance(low, int | np.integer) and isinstance(high, int | np.integer) and 1 <= low <= high):
        raise InvalidInput(f"n must be a whole number from 1 up, or a pair (shortest, longest) of them; got {n!r}")
    return int(low), int(high)


@checked
def candidates(scores: Any, k: int) -> Int[np.ndarray, " candidates"]:
    """Return the indices, sorted, of the training examples among the k best of at least one test example.

    Pass them to ``Attributor.scores(…, train=…)``: a cheap attributor proposes, a costly one decides.

    Args:
        scores: ``[test, train]``, the larger the better.
        k: number of training examples per test example; ties go to the earlier training example.

    Raises:
        InvalidInput: ``scores`` has other axes, or k is not from 1 to the number of training examples.

    >>> candidates(TfIdf().fit(["red fox", "blue bird", "red bird"]).scores(["a fox", "red foxes"]), k=1)
    array([0, 2])
    """
    values = np.asarray(scores)
    if values.ndim != 2:
        raise InvalidInput(f"scores must be [test, train], got {values.shape}")
    if not 1 <= k <= values.shape[1]:
        raise InvalidInput(f"k must be from 1 to the number of training examples, {values.shape[1]}; got {k}")
    return np.unique(np.argsort(-values, axis=1, kind="stable")[:, :k])
