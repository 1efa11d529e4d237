"""What notebooks and terminals show of an object: escaped text, tables with rounded numbers, a small picture."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

_LONGEST = 200  # letters of a fact


class Html(str):
    """A text that notebooks show as HTML. What came from outside was escaped when it was made."""

    def _repr_html_(self) -> str:
        return str(self)


def card(title: str, facts: Mapping[str, object], *parts: str) -> Html:
    """A heading, facts by name, and parts below that are HTML already.

    >>> card("runs", {"task": "<b>"})
    '<div><b>runs</b><br>task: &lt;b&gt;</div>'
    """
    lines = [f"{escaped(name)}: {escaped(value)}" for name, value in facts.items()]
    return Html(f"<div><b>{escaped(title)}</b><br>{'<br>'.join(lines)}{''.join(parts)}</div>")


def picture(drawing: Callable[[Any], object], width: float = 6.5, height: float = 2.8) -> str:
    """What ``drawing`` puts on the axes that it is given, as an image within the HTML. Sizes are in inches."""
    from matplotlib.figure import Figure  # takes half a second, and most programs never look

    from simfluence.plots.style import save

    figure = Figure(figsize=(width, height), layout="constrained")
    drawing(figure.subplots())
    content = io.BytesIO()
    save(figure, content, dpi=80)
    return f'<br><img src="data:image/png;base64,{base64.b64encode(content.getvalue()).decode()}">'


def escaped(value: object) -> str:
    """A value as text, with nothing in it that HTML would read; cut where it is long."""
    text = str(value)
    return html.escape(text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…")


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
