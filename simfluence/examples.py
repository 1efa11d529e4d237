"""One side of a task's data as people speak of it: ids and a metadata table."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from simfluence import filters
from simfluence._indices import checked_indices
from simfluence._types import Indices, Target
from simfluence.errors import FilterError, InvalidInput, did_you_mean


class Examples:
    """Ids and metadata of the training or the test examples, in index order. Not their tensors.

    Args:
        ids: one distinct text per example.
        metadata: one row per example (label, text, group, …); filters speak of its columns and of ``id``.

    >>> examples = Examples(["a", "b", "c"], pd.DataFrame({"label": [3, 1, 3]}))
    >>> examples.select("label == 3")
    array([0, 2])
    """

    def __init__(self, ids: Sequence[Any], metadata: pd.DataFrame | None = None) -> None:
        metadata = pd.DataFrame(index=range(len(ids))) if metadata is None else metadata
        if len(metadata) != len(ids):
            raise InvalidInput(f"{len(ids)} ids, but {len(metadata)} rows of metadata")
        if "id" in metadata.columns:
            raise InvalidInput("metadata has a column 'id': give it as ids=")
        self.table = metadata.reset_index(drop=True)
        self.table.insert(0, "id", [str(name) for name in ids])
        repeated = self.table["id"][self.table["id"].duplicated()]
        if len(repeated):
            raise InvalidInput(f"example ids must be distinct; {repeated.iloc[0]!r} stands twice")

    @classmethod
    def numbered(cls, count: int, metadata: pd.DataFrame | None = None) -> Examples:
        """Examples whose ids are "0", "1", …"""
        return cls(range(count), metadata)

    @property
    def ids(self) -> list[str]:
        return self.table["id"].tolist()

    def column(self, name: str) -> list[Any]:
        """The values of a metadata column.

        Raises:
            InvalidInput: there is no such column.
        """
        if name not in self.table.columns:
            raise InvalidInput(
                f"no column {name!r} in the examples' metadata: {did_you_mean(name, self.table.columns)}"
            )
        return self.table[name].tolist()

    def select(self, target: Target) -> Indices:
        """The indices that ``target`` means: a filter (one text), a list of indices, or a list of ids.

        Raises:
            InvalidInput: an index or id that is not there, or a filter that matches nothing.
        """
        if isinstance(target, str):
            return self._matching(target)
        if len(target) and all(isinstance(name, str) for name in target):
            return self._of_ids(target)
        return checked_indices(target, len(self))

    def _matching(self, text: str) -> Indices:
        found = np.flatnonzero(filters.parse(text).mask(self.table))
        if len(found) == 0:
            raise FilterError(f"filter {text!r} matches none of {len(self)} examples. Columns: {self._columns()}")
        return found

    def _of_ids(self, ids: Any) -> Indices:
        position = {name: index for index, name in enumerate(self.ids)}
        unknown = [name for name in ids if name not in position]
        if unknown:
            raise InvalidInput(f"no example {unknown[0]!r}, {did_you_mean(unknown[0], self.ids[:1000])[:200]}")
        return np.array([position[name] for name in ids])

    def _columns(self) -> str:
        return "; ".join(f"{name} ({_some_values(self.table[name])})" for name in self.table.columns)

    def __len__(self) -> int:
        return len(self.table)

    def __repr__(self) -> str:
        return f"Examples({len(self)}: {', '.join(self.table.columns)})"


def _some_values(column: pd.Series, limit: int = 6) -> str:
    values = column.drop_duplicates()
    shown = [str(value)[:20] for value in values.head(limit)]
    return ", ".join(shown) + (", …" if len(values) > limit else "")
