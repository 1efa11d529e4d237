"""The mean path of recorded runs: the mean weights at a few steps, and the mean outputs at every step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from simfluence.attribution.gradients.hooks import evaluating, rows_of
from simfluence.attribution.gradients.tangent_kernel import one_tensor
from simfluence.errors import InvalidInput
from simfluence.recording import follow
from simfluence.recording.checkpoints import Checkpoint
from simfluence.runs import Run, Runs
from simfluence.task import Data, Task, forward

__all__ = ["MOST_OUTPUTS", "MeanPath", "mean_path"]

#: Most outputs per example: each takes a pass over all examples at each checkpoint.
MOST_OUTPUTS = 64

_SMALL = 10**6  # parameters of a model whose outputs are read at every step; others are read at the checkpoints
_BATCH = 256  # examples per pass


@dataclass(frozen=True, eq=False)
class MeanPath:
    """Means over runs.

    Args:
        outputs: outputs of all examples, ``[steps + 1, examples, outputs]``.
        weights: trained parameters and running statistics by name, at each checkpoint.
        samples: the same of some single runs, at each checkpoint; none if there are to be none.
        shape: shape of the model's outputs for one example.
    """

    outputs: Tensor
    weights: list[dict[str, Tensor]]
    samples: list[list[dict[str, Tensor]]]
    shape: tuple[int, ...]


def mean_path(
    task: Task, runs: Runs, data: Data, times: np.ndarray, n_samples: int, advance: Callable[[], None]
) -> MeanPath:
    """Return the mean over runs; at each step over those that have not ended.

    A run whose checkpoints of ``times`` were recorded is read if its outputs are needed at these steps alone. Others
    are trained again.

    Args:
        task: what the runs trained.
        runs: the runs.
        data: training data, then test data.
        times: steps of the checkpoints, ``[checkpoints]``.
        n_samples: number of runs whose own weights are kept.
        advance: called after each run.

    Raises:
        InvalidInput: the runs start from different weights, or an example has too many outputs.
    """
    steps = max(run.steps for run in runs)
    small = _size(task.build_model(0)) <= _SMALL
    read = range(steps + 1) if small else sorted({*times.tolist(), steps})
    sums: dict[int, Any] = {}
    weights: dict[int, dict[str, Tensor]] = {}
    samples: dict[int, list[dict[str, Tensor]]] = {int(time): [] for time in times}
    first: Tensor | None = None
    shape: tuple[int, ...] = ()
    for number, run in enumerate(runs):
        for step, model in _moments(task, run, read):
            outputs = _outputs(task, model, data)
            if step == 0:
                shape = tuple(outputs.shape[1:])
                first = _checked_start(run, outputs, first)
            _add(sums, step, {"outputs": outputs.flatten(1)})
            if step in times:
                _add(weights, step, _state(model))
                if number < n_samples:
                    samples[step].append({name: value.clone() for name, value in _state(model).items()})
        advance()
    means = {step: values["outputs"] / values["count"] for step, values in sums.items()}
    return MeanPath(
        _interpolated(means, steps),
        [{name: value / weights[t]["count"] for name, value in weights[t].items() if name != "count"} for t in times],
        list(samples.values()),
        shape,
    )


def _moments(task: Task, run: Run, steps: Collection[int]) -> Iterator[tuple[int, nn.Module]]:
    """Yield the model of a run at those of ``steps`` that it has."""
    wanted = [step for step in steps if step <= run.steps]
    if set(wanted) <= set(run.checkpoints):
        model = task.build_model(run.recipe.seed if run.recipe else 0)
        model.to(run.recipe.torch_dtype if run.recipe else None)
        for step in wanted:
            Checkpoint.load(run.checkpoints[step]).restore(model)
            yield step, model
        return
    for training in follow(task, run):
        if training.step in wanted:
            yield training.step, training.model


def _outputs(task: Task, model: nn.Module, data: Data) -> Tensor:
    """Return the outputs of all examples in evaluation mode, ``[examples, …]``."""
    count = len(data[1])
    with evaluating(model), torch.no_grad():
        parts = [rows_of(data, slice(start, start + _BATCH)) for start in range(0, count, _BATCH)]
        outputs = torch.cat([one_tensor(forward(model, inputs)) for inputs, _ in parts])
    if outputs[0].numel() > MOST_OUTPUTS:
        raise InvalidInput(
            f"the model of task {task.name!r} has {outputs[0].numel()} outputs per example, but the response follows "
            f"at most {MOST_OUTPUTS}: use a simulator that needs only losses, such as BoostedSimulator"
        )
    return outputs


def _checked_start(run: Run, outputs: Tensor, first: Tensor | None) -> Tensor:
    if first is not None and not torch.allclose(outputs, first, rtol=1e-3, atol=1e-4):
        raise InvalidInput(
            f"run {run.id} starts from other weights than the runs before it: a mean path needs runs from the same "
            "initial weights, which one task and one recipe give"
        )
    return outputs


def _state(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained parameters and the running statistics."""
    trained = {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    return trained | {name: value for name, value in model.named_buffers() if value.is_floating_point()}


def _add(sums: dict[int, Any], step: int, values: Mapping[str, Tensor]) -> None:
    """Add tensors to the sums of a step, and count them."""
    total = sums.setdefault(step, {"count": 0} | {name: torch.zeros_like(value) for name, value in values.items()})
    total["count"] += 1
    for name, value in values.items():
        total[name] += value


def _interpolated(means: Mapping[int, Tensor], steps: int) -> Tensor:
    """Return values at every step, ``[steps + 1, …]``, on straight lines between those that are known."""
    known = sorted(means)
    filled = []
    for step in range(steps + 1):
        after = min(int(np.searchsorted(known, step)), len(known) - 1)
        before = after if known[after] <= step else after - 1
        share = (step - known[before]) / max(1, known[after] - known[before])
        filled.append(
            means[known[before]] if not share else torch.lerp(means[known[before]], means[known[after]], share)
        )
    return torch.stack(filled)


def _size(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
