"""What an attributor says of each pair of a test and a training example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class Scores:
    """Scores ``[test, train]``, or ``[layer, test, train]``; ``np.asarray`` gives the array.

    A positive score of (z, i): training on i lowers the loss of z.

    Args:
        values: the scores.
        unit: "loss" is the predicted rise of z's loss if every occurrence of i were taken out of training; the effect
            of removing several is the sum. "raw" is the method's own number.
        method: the attributor that gave them.
        layers: names along the first axis, where there is one.
        train, test: ids, by default 0, 1, 2, …

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

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    def to_frame(self) -> pd.DataFrame:
        """A row per score: (layer,) test, train, score."""
        count, n_train = self.values.shape[-2:]
        names: dict[str, Sequence[Any]] = {} if self.layers is None else {"layer": self.layers}
        names |= {
            "test": range(count) if self.test is None else self.test,
            "train": range(n_train) if self.train is None else self.train,
        }
        index = pd.MultiIndex.from_product(list(names.values()), names=list(names))
        return pd.DataFrame({"score": self.values.reshape(-1)}, index=index).reset_index()

    def __repr__(self) -> str:
        axes = "layer × test × train" if self.layers is not None else "test × train"
        return f"Scores({self.method}, {' × '.join(map(str, self.shape))} ({axes}), unit={self.unit!r})"


@dataclass(frozen=True, eq=False)
class TopScores:
    """The training examples with the largest scores for each test example, the largest first.

    Args:
        indices: of training examples.
        values: their scores.
        unit, method: as of ``Scores``.
    """

    indices: Int[np.ndarray, "test k"]
    values: Float[np.ndarray, "test k"]
    unit: str
    method: str
