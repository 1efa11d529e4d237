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

A comparison with a missing value is false, except ``!=``, which is true.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from simfluence.errors import FilterError, did_you_mean

__all__ = ["Both", "Comparison", "Either", "Filter", "Not", "Value", "parse"]

Value = int | float | str | bool

_MAX_LENGTH = 10_000
_MAX_DEPTH = 50
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
        column = _plain(_column(table, self.column))
        if column.isna().all():  # whatever its type: a missing value is not equal to, or greater than, anything
            return np.full(len(column), self.operator == "!=")
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        for value in values:
            _check_comparable(column, self.operator, value)
        if self.operator == "in":
            return column.isin(list(values)).to_numpy(bool)
        if self.operator == "contains":
            return column.str.contains(str(self.value), regex=False, na=False).to_numpy(bool)
        holds = _ORDER[self.operator](column, self.value)
        return np.where(column.isna(), self.operator == "!=", holds.fillna(False)).astype(bool)


@dataclass(frozen=True)
class Not:
    """A filter that is true where ``part`` is false."""

    part: Filter

    def mask(self, table: pd.DataFrame) -> np.ndarray:
        return ~self.part.mask(table)


@dataclass(frozen=True)
class Both:
    """A filter that is true where both parts are true."""

    left: Filter
    right: Filter

    def mask(self, table: pd.DataFrame) -> np.ndarray:
        return self.left.mask(table) & self.right.mask(table)


@dataclass(frozen=True)
class Either:
    """A filter that is true where at least one part is true."""

    left: Filter
    right: Filter

    def mask(self, table: pd.DataFrame) -> np.ndarray:
        return self.left.mask(table) | self.right.mask(table)


Filter = Comparison | Not | Both | Either


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
        left = self.and_part(depth)
        while self.take("or"):
            left = Either(left, self.and_part(depth))
        return left

    def and_part(self, depth: int) -> Filter:
        left = self.part(depth)
        while self.take("and"):
            left = Both(left, self.part(depth))
        return left

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
            return int(token) if re.fullmatch(r"[+-]?\d+", token) else float(token)
        return token.lower() == "true"


def _column(table: pd.DataFrame, name: str) -> pd.Series:
    if name not in table.columns:
        raise FilterError(f"no column {name!r} in the examples' metadata: {did_you_mean(name, table.columns)}")
    return table[name]


def _plain(column: pd.Series) -> pd.Series:
    """Return the column as numbers, booleans or text, so that data frames and stores give the same result."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    if pd.api.types.is_datetime64_any_dtype(column):
        column = column.astype(str).where(column.notna())
    present = column.dropna()
    if column.dtype == object and len(present) and present.map(lambda value: isinstance(value, bool)).all():
        column = column.astype("boolean")
    return column.infer_objects()


def _check_comparable(column: pd.Series, symbol: str, value: Value) -> None:
    """Refuse to compare a number with text, which would silently match nothing."""
    is_number = pd.api.types.is_numeric_dtype(column)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise FilterError(f"{value} does not fit a 64-bit integer: write it as {float(value):g}")
    if symbol == "contains" and (is_number or not isinstance(value, str)):
        raise FilterError(f"'contains' looks for text in a text column; column {column.name!r} is {column.dtype}")
    if is_number == isinstance(value, str):
        raise FilterError(f"column {column.name!r} is {column.dtype} and cannot be compared with {value!r}")
