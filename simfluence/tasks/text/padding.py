"""Padding of token sequences, cut where all of a batch have it."""

from __future__ import annotations

from torch import Tensor

from simfluence.task import Data

#: The target of a token that is none.
IGNORED = -100


def trimmed(data: Data) -> Data:
    """The examples without trailing columns that are padding in all of them, by the names that Hugging Face uses.

    ``attention_mask`` says which tokens are padding; where there are ``decoder_input_ids``, their padding is where
    ``labels`` (an input, or the targets) are −100. Of other inputs and whole-number targets, those are cut whose last
    axis is as long as one of these. For ``Task(trim=trimmed)``, with models whose losses do not depend on padding.

    >>> import torch
    >>> inputs = {"input_ids": torch.tensor([[5, 6, 0, 0]]), "attention_mask": torch.tensor([[1, 1, 0, 0]])}
    >>> trimmed((inputs, torch.tensor([1])))[0]["input_ids"]
    tensor([[5, 6]])
    """
    inputs, targets = data
    mask = inputs["attention_mask"]
    lengths = {mask.shape[-1]: _used(mask != 0)}
    read = {name for name in inputs if name in _ENCODED}
    if "decoder_input_ids" in inputs:
        labels = inputs.get("labels", targets)
        said = {labels.shape[-1]: _used(labels != IGNORED)}
    else:
        said = lengths
    cut = {name: _cut(tensor, lengths if name in read else said) for name, tensor in inputs.items()}
    return cut, targets if targets.ndim < 2 or targets.is_floating_point() else _cut(targets, said)


_ENCODED = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


def _used(mask: Tensor) -> int:
    """Columns up to the last one that any example uses; at least one."""
    used = mask.flatten(0, -2).any(0).nonzero()
    return int(used[-1]) + 1 if len(used) else 1


def _cut(tensor: Tensor, lengths: dict[int, int]) -> Tensor:
    return tensor[..., : lengths.get(tensor.shape[-1], tensor.shape[-1])] if tensor.ndim > 1 else tensor
