"""Progress of a recording: shown on a terminal, silent in a pipe."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

_REFRESH_SECONDS = 0.2


class RecordingProgress:
    """A bar over all steps of all runs, with finished runs, runs/s and the time left."""

    def __init__(self, steps: list[int], done: int) -> None:
        self.steps = steps
        self.runs, self.already, self.finished = len(steps) + done, done, 0
        self.steps_done = 0
        self.shown = self.started = time.monotonic()
        self.bar = Progress(
            TextColumn("recording"), BarColumn(), TextColumn("{task.fields[note]}"), TimeRemainingColumn(),
            console=Console(stderr=True), transient=True,
        )  # fmt: skip
        self.bar.disable = not self.bar.console.is_terminal

    def __enter__(self) -> RecordingProgress:
        self.bar.start()
        self.task = self.bar.add_task("recording", total=sum(self.steps), note="")
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.stop()

    def step(self, count: int = 1) -> None:
        self.steps_done += count
        now = time.monotonic()
        if now - self.shown > _REFRESH_SECONDS:
            self.shown = now
            self._show(now)

    def run_finished(self) -> None:
        self.finished += 1

    def _show(self, now: float) -> None:
        mean_steps = sum(self.steps) / len(self.steps)
        rate = self.steps_done / mean_steps / (now - self.started)
        note = f"{self.already + self.finished} of {self.runs} runs, {rate:.1f} runs/s"
        self.bar.update(self.task, completed=self.steps_done, note=note)
