"""Texts as padded tensors of token numbers, with masks; both sides of a task are padded to the same length."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from simfluence.errors import InvalidInput
from simfluence.tasks.text.padding import IGNORED
from simfluence.tasks.text.pretrained import Pretrained

#: What is read and what is said, as token numbers.
_Pair = tuple[list[int], list[int]]


def texts(pretrained: Pretrained, texts: pd.DataFrame, max_length: int | None, truncate: bool) -> list[list[int]]:
    """Token numbers of each row's text or pair of texts."""
    columns = [texts[column].astype(str).tolist() for column in texts]
    limit = _limit(pretrained, max_length)
    ids: list[list[int]] = pretrained.tokenizer(*columns, truncation=truncate and limit is not None, max_length=limit)[
        "input_ids"
    ]
    _check_lengths([len(row) for row in ids], limit)
    return ids


def padded_alike(pretrained: Pretrained, sides: Sequence[list[list[int]]]) -> list[dict[str, Tensor]]:
    """Both sides' tokens and masks, padded to the same length."""
    length = max(len(row) for side in sides for row in side)
    padding = pretrained.tokenizer.pad_token_id or 0
    return [
        {
            "input_ids": _padded(side, length, padding),
            "attention_mask": _padded([[1] * len(row) for row in side], length, 0),
        }
        for side in sides
    ]


def continuations(
    pretrained: Pretrained, sides: Sequence[list[tuple[str, str]]], max_length: int | None, truncate: bool
) -> list[dict[str, Tensor]]:
    """Inputs, and ``labels``: what the model is to say at each place."""
    encoded = _encoder_decoder if pretrained.config.is_encoder_decoder else _causal
    limit = _limit(pretrained, max_length)
    found = [[encoded(pretrained, *pair, limit if truncate else None) for pair in side] for side in sides]
    for side in found:
        for row, (read, said) in enumerate(side):
            if not said:
                raise InvalidInput(f"the target of row {row} is empty: there is nothing to say; leave the row out")
            longest = max(len(read), len(said)) if pretrained.config.is_encoder_decoder else len(read)
            _check_lengths([0] * row + [longest], limit)
    if pretrained.config.is_encoder_decoder:
        return _decoder_inputs(pretrained, found)
    return _causal_inputs(pretrained, found)


def _encoder_decoder(pretrained: Pretrained, prompt: str, target: str, limit: int | None) -> _Pair:
    cut = {} if limit is None else {"truncation": True, "max_length": limit}
    said = pretrained.tokenizer(target, **cut)["input_ids"] if target.strip() else []
    return pretrained.tokenizer(prompt, **cut)["input_ids"], said


def _causal(pretrained: Pretrained, prompt: str, target: str, limit: int | None) -> _Pair:
    """All tokens, and those of them that are to be said: all but the first where there is no prompt."""
    gap = " " if prompt and not prompt[-1].isspace() else ""
    before = pretrained.tokenizer(prompt, add_special_tokens=False)["input_ids"] if prompt else []
    said = pretrained.tokenizer(gap + target, add_special_tokens=False)["input_ids"] if target.strip() else []
    if limit is not None:
        said = said[:limit]
        before = before[max(0, len(before) + len(said) - limit) :]
    return before + said, said if before else said[1:]


def _causal_inputs(pretrained: Pretrained, sides: Sequence[list[_Pair]]) -> list[dict[str, Tensor]]:
    inputs = padded_alike(pretrained, [[read for read, _ in side] for side in sides])
    for each, side in zip(inputs, sides, strict=True):
        length = each["input_ids"].shape[1]
        rows = [[IGNORED] * (len(read) - len(said) - 1) + said for read, said in side]
        each["labels"] = _padded(rows, length, IGNORED)
    return inputs


def _decoder_inputs(pretrained: Pretrained, sides: Sequence[list[_Pair]]) -> list[dict[str, Tensor]]:
    """The decoder reads what it is to say, one place later."""
    start = pretrained.config.decoder_start_token_id
    inputs = padded_alike(pretrained, [[read for read, _ in side] for side in sides])
    length = max(len(said) for side in sides for _, said in side)
    for each, side in zip(inputs, sides, strict=True):
        shifted = [[start, *said[:-1]] for _, said in side]
        each["decoder_input_ids"] = _padded(shifted, length, pretrained.tokenizer.pad_token_id or 0)
        each["decoder_attention_mask"] = _padded([[1] * len(said) for _, said in side], length, 0)
        each["labels"] = _padded([said for _, said in side], length, IGNORED)
    return inputs


def _padded(rows: Sequence[Sequence[int]], length: int, padding: int) -> Tensor:
    return torch.tensor([[*row, *[padding] * (length - len(row))] for row in rows])


def _limit(pretrained: Pretrained, max_length: int | None) -> int | None:
    """The most tokens that are asked for or that the model has positions for."""
    limits = [limit for limit in (max_length, pretrained.max_length) if limit is not None]
    return min(limits) if limits else None


def _check_lengths(lengths: Sequence[int], limit: int | None) -> None:
    longest = int(np.argmax(lengths))
    if limit is not None and lengths[longest] > limit:
        raise InvalidInput(
            f"row {longest} has {lengths[longest]} tokens, more than the {limit} that are allowed: give truncate=True, "
            "or leave it out"
        )
