"""Small language modelling without the hub: the texts of Python's own help topics, byte by byte.

The texts are those of ``help("topics")`` in the running Python; ``docstrings`` explains what that means for stores.
"""

from __future__ import annotations

import importlib
import platform
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from simfluence._internal.checked import checked
from simfluence._internal.types import Seed
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.examples import Examples
from simfluence.task import Data, Task
from simfluence.tasks.losses import LANGUAGE, token_cross_entropy
from simfluence.tasks.text.padding import IGNORED
from simfluence.tasks.text.pretrained import Outputs, extra

__all__ = ["paragraphs", "topics"]

#: Token id with which T5's decoder starts, after the 256 bytes.
_START = 256
#: Number of token ids.
_WORDS = 257


@checked
def topics(
    n_train: int = 200,
    n_test: int = 100,
    shape: str = "gpt2",
    length: int = 64,
    seed: Seed = 0,
    python: str | None = None,
) -> Task:
    """Build a task that predicts Python's help topics with a small, randomly initialised model; mean cross-entropy.

    Args:
        n_train, n_test: sizes of the two disjoint random samples of paragraphs.
        shape: "gpt2" predicts each byte from those before it; "t5" reads the first half and predicts the second. Both
            have two layers (T5 in encoder and decoder each) and 32 dimensions.
        length: number of bytes of each paragraph; shorter paragraphs are left out.
        seed: seed of the samples.
        python: same as in ``docstrings``.

    Raises:
        InvalidInput: there are fewer paragraphs than requested, the shape is unknown, or the length is below 2; when
            the model is built, the extra ``hf`` is not installed.
    """
    if shape not in _MODELS:
        raise InvalidInput(f"unknown shape {shape!r}, {did_you_mean(shape, _MODELS)}")
    if length < 2:
        raise InvalidInput(f"length={length} must be 2 or more: the first byte has no prediction")
    every = paragraphs(length)
    if min(n_train, n_test) < 1 or n_train + n_test > len(every):
        raise InvalidInput(
            f"n_train={n_train} and n_test={n_test} must be 1 or more, and at most {len(every)} paragraphs together"
        )
    rows = [every[row] for row in np.random.default_rng(seed).permutation(len(every))[: n_train + n_test]]
    parts = rows[:n_train], rows[n_train:]
    train, test = (
        Examples([name for name, _, _ in part], pd.DataFrame({"label": [label for _, label, _ in part]}))
        for part in parts
    )
    data = [_data([text for _, _, text in part], shape) for part in parts]
    arguments = {
        "n_train": n_train, "n_test": n_test, "shape": shape, "length": length, "seed": seed,
        "python": python or platform.python_version(),
    }  # fmt: skip
    return Task(
        "topics", partial(_MODELS[shape], length), data[0], data[1], token_cross_entropy, train, test, arguments,
        LANGUAGE,
    )  # fmt: skip


def paragraphs(length: int) -> list[tuple[str, str, bytes]]:
    """Return ``(name, topic, first bytes)`` of every paragraph of at least ``length`` bytes, without duplicates."""
    texts: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    unique: dict[bytes, tuple[str, str, bytes]] = {}
    for topic, text in sorted(texts.items()):
        for number, paragraph in enumerate(text.split("\n\n")):
            start = " ".join(paragraph.split()).encode()[:length]
            if len(start) == length and start not in unique:
                unique[start] = (f"{topic}-{number}", topic, start)
    return list(unique.values())


def _data(texts: list[bytes], shape: str) -> Data:
    """Return inputs and targets; nothing is padded, as all texts have the same length."""
    tokens = torch.tensor([list(text) for text in texts])
    mask = torch.ones_like(tokens)
    if shape == "gpt2":
        return {"input_ids": tokens, "attention_mask": mask}, _with_ignored_end(tokens[:, 1:])
    half = tokens.shape[1] // 2
    source, target = tokens[:, :half], tokens[:, half:]
    start = torch.full_like(target[:, :1], _START)
    inputs = {"input_ids": source, "attention_mask": mask[:, :half], "decoder_input_ids": torch.cat([start, target], 1)}
    return inputs, _with_ignored_end(target)


def _with_ignored_end(targets: Tensor) -> Tensor:
    """Append a position without a target."""
    return torch.cat([targets, torch.full_like(targets[:, :1], IGNORED)], 1)


def _gpt2(length: int) -> nn.Module:
    transformers = extra("transformers")
    return Outputs(transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=_WORDS, n_positions=length, n_embd=32, n_layer=2, n_head=2, resid_pdrop=0.0, embd_pdrop=0.0,
        attn_pdrop=0.0, use_cache=False, bos_token_id=_START, eos_token_id=_START, attn_implementation="eager",
    )))  # fmt: skip


def _t5(length: int) -> nn.Module:
    transformers = extra("transformers")
    return Outputs(transformers.T5ForConditionalGeneration(transformers.T5Config(
        vocab_size=_WORDS, d_model=32, d_kv=16, d_ff=64, num_layers=2, num_heads=2, dropout_rate=0.0, use_cache=False,
        pad_token_id=_START, eos_token_id=_START, decoder_start_token_id=_START, attn_implementation="eager",
    )))  # fmt: skip


_MODELS = {"gpt2": _gpt2, "t5": _t5}
