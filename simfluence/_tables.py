"""Tables as people read them: rounded numbers, and each metric with its spread in one column."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd

from simfluence._html import escaped


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """An evaluation table with each metric and its spread in one column.

    >>> readable(pd.DataFrame({"skill": [0.5], "skill_low": [0.4], "skill_high": [0.6]})).loc[0].tolist()
    ['0.500 [0.400, 0.600]']
    """
    columns = {}
    for name in table.columns:
        if f"{name}_sd" in table:
            columns[name] = [f"{cell(a)} ± {cell(b)}" for a, b in table[[name, f"{name}_sd"]].to_numpy()]
        elif f"{name}_low" in table:
            rows = table[[name, f"{name}_low", f"{name}_high"]].to_numpy()
            columns[name] = ["–" if math.isnan(v) else f"{cell(v)} [{cell(a)}, {cell(b)}]" for v, a, b in rows]
        elif not name.endswith(("_sd", "_low", "_high")):
            columns[name] = table[name].tolist()
    return pd.DataFrame(columns, index=table.index)


def cell(value: Any) -> str:
    """A number with three decimals, or three figures where it is large; "–" where there is none."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"
    return str(value)


def as_html(table: pd.DataFrame) -> str:
    """The table as HTML, everything in it escaped."""
    head = [str(table.index.name or ""), *(str(name).replace("_", " ") for name in table.columns)]
    rows = [[str(index), *map(cell, values)] for index, *values in table.itertuples()]
    lines = ["".join(f"<th>{escaped(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{escaped(value)}</td>" for value in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
