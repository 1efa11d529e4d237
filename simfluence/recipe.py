"""The ``Recipe``: optimizer, learning-rate schedule, weight decay, clipping, dtype and initialisation seed."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import numpy as np
import torch
from annotated_types import Interval
from jaxtyping import Float
from pydantic import Field, field_validator, model_validator

from simfluence._internal.checked import checked
from simfluence._internal.spec import Spec
from simfluence.errors import did_you_mean

__all__ = ["Recipe"]

_MOST_STEPS = 10_000_000  # each is computed by itself

NonNegative = Annotated[float, Field(ge=0)]
Scalar = bool | int | float | str | None


class Recipe(Spec):
    """The settings that a run is trained with, apart from its data. Frozen.

    With ``p(t)`` the learning-rate factor at step t = 0…T−1, the optimizer steps with ``lr · p(t)``:
    during warm-up ``p(t) = (t + 1) / warmup``; afterwards, with ``u = (t − warmup) / (horizon − warmup)``
    capped at 1, constant ``1``, linear ``1 − u``, cosine ``(1 + cos πu) / 2``. The horizon belongs to the
    recipe, so the schedule does not depend on the length of the curriculum.

    Args:
        optimizer: "sgd", "adam", "adamw" or any class of ``torch.optim`` by name, in any case.
        lr: peak learning rate.
        momentum: for optimizers that support it.
        weight_decay: passed to the optimizer, also when 0 (torch's AdamW would otherwise use 0.01).
        optimizer_args: further arguments of the optimizer, such as ``{"betas": (0.9, 0.98)}``.
        schedule: "constant", "linear" or "cosine".
        warmup: number of warm-up steps.
        horizon: number of steps of the whole schedule; required unless the schedule is constant.
        clip_norm: largest norm of the gradient over all parameters; larger gradients are scaled down to it.
        dtype: dtype of parameters, inputs and losses.
        micro_batch: largest number of examples per forward pass; the gradients of a batch's parts are added up. It
            bounds memory and changes results only by rounding.
        seed: seed of the initial weights and of anything random in the model; all runs of a recipe share it.

    Raises:
        InvalidInput: a field is invalid; the message names every such field.

    >>> Recipe(lr=1.0, schedule="linear", horizon=4, warmup=1).learning_rates(4).round(2).tolist()
    [1.0, 1.0, 0.67, 0.33]
    """

    optimizer: str = "sgd"
    lr: NonNegative = 0.1
    momentum: NonNegative = 0.0
    weight_decay: NonNegative = 0.0
    optimizer_args: dict[str, Scalar | tuple[Scalar, ...]] = Field(default_factory=dict)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: int = Field(0, ge=0)
    horizon: int | None = Field(None, ge=1)
    clip_norm: float | None = Field(None, gt=0)
    dtype: Literal["float32", "float64"] = "float32"
    micro_batch: int | None = Field(None, ge=1)
    seed: int = Field(0, ge=0)

    @field_validator("optimizer")
    @classmethod
    def _known_optimizer(cls, name: str) -> str:
        optimizers = _optimizers()
        if name.lower() not in optimizers:
            raise ValueError(f"unknown optimizer {name!r}, {did_you_mean(name.lower(), optimizers)}")
        if "closure" in _required_parameters(optimizers[name.lower()].step):
            raise ValueError(f"optimizer {name!r} re-evaluates the loss within a step, which a recipe cannot express")
        return name.lower()

    @model_validator(mode="after")
    def _fits_together(self) -> Recipe:
        accepted = self._accepted()
        for name in self._arguments():
            if name not in accepted:
                raise ValueError(f"optimizer {self.optimizer!r} takes no {name!r}, {did_you_mean(name, accepted)}")
        try:
            self.build_optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
        except (ValueError, TypeError, RuntimeError) as error:
            raise ValueError(f"torch refuses these arguments of {self.optimizer!r}: {error}") from None
        if self.schedule != "constant" and self.horizon is None:
            raise ValueError(f"schedule {self.schedule!r} needs its number of steps: pass horizon=")
        if self.horizon is not None and self.warmup >= self.horizon:
            raise ValueError(f"warmup={self.warmup} must be below horizon={self.horizon}")
        return self

    def build_optimizer(self, parameters: Iterable[torch.nn.Parameter]) -> torch.optim.Optimizer:
        """Build a fresh optimizer over ``parameters``, at the peak learning rate."""
        build: Callable[..., torch.optim.Optimizer] = _optimizers()[self.optimizer]
        return build(parameters, lr=self.lr, **self._arguments())

    @checked
    def learning_rates(self, steps: Annotated[int, Interval(ge=0, le=_MOST_STEPS)]) -> Float[np.ndarray, " steps"]:
        """Compute the learning rate of each step."""
        return self.lr * np.array([self._factor(step) for step in range(steps)])

    @property
    def torch_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == "float64" else torch.float32

    def canonical(self) -> str:
        """Return sorted JSON of the fields that differ from their defaults, from which run ids are computed."""
        return json.dumps(self.model_dump(exclude_defaults=True), sort_keys=True)

    def _arguments(self) -> dict[str, Any]:
        plain = {"momentum": self.momentum, "weight_decay": self.weight_decay}
        return {k: v for k, v in plain.items() if v or k in self._accepted()} | self.optimizer_args

    def _accepted(self) -> set[str]:
        return set(inspect.signature(_optimizers()[self.optimizer]).parameters) - {"params", "lr"}

    def _factor(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.schedule == "constant" or self.horizon is None:
            return 1.0
        progress = min(1.0, (step - self.warmup) / (self.horizon - self.warmup))
        return 1 - progress if self.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2

    def __hash__(self) -> int:
        return hash(self.canonical())


def _optimizers() -> dict[str, type[torch.optim.Optimizer]]:
    return {
        name.lower(): value
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer) and value is not torch.optim.Optimizer
    }


def _required_parameters(function: Any) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [parameter.name for parameter in parameters if parameter.default is parameter.empty]
