"""Targets, which say what examples are meant: a filter, rows, ids, a mask, or a list of either rows or ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from simfluence.errors import InvalidInput

__all__ = ["Selection", "as_target", "one_target"]

KINDS = ("rows", "ids")


@dataclass(frozen=True)
class Selection:
    """Examples named by their rows or by their ids.

    Args:
        kind: "rows" or "ids".
        values: row numbers, or ids as text.
        out_of: how many examples there must be, if the selection was a mask.
    """

    kind: str
    values: tuple[int, ...] | tuple[str, ...]
    out_of: int | None = None

    def __len__(self) -> int:
        return len(self.values)

    def to_dict(self) -> dict[str, Any]:
        """Return the selection as plain content: ``{"rows": […]}`` or ``{"ids": […]}``."""
        return {self.kind: list(self.values)}


def one_target(target: Any, rows: Any, ids: Any) -> Any:
    """Return the one target that was passed as ``target``, ``rows=`` or ``ids=``.

    Raises:
        InvalidInput: none or several were passed.

    >>> one_target(None, [2, 0], None)
    Selection(kind='rows', values=(2, 0), out_of=None)
    """
    passed = {"target": target, "rows": rows, "ids": ids}
    names = [name for name, value in passed.items() if value is not None]
    if len(names) != 1:
        given = f"got {' and '.join(names)}" if names else "got none"
        raise InvalidInput(f"give one of target, rows= and ids=, {given}")
    name = names[0]
    return target if name == "target" else as_target(name, {name: passed[name]})


def as_target(name: str, value: Any) -> str | Selection | tuple[Any, ...]:
    """Return a target in its frozen form: a filter, a ``Selection``, or a tuple that can mean rows or ids.

    Raises:
        InvalidInput: the value is no target.

    >>> as_target("target", np.array([True, False, True]))
    Selection(kind='rows', values=(0, 2), out_of=3)
    >>> as_target("target", pd.Series([3, 1]))
    (3, 1)
    """
    if isinstance(value, str | Selection):
        return value
    if isinstance(value, Mapping):
        return _from_mapping(name, value)
    array = np.asarray(value) if isinstance(value, np.ndarray | pd.Series | pd.Index) else None
    if array is not None and array.ndim == 1:
        value = array.tolist()
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise _no_target(name, value)
    entries = tuple(entry.item() if isinstance(entry, np.generic) else entry for entry in value)
    if entries and all(isinstance(entry, bool) for entry in entries):
        return Selection("rows", tuple(np.flatnonzero(entries).tolist()), len(entries))
    if not all(isinstance(entry, int | str) and not isinstance(entry, bool) for entry in entries):
        raise _no_target(name, value)
    return entries


def _from_mapping(name: str, value: Mapping[Any, Any]) -> Selection:
    if len(value) != 1 or next(iter(value)) not in KINDS:
        raise InvalidInput(f"{name} as a mapping must be {{rows: […]}} or {{ids: […]}}, got the keys {list(value)[:5]}")
    ((kind, entries),) = value.items()
    plain = as_target(f"{name} {kind}", entries)
    if isinstance(plain, str) or len(plain) == 0:
        raise InvalidInput(f"{kind} must be a list of one or more, got {entries!r}")
    if isinstance(plain, Selection):  # a mask
        if kind == "ids" or plain.kind != kind:
            raise InvalidInput(f"{kind} must be a list of {kind}, not a mask")
        return plain
    if kind == "ids":
        return Selection("ids", tuple(str(entry) for entry in plain))
    if not all(isinstance(entry, int) for entry in plain):
        raise InvalidInput(f"rows must be whole numbers, got {next(e for e in plain if not isinstance(e, int))!r}")
    return Selection("rows", plain)


def _no_target(name: str, value: Any) -> InvalidInput:
    return InvalidInput(
        f"{name} must be a filter (a string), rows, ids or a mask of examples, got {_short(value)}; expected such as "
        "'label == 3', [0, 17], ['a', 'b'] or a boolean array"
    )


def _short(value: Any) -> str:
    if isinstance(value, np.ndarray):
        return f"an array {list(value.shape)} of {value.dtype}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"
