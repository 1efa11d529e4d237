"""Scores: one number per pair of a test and a training example, from an attributor or from a simulator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from simfluence._internal.checked import checked
from simfluence._internal.deprecation import warn_renamed
from simfluence._internal.types import Share
from simfluence.errors import InvalidInput

__all__ = ["Scores", "Tail", "TopScores"]

_MIN_TAIL = 20  # smallest number of scores that the tail's exponent is estimated from


@dataclass(frozen=True, eq=False)
class Scores(np.lib.mixins.NDArrayOperatorsMixin):
    """Scores ``[test, train]``, or ``[layer, test, train]``. They are indexed and computed with like an array.

    A positive score of (z, i): training on i lowers the loss of z.

    Args:
        values: the scores.
        unit: "loss" is the predicted rise of z's loss if every occurrence of i were removed from training; the effect
            of removing several is about the sum. "change" is the predicted rise of z's loss by another edit of i, such
            as showing it once more. "raw" is the method's own number.
        method: name of the attributor or simulator that computed the scores.
        layers: layer names along the first axis, if the scores are by layer.
        train, test: ids of the examples, by default 0, 1, 2, …

    >>> scores = Scores(np.array([[0.5, -1.0]]), "loss", "EKFAC", train=["cat", "dog"])
    >>> scores.to_frame()
       test train  score
    0     0   cat    0.5
    1     0   dog   -1.0
    >>> np.asarray(scores).shape
    (1, 2)
    """

    values: Float[np.ndarray, "*layer test train"]
    unit: str
    method: str
    layers: Sequence[str] | None = None
    train: Sequence[Any] | None = None
    test: Sequence[Any] | None = None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.values, dtype=dtype, copy=copy)

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = [part.values if isinstance(part, Scores) else part for part in inputs]
        return getattr(ufunc, method)(*arrays, **options)

    def __getitem__(self, index: Any) -> Any:
        return self.values[index]

    def __len__(self) -> int:
        return len(self.values)

    def __getattr__(self, name: str) -> Any:
        """Answer for the array that ``leave_one_out`` and its relatives returned before."""
        if name.startswith("_") or not hasattr(np.ndarray, name):
            raise AttributeError(f"Scores have no {name!r}")
        warn_renamed(f"scores.{name}", f"scores.values.{name}")
        return getattr(self.values, name)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def to_frame(self) -> pd.DataFrame:
        """Return a table with one row per score: (layer,) test, train, score."""
        n_test, n_train = self.values.shape[-2:]
        names: dict[str, Sequence[Any]] = {} if self.layers is None else {"layer": self.layers}
        names |= {
            "test": range(n_test) if self.test is None else self.test,
            "train": range(n_train) if self.train is None else self.train,
        }
        index = pd.MultiIndex.from_product(list(names.values()), names=list(names))
        return pd.DataFrame({"score": self.values.reshape(-1)}, index=index).reset_index()

    def by_layer(self) -> pd.DataFrame:
        """Return each layer's share of the total absolute score, summed over training examples.

        Returns:
            A row per layer: ``share``, the mean over test examples, and ``low`` and ``high``, the 10th and 90th
            percentile over them. Test examples whose scores are all 0 are left out.

        Raises:
            InvalidInput: these scores are not by layer.

        >>> Scores(np.array([[[1.0, -2.0]], [[0.0, 1.0]]]), "raw", "GradientDot", ["0", "2"]).by_layer().share.tolist()
        [0.75, 0.25]
        """
        if self.layers is None:
            raise InvalidInput("these scores are not by layer: ask for scores(by_layer=True)")
        sizes = np.abs(self.values.astype(np.float64)).sum(axis=2)  # [layer, test]
        total = sizes.sum(axis=0)
        shares = (sizes / np.where(total > 0, total, 1.0))[:, total > 0]
        if shares.shape[1] == 0:
            shares = np.full((len(sizes), 1), np.nan)
        low, high = np.quantile(shares, [0.1, 0.9], axis=1)
        return pd.DataFrame(
            {"share": shares.mean(axis=1), "low": low, "high": high}, pd.Index(self.layers, name="layer")
        )

    @checked
    def tail(self, top: Share = 0.01) -> Tail:
        """Measure how unevenly positive influence is spread (Grosse et al. 2023, section 5.2).

        Args:
            top: fraction of the training examples (for ``share``) and of the scores (for ``exponent``) that is the top.

        Raises:
            InvalidInput: ``top`` is not between 0 and 1.

        >>> scores = Scores(np.array([[0.0, 1.0, 1.0, 8.0]]), "raw", "GradientDot")
        >>> scores.tail(top=0.25).share
        0.8
        """
        values = self.values.astype(np.float64)
        values = values.sum(axis=0) if values.ndim == 3 else values
        ordered = -np.sort(-np.maximum(values, 0.0), axis=1)  # [test, train]
        total = ordered.sum(axis=1)
        first = ordered[:, : max(1, round(top * ordered.shape[1]))].sum(axis=1)
        share = float((first[total > 0] / total[total > 0]).mean()) if (total > 0).any() else float("nan")
        positive = -np.sort(-values[values > 0])
        count = max(_MIN_TAIL, round(top * values.size))
        if len(positive) <= count or positive[0] == positive[count]:
            return Tail(share, float("nan"), float("nan"), 0)
        start = float(positive[count])
        return Tail(share, count / float(np.log(positive[:count] / start).sum()), start, count)

    def __repr__(self) -> str:
        axes = "layer × test × train" if self.layers is not None else "test × train"
        return f"Scores({self.method}, {' × '.join(map(str, self.shape))} ({axes}), unit={self.unit!r})"


@dataclass(frozen=True)
class Tail:
    """How unevenly positive scores are spread.

    Args:
        share: fraction of a test example's positive influence from its top training examples; mean over test examples.
        exponent: a of ``P(score > s) ∝ s^−a`` among the largest scores of all pairs, by Hill's estimator (Hill 1975);
            NaN if there are too few.
        start: the score above which the exponent is estimated.
        count: number of scores used for the exponent.
    """

    share: float
    exponent: float
    start: float
    count: int


@dataclass(frozen=True, eq=False)
class TopScores:
    """The training examples with the largest scores for each test example, the largest first.

    Args:
        indices: indices of the training examples.
        values: scores of these examples.
        unit, method: see ``Scores``.

    >>> best = TopScores(np.array([[4, 0]]), np.array([[0.9, 0.2]]), "loss", "EKFAC")
    >>> best.indices[0, 0]
    np.int64(4)
    """

    indices: Int[np.ndarray, "test k"]
    values: Float[np.ndarray, "test k"]
    unit: str
    method: str
