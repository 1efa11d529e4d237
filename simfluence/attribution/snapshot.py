"""A model's weights as they were, to notice whether they changed."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from simfluence.errors import InvalidInput

__all__ = ["Snapshot"]


@dataclass(frozen=True, eq=False)
class _Entry:
    """A tensor of a model: the object itself, whether it is trained, and the checksum of its numbers."""

    tensor: Tensor
    trained: bool
    checksum: int


@dataclass(frozen=True, eq=False)
class Snapshot:
    """A model's parameters and stored buffers: the objects, whether they are trained, and their checksums.

    A copy of the snapshot that is made together with a copy of the model belongs to that copy.

    >>> model = nn.Linear(2, 1)
    >>> snapshot = Snapshot.of(model)
    >>> model.weight.data = model.weight.data + 1
    >>> snapshot.changed()
    'weight'
    """

    model: nn.Module
    entries: dict[str, _Entry]

    @classmethod
    def of(cls, model: nn.Module) -> Snapshot:
        """Take a snapshot of the model as it is now."""
        return cls(model, _entries(model))

    def changed(self) -> str | None:
        """Return the name of a tensor that was changed, replaced, added or removed, or None."""
        now = _entries(self.model)
        for name in [*self.entries, *(name for name in now if name not in self.entries)]:
            if not _same(self.entries.get(name), now.get(name)):
                return name
        return None

    def check(self) -> None:
        """Check that nothing changed.

        Raises:
            InvalidInput: something did.
        """
        name = self.changed()
        if name is not None:
            raise InvalidInput(
                f"the model's weights changed since fit: fit again, or fit on a copy of the model. {name!r} is not "
                "what it was (its numbers, its requires_grad, or the parameter itself)"
            )


def _entries(model: nn.Module) -> dict[str, _Entry]:
    stored = model.state_dict(keep_vars=True).keys()
    tensors: dict[str, Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in stored}
    return {name: _Entry(tensor, tensor.requires_grad, _checksum(tensor)) for name, tensor in tensors.items()}


def _same(before: _Entry | None, now: _Entry | None) -> bool:
    if before is None or now is None:
        return False
    replaced = isinstance(before.tensor, nn.Parameter) and before.tensor is not now.tensor
    return not replaced and (before.trained, before.checksum) == (now.trained, now.checksum)


def _checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of the numbers, which depends on their order."""
    numbers = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return zlib.crc32(numbers.data)
