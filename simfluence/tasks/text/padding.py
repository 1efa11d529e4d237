"""Removal of padding that all examples of a batch have."""

from __future__ import annotations

from torch import Tensor

from simfluence.task import Data

__all__ = ["IGNORED", "trimmed"]

#: Target of tokens without a target.
IGNORED = -100


def trimmed(data: Data) -> Data:
    """Cut trailing columns that are padding in all examples; inputs have the names that Hugging Face uses.

    ``attention_mask`` tells which tokens are padding; ``decoder_input_ids`` are padding where ``labels`` (an input, or
    the targets) are −100. Other inputs and whole-number targets are cut if their last axis has the same length. Use it
    as ``Task(trim=trimmed)``, with models whose losses do not depend on padding.

    >>> import torch
    >>> inputs = {"input_ids": torch.tensor([[5, 6, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    >>> trimmed((inputs, torch.tensor([1])))[0]["input_ids"]
    tensor([[5, 6]])
    """
    inputs, targets = data
    mask = inputs["attention_mask"]
    lengths = {mask.shape[-1]: _used(mask != 0)}
    if "decoder_input_ids" in inputs:
        labels = inputs.get("labels", targets)
        target_lengths = {labels.shape[-1]: _used(labels != IGNORED)}
    else:
        target_lengths = lengths
    cut = {name: _cut(tensor, lengths if name in _ENCODED else target_lengths) for name, tensor in inputs.items()}
    return cut, targets if targets.ndim < 2 or targets.is_floating_point() else _cut(targets, target_lengths)


_ENCODED = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def _used(mask: Tensor) -> int:
    """Count the columns up to the last one that any example uses, at least one."""
    used = mask.flatten(0, -2).any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


def _cut(tensor: Tensor, lengths: dict[int, int]) -> Tensor:
    return tensor[..., : lengths.get(tensor.shape[-1], tensor.shape[-1])] if tensor.ndim > 1 else tensor
