"""Many trainings at once: their parameters stacked, their updates made together.

Every parameter gets a leading axis of runs, ``[runs, …]``. The model is mapped over it, so a step is one forward
and one backward pass; runs do not meet in any operation, so the gradient of the summed losses is every run's own.
An optimizer that works element by element then steps the stack as it would step each run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from simfluence.curriculum import Curriculum
from simfluence.recipe import Recipe
from simfluence.recording.checkpoints import Checkpoint
from simfluence.recording.training import Job, Training
from simfluence.task import Task, cast, convert, forward, take, tensors

#: Optimizers that treat every element of a parameter by itself.
ELEMENTWISE = ("sgd", "adam", "adamw", "rmsprop", "adagrad")

#: Test examples times runs per forward pass: bounds memory, does not change the losses.
EVALUATION_BATCH = 8192


class BatchedTraining(Training):
    """Trainings of equal length, without empty batches, in step on stacked parameters."""

    def __init__(self, job: Job, curricula: Sequence[Curriculum], times: np.ndarray) -> None:
        super().__init__(job, len(curricula), times)
        self.model = job.task.build_model(job.recipe.seed).to(job.device, job.recipe.torch_dtype)
        self.stack = {
            name: nn.Parameter(_stacked(parameter.detach(), len(curricula)))
            for name, parameter in self.model.named_parameters()
            if parameter.requires_grad
        }
        self.optimizer = job.recipe.build_optimizer(self.stack.values())
        self.rows, self.weights, self.widths = _padded(curricula, job.device, job.recipe.torch_dtype)
        self.start()

    def moments(self) -> list[Checkpoint]:
        rest = {name: value for name, value in self.model.state_dict().items() if name not in self.stack}
        state = self.optimizer.state_dict()["state"]
        return [
            Checkpoint(
                self.step,
                {name: parameter.detach()[run] for name, parameter in self.stack.items()} | rest,
                {number: {k: _of_run(v, run) for k, v in entries.items()} for number, entries in state.items()},
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
        inputs, targets = take(self.job.train_data, rows)
        outputs = mapped(self.model, self.stack, inputs, 0)
        losses = self.job.task.read(_joined(outputs), targets.flatten(0, 1))["loss"]  # [runs · batch]
        losses.backward(weights.flatten())
        if self.job.task.l2:
            for parameter in self.stack.values():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach(), alpha=self.job.task.l2)
        if self.job.recipe.clip_norm is not None:
            _clip_each(list(self.stack.values()), self.job.recipe.clip_norm)
        self.optimizer.step()

    def _read(self) -> Mapping[str, Tensor]:
        self.model.eval()
        runs, tests = self.readings["loss"].shape[0], len(self.job.task.test)
        chunk = max(1, EVALUATION_BATCH // runs)
        if tests <= chunk:
            return self._read_some(self.job.test_data, runs)
        chunks = torch.arange(tests, device=self.job.device).split(chunk)
        parts = [self._read_some(take(self.job.test_data, some), runs) for some in chunks]
        return {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}

    def _read_some(self, data: tuple[Any, Tensor], runs: int) -> dict[str, Tensor]:
        inputs, targets = data
        with torch.no_grad():
            outputs = _joined(mapped(self.model, self.stack, inputs, None))
            again = targets.expand(runs, *targets.shape).flatten(0, 1)  # the targets once for each run
            readings = self.job.task.read(outputs, again, self.job.measures)
        return {name: values.unflatten(0, (runs, -1)) for name, values in readings.items()}

    def _state(self, extra: Mapping[str, Tensor]) -> Checkpoint:
        return Checkpoint(self.step, self.stack, self.optimizer.state_dict()["state"], extra)

    def _restore(self, checkpoint: Checkpoint) -> None:
        with torch.no_grad():
            for name, parameter in self.stack.items():
                parameter.copy_(checkpoint.model[name])
        checkpoint.restore_optimizer(self.optimizer)


def obstacle(task: Task, recipe: Recipe) -> str | None:
    """Why runs of this task and recipe cannot be trained on stacked parameters, or None if they can.

    Tries it on two runs of two training examples, beside the plain model.
    """
    if recipe.optimizer not in ELEMENTWISE:
        return f"optimizer {recipe.optimizer!r} does not work element by element"
    model = task.build_model(recipe.seed).to(recipe.torch_dtype).train()
    inputs, targets = cast(
        take(task.train_data, torch.arange(2) % len(task.train)), torch.device("cpu"), recipe.torch_dtype
    )
    buffers = [buffer.clone() for buffer in model.buffers()]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        plain = forward(model, inputs)
        if any(not torch.equal(*pair) for pair in zip(buffers, model.buffers(), strict=True)):
            return "the model keeps state beside its parameters while it trains (BatchNorm's running statistics, say)"
        stack = {name: torch.stack([p] * 2) for name, p in model.named_parameters() if p.requires_grad}
        try:
            stacked = mapped(model, stack, convert(lambda t: torch.stack([t] * 2), inputs), 0)
            agree = all(
                torch.allclose(one, two[1], rtol=1e-3, atol=1e-5)
                for one, two in zip(tensors(plain), tensors(stacked), strict=True)
            )
            task.read(_joined(stacked), torch.cat([targets] * 2))
        except (RuntimeError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            return f"the model cannot be mapped over stacked parameters ({reason[0][:150]})"
    return None if agree else "the model mapped over stacked parameters gives other outputs than by itself"


def mapped(model: nn.Module, stack: Mapping[str, Tensor], inputs: Any, input_axis: int | None) -> Any:
    """The outputs ``[runs, batch, …]`` of the model under each run's parameters.

    Args:
        input_axis: 0 if every run has inputs of its own, ``[runs, batch, …]``; None if all share them, ``[batch, …]``.
    """

    def of_run(parameters: dict[str, Tensor], some: Any) -> Any:
        arguments = ((), dict(some)) if isinstance(some, Mapping) else ((some,), {})
        return functional_call(model, parameters, *arguments)

    return vmap(of_run, in_dims=(0, input_axis), randomness="error")(dict(stack), inputs)


def _stacked(parameter: Tensor, runs: int) -> Tensor:
    """``[runs, …]``. Matrices ``[out, in]`` lie with ``out`` fastest in memory, as their gradients come out of the
    batched product x̄ᵀδ, which then need not be copied into another order (an eighth of a step of a small MLP).
    """
    stack = torch.stack([parameter] * runs)
    return stack.mT.contiguous().mT if parameter.ndim == 2 else stack


def _padded(
    curricula: Sequence[Curriculum], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[int]]:
    """Rows and weights 1/|c| of all batches, each ``[steps, runs, widest]``, and the widest batch of each step.

    A shorter batch is filled with its own first example at weight 0.
    """
    sizes = np.stack([curriculum.sizes for curriculum in curricula], axis=1)  # [steps, runs]
    rows = np.empty((*sizes.shape, sizes.max()), np.int64)
    for run, curriculum in enumerate(curricula):
        rows[:, run] = curriculum.indices[curriculum.offsets[:-1], None]
        for step, batch in enumerate(curriculum):
            rows[step, run, : len(batch)] = batch
    weights = (np.arange(rows.shape[2]) < sizes[..., None]) / sizes[..., None]
    return torch.tensor(rows, device=device), torch.tensor(weights, dtype=dtype, device=device), sizes.max(1).tolist()


def _joined(outputs: Any) -> Any:
    """Runs and examples as one axis: a per-example loss does not care which run an example is of."""
    return convert(lambda tensor: tensor.flatten(0, 1), outputs)


def _clip_each(parameters: Sequence[Tensor], limit: float) -> None:
    """``clip_grad_norm_`` of each run by itself."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norms = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in gradients])
    factors = (limit / (torch.linalg.vector_norm(norms, dim=0) + 1e-6)).clamp(max=1.0)  # [runs]
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


def _of_run(value: Any, run: int) -> Any:
    """One run's part of an optimizer's entry; step counts are common to all."""
    return value[run] if isinstance(value, Tensor) and value.ndim > 0 else value


def parameter_count(task: Task) -> int:
    """Number of trained parameters of the task's model."""
    return sum(math.prod(p.shape) for p in task.build_model(0).parameters() if p.requires_grad)
