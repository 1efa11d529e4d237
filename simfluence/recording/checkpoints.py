"""Checkpoints: parameters, buffers and optimizer state at one step of training, as safetensors. No pickle.

The file's metadata has the SHA-256 of the whole file, computed with zeros in place of the checksum.
"""

from __future__ import annotations

import hashlib
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

from simfluence._internal.checked import checked
from simfluence._internal.files import check_format, write_whole
from simfluence.errors import InvalidInput, StoreError

__all__ = ["FORMAT", "Checkpoint"]

#: Version of the checkpoint files. Files without a version have version 0; versions 0 and 1 have no checksum and can
#: be read; newer ones are refused.
FORMAT = 2

_CHECKSUM = "sha256"  # key of the checksum in the metadata
_ZEROS = "0" * 64  # placeholder for the checksum
_KEY = f'"{_CHECKSUM}":"'.encode()  # as it stands in the file; inside names the quotes would be escaped
_CHUNK = 2**20


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

    @checked
    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
        """Load the state into a model and an optimizer of the same kind.

        Raises:
            InvalidInput: the model or the optimizer is of another kind than the one that was saved.
        """
        try:
            model.load_state_dict(dict(self.model))
            if optimizer is not None:
                self.restore_optimizer(optimizer)
        except (RuntimeError, LookupError, ValueError) as error:
            reason = "; ".join(line.strip() for line in str(error).splitlines()[:3])
            raise InvalidInput(
                f"the checkpoint of step {self.step} does not fit this model or optimizer: {reason}"
            ) from None

    @checked
    def restore_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Load the state into an optimizer of the same kind."""
        groups = optimizer.state_dict()["param_groups"]
        state = {number: dict(entries) for number, entries in self.optimizer.items()}
        optimizer.load_state_dict({"state": state, "param_groups": groups})

    @checked
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
        content = safetensors.torch.save(on_cpu, {"simfluence": header, _CHECKSUM: _ZEROS})
        start = content.index(_KEY) + len(_KEY)
        digest = hashlib.sha256(content).hexdigest().encode()
        write_whole(path, content[:start] + digest + content[start + len(_ZEROS) :], aside)

    @classmethod
    @checked
    def load(cls, path: str | Path) -> Checkpoint:
        """Read a checkpoint.

        Raises:
            StoreError: the file is missing, damaged or not a checkpoint.
        """
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                header = json.loads(metadata["simfluence"])
                version = header.get("format", 0)
                check_format(version, FORMAT, path)
                if version >= 2 or _CHECKSUM in metadata:
                    _check_sum(Path(path))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return cls._of_parts(header["step"], tensors | header["numbers"])
        except FileNotFoundError:
            raise StoreError(
                f"there is no checkpoint {path}: record the run again with Observe(checkpoints=…)"
            ) from None
        except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise _damaged(path, str(error)) from None

    @classmethod
    def _of_parts(cls, step: Any, values: Mapping[str, Any]) -> Checkpoint:
        """Sort the values of a file by the first part of their names.

        Raises:
            ValueError: the step or a value is not what a checkpoint has.
        """
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"its step is {step!r}")
        parts: dict[str, dict[str, Any]] = {"model": {}, "optimizer": {}, "extra": {}}
        for name, value in values.items():
            part, rest = name.split("/", 1)
            if not isinstance(value, Tensor) and (part != "optimizer" or not isinstance(value, int | float)):
                raise ValueError(f"{name!r} is not a number")
            parts[part][rest] = value
        return cls(step, parts["model"], _by_parameter(parts["optimizer"]), parts["extra"])

    @staticmethod
    def is_whole(path: Path) -> bool:
        """Decide whether a file is a checkpoint whose checksum matches; older files without one count as whole."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
            if json.loads(metadata["simfluence"]).get("format", 0) >= 2 or _CHECKSUM in metadata:
                _check_sum(path)
        except (SafetensorError, OSError, LookupError, ValueError, TypeError, AttributeError, StoreError):
            return False
        return True


def _check_sum(path: Path) -> None:
    """Compare the file's content with the checksum in it.

    Raises:
        StoreError: they differ, or there is no checksum.
    """
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")  # of the header, which safetensors has checked
        head = length.to_bytes(8, "little") + file.read(length)
        start = head.find(_KEY) + len(_KEY)
        end = start + len(_ZEROS)
        digest = hashlib.sha256(head[:start] + _ZEROS.encode() + head[end:])
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    if start < len(_KEY) or digest.hexdigest().encode() != head[start:end]:
        raise _damaged(path, "its checksum does not match")


def _damaged(path: str | Path, reason: str) -> StoreError:
    return StoreError(
        f"{path} is damaged or is not a checkpoint ({reason}): record the run again with Observe(checkpoints=…), which "
        "replaces it, or delete it"
    )


def _by_parameter(flat: Mapping[str, Any]) -> dict[int, dict[str, Any]]:
    nested: dict[int, dict[str, Any]] = {}
    for name, value in flat.items():
        index, entry = name.split("/", 1)
        nested.setdefault(int(index), {})[entry] = value
    return nested
