"""The batched engine: many runs at once, with stacked parameters and shared updates.

Every parameter gets a leading axis of runs, ``[runs, …]``. The model is mapped over this axis, so that a step is one
forward and one backward pass. No operation mixes runs, so the gradient of the summed losses holds each run's own
gradient. An element-wise optimizer then updates the stack exactly as it would update each run.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from simfluence.curriculum import Curriculum
from simfluence.recipe import Recipe
from simfluence.recording.checkpoints import Checkpoint
from simfluence.recording.engines.base import Training, TrainingSetup, first_pass
from simfluence.task import Data, Task, cast, convert, take

__all__ = ["ELEMENTWISE", "EVALUATION_BATCH", "BatchedTraining", "map_over_runs", "obstacle", "parameter_count"]

#: Optimizers that update every element of a parameter independently.
ELEMENTWISE = ("sgd", "adam", "adamw", "rmsprop", "adagrad")

#: Test examples times runs per forward pass: bounds memory, does not change the losses.
EVALUATION_BATCH = 8192


class BatchedTraining(Training):
    """Runs of equal length, without empty batches, that are trained together on stacked parameters."""

    def __init__(self, setup: TrainingSetup, curricula: Sequence[Curriculum], times: np.ndarray) -> None:
        super().__init__(setup, len(curricula), times)
        self.model = setup.task.build_model(setup.recipe.seed).to(setup.device, setup.recipe.torch_dtype)
        self.stack = {
            name: nn.Parameter(_stacked(parameter.detach(), len(curricula)))
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = setup.recipe.build_optimizer(self.stack.values())
        self.rows, self.weights, self.widths = _padded(curricula, setup.device, setup.recipe.torch_dtype)
        self.start()

    def run_checkpoints(self) -> list[Checkpoint]:
        first_names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        aliases = {  # all names of trained parameters; tied parameters have several
            name: first_names[id(parameter)]
            for name, parameter in self.model.named_parameters(remove_duplicate=False)
            if first_names[id(parameter)] in self.stack
        }
        untrained = {name: value for name, value in self.model.state_dict().items() if name not in aliases}
        state = self.optimizer.state_dict()["state"]
        return [
            Checkpoint(
                self.step,
                {name: self.stack[first_name].detach()[run] for name, first_name in aliases.items()} | untrained,
                {number: {k: _of_one_run(v, run) for k, v in entries.items()} for number, entries in state.items()},
                {},
            )
            for run in range(len(self.rows[0]))
        ]

    def _update(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        width = self.widths[self.step]
        rows, weights = self.rows[self.step, :, :width], self.weights[self.step, :, :width]  # [runs, batch]
        self.model.train()
        self.optimizer.zero_grad()
        inputs, targets = take(self.setup.train_data, rows)
        outputs = map_over_runs(self.model, self.stack, inputs, 0)
        losses = self.setup.task.read(_flatten_runs(outputs), targets.flatten(0, 1))["loss"]  # [runs · batch]
        torch.autograd.backward((losses,), (weights.flatten(),))
        if self.setup.task.l2:
            for parameter in self.stack.values():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach(), alpha=self.setup.task.l2)
        if self.setup.recipe.clip_norm is not None:
            _clip_per_run(list(self.stack.values()), self.setup.recipe.clip_norm)
        self.optimizer.step()

    def _batch_rows(self) -> list[int]:
        rows: list[int] = self.rows[self.step][self.weights[self.step] > 0].unique().tolist()
        return rows

    def _read(self) -> Mapping[str, Tensor]:
        self.model.eval()
        runs, tests = self.readings["loss"].shape[0], len(self.setup.task.test)
        size = max(1, EVALUATION_BATCH // runs)
        if tests <= size:
            return self._read_chunk(self.setup.test_data, runs)
        chunks = torch.split(torch.arange(tests, device=self.setup.device), size)
        parts = [self._read_chunk(take(self.setup.test_data, chunk), runs) for chunk in chunks]
        return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}

    def _read_chunk(self, data: tuple[Any, Tensor], runs: int) -> dict[str, Tensor]:
        inputs, targets = data
        with torch.no_grad():
            outputs = _flatten_runs(map_over_runs(self.model, self.stack, inputs, None))
            repeated_targets = targets.expand(runs, *targets.shape).flatten(0, 1)  # once for each run
            readings = self.setup.task.read(outputs, repeated_targets, self.setup.measures)
        return {name: values.reshape(runs, -1) for name, values in readings.items()}

    def _state(self, extra: Mapping[str, Tensor]) -> Checkpoint:
        return Checkpoint(self.step, self.stack, self.optimizer.state_dict()["state"], extra)

    def _restore(self, checkpoint: Checkpoint) -> None:
        with torch.no_grad():
            for name, parameter in self.stack.items():
                parameter.copy_(checkpoint.model[name])
        checkpoint.restore_optimizer(self.optimizer)


def obstacle(task: Task, recipe: Recipe) -> str | None:
    """Return why runs of this task and recipe cannot be trained on stacked parameters, or None if they can.

    The check trains two runs with batches of different size, stacked and one by one: losses, gradients and readings
    must agree.
    """
    if recipe.optimizer not in ELEMENTWISE:
        return f"optimizer {recipe.optimizer!r} does not work element by element"
    if recipe.micro_batch is not None:
        return "micro-batches must be processed one after another"
    model = task.build_model(recipe.seed).to(recipe.torch_dtype)
    if any(isinstance(m, nn.Embedding) and m.padding_idx is not None for m in model.modules()):
        return "an Embedding with padding_idx would keep its padding row fixed in the first run only"
    rows, test_rows = _TRIAL_ROWS % len(task.train), _TRIAL_ROWS[1] % len(task.test)

    def trial_data(data: Data, chosen: Tensor) -> Data:
        on_cpu: Data = cast(take(data, chosen), torch.device("cpu"), recipe.torch_dtype)
        return on_cpu

    with torch.random.fork_rng(devices=[]):
        buffers = [buffer.clone() for buffer in model.buffers()]
        with first_pass(task):
            plain = [_trial(task, model, trial_data(task.train_data, batch)) for batch in (rows[0, :2], rows[1])]
        if any(not torch.equal(*pair) for pair in zip(buffers, model.buffers(), strict=True)):
            return "the model keeps state beside its parameters while it trains (like BatchNorm's running statistics)"
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="There is a performance drop")  # vmap would loop over runs
                stacked = _stacked_trial(task, model, trial_data(task.train_data, rows))
                agree = all(_close(single, [part[run] for part in stacked]) for run, single in enumerate(plain))
                agree = agree and _readings_agree(task, model, trial_data(task.test_data, test_rows))
        except (
            RuntimeError, TypeError, ValueError, AttributeError, LookupError, AssertionError, UserWarning,
        ) as error:  # fmt: skip
            reason = str(error).strip().splitlines() or [type(error).__name__]
            return f"the model cannot be mapped over stacked parameters ({reason[0][:150]})"
    return None if agree else "the model or loss gives other results on stacked parameters (do examples interact?)"


#: Examples of the trial, modulo the number of examples; the third example of the first run has weight 0.
_TRIAL_ROWS = torch.tensor([[0, 1, 0], [1, 2, 3]])
_TRIAL_WEIGHTS = torch.tensor([[1 / 2, 1 / 2, 0], [1 / 3, 1 / 3, 1 / 3]])


def _trial(task: Task, model: nn.Module, data: Data) -> list[Tensor]:
    """Compute the mean loss of a single run, and the gradient of each parameter."""
    model.train().zero_grad()
    losses = task.batch_losses(model, data)
    torch.autograd.backward((losses.mean(),))
    gradients = [parameter.grad for parameter in model.parameters() if parameter.requires_grad]
    zeros = [torch.zeros_like(p) for p in model.parameters() if p.requires_grad]
    return [losses.detach().mean(), *(z if g is None else g.clone() for g, z in zip(gradients, zeros, strict=True))]


def _stacked_trial(task: Task, model: nn.Module, data: Data) -> list[Tensor]:
    """Compute the same as ``_trial`` for both runs on stacked parameters, each with a leading axis of runs."""
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    stack = {name: nn.Parameter(_stacked(p.detach(), 2)) for name, p in parameters.items()}
    inputs, targets = data
    losses = task.read(_flatten_runs(map_over_runs(model.train(), stack, inputs, 0)), targets.flatten(0, 1))["loss"]
    weights = _TRIAL_WEIGHTS.to(losses.dtype)
    torch.autograd.backward((losses,), (weights.flatten(),))
    gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in stack.values()]
    return [(losses.detach().view_as(weights) * weights).sum(1), *gradients]


def _readings_agree(task: Task, model: nn.Module, data: Data) -> bool:
    """Decide whether the test losses are the same on stacked parameters in evaluation mode."""
    model.eval()
    stack = {name: _stacked(p.detach(), 2) for name, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        plain = task.batch_losses(model, data)
        targets = torch.cat([data[1]] * 2)
        stacked = task.read(_flatten_runs(map_over_runs(model, stack, data[0], None)), targets)["loss"]
    return _close([plain, plain], list(stacked.reshape(2, -1)))


def _close(plain: Sequence[Tensor], stacked: Sequence[Tensor]) -> bool:
    pairs = zip(plain, stacked, strict=True)
    return all(torch.allclose(one, two, rtol=1e-3, atol=1e-5, equal_nan=True) for one, two in pairs)


def map_over_runs(model: nn.Module, stack: Mapping[str, Tensor], inputs: Any, input_axis: int | None) -> Any:
    """Compute the model's outputs ``[runs, batch, …]`` with each run's parameters.

    Args:
        model: the model.
        stack: stacked parameters ``[runs, …]`` by name.
        inputs: the model's inputs.
        input_axis: 0 if every run has its own inputs, ``[runs, batch, …]``; None if all share them, ``[batch, …]``.
    """

    def one_run(parameters: dict[str, Tensor], run_inputs: Any) -> Any:
        arguments = ((), dict(run_inputs)) if isinstance(run_inputs, Mapping) else ((run_inputs,), {})
        return functional_call(model, parameters, *arguments)

    return vmap(one_run, in_dims=(0, input_axis), randomness="error")(dict(stack), inputs)


def _stacked(parameter: Tensor, runs: int) -> Tensor:
    """Repeat a parameter for every run, ``[runs, …]``.

    Matrices ``[out, in]`` are stored with ``out`` as the fastest axis, like their gradients from the batched product
    x̄ᵀδ. This saves a copy into another order, which is an eighth of a step of a small MLP.
    """
    stack = torch.stack([parameter] * runs)
    return stack.mT.contiguous().mT if parameter.ndim == 2 else stack


def _padded(
    curricula: Sequence[Curriculum], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[int]]:
    """Return rows and weights 1/|c| of all batches, each ``[steps, runs, widest]``, and each step's widest batch.

    Shorter batches are padded with their first example at weight 0.
    """
    sizes = np.stack([curriculum.sizes for curriculum in curricula], axis=1)  # [steps, runs]
    rows = np.empty((*sizes.shape, sizes.max()), np.int64)
    for run, curriculum in enumerate(curricula):
        rows[:, run] = curriculum.indices[curriculum.offsets[:-1], None]
        for step, batch in enumerate(curriculum):
            rows[step, run, : len(batch)] = batch
    weights = (np.arange(rows.shape[2]) < sizes[..., None]) / sizes[..., None]
    return torch.tensor(rows, device=device), torch.tensor(weights, dtype=dtype, device=device), sizes.max(1).tolist()


def _flatten_runs(outputs: Any) -> Any:
    """Merge the axes of runs and examples: a per-example loss does not depend on an example's run."""
    return convert(lambda tensor: tensor.flatten(0, 1), outputs)


def _clip_per_run(parameters: Sequence[Tensor], limit: float) -> None:
    """Apply ``clip_grad_norm_`` to each run separately."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g.reshape(len(g), -1), dim=1) for g in gradients])
    factors = (limit / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)  # [runs]
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


def _of_one_run(value: Any, run: int) -> Any:
    """Return one run's part of an entry of the optimizer's state; all runs share step counts."""
    return value[run] if isinstance(value, Tensor) and value.ndim > 0 else value


def parameter_count(task: Task, frozen: bool = False) -> int:
    """Count the trained parameters of the task's model, or all of them with ``frozen``."""
    return sum(math.prod(p.shape) for p in task.build_model(0).parameters() if p.requires_grad or frozen)
