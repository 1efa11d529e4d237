"""Influence: how it is spread over examples, over layers, over the tokens of a text."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from simfluence._internal.html import Html
from simfluence.plots.style import COLOURS, empty, finished, named, of, opened, some

_POINTS = 5000
_LAYERS = 40
_TOKENS = 1000


def distribution(
    scores: np.ndarray,
    ax: Axes | None = None,
    title: str = "",
    *,
    share: float | None = None,
    exponent: float | None = None,
    start: float | None = None,
    unit: str = "raw",
) -> Axes:
    """How rare large positive scores are: the share of scores above each value, on logarithmic axes.

    Args:
        scores: of any shape; those above 0 are drawn, 5,000 of them at most.
        share: of the sum of positive scores that the top 1 % carry, to stand in the picture.
        exponent, start: of a power law ``P(score > s) ∝ s^−exponent`` from ``start`` up, drawn as a line.
        unit: of the scores.

    ``Scores.tail()`` gives all three.

    >>> from matplotlib.figure import Figure
    >>> ax = distribution(np.array([1.0, 2.0, -1.0, 4.0]), Figure().subplots(), share=0.5)
    >>> ax.lines[0].get_xdata().tolist(), ax.lines[0].get_ydata().tolist()
    ([4.0, 2.0, 1.0], [0.25, 0.5, 0.75])
    """
    ax = opened(ax)
    descending = -np.sort(-scores[np.isfinite(scores) & (scores > 0)].ravel())
    if descending.size == 0:
        return empty(ax, title, "positive scores")
    above = np.arange(1, len(descending) + 1) / scores.size
    tail = min(len(descending), _POINTS // 2)  # all of the largest, some of the rest
    chosen = np.unique(np.concatenate([np.arange(tail), some(len(descending), _POINTS // 2)]))
    label = of(len(chosen), len(descending), "positive scores")
    ax.loglog(descending[chosen], above[chosen], ".", color=COLOURS[0], markersize=3, label=label)
    if exponent is not None and start is not None and np.isfinite(exponent):
        first = above[np.searchsorted(-descending, -start, side="right") - 1]
        ends = np.array([start, descending[0]])
        label = f"power law, exponent {exponent:.2f}"
        ax.loglog(ends, first * (ends / start) ** -exponent, color=COLOURS[1], linestyle="--", label=label)
    if share is not None:
        ax.plot([], [], " ", label=f"top 1 %: {share:.0%} of the positive sum")
    ax.legend(frameon=False, loc="lower left")
    return finished(ax, title, xlabel=f"score ({unit})", ylabel="share of scores above")


def by_layer(table: pd.DataFrame, ax: Axes | None = None, title: str = "") -> Axes:
    """Each layer's share of the influence, as ``Scores.by_layer()`` gives it: ``share`` with ``low`` and ``high``.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"share": [0.3, 0.7]}, index=["0", "2"])
    >>> [float(bar.get_width()) for bar in by_layer(table, Figure().subplots()).patches]
    [0.3, 0.7]
    """
    ax = opened(ax)
    if table.empty:
        return empty(ax, title, "layers")
    first = table.head(_LAYERS)
    rows = np.arange(len(first))
    ax.barh(rows, first["share"], color=COLOURS[0], alpha=0.8)
    if {"low", "high"} <= set(first.columns):
        ax.hlines(rows, first["low"], first["high"], color="black", linewidth=1.5)
    ax.set_yticks(rows, named(first.index))
    ax.invert_yaxis()
    layers = "layer" if len(first) == len(table) else f"layer ({of(len(first), len(table), 'layers')})"
    return finished(ax, title, xlabel="share of the scores' sizes", ylabel=layers)


def tokens(
    texts: Sequence[str], values: np.ndarray, title: str = "", *, largest: float | None = None, unit: str = "raw"
) -> Html:
    """A text as HTML, its tokens coloured by their influence: orange: above 0, purple: below. Everything is escaped.

    Args:
        texts: the tokens, in order; the first 1,000 are shown.
        values: of each of them; where there are fewer tokens than values, the rest is padding.
        largest: the size that has the full colour; by default the largest there is.
        unit: of the values, which a pointer shows.

    >>> str(tokens(["<b>", "dog"], np.array([0.5, -1.0]))).count("<b>")
    0
    """
    shown = min(len(texts), len(values), _TOKENS)
    sizes = np.abs(values[:shown][np.isfinite(values[:shown])])
    top = (largest if largest is not None else float(sizes.max()) if sizes.size else 0.0) or 1.0
    spans = [_token(text, float(value), top, unit) for text, value in zip(texts, values[:shown], strict=False)]
    more = "" if shown == len(texts) else f"<i> … {of(shown, len(texts), 'tokens')}</i>"
    head = f"<b>{html.escape(title)}</b><br>" if title else ""
    body = "".join(spans) or "<i>no tokens to draw</i>"
    return Html(f'<div style="line-height:1.8; white-space:pre-wrap; font-family:monospace">{head}{body}{more}</div>')


def _token(text: str, value: float, largest: float, unit: str) -> str:
    if not np.isfinite(value):
        return f"<span>{html.escape(text)}</span>"
    place = 0.5 + 0.5 * float(np.clip(value / largest, -1, 1))
    colour = to_hex(colormaps["PuOr_r"](0.15 + 0.7 * place))  # without the darkest ends, on which black is not read
    style = f"background:{colour}; color:black; border-radius:2px"
    return f'<span style="{style}" title="{value:.3g} ({html.escape(unit)})">{html.escape(text)}</span>'
