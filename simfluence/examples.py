"""The ids, metadata and features of a task's training or test examples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Annotated, Any

import numpy as np
import pandas as pd
from annotated_types import Ge

from simfluence import filters
from simfluence._internal.checked import checked, shown
from simfluence._internal.columns import plain_table
from simfluence._internal.targets import Selection, as_target, one_target
from simfluence._internal.types import Indices, Target
from simfluence._internal.validation import checked_indices
from simfluence.errors import FilterError, InvalidInput, did_you_mean

__all__ = ["Examples"]


class Examples:
    """Ids, metadata and features of the training or the test examples, in index order. Not the model's inputs.

    Args:
        ids: one distinct string per example.
        metadata: one row per example (label, text, group, …); filters use its columns and ``id``.
        features: numbers that describe each example, ``[examples, features]`` (pixels, a sentence encoder's vectors,
            …), for simulators that compare examples. Stored in single precision.
        targets: training targets, ``[examples]`` (whole numbers are classes) or ``[examples, outputs]``.

    Raises:
        InvalidInput: there is not one row per example, an id repeats, or a feature is not a finite number.

    >>> examples = Examples(["a", "b", "c"], pd.DataFrame({"label": [3, 1, 3]}))
    >>> examples.select("label == 3")
    array([0, 2])
    """

    @checked
    def __init__(
        self, ids: Sequence[Any], metadata: pd.DataFrame | None = None, features: Any = None, targets: Any = None
    ) -> None:
        metadata = pd.DataFrame(index=range(len(ids))) if metadata is None else metadata
        if len(metadata) != len(ids):
            raise InvalidInput(f"{len(ids)} ids, but {len(metadata)} rows of metadata: give one row per example")
        if "id" in metadata.columns:
            raise InvalidInput("metadata must not have a column 'id': pass it as ids=")
        self.table = plain_table(metadata)
        self.table.insert(0, "id", [str(name) for name in ids])
        repeated = self.table["id"][self.table["id"].duplicated()]
        if len(repeated):
            raise InvalidInput(f"example ids must be distinct; {repeated.iloc[0]!r} appears twice")
        self.features = None if features is None else _checked("features", features, len(ids), (2,), np.float32)
        self.targets = None if targets is None else _checked("targets", targets, len(ids), (1, 2), None)

    @classmethod
    @checked
    def numbered(
        cls,
        count: Annotated[int, Ge(0)],
        metadata: pd.DataFrame | None = None,
        features: Any = None,
        targets: Any = None,
    ) -> Examples:
        """Build examples whose ids are "0", "1", …"""
        return cls(range(count), metadata, features, targets)

    def with_features(self, features: Any, targets: Any = None) -> Examples:
        """Return the same examples with other features, and other targets if given.

        Raises:
            InvalidInput: there is not one row per example, or a number is not finite.
        """
        return Examples(self.ids, self.table.drop(columns="id"), features, self.targets if targets is None else targets)

    @property
    def ids(self) -> list[str]:
        ids: list[str] = self.table["id"].tolist()
        return ids

    @checked
    def column(self, name: str) -> list[Any]:
        """Return the values of a metadata column.

        Raises:
            InvalidInput: the metadata has no such column.
        """
        if name not in self.table.columns:
            raise InvalidInput(
                f"no column {name!r} in the examples' metadata: {did_you_mean(name, self.table.columns)}"
            )
        values: list[Any] = self.table[name].tolist()
        return values

    def select(self, target: Target | None = None, *, rows: Any = None, ids: Any = None) -> Indices:
        """Return the indices of the examples that a target selects.

        Args:
            target: a filter (one string), a boolean mask, or a list of rows or of ids.
            rows: row numbers, 0 the first. Needed where ids are numbers too, so that a bare number could mean either.
            ids: ids of examples, as text or numbers.

        Raises:
            InvalidInput: a row or id does not exist, a filter or mask selects nothing, or bare numbers are ambiguous.

        >>> numbered = Examples([3, 1, 2])
        >>> numbered.select(ids=[3, 2]), numbered.select(rows=[1])
        (array([0, 2]), array([1]))
        """
        chosen = as_target("target", one_target(target, rows, ids))
        if isinstance(chosen, str):
            return self._matching(chosen)
        if isinstance(chosen, Selection):
            return self._indices_of(chosen.values) if chosen.kind == "ids" else self._rows_of(chosen)
        if len(chosen) and all(isinstance(name, str) for name in chosen):
            return self._indices_of(chosen)
        if self.numbers_are_ambiguous:
            raise InvalidInput(
                f"the ids of these examples are numbers (such as {', '.join(self.ids[:3])}), so {list(chosen[:3])} can "
                "mean ids or rows: write ids=[…] or rows=[…]"
            )
        return checked_indices(chosen, len(self))

    @cached_property
    def numbers_are_ambiguous(self) -> bool:
        """Whether a bare number could mean an id or a row: the ids are whole numbers, but not 0, 1, … in order."""
        ids = self.ids
        whole = all(name.removeprefix("-").isdecimal() for name in ids)
        return whole and ids != [str(row) for row in range(len(ids))]

    def _rows_of(self, chosen: Selection) -> Indices:
        if chosen.out_of not in (None, len(self)):
            raise InvalidInput(f"the mask has {chosen.out_of} entries for {len(self)} examples: give one per example")
        if len(chosen) == 0:
            raise InvalidInput(f"the mask selects none of the {len(self)} examples")
        return checked_indices(chosen.values, len(self))

    def _matching(self, text: str) -> Indices:
        indices = np.flatnonzero(filters.parse(text).mask(self.table))
        if len(indices) == 0:
            raise FilterError(f"filter {text!r} matches none of the {len(self)} examples. Columns: {self._columns()}")
        return indices

    @cached_property
    def _row_of_id(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self.ids)}

    def _indices_of(self, ids: Any) -> Indices:
        unknown = [name for name in ids if name not in self._row_of_id]
        if unknown:
            raise InvalidInput(f"no example {unknown[0]!r}, {did_you_mean(unknown[0], self.ids[:1000])[:200]}")
        return np.array([self._row_of_id[name] for name in ids])

    def _columns(self) -> str:
        return "; ".join(f"{name} ({_first_values(self.table[name])})" for name in self.table.columns)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"Examples({len(self)}: {', '.join(self.table.columns)})"


def _first_values(column: pd.Series, limit: int = 6) -> str:
    values = column.drop_duplicates()
    shown = [str(value)[:20] for value in values.head(limit)]
    return ", ".join(shown) + (", …" if len(values) > limit else "")


def _checked(name: str, values: Any, count: int, ranks: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return ``values`` as an array with one row per example.

    Raises:
        InvalidInput: the number of rows or axes is wrong, or a value is not a finite number.
    """
    try:
        array = np.asarray(values)
    except (TypeError, ValueError, RuntimeError):
        raise InvalidInput(f"{name} must be numbers with one row per example, got {shown(values)}") from None
    if array.dtype.kind not in "biuf" or array.ndim not in ranks:
        raise InvalidInput(f"{name} must be numbers with one row per example, got {array.dtype}{list(array.shape)}")
    if len(array) != count:
        raise InvalidInput(f"{name} have {len(array)} rows for {count} examples: give one per example, in their order")
    if 0 in array.shape[1:]:
        raise InvalidInput(f"{name} have no columns")
    with np.errstate(over="ignore"):
        converted = array.astype(dtype or array.dtype.newbyteorder("="))
    if not np.isfinite(converted).all():
        bad = int(np.flatnonzero(~np.isfinite(converted.reshape(count, -1)).all(axis=1))[0])
        raise InvalidInput(f"{name} of example {bad} are NaN, infinite, or beyond {converted.dtype}: fill or drop them")
    return converted
