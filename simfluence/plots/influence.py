"""Plots of influence: its distribution over examples, over layers, and over the tokens of a text."""

from __future__ import annotations

import html
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from simfluence._internal.checked import checked
from simfluence._internal.html import Html
from simfluence.plots.style import (
    COLOURS,
    Line,
    Numbers,
    check_columns,
    count_label,
    empty,
    finished,
    named,
    opened,
    spread,
)

__all__ = ["by_layer", "distribution", "tokens"]

_POINTS = 5000  # scores drawn
_LAYERS = 40  # layers drawn
_TOKENS = 1000  # tokens shown


@checked
def distribution(
    scores: Numbers,
    ax: Axes | None = None,
    title: str = "",
    *,
    share: float | None = None,
    exponent: float | None = None,
    start: float | None = None,
    unit: str = "raw",
) -> Axes:
    """Plot the share of scores above each positive value, on logarithmic axes.

    Args:
        scores: scores of any shape; those above 0 are drawn, 5,000 at most.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot.
        share: share of the sum of positive scores in the top 1 %, to show in the legend.
        exponent, start: a power law ``P(score > s) ∝ s^−exponent`` for scores above ``start``, drawn as a line.
        unit: unit of the scores.

    ``Scores.tail()`` returns share, exponent and start.

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
    tail = min(len(descending), _POINTS // 2)  # all of the largest, an even sample of the rest
    chosen = np.unique(np.concatenate([np.arange(tail), spread(len(descending), _POINTS // 2)]))
    label = count_label(len(chosen), len(descending), "positive scores")
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


@checked
def by_layer(table: pd.DataFrame, ax: Axes | None = None, title: str = "") -> Axes:
    """Plot each layer's share of the influence.

    Args:
        table: table from ``Scores.by_layer()``, with columns share, low, high; of more than 40 rows, the first 40 are
            drawn.
        ax: axes to draw on; by default those of a new figure.
        title: title of the plot.

    >>> from matplotlib.figure import Figure
    >>> table = pd.DataFrame({"share": [0.3, 0.7]}, index=["0", "2"])
    >>> [float(bar.get_width()) for bar in by_layer(table, Figure().subplots()).patches]
    [0.3, 0.7]
    """
    ax = opened(ax)
    if table.empty:
        return empty(ax, title, "layers")
    check_columns(table, "share")
    first = table.head(_LAYERS)
    rows = np.arange(len(first))
    ax.barh(rows, first["share"], color=COLOURS[0], alpha=0.8)
    if {"low", "high"} <= set(first.columns):
        ax.hlines(rows, first["low"], first["high"], color="black", linewidth=1.5)
    ax.set_yticks(rows, named(first.index))
    ax.invert_yaxis()
    layers = "layer" if len(first) == len(table) else f"layer ({count_label(len(first), len(table), 'layers')})"
    return finished(ax, title, xlabel="share of the absolute scores", ylabel=layers)


@checked
def tokens(
    texts: Sequence[str], values: Line, title: str = "", *, largest: float | None = None, unit: str = "raw"
) -> Html:
    """Return a text as HTML, its tokens coloured by influence: orange above 0, purple below. All text is escaped.

    Args:
        texts: tokens in order; the first 1,000 are shown.
        values: influence of each token; values beyond the last token are padding.
        title: title above the text.
        largest: absolute value with the full colour; by default the largest one.
        unit: unit of the values, which are shown on hovering.

    >>> str(tokens(["<b>", "dog"], np.array([0.5, -1.0]))).count("<b>")
    0
    """
    shown = min(len(texts), len(values), _TOKENS)
    sizes = np.abs(values[:shown][np.isfinite(values[:shown])])
    top = (largest if largest is not None else float(sizes.max()) if sizes.size else 0.0) or 1.0
    spans = [_token(text, float(value), top, unit) for text, value in zip(texts, values[:shown], strict=False)]
    more = "" if shown == len(texts) else f"<i> … {count_label(shown, len(texts), 'tokens')}</i>"
    head = f"<b>{html.escape(title)}</b><br>" if title else ""
    body = "".join(spans) or "<i>no tokens to draw</i>"
    return Html(f'<div style="line-height:1.8; white-space:pre-wrap; font-family:monospace">{head}{body}{more}</div>')


def _token(text: str, value: float, largest: float, unit: str) -> str:
    if not np.isfinite(value):
        return f"<span>{html.escape(text)}</span>"
    place = 0.5 + 0.5 * float(np.clip(value / largest, -1, 1))
    colour = to_hex(colormaps["PuOr_r"](0.15 + 0.7 * place))  # on the darkest ends black is illegible
    style = f"background:{colour}; color:black; border-radius:2px"
    return f'<span style="{style}" title="{value:.3g} ({html.escape(unit)})">{html.escape(text)}</span>'
