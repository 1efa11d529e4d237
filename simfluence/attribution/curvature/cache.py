"""Unfinished and finished curvature in one safetensors file, so that a stopped fit can resume."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from simfluence._internal.files import write_whole
from simfluence.attribution.gradients.hooks import Gradients
from simfluence.errors import StoreError
from simfluence.task import Data, tensors

#: Seconds between saves of unfinished sums.
EVERY = 30.0
_FORMAT = 1

__all__ = ["CurvatureCache", "fingerprint"]


class CurvatureCache:
    """Sums over training examples, by name, in the file at ``path``.

    Args:
        path: the file, read if it exists.
        fingerprint: identifies model, data and settings; a file with another fingerprint is refused.

    Raises:
        StoreError: the file is damaged, or belongs to another model, data or settings.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        self.fingerprint = fingerprint
        self.stage, self.done, self.sums = "", 0, dict[str, Tensor]()
        self._saved = time.monotonic()
        if path.exists():
            self._read()

    def restored(self, stage: str, sums: dict[str, Tensor]) -> int:
        """Copy the file's sums of ``stage`` into ``sums``, and return the number of examples that they cover."""
        if self.stage != stage:
            return 0
        for name, value in sums.items():
            value.copy_(self.sum(name, value))
        return self.done

    def sum(self, name: str, like: Tensor) -> Tensor:
        """Return one of the sums, checked for the shape of ``like``, with its device and dtype."""
        if name not in self.sums or self.sums[name].shape != like.shape:
            raise StoreError(f"{self.path} has no {name} of shape {tuple(like.shape)}: pass another path")
        return self.sums[name].to(like)

    def save(self, stage: str, sums: Mapping[str, Tensor], done: int, last: bool) -> None:
        """Write the file if this is the last batch, or if the last save was ``EVERY`` seconds ago."""
        if not last and time.monotonic() - self._saved < EVERY:
            return
        header = {"format": _FORMAT, "fingerprint": self.fingerprint, "stage": stage, "done": done}
        portable = {name: value.detach().cpu().contiguous() for name, value in sums.items()}
        text = json.dumps(header | {"sha256": _digest(portable)})
        write_whole(self.path, safetensors.torch.save(portable, {"simfluence": text}))
        self.stage, self.done, self.sums, self._saved = stage, done, portable, time.monotonic()

    def _read(self) -> None:
        try:
            with safetensors.safe_open(self.path, "pt") as file:
                header = json.loads((file.metadata() or {})["simfluence"])
                sums = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            if header["sha256"] != _digest(sums) or header["format"] != _FORMAT:
                raise ValueError("its checksum or format is wrong")
            stage, done, fingerprint = str(header["stage"]), int(header["done"]), str(header["fingerprint"])
        except (safetensors.SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise StoreError(f"{self.path} is damaged or is no curvature file: {error}") from None
        if fingerprint != self.fingerprint:
            raise StoreError(
                f"{self.path} has the curvature of another model, training data, labels or layers: pass another path"
            )
        self.stage, self.done, self.sums = stage, done, sums


def fingerprint(gradients: Gradients, data: Data, *settings: object) -> str:
    """Return the SHA-256 of weights, layers, data, loss and settings; of functions, it covers only the names."""
    loss = getattr(gradients.loss, "__qualname__", type(gradients.loss).__qualname__)
    layers = [[name, layer.rows, layer.columns] for name, layer in gradients.layers.items()]
    digest = hashlib.sha256(json.dumps([layers, loss, [str(setting) for setting in settings]]).encode())
    for tensor in tensors((list(gradients.model.state_dict().values()), data)):
        digest.update(f"{tensor.dtype} {tuple(tensor.shape)}".encode() + _bytes(tensor))
    return digest.hexdigest()


def _digest(sums: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(sums):
        digest.update(f"{name} {sums[name].dtype} {tuple(sums[name].shape)}".encode() + _bytes(sums[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
