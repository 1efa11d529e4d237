"""The test side as it is read again and again: in batches of alike length, made once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from simfluence.recording.activation_cache import CachedModel
from simfluence.task import EVALUATION_BATCH, Data, Task, forward

#: Numbers per input of a batch, padding included, where examples differ in length: small enough to waste little on it.
BATCH_NUMBERS = 4096


class LossReader:
    """The test examples of a task on their device.

    Where the task trims padding, they are sorted by length and cut into batches that are padded to their own longest
    example; losses come back in the examples' order.

    Args:
        task: whose losses and measures are read.
        data: its test side.
        measures: names of the measures.
    """

    def __init__(self, task: Task, data: Data, measures: Sequence[str]) -> None:
        self.task, self.measures = task, measures
        self.place: Tensor | None = None  # of each example among the sorted ones
        self.batches = [data]
        if task.trim or len(data[1]) > EVALUATION_BATCH:
            rows = _batches(task.sizes(data) if task.trim else [0] * len(data[1]))
            self.batches = [task.some(data, some) for some in rows]
            self.place = torch.argsort(torch.cat(rows)).to(data[1].device)

    def read(self, model: nn.Module, cached_model: CachedModel | None, first: bool) -> dict[str, Tensor]:
        """Loss and measures of every test example, each ``[test]``, in the model's present mode.

        Args:
            cached_model: for the model's frozen layers.
            first: of this model: what it keeps of its first pass (positions, say) must be fit for training, which what
                is made in inference mode is not.
        """
        with torch.no_grad() if first else torch.inference_mode():
            parts = [self._read(model, cached_model, number) for number in range(len(self.batches))]
            if self.place is None:
                return parts[0]
            return {name: torch.cat([part[name] for part in parts])[self.place] for name in parts[0]}

    def _read(self, model: nn.Module, cached_model: CachedModel | None, number: int) -> dict[str, Tensor]:
        inputs, targets = self.batches[number]
        if cached_model is None:
            return self.task.read(forward(model, inputs), targets, self.measures)
        with cached_model.reading(number):
            return self.task.read(forward(model, inputs), targets, self.measures)


def _batches(sizes: Sequence[int]) -> list[Tensor]:
    """Rows of each batch, from the shortest example to the longest."""
    order = sorted(range(len(sizes)), key=lambda row: sizes[row])
    batches: list[list[int]] = [[]]
    for row in order:
        here = len(batches[-1])
        if here == EVALUATION_BATCH or (here and sizes[row] * (here + 1) > BATCH_NUMBERS):
            batches.append([])
        batches[-1].append(row)
    return [torch.tensor(batch) for batch in batches]
