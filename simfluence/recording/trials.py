"""Trials before training: what would spoil a recording is found in a few passes, before any run is trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.recording.engines.base import TrainingSetup
from simfluence.recording.explain import PASSED_ON, explained, named
from simfluence.task import Data, forward, set_seed

__all__ = ["InitialReadings", "check_before_training"]

#: Examples of each side that are evaluated by themselves.
_ALONE = 4

#: Agreement of losses and gradients: far above the rounding of float32, TF32 and bfloat16, and far below the effect of
#: examples that are mixed.
_RTOL, _ATOL = 1e-2, 1e-3


@dataclass(frozen=True)
class InitialReadings:
    """The evaluation of the untrained model.

    Args:
        values: loss and measures by name, each ``[test]``.
        random: whether the model draws random numbers in evaluation mode, so that no two evaluations agree.
    """

    values: Mapping[str, np.ndarray]
    random: bool


def check_before_training(setup: TrainingSetup, curricula: Mapping[str, Curriculum]) -> InitialReadings:
    """Evaluate the untrained model, and check it against the curricula that it is to be trained on.

    Args:
        setup: task, recipe and data.
        curricula: curricula by run id; without any, the model is evaluated only.

    Raises:
        InvalidInput: a test loss is not finite or depends on other examples; the model or the loss fails on a batch;
            ``micro_batch`` changes gradients.
    """
    model = untrained_model(setup)
    initial = initial_readings(setup, model)
    if curricula:
        check_examples(setup, model, initial)
        check_batches(setup, model, curricula)
    return initial


def untrained_model(setup: TrainingSetup) -> nn.Module:
    """Build the model as every run starts with it."""
    return setup.task.build_model(setup.recipe.seed).to(setup.device, setup.recipe.torch_dtype)


def initial_readings(setup: TrainingSetup, model: nn.Module) -> InitialReadings:
    """Evaluate the untrained model on the test examples.

    Raises:
        InvalidInput: the model or the loss fails on a test example.
    """
    task = setup.task
    try:
        set_seed(setup.recipe.seed)  # as every run starts
        before = torch.get_rng_state()
        readings = setup.loss_reader.read(model.eval(), None, first=True)
    except PASSED_ON:
        raise
    except Exception as error:
        rows = range(len(task.test))
        raise explained(error, "the evaluation before training", task, "test", rows, model, setup.test_data) from error
    drawn = not torch.equal(before, torch.get_rng_state())
    return InitialReadings({name: values.cpu().numpy() for name, values in readings.items()}, drawn)


def check_examples(setup: TrainingSetup, model: nn.Module, initial: InitialReadings) -> None:
    """Check that every test loss before training is finite, and that no loss or measure depends on other examples.

    Raises:
        InvalidInput: a loss is NaN or infinite, or the loss, a measure or the model mixes examples.
    """
    task = setup.task
    bad = np.flatnonzero(~np.isfinite(initial.values["loss"])).tolist()
    if bad:
        raise InvalidInput(
            f"task {task.name!r}: before any training the loss of {len(bad)} of {len(task.test)} test examples is NaN "
            f"or infinite: {named(task.test, bad)}. Every run would count as diverged. Look for missing values or "
            "huge numbers in their inputs, and for targets that the loss ignores altogether; correct these examples or "
            "leave them out"
        )
    if initial.random:
        return
    rows = _spread(len(task.test))
    _compare_alone(setup, model.eval(), "test", rows, {name: values[rows] for name, values in initial.values.items()})
    rows = _spread(len(task.train))
    try:
        together = _evaluated(setup, model, "train", rows)
    except Exception:  # the update that shows these examples names them, and they may never be shown
        return
    _compare_alone(setup, model, "train", rows, together)


def _spread(count: int) -> list[int]:
    """Return a few rows from the first to the last."""
    return sorted(set(np.linspace(0, count - 1, _ALONE).round().astype(int).tolist()))


def _compare_alone(
    setup: TrainingSetup, model: nn.Module, side: str, rows: Sequence[int], together: Mapping[str, np.ndarray]
) -> None:
    """Compare readings ``[rows]`` that were made in a batch with those of each example by itself.

    An example by itself is given twice, since models that drop axes of length 1 cannot take a batch of one.

    Raises:
        InvalidInput: they differ.
    """
    task, names = setup.task, list(together)
    for position, row in enumerate(rows):
        try:
            alone = _evaluated(setup, model, side, [row, row], names)
        except Exception as error:
            if isinstance(error, PASSED_ON):
                raise
            data = setup.test_data if side == "test" else setup.train_data
            raise explained(error, "the evaluation before training", task, side, [row], model, data) from error
        for name in names:
            one, other = float(together[name][position]), float(alone[name][0])
            scale = float(np.nanmean(np.abs(together[name])))
            if not np.isclose(one, other, rtol=_RTOL, atol=_ATOL * scale, equal_nan=True):
                raise InvalidInput(_mixing(setup, model, side, row, name, one, other))


def _evaluated(
    setup: TrainingSetup, model: nn.Module, side: str, rows: Sequence[int], names: Sequence[str] = ("loss",)
) -> dict[str, np.ndarray]:
    """Evaluate some examples as one batch: readings by name, each ``[rows]``."""
    data: Data = setup.test_data if side == "test" else setup.train_data
    inputs, targets = setup.task.some(data, torch.tensor(rows))
    with torch.no_grad():
        readings = setup.task.read(forward(model, inputs), targets, [name for name in names if name != "loss"])
    return {name: values.cpu().numpy() for name, values in readings.items()}


def _mixing(setup: TrainingSetup, model: nn.Module, side: str, row: int, name: str, one: float, other: float) -> str:
    """Say that a loss or measure depends on other examples, with the shapes of outputs and targets."""
    task = setup.task
    data = setup.test_data if side == "test" else setup.train_data
    inputs, targets = task.some(data, torch.tensor([row, row]))
    with torch.no_grad():
        outputs = _tensors(forward(model, inputs))
    function = task.loss if name == "loss" else task.measures[name]
    called = getattr(function, "__name__", type(function).__name__)
    what = f"the loss {called!r}" if name == "loss" else f"the measure {name!r} ({called})"
    output_shapes = " and ".join(str(list(tensor.shape)) for tensor in outputs[:3])
    return (
        f"task {task.name!r}: {what} of one example depends on the other examples of the batch: "
        f"{named(getattr(task, side), [row])} has {one:.5g} in a batch and {other:.5g} by itself. For two examples the "
        f"outputs have shape {output_shapes} and the targets {list(targets.shape)}: if one of them lacks an axis, give "
        "them the same shape (for example targets[:, None]). If the loss or the model computes with means over the "
        "batch, use one that treats each example by itself in evaluation mode"
    )


def _tensors(outputs: Any) -> list[Tensor]:
    """Return the tensors among a model's outputs, whatever contains them."""
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor)]


def check_batches(setup: TrainingSetup, model: nn.Module, curricula: Mapping[str, Curriculum]) -> None:
    """Check that the model trains on the smallest batch, and that micro-batches give the gradients of whole batches.

    Args:
        setup: task, recipe and data.
        model: an untrained model, whose buffers may change.
        curricula: curricula by run id.

    Raises:
        InvalidInput: a pass fails, or gradients or buffers differ.
    """
    limit = setup.recipe.micro_batch
    smallest = _smallest_part(curricula, limit)
    if smallest is not None:
        _try_training_pass(setup, model.train(), *smallest)
    if limit is not None:
        longer = (batch for curriculum in curricula.values() for batch in curriculum if len(batch) > limit)
        if (batch := next(longer, None)) is not None:
            _check_parts(setup, batch[: max(2, limit)].tolist())


def _smallest_part(curricula: Mapping[str, Curriculum], limit: int | None) -> tuple[str, int, list[int]] | None:
    """Return run, step and rows of the smallest part of a batch that the model will be trained on."""
    found: tuple[int, str, int] | None = None
    for name, curriculum in curricula.items():
        sizes = curriculum.sizes  # [steps]
        last = sizes if limit is None else np.where(sizes > 0, (sizes - 1) % limit + 1, 0)  # of each batch's parts
        last = np.where(last > 0, last, np.iinfo(np.int64).max)
        step = int(last.argmin())
        if sizes[step] and (found is None or last[step] < found[0]):
            found = int(last[step]), name, step
    if found is None:
        return None
    size, name, step = found
    return name, step, curricula[name][step][-size:].tolist()


def _try_training_pass(setup: TrainingSetup, model: nn.Module, name: str, step: int, rows: list[int]) -> None:
    task = setup.task
    try:
        task.batch_losses(model, task.some(setup.train_data, torch.tensor(rows)))
    except PASSED_ON:
        raise
    except Exception as error:
        doing = f"the pass over the smallest batch ({len(rows)} of the examples of step {step}, in run {name})"
        raise explained(error, doing, task, "train", rows, model, setup.train_data) from error


def _check_parts(setup: TrainingSetup, rows: list[int]) -> None:
    """Compare gradients and buffers after a batch, trained on whole and in two parts.

    The batch is no longer than a micro-batch, so that it fits in memory as a whole.

    Raises:
        InvalidInput: they differ.
    """
    half = -(-len(rows) // 2)
    try:
        whole, parts = _after_parts(setup, [rows]), _after_parts(setup, [rows[:half], rows[half:]])
        counts = zip(whole.counts, parts.counts, strict=True)
        same = all(torch.equal(*pair) for pair in counts)
        if not whole.random:
            same = same and all(_close(*pair) for pair in zip(whole.buffers, parts.buffers, strict=True))
            sizes = [float(gradient.abs().max()) for gradient in whole.gradients if gradient.numel()]
            largest = max(sizes, default=0.0)
            # Some gradients are zero but for rounding, such as those of attention's key biases.
            pairs = zip(whole.gradients, parts.gradients, strict=True)
            same = same and all(_close(*pair, scale=largest) for pair in pairs)
    except PASSED_ON:
        raise
    except Exception:
        same = False
    if not same:
        raise InvalidInput(
            f"micro_batch={setup.recipe.micro_batch} would change the training of task {setup.task.name!r}: the model "
            "or the loss computes with the whole batch (as BatchNorm does), so that a batch in parts gives other "
            "gradients. Leave micro_batch out, or replace such layers (for example by GroupNorm or LayerNorm)"
        )


@dataclass(frozen=True)
class _AfterPass:
    """State after a training pass: gradients, buffers of numbers, buffers that count, and whether it was random."""

    gradients: Sequence[Tensor]
    buffers: Sequence[Tensor]
    counts: Sequence[Tensor]
    random: bool


def _after_parts(setup: TrainingSetup, parts: Sequence[list[int]]) -> _AfterPass:
    """Make a training pass over the parts of a batch.

    Dropout layers are switched off: they draw other numbers for parts, which is not what is looked for.
    """
    task, model = setup.task, untrained_model(setup).train()
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.eval()
    before, count = torch.get_rng_state(), sum(map(len, parts))
    for part in parts:
        losses = task.batch_losses(model, task.some(setup.train_data, torch.tensor(part)))
        torch.autograd.backward((losses,), (torch.full_like(losses, 1 / count, requires_grad=False),))
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    buffers = list(model.buffers())
    return _AfterPass(
        gradients=[gradient.coalesce().to_dense() if gradient.is_sparse else gradient for gradient in gradients],
        buffers=[buffer for buffer in buffers if buffer.is_floating_point()],
        counts=[buffer for buffer in buffers if not buffer.is_floating_point()],
        random=not torch.equal(before, torch.get_rng_state()),
    )


def _close(one: Tensor, other: Tensor, scale: float | None = None) -> bool:
    """Decide whether two tensors agree, relative to ``scale`` or to the largest element."""
    one, other = one.detach().double(), other.detach().double()
    if scale is None:
        scale = float(one.abs().max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=_RTOL, atol=_ATOL * scale, equal_nan=True)
