"""What notebooks show of an object: escaped text, small tables, a small picture."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping
from typing import Any

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
