"""The loop engine: one run after another, for any ``torch.nn.Module``."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor, nn

from simfluence.curriculum import Curriculum
from simfluence.recording.activation_cache import CachedModel
from simfluence.recording.checkpoints import Checkpoint
from simfluence.recording.engines.base import Training, TrainingSetup

__all__ = ["LoopTraining", "ModeSwitch"]

_NO_CACHE = contextlib.nullcontext()


class LoopTraining(Training):
    """A single run. An empty batch is a step without an update, but the schedule advances."""

    def __init__(self, setup: TrainingSetup, curriculum: Curriculum, times: np.ndarray) -> None:
        super().__init__(setup, 1, times)
        self.model = setup.task.build_model(setup.recipe.seed).to(setup.device, setup.recipe.torch_dtype)
        self.parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = setup.recipe.build_optimizer(self.parameters)
        indices = torch.tensor(curriculum.indices, dtype=torch.int64, device=setup.device)
        self.batches = torch.split(indices, curriculum.sizes.tolist())
        self.gradients_of_mean: dict[tuple[int, int], Tensor] = {}
        self.mode = ModeSwitch(self.model)
        self.cached_model = setup.cached_model(self.model)
        self.rows = [batch.tolist() for batch in curriculum] if self.cached_model else []
        self.start()

    def run_checkpoints(self) -> list[Checkpoint]:
        return [self._state({})]

    def _update(self, rate: float) -> None:
        batch = self.batches[self.step]
        if len(batch) == 0:
            return
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        size = self.setup.recipe.micro_batch or len(batch)
        for start in range(0, len(batch), size):
            part = slice(start, start + size)
            cache = self._cache(self.cached_model, self.rows[self.step][part]) if self.cached_model else _NO_CACHE
            self.mode.training(True)
            with cache:
                losses = self.setup.task.batch_losses(
                    self.model, self.setup.task.some(self.setup.train_data, batch[part])
                )
                torch.autograd.backward((losses,), (self._gradient_of_mean(losses, len(batch)),))
        if self.setup.task.l2:
            for parameter in self.parameters:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach(), alpha=self.setup.task.l2)
        if self.setup.recipe.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(self.parameters, self.setup.recipe.clip_norm)
        self.optimizer.step()

    def _cache(self, cached_model: CachedModel, rows: list[int]) -> contextlib.AbstractContextManager[None]:
        """Prepare the activation cache for a training pass over ``rows``."""
        if missing := cached_model.missing(rows):
            self.mode.training(False)
            cached_model.prepare(missing)
        return cached_model.training(rows)

    def _gradient_of_mean(self, losses: Tensor, count: int) -> Tensor:
        """Return the gradient of the mean over ``count`` losses with respect to ``losses``.

        It is cached, since creating it costs as much as a layer.
        """
        key = len(losses), count
        if key not in self.gradients_of_mean:
            self.gradients_of_mean[key] = torch.full_like(losses, 1 / count, requires_grad=False)
        return self.gradients_of_mean[key]

    def _batch_rows(self) -> list[int]:
        rows: list[int] = self.batches[self.step].tolist()
        return rows

    def _read(self) -> Mapping[str, Tensor]:
        self.mode.training(False)
        return self.setup.loss_reader.read(self.model, self.cached_model, first=self.step == 0)

    def _state(self, extra: Mapping[str, Tensor]) -> Checkpoint:
        return Checkpoint(self.step, self.model.state_dict(), self.optimizer.state_dict()["state"], extra)

    def _restore(self, checkpoint: Checkpoint) -> None:
        checkpoint.restore(self.model, self.optimizer)


class ModeSwitch:
    """A replacement for ``model.train()`` and ``model.eval()`` at a twentieth of their cost.

    If a module defines its own ``train`` or ``eval`` (for example to keep a layer frozen), the model's own are called.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        modules = list(model.modules())
        plain = all(
            type(m).train is nn.Module.train
            and type(m).eval is nn.Module.eval
            and not isinstance(m, torch.jit.ScriptModule)  # stores its flag elsewhere
            for m in modules
        )
        self.flags = [vars(module) for module in modules] if plain else None

    def training(self, mode: bool) -> None:
        if self.flags is None:
            self.model.train(mode)
            return
        for flags in self.flags:
            flags["training"] = mode
