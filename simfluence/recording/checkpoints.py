"""Checkpoints: parameters, buffers and optimizer state at one step of training, as safetensors. No pickle."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from simfluence._internal.files import check_format, write_whole
from simfluence.errors import StoreError

__all__ = ["FORMAT", "Checkpoint"]

#: Version of the checkpoint files. Files without a version have version 0 and can be read; newer ones are refused.
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """State of a run at one step. It may share tensors with the model until ``save``.

    Args:
        step: number of updates so far.
        model: parameters and buffers by name, as in ``module.state_dict()``.
        optimizer: per-parameter state: parameter number → name → tensor or number.
        extra: further tensors by name.

    >>> model = nn.Linear(2, 1)
    >>> before = Checkpoint(0, {name: tensor.clone() for name, tensor in model.state_dict().items()}, {}, {})
    >>> _ = nn.init.zeros_(model.weight)
    >>> before.restore(model)
    >>> bool((model.weight == before.model["weight"]).all())
    True
    """

    step: int
    model: Mapping[str, Tensor]
    optimizer: Mapping[int, Mapping[str, Any]]
    extra: Mapping[str, Tensor]

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Load the state into a model and an optimizer of the same kind."""
        model.load_state_dict(dict(self.model))
        if optimizer is not None:
            self.restore_optimizer(optimizer)

    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the state into an optimizer of the same kind."""
        groups = optimizer.state_dict()["param_groups"]
        state = {number: dict(entries) for number, entries in self.optimizer.items()}
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    def save(self, path: Path, aside: Path | None = None) -> None:
        """Write to ``path`` atomically.

        Args:
            path: the file to write.
            aside: folder for the temporary file, on the same file system; by default the folder of ``path``.
        """
        tensors = {f"model/{name}": tensor for name, tensor in self.model.items()}
        tensors |= {f"extra/{name}": tensor for name, tensor in self.extra.items()}
        numbers: dict[str, Any] = {}
        for index, entries in self.optimizer.items():
            for name, value in entries.items():
                (tensors if isinstance(value, Tensor) else numbers)[f"optimizer/{index}/{name}"] = value
        on_cpu = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
        header = json.dumps({"format": FORMAT, "step": self.step, "numbers": numbers})
        write_whole(path, safetensors.torch.save(on_cpu, {"simfluence": header}), aside)

    @classmethod
    def load(cls, path: Path) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            StoreError: the file is damaged or is not a checkpoint.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                header = json.loads((file.metadata() or {})["simfluence"])
                check_format(header.get("format", 0), FORMAT, path)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, KeyError, ValueError) as error:
            raise StoreError(f"{path} is damaged or is not a checkpoint: {error}") from None
        parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "extra": {}}
        for name, value in (tensors | header["numbers"]).items():
            part, rest = name.split("/", 1)
            parts[part][rest] = value
        return cls(header["step"], parts["model"], _by_parameter(parts["optimizer"]), parts["extra"])


def _by_parameter(flat: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    nested: dict[int, dict[str, Any]] = {}
    for name, value in flat.items():
        index, entry = name.split("/", 1)
        nested.setdefault(int(index), {})[entry] = value
    return nested
