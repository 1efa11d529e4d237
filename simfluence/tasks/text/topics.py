"""Small language modelling that needs no hub: the texts of Python's own help topics, byte by byte.

The texts are those of ``help("topics")`` in the running Python; see ``docstrings`` for what that means for stores.
"""

from __future__ import annotations

import importlib
import platform
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from simfluence.errors import InvalidInput, did_you_mean
from simfluence.examples import Examples
from simfluence.task import Data, Task
from simfluence.tasks.losses import LANGUAGE, token_cross_entropy
from simfluence.tasks.text.padding import IGNORED
from simfluence.tasks.text.pretrained import Outputs, extra

#: Bytes, and where T5's decoder starts.
_START = 256
_WORDS = 257


def topics(
    n_train: int = 200,
    n_test: int = 100,
    shape: str = "gpt2",
    length: int = 64,
    seed: int = 0,
    python: str | None = None,
) -> Task:
    """Paragraphs of Python's help topics, by a small model with random weights; mean cross-entropy over bytes.

    Args:
        n_train, n_test: sizes of the two disjoint random samples of paragraphs.
        shape: "gpt2" says each byte after those before it; "t5" reads the first half and says the second. Both have
            two layers (T5's decoder too) and 32 dimensions.
        length: bytes of a paragraph that are read; shorter ones are left out.
        seed: of the sample.
        python: as of ``docstrings``.

    Raises:
        InvalidInput: more paragraphs than there are, an unknown shape, a length below 2, no extra ``hf``.
    """
    if shape not in _MODELS:
        raise InvalidInput(f"unknown shape {shape!r}, {did_you_mean(shape, _MODELS)}")
    if length < 2:
        raise InvalidInput(f"length={length}: there is nothing to say after less than two bytes")
    found = paragraphs(length)
    if min(n_train, n_test) < 1 or n_train + n_test > len(found):
        raise InvalidInput(f"n_train={n_train} and n_test={n_test}: there are {len(found)} paragraphs, take some")
    rows = [found[row] for row in np.random.default_rng(seed).permutation(len(found))[: n_train + n_test]]
    train, test = (
        Examples([name for name, _, _ in side], pd.DataFrame({"label": [label for _, label, _ in side]}))
        for side in (rows[:n_train], rows[n_train:])
    )
    data = [_data([text for _, _, text in side], shape) for side in (rows[:n_train], rows[n_train:])]
    arguments = {
        "n_train": n_train, "n_test": n_test, "shape": shape, "length": length, "seed": seed,
        "python": python or platform.python_version(),
    }  # fmt: skip
    return Task(
        "topics", partial(_MODELS[shape], length), data[0], data[1], token_cross_entropy, train, test, arguments,
        LANGUAGE,
    )  # fmt: skip


def paragraphs(length: int) -> list[tuple[str, str, bytes]]:
    """``(name, topic, first bytes)`` of every paragraph of so many bytes or more; the same bytes stand once."""
    every: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    found: dict[bytes, tuple[str, str, bytes]] = {}
    for topic, text in sorted(every.items()):
        for number, paragraph in enumerate(text.split("\n\n")):
            start = " ".join(paragraph.split()).encode()[:length]
            if len(start) == length and start not in found:
                found[start] = (f"{topic}-{number}", topic, start)
    return list(found.values())


def _data(texts: list[bytes], shape: str) -> Data:
    """Nothing is padded: all texts have the same length."""
    tokens = torch.tensor([list(text) for text in texts])
    mask = torch.ones_like(tokens)
    if shape == "gpt2":
        return {"input_ids": tokens, "attention_mask": mask}, _moved(tokens[:, 1:], after=IGNORED)
    half = tokens.shape[1] // 2
    read, said = tokens[:, :half], tokens[:, half:]
    start = torch.full_like(said[:, :1], _START)
    inputs = {"input_ids": read, "attention_mask": mask[:, :half], "decoder_input_ids": torch.cat([start, said], 1)}
    return inputs, _moved(said, after=IGNORED)


def _moved(targets: Tensor, after: int) -> Tensor:
    """With one more place, which has no target."""
    return torch.cat([targets, torch.full_like(targets[:, :1], after)], 1)


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
