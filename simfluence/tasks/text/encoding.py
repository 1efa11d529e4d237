"""Texts as padded tensors of token ids, with masks; training and test examples are padded to the same length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from simfluence._internal.checked import shown
from simfluence.errors import InvalidInput
from simfluence.tasks.text.padding import IGNORED
from simfluence.tasks.text.pretrained import Pretrained

__all__ = ["continuations", "padded_alike", "texts"]

#: Token ids of an input and of its target.
_Pair = tuple[list[int], list[int]]


def texts(pretrained: Pretrained, texts: pd.DataFrame, max_length: int | None, truncate: bool) -> list[list[int]]:
    """Return the token ids of each row's text or pair of texts."""
    columns = [texts[column].astype(str).tolist() for column in texts]
    limit = _limit(pretrained, max_length)
    ids: list[list[int]] = pretrained.tokenizer(*columns, truncation=truncate and limit is not None, max_length=limit)[
        "input_ids"
    ]
    _check_lengths([len(row) for row in ids], limit)
    return ids


def padded_alike(pretrained: Pretrained, parts: Sequence[list[list[int]]]) -> list[dict[str, Tensor]]:
    """Return token ids and masks of training and test examples, padded to the same length."""
    length = max(len(row) for part in parts for row in part)
    padding = pretrained.tokenizer.pad_token_id or 0
    return [
        {
            "input_ids": _padded(part, length, padding),
            "attention_mask": _padded([[1] * len(row) for row in part], length, 0),
        }
        for part in parts
    ]


def continuations(
    pretrained: Pretrained, parts: Sequence[list[tuple[Any, Any]]], max_length: int | None, truncate: bool
) -> list[dict[str, Tensor]]:
    """Return a model's inputs for pairs (prompt, target), and ``labels``: the target token of each position.

    Raises:
        InvalidInput: a part of a pair is not text, a target is empty, or a pair is longer than allowed.
    """
    encode = _encoder_decoder if pretrained.config.is_encoder_decoder else _causal
    limit = _limit(pretrained, max_length)
    for pairs in parts:
        _check_texts(pairs)
    encoded = [[encode(pretrained, *pair, limit if truncate else None) for pair in part] for part in parts]
    for part in encoded:
        for row, (source, target) in enumerate(part):
            if not target:
                raise InvalidInput(f"the target of row {row} is empty: leave the row out")
            longest = max(len(source), len(target)) if pretrained.config.is_encoder_decoder else len(source)
            _check_lengths([0] * row + [longest], limit)
    if pretrained.config.is_encoder_decoder:
        return _decoder_inputs(pretrained, encoded)
    return _causal_inputs(pretrained, encoded)


def _encoder_decoder(pretrained: Pretrained, prompt: str, target: str, limit: int | None) -> _Pair:
    truncation = {} if limit is None else {"truncation": True, "max_length": limit}
    target_ids = pretrained.tokenizer(target, **truncation)["input_ids"] if target.strip() else []
    return pretrained.tokenizer(prompt, **truncation)["input_ids"], target_ids


def _causal(pretrained: Pretrained, prompt: str, target: str, limit: int | None) -> _Pair:
    """Return all token ids, and the target's; without a prompt, the first token is not a target."""
    gap = " " if prompt and not prompt[-1].isspace() else ""
    prompt_ids = pretrained.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    target_ids = pretrained.tokenizer(gap + target, add_special_tokens=False)["input_ids"] if target.strip() else []
    if limit is not None:
        target_ids = target_ids[:limit]
        prompt_ids = prompt_ids[max(0, len(prompt_ids) + len(target_ids) - limit) :]
    return prompt_ids + target_ids, target_ids if prompt_ids else target_ids[1:]


def _causal_inputs(pretrained: Pretrained, parts: Sequence[list[_Pair]]) -> list[dict[str, Tensor]]:
    inputs = padded_alike(pretrained, [[ids for ids, _ in part] for part in parts])
    for tensors, part in zip(inputs, parts, strict=True):
        length = tensors["input_ids"].shape[1]
        labels = [[IGNORED] * (len(ids) - len(target) - 1) + target for ids, target in part]
        tensors["labels"] = _padded(labels, length, IGNORED)
    return inputs


def _decoder_inputs(pretrained: Pretrained, parts: Sequence[list[_Pair]]) -> list[dict[str, Tensor]]:
    """Return inputs for an encoder and a decoder; the decoder reads the target, shifted by one position."""
    start = pretrained.config.decoder_start_token_id
    inputs = padded_alike(pretrained, [[ids for ids, _ in part] for part in parts])
    length = max(len(target) for part in parts for _, target in part)
    for tensors, part in zip(inputs, parts, strict=True):
        shifted = [[start, *target[:-1]] for _, target in part]
        tensors["decoder_input_ids"] = _padded(shifted, length, pretrained.tokenizer.pad_token_id or 0)
        tensors["decoder_attention_mask"] = _padded([[1] * len(target) for _, target in part], length, 0)
        tensors["labels"] = _padded([target for _, target in part], length, IGNORED)
    return inputs


def _padded(rows: Sequence[Sequence[int]], length: int, padding: int) -> Tensor:
    return torch.tensor([[*row, *[padding] * (length - len(row))] for row in rows])


def _check_texts(pairs: Sequence[tuple[Any, Any]]) -> None:
    for row, pair in enumerate(pairs):
        for text in pair:
            if not isinstance(text, str):
                raise InvalidInput(f"row {row} must have text, got {shown(text)}: convert the column to text")


def _limit(pretrained: Pretrained, max_length: int | None) -> int | None:
    """Return the smaller of ``max_length`` and the model's number of positions, or None without a limit."""
    limits = [limit for limit in (max_length, pretrained.max_length) if limit is not None]
    return min(limits) if limits else None


def _check_lengths(lengths: Sequence[int], limit: int | None) -> None:
    longest = int(np.argmax(lengths))
    if limit is not None and lengths[longest] > limit:
        raise InvalidInput(
            f"row {longest} has {lengths[longest]} tokens, more than the {limit} that are allowed: pass truncate=True, "
            "or leave the row out"
        )
