"""Progress bars, shown only on a terminal."""

from __future__ import annotations

import contextlib
import contextvars
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

_REFRESH_SECONDS = 0.2
_shown = contextvars.ContextVar("shown", default=False)


@contextlib.contextmanager
def bar(what: str, total: int, shown: bool) -> Iterator[Callable[..., None]]:
    """Show a progress bar on a terminal and yield a function that advances it, by 1 or by a given number.

    Inside a visible bar, other bars stay hidden.
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


class RecordingProgress:
    """A progress bar over all steps to train, with finished runs, runs per second and remaining time.

    Args:
        groups: numbers of steps and runs of each group to record.
        runs: number of all runs, including those recorded before.
    """

    def __init__(self, groups: Sequence[tuple[int, int]], runs: int) -> None:
        self.runs = runs
        self.finished = runs - sum(count for _, count in groups)
        self.total = sum(steps for steps, _ in groups)
        self.runs_per_step = sum(count for _, count in groups) / self.total
        self.steps_done = 0
        self.shown = self.started = time.monotonic()
        self.bar = Progress(
            TextColumn("recording"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.bar.disable = not self.bar.console.is_terminal

    def __enter__(self) -> RecordingProgress:
        self.bar.start()
        self.task = self.bar.add_task("recording", total=self.total, note="")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def step(self, count: int = 1) -> None:
        """Advance by ``count`` steps of the present group."""
        self.steps_done += count
        now = time.monotonic()
        if now - self.shown > _REFRESH_SECONDS:
            self.shown = now
            self._show(now)

    def run_finished(self) -> None:
        """Count a finished run."""
        self.finished += 1

    def skip(self, steps: int, runs: int) -> None:
        """Take out a group that another process has recorded."""
        self.total -= steps
        self.finished += runs

    def _show(self, now: float) -> None:
        rate = self.steps_done * self.runs_per_step / (now - self.started)
        note = f"{self.finished} of {self.runs} runs, {rate:.1f} runs/s"
        self.bar.update(self.task, completed=self.steps_done, total=self.total, note=note)
