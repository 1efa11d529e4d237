"""Filters over example metadata, such as ``label == 3 and group in ["a", "b"]``.

A filter is parsed by the grammar below and applied column by column; it is never evaluated as code.

    filter      = and_part ("or" and_part)*
    and_part    = part ("and" part)*
    part        = "not" part | "(" filter ")" | comparison
    comparison  = column ("==" | "!=" | "<" | "<=" | ">" | ">=") value
                | column ["not"] "in" "[" value ("," value)* "]"
                | column ["not"] "contains" string
    value       = number | string | "true" | "false"
    column      = a name, or any text between backticks

A comparison with a missing value is false, except ``!=``, which is true. ``in`` is ``==`` one value or another.
Dates and durations are compared with quoted ones, such as ``day >= "2024-06-01"``; ordered categories by their order.
"""

from __future__ import annotations

import numbers
import operator
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from simfluence._internal.columns import plain_column
from simfluence.errors import FilterError, did_you_mean

__all__ = ["All", "Comparison", "Either", "Filter", "Not", "Value", "parse"]

Value = int | float | str | bool

_MAX_LENGTH = 10_000
_MAX_DEPTH = 50
_MAX_DIGITS = 100
_TOKEN = re.compile(
    r"""\s*(?:(?P<number>[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
          |(?P<string>"(?:[^"\\]|\\.)*"|'(?:[^'\\]|\\.)*')
          |`(?P<quoted>[^`]+)`
          |(?P<name>[^\W\d]\w*)
          |(?P<mark>==|!=|<=|>=|<|>|\(|\)|\[|\]|,))""",
    re.VERBOSE,
)
_ORDER: dict[str, Callable[[Any, Any], Any]] = {
    "==": operator.eq, "!=": operator.ne, "<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
}  # fmt: skip
_KEYWORDS = {"and", "or", "not", "in", "contains", "true", "false", "True", "False"}


@dataclass(frozen=True)
class Comparison:
    """A comparison of a column by ``== != < <= > >=``, ``in`` (a tuple) or ``contains``."""

    column: str
    operator: str
    value: Value | tuple[Value, ...]

    def mask(self, table: pd.DataFrame) -> np.ndarray:
        column = plain_column(_column(table, self.column))
        if isinstance(self.value, tuple):  # "in" is "==" one or another
            return _any(_holds(column, "==", value) for value in self.value)
        return _holds(column, self.operator, self.value)


@dataclass(frozen=True)
class Not:
    """A filter that is true where ``part`` is false."""

    part: Filter

    def mask(self, table: pd.DataFrame) -> np.ndarray:
        return ~self.part.mask(table)


@dataclass(frozen=True)
class All:
    """A filter that is true where all its parts are true."""

    parts: tuple[Filter, ...]

    def mask(self, table: pd.DataFrame) -> np.ndarray:
        return ~_any(~part.mask(table) for part in self.parts)


@dataclass(frozen=True)
class Either:
    """A filter that is true where at least one of its parts is true."""

    parts: tuple[Filter, ...]

    def mask(self, table: pd.DataFrame) -> np.ndarray:
        return _any(part.mask(table) for part in self.parts)


Filter = Comparison | Not | All | Either


def parse(text: str) -> Filter:
    """Parse the text of a filter.

    Raises:
        FilterError: the text is not a filter; the message has the position of the error.

    >>> parse('label == 3 or not group in ["a"]').mask(pd.DataFrame({"label": [3, 1], "group": ["a", "a"]}))
    array([ True, False])
    """
    if len(text) > _MAX_LENGTH:
        raise FilterError(f"the filter has {len(text):,} characters, more than the limit of {_MAX_LENGTH:,}")
    parser = _Parser(text)
    result = parser.filter(0)
    if parser.kind != "end":
        raise parser.error("expected 'and', 'or' or the end")
    return result


class _Parser:
    """A recursive-descent parser of one filter, with one token of look-ahead."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.end = 0
        self.advance()

    def advance(self) -> None:
        """Read the next token into ``kind``, ``token`` (its text) and ``start``."""
        rest = self.text[self.end :]
        self.start = self.end + len(rest) - len(rest.lstrip())
        match = _TOKEN.match(self.text, self.end)
        if match is None:
            self.kind, self.token = ("end", "") if not rest.strip() else ("unknown", rest.strip()[0])
            return
        self.kind, self.token = str(match.lastgroup), match[str(match.lastgroup)]
        self.end = match.end()
        if self.kind == "name" and self.token in _KEYWORDS:
            self.kind = "keyword"

    def error(self, expected: str) -> FilterError:
        actual = repr(self.token) if self.token else "the end"
        return FilterError(
            f"filter {self.text!r}: {expected}, but got {actual} at position {self.start}. "
            'Filters compare columns with values, such as label == 3 and group in ["a", "b"]'
        )

    def take(self, token: str) -> bool:
        if self.kind in ("mark", "keyword") and self.token == token:
            self.advance()
            return True
        return False

    def expect(self, token: str) -> None:
        if not self.take(token):
            raise self.error(f"expected {token!r}")

    def filter(self, depth: int) -> Filter:
        parts = [self.and_part(depth)]
        while self.take("or"):
            parts.append(self.and_part(depth))
        return parts[0] if len(parts) == 1 else Either(tuple(parts))

    def and_part(self, depth: int) -> Filter:
        parts = [self.part(depth)]
        while self.take("and"):
            parts.append(self.part(depth))
        return parts[0] if len(parts) == 1 else All(tuple(parts))

    def part(self, depth: int) -> Filter:
        if depth > _MAX_DEPTH:
            raise FilterError(f"the filter is nested more than {_MAX_DEPTH} levels deep")
        if self.take("not"):
            return Not(self.part(depth + 1))
        if self.take("("):
            inner = self.filter(depth + 1)
            self.expect(")")
            return inner
        return self.comparison()

    def comparison(self) -> Filter:
        if self.kind not in ("name", "quoted"):
            raise self.error("expected a column")
        column = self.token
        self.advance()
        if self.kind == "mark" and self.token in _ORDER:
            symbol = self.token
            self.advance()
            return Comparison(column, symbol, self.value())
        negated = self.take("not")
        if self.take("in"):
            comparison: Filter = Comparison(column, "in", self.values())
        elif self.take("contains"):
            comparison = Comparison(column, "contains", self.value())
        else:
            raise self.error(f"expected a comparison after {column!r}")
        return Not(comparison) if negated else comparison

    def values(self) -> tuple[Value, ...]:
        self.expect("[")
        values = [self.value()]
        while self.take(","):
            values.append(self.value())
        self.expect("]")
        return tuple(values)

    def value(self) -> Value:
        kind, token = self.kind, self.token
        if kind not in ("number", "string") and token.lower() not in ("true", "false"):
            raise self.error("expected a number, a quoted string, true or false")
        self.advance()
        if kind == "string":
            return re.sub(r"\\(.)", r"\1", token[1:-1])
        if kind == "number":
            if len(token) > _MAX_DIGITS:
                raise FilterError(f"the number {token[:20]}… has {len(token):,} characters: write it shorter")
            return int(token) if re.fullmatch(r"[+-]?\d+", token) else float(token)
        return token.lower() == "true"


def _any(masks: Iterable[np.ndarray]) -> np.ndarray:
    union: np.ndarray = np.logical_or.reduce(list(masks))
    return union


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    if name not in table.columns:
        raise FilterError(f"no column {name!r} in the examples' metadata: {did_you_mean(name, table.columns)}")
    return table[name]


def _holds(column: pd.Series, symbol: str, value: Value) -> np.ndarray:
    """Compare the present values of a plain column; a missing one differs from every value, and that is all."""
    missing = column.isna().to_numpy(bool)
    mask = np.full(len(column), symbol == "!=")
    if missing.all():
        return mask
    present = column[~missing]
    if symbol == "contains":
        texts = _texts(present, value)
        mask[~missing] = [str(value) in text for text in texts]
    else:
        values, operand = _comparable(present, symbol, value)
        mask[~missing] = _ORDER[symbol](values, operand)
    return mask


def _texts(column: pd.Series, value: Value) -> list[str]:
    kind = _kind(column)
    if kind not in ("text", "date", "duration") or not isinstance(value, str):
        raise FilterError(f"'contains' looks for text in a text column; column {column.name!r} is {column.dtype}")
    return [str(entry) for entry in column]


def _comparable(column: pd.Series, symbol: str, value: Value) -> tuple[Any, Any]:
    """Return a column's values, and the value as something to compare them with."""
    kind = _kind(column)
    if (kind == "number") == isinstance(value, str) or kind == "other":
        raise FilterError(f"column {column.name!r} is {column.dtype} and cannot be compared with {value!r}")
    if kind == "number":
        return _numbers(column, value)
    if kind == "text":
        return _ordered(column, symbol, str(value)) or (column.to_numpy(object), value)
    convert = pd.Timestamp if kind == "date" else pd.Timedelta
    try:
        operand: Any = convert(value)
    except (ValueError, TypeError, OverflowError):
        raise FilterError(
            f"column {column.name!r} has {kind}s, and {value!r} is none: write it as {_EXAMPLES[kind]}"
        ) from None
    zone = getattr(column.dt, "tz", None)
    if kind == "date" and (operand.tz is None) != (zone is None):
        if zone is None:
            raise FilterError(f"column {column.name!r} has dates without a time zone, but {value!r} has one")
        operand = operand.tz_localize(zone)
    return column, operand


def _numbers(column: pd.Series, value: Any) -> tuple[np.ndarray, Any]:
    """Return numbers to compare exactly: whole numbers as Python's where the value is beyond 64 bits or a fraction."""
    values = column.to_numpy(column.dtype.numpy_dtype if hasattr(column.dtype, "numpy_dtype") else None)
    if values.dtype.kind in "iu" and (isinstance(value, float) or abs(value) >= 2**63):
        values = values.astype(object)
    return values, value


def _ordered(column: pd.Series, symbol: str, value: str) -> tuple[np.ndarray, Any] | None:
    """Return the positions of ordered categories, for comparisons by order."""
    if not isinstance(column.dtype, pd.CategoricalDtype) or symbol in ("==", "!="):
        return None
    categories = column.cat.categories
    if value not in categories:
        raise FilterError(f"column {column.name!r} has no category {value!r}, {did_you_mean(value, categories)}")
    return column.cat.codes.to_numpy(), categories.get_loc(value)


_EXAMPLES = {"date": '"2024-06-01" or "2024-06-01 08:00"', "duration": '"2 days" or "01:30:00"'}


def _kind(column: pd.Series) -> str:
    """Return what a plain column without missing values holds: numbers, text, dates, durations or others."""
    if pd.api.types.is_numeric_dtype(column):  # booleans too
        return "number"
    if pd.api.types.is_datetime64_any_dtype(column):
        return "date"
    if pd.api.types.is_timedelta64_dtype(column):
        return "duration"
    return "text" if all(isinstance(value, str) for value in column) else _kind_of_objects(column)


def _kind_of_objects(column: pd.Series) -> str:
    return "number" if all(isinstance(value, numbers.Real) for value in column) else "other"
