"""Filters over example metadata: text such as ``label == 3 and group in ["a", "b"]``.

Parsed against the grammar below and applied column by column; nothing is ever evaluated.

    filter      = and_part ("or" and_part)*
    and_part    = part ("and" part)*
    part        = "not" part | "(" filter ")" | comparison
    comparison  = column ("==" | "!=" | "<" | "<=" | ">" | ">=") value
                | column ["not"] "in" "[" value ("," value)* "]"
                | column ["not"] "contains" string
    value       = number | string | "true" | "false"
    column      = a name, or any text between backticks

A comparison with a value that is missing fails, except ``!=``, which holds.
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
    """``column operator value``: one of ``== != < <= > >=``, ``in`` (a tuple) or ``contains``."""

    column: str
    operator: str
    value: Value | tuple[Value, ...]

    def mask(self, table: pd.DataFrame) -> np.ndarray:
        column = _plain(_column(table, self.column))
        if column.isna().all():  # of whatever type: nothing is equal to, or greater than, what is not there
            return np.full(len(column), self.operator == "!=")
        values = self.value if isinstance(self.value, tuple) else (self.value,)
        for value in values:
            _check_comparable(column, self.operator, value)
        if self.operator == "in":
            return column.isin(list(values)).to_numpy(bool)
        if self.operator == "contains":
            return column.str.contains(str(self.value), regex=False, na=False).to_numpy(bool)
        found = _ORDER[self.operator](column, self.value)
        return np.where(column.isna(), self.operator == "!=", found.fillna(False)).astype(bool)


@dataclass(frozen=True)
class Not:
    """Where ``part`` does not hold."""

    part: Filter

    def mask(self, table: pd.DataFrame) -> np.ndarray:
        return ~self.part.mask(table)


@dataclass(frozen=True)
class Both:
    """Where both parts hold."""

    left: Filter
    right: Filter

    def mask(self, table: pd.DataFrame) -> np.ndarray:
        return self.left.mask(table) & self.right.mask(table)


@dataclass(frozen=True)
class Either:
    """Where at least one part holds."""

    left: Filter
    right: Filter

    def mask(self, table: pd.DataFrame) -> np.ndarray:
        return self.left.mask(table) | self.right.mask(table)


Filter = Comparison | Not | Both | Either


def parse(text: str) -> Filter:
    """The filter that ``text`` says.

    Raises:
        FilterError: with the place where the text leaves the grammar.

    >>> parse('label == 3 or not group in ["a"]').mask(pd.DataFrame({"label": [3, 1], "group": ["a", "a"]}))
    array([ True, False])
    """
    if len(text) > _MAX_LENGTH:
        raise FilterError(f"a filter of {len(text):,} characters: the limit is {_MAX_LENGTH:,}")
    parser = _Parser(text)
    result = parser.filter(0)
    if parser.kind != "end":
        raise parser.error("expected 'and', 'or' or the end")
    return result


class _Parser:
    """Recursive descent over the tokens of one filter, one token of look-ahead."""

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
        found = repr(self.token) if self.token else "the end"
        return FilterError(
            f"filter {self.text!r}: {expected}, but found {found} at position {self.start}. "
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
            raise FilterError(f"a filter nested more than {_MAX_DEPTH} deep")
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
            found: Filter = Comparison(column, "in", self.values())
        elif self.take("contains"):
            found = Comparison(column, "contains", self.value())
        else:
            raise self.error(f"expected a comparison after {column!r}")
        return Not(found) if negated else found

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
    """The column as numbers, truth values or text: the same from a data frame as from the store."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        column = column.astype(column.cat.categories.dtype)
    if pd.api.types.is_datetime64_any_dtype(column):
        column = column.astype(str).where(column.notna())
    known = column.dropna()
    if column.dtype == object and len(known) and known.map(lambda value: isinstance(value, bool)).all():
        column = column.astype("boolean")
    return column.infer_objects()


def _check_comparable(column: pd.Series, symbol: str, value: Value) -> None:
    """Comparing a number with text matches nothing in silence; say so instead."""
    is_number = pd.api.types.is_numeric_dtype(column)
    if isinstance(value, int) and abs(value) >= 2**63:
        raise FilterError(f"{value} is larger than any whole number here: write it as {float(value):g}")
    if symbol == "contains" and (is_number or not isinstance(value, str)):
        raise FilterError(f"'contains' looks for text in a text column; column {column.name!r} is {column.dtype}")
    if is_number == isinstance(value, str):
        raise FilterError(f"column {column.name!r} is {column.dtype} and cannot be compared with {value!r}")
