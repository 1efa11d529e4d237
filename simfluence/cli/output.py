"""Output of the command line: tables on a terminal, JSON for programs, pictures in files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from rich.text import Text

from simfluence._internal.html import cell
from simfluence.cli.text import visible
from simfluence.errors import InvalidInput
from simfluence.plots.style import save

__all__ = ["draw", "print_json", "print_table", "records"]


def print_table(table: pd.DataFrame, title: str) -> None:
    """Print a table under its title, as wide as the terminal. Names are plain text, never markup."""
    text = Table()
    for name in table.index.names:
        text.add_column(_plain_text(name or ""))
    for name in table.columns:
        text.add_column(_plain_text(str(name).replace("_", " ")), justify="right")
    for index, *values in table.itertuples():
        keys = index if isinstance(index, tuple) else (index,)
        text.add_row(*map(_plain_text, keys), *(_plain_text(cell(value)) for value in values))
    console = Console()
    console = console if console.is_terminal else Console(width=200)  # a pipe has no width
    console.print(Text(f"\n{visible(title)}"))
    console.print(text)


def _plain_text(content: object) -> Text:
    return Text(visible(content, keep=""))


def records(table: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the rows of a table as dictionaries, with the index among the columns."""
    return [{str(name): value for name, value in row.items()} for row in table.reset_index().to_dict("records")]


def print_json(content: Any) -> None:
    """Print ``content`` as JSON; NaN and infinities become null."""
    print(json.dumps(_plain(content), indent=2))


def draw(path: Path, drawing: Callable[[Axes], object]) -> None:
    """Draw a picture on new axes and save it.

    Args:
        path: file of the picture; its ending is the format.
        drawing: function that draws on the axes.

    Raises:
        InvalidInput: the ending is not that of a picture format, or the file cannot be written.
    """
    figure = Figure(figsize=(8, 5), layout="constrained")
    drawing(figure.subplots())
    try:
        save(figure, path, dpi=150)
    except (ValueError, OSError) as error:
        raise InvalidInput(f"{path}: {error}") from None


def _plain(content: Any) -> Any:
    """Convert to values that JSON has: NaN and infinities to None, NumPy's numbers to Python's."""
    if isinstance(content, dict):
        return {str(key): _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    if hasattr(content, "item"):
        content = content.item()
    return None if isinstance(content, float) and not math.isfinite(content) else content
