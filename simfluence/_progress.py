"""A plain progress bar, shown on a terminal and silent in a pipe."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_shown = contextvars.ContextVar("shown", default=False)


@contextlib.contextmanager
def bar(what: str, total: int, shown: bool) -> Iterator[Callable[..., None]]:
    """A progress bar on a terminal, moved on by calling what is yielded (with a number, by so many).

    Within one that is shown, others are not.
    """
    console = Console(stderr=True)
    shown = shown and console.is_terminal and not _shown.get()
    within = _shown.set(shown or _shown.get())
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True, disable=not shown) as progress:
            task = progress.add_task(what, total=total)
            yield lambda count=1: progress.advance(task, count)
    finally:
        _shown.reset(within)
