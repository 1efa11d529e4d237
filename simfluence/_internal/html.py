"""HTML for notebooks and text for terminals: escaped text, tables with rounded numbers, small pictures."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

_LONGEST = 200  # characters of a fact


class Html(str):
    """A string that notebooks show as HTML; user text in it is already escaped."""

    def _repr_html_(self) -> str:
        return str(self)


def card(title: str, facts: Mapping[str, object], *parts: str) -> Html:
    """Build a card: a heading, facts by name, and ``parts``, which are already HTML.

    >>> card("runs", {"task": "<b>"})
    '<div><b>runs</b><br>task: &lt;b&gt;</div>'
    """
    lines = [f"{escaped(name)}: {escaped(value)}" for name, value in facts.items()]
    return Html(f"<div><b>{escaped(title)}</b><br>{'<br>'.join(lines)}{''.join(parts)}</div>")


def picture(drawing: Callable[[Any], object], width: float = 6.5, height: float = 2.8) -> str:
    """Call ``drawing`` with axes and return the picture as an HTML image. Sizes are in inches."""
    from matplotlib.figure import Figure  # imported late: it takes half a second and most programs need no picture

    from simfluence.plots.style import save

    figure = Figure(figsize=(width, height), layout="constrained")
    drawing(figure.subplots())
    content = io.BytesIO()
    save(figure, content, dpi=80)
    return f'<br><img src="data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}">'


def escaped(value: object) -> str:
    """Return a value as text, escaped for HTML and cut if it is long."""
    text = str(value)
    return html.escape(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…")


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Join each metric of an evaluation table and its spread in one column.

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
    """Format a number with three decimals, or three significant figures if it is large; "–" for NaN."""
    if isinstance(value, float):
        return "–" if math.isnan(value) else f"{value:.3f}" if abs(value) < 1000 else f"{value:.3g}"
    return str(value)


def as_html(table: pd.DataFrame) -> str:
    """Return the table as HTML with all text escaped."""
    head = [str(table.index.name or ""), *(str(name).replace("_", " ") for name in table.columns)]
    rows = [[str(index), *map(cell, values)] for index, *values in table.itertuples()]
    lines = ["".join(f"<th>{escaped(name)}</th>" for name in head)]
    lines += ["".join(f"<td>{escaped(value)}</td>" for value in row) for row in rows]
    return f"<table>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"
