"""The groups that examples fall into, such as classes: what a forecast must know more of than who is in which."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Int

from simfluence._internal.checked import checked
from simfluence.errors import InvalidInput
from simfluence.examples import Examples

__all__ = ["Groups", "groups_of"]


@dataclass(frozen=True, eq=False)
class Groups:
    """The number of each example's group, the same on both sides.

    Args:
        name: what the groups are called: a metadata column, or "target".
        test: groups of the test examples.
        train: groups of the training examples, if known.
    """

    name: str
    test: Int[np.ndarray, " test"]
    train: Int[np.ndarray, " train"] | None = None

    @property
    def same(self) -> Bool[np.ndarray, "test train"]:
        """Whether a test and a training example are of one group.

        As scores, these are the baseline of every attribution: "examples of the same class help".

        Raises:
            InvalidInput: the groups of the training examples are not known.
        """
        if self.train is None:
            raise InvalidInput(f"the {self.name} of the training examples is not known: give Groups both sides")
        same: np.ndarray = self.test[:, None] == self.train
        return same


@checked
def groups_of(train: Examples | None, test: Examples | None, column: str | None = None) -> Groups | None:
    """Look up the groups of examples: a metadata column, by default ``label``, else whole-number targets.

    Args:
        train, test: training and test examples, as far as they are known.
        column: a metadata column of the test examples, and of the training examples if they have it.

    Returns:
        The groups, or None if no column is named and the test examples have neither labels nor classes as targets.

    Raises:
        InvalidInput: the test examples have no such column.

    >>> train, test = (Examples.numbered(3, pd.DataFrame({"label": list(labels)})) for labels in ("bac", "aab"))
    >>> groups_of(train, test).same.tolist()
    [[False, True, False], [False, True, False], [True, False, False]]
    """
    if column is not None:
        if test is None:
            raise InvalidInput(f"the test examples have no metadata: pass task= to look up {column!r}")
        return _numbered(column, test.column(column), _column(train, column))
    if (labels := _column(test, "label")) is not None:
        return _numbered("label", labels, _column(train, "label"))
    targets = _classes(test)
    return None if targets is None else _numbered("target", targets, _classes(train))


def _column(examples: Examples | None, name: str) -> Sequence[Any] | None:
    return None if examples is None or name not in examples.table.columns else examples.column(name)


def _classes(examples: Examples | None) -> Sequence[Any] | None:
    """Return targets that are one whole number per example; None for others."""
    targets = None if examples is None else examples.targets
    return None if targets is None or targets.ndim > 1 or targets.dtype.kind not in "iub" else targets.tolist()


def _numbered(name: str, test: Sequence[Any], train: Sequence[Any] | None) -> Groups:
    """Number the distinct values of both sides. Examples without a value are a group too, number −1."""
    values = [value if isinstance(value, Hashable) else str(value) for value in [*test, *(train or [])]]
    numbers, _ = pd.factorize(pd.Series(values, dtype=object))
    return Groups(name, numbers[: len(test)], None if train is None else numbers[len(test) :])
