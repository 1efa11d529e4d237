"""Reading of test losses and measures, in batches of similar length that are built once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simfluence.recording.activation_cache import CachedModel
from simfluence.task import EVALUATION_BATCH, Data, Task, forward

__all__ = ["BATCH_NUMBERS", "LossReader"]

#: Most numbers per input of a batch, padding included, where examples differ in length; small, so as to pad little.
BATCH_NUMBERS = 4096


class LossReader:
    """Reader of a task's test losses and measures.

    If the task trims padding, test examples are sorted by length and cut into batches, each padded to its longest
    example. Losses are returned in the examples' order.

    Args:
        task: the task.
        data: its test data, on the model's device.
        measures: names of the measures to read.
    """

    def __init__(self, task: Task, data: Data, measures: Sequence[str]) -> None:
        self.task, self.measures = task, measures
        self.positions: Tensor | None = None  # position of each example among the sorted ones
        self.batches = [data]
        if task.trim or len(data[1]) > EVALUATION_BATCH:
            rows = _batches(task.sizes(data) if task.trim else [0] * len(data[1]))
            self.batches = [task.some(data, batch) for batch in rows]
            self.positions = torch.argsort(torch.cat(rows)).to(data[1].device)

    def read(self, model: nn.Module, cached_model: CachedModel | None, first: bool) -> dict[str, Tensor]:
        """Compute loss and measures of every test example, each ``[test]``, in the model's present mode.

        Args:
            model: the model.
            cached_model: the model's activation cache, if it has one.
            first: whether this is the model's first pass. It then runs outside inference mode: a tensor that the model
                stores in its first pass (such as positions) must be usable in training.
        """
        with torch.no_grad() if first else torch.inference_mode():
            parts = [self._read(model, cached_model, number) for number in range(len(self.batches))]
            if self.positions is None:
                return parts[0]
            return {name: torch.cat([part[name] for part in parts])[self.positions] for name in parts[0]}

    def _read(self, model: nn.Module, cached_model: CachedModel | None, number: int) -> dict[str, Tensor]:
        inputs, targets = self.batches[number]
        if cached_model is None:
            return self.task.read(forward(model, inputs), targets, self.measures)
        with cached_model.reading(number):
            return self.task.read(forward(model, inputs), targets, self.measures)


def _batches(sizes: Sequence[int]) -> list[Tensor]:
    """Choose the rows of each batch, from the shortest example to the longest."""
    order = sorted(range(len(sizes)), key=lambda row: sizes[row])
    batches: list[list[int]] = [[]]
    for row in order:
        count = len(batches[-1])
        if count == EVALUATION_BATCH or (count and sizes[row] * (count + 1) > BATCH_NUMBERS):
            batches.append([])
        batches[-1].append(row)
    return [torch.tensor(batch) for batch in batches]
