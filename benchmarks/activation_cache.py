"""What is gained where the lower layers are frozen: their outputs computed once per example, padding trimmed?

The same runs are recorded three times in alternation: everything computed at every step on batches padded to the
longest example of all (as a loop without further ado does), padding trimmed and the test side sorted by length, and
frozen layers kept too. Losses are compared in single precision, where rounding grows with every step of Adam, and in a
few steps of double precision.

    python benchmarks/activation_cache.py [--repetitions 3] [--runs 1] [--steps 12] [--threads 1]
"""

from __future__ import annotations

import argparse
import time
from itertools import pairwise

import numpy as np
import torch
from torch import nn

import simfluence as sf
from simfluence.tasks.text.padding import trimmed

N_TRAIN, N_TEST, LONGEST, WIDTH, LAYERS = 200, 100, 64, 128, 6


class Encoder(nn.Module):
    """A transformer of six layers over tokens, a mean, a head."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(1000, WIDTH), nn.Embedding(LONGEST, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0, batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        states = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1]))
        hidden = (1.0 - attention_mask[:, None, None, :].to(states.dtype)) * -1e9
        hidden = hidden.expand(-1, 4, input_ids.shape[1], -1).flatten(0, 1)
        for layer in self.layers:
            states = layer(states, src_mask=hidden)
        mask = attention_mask[..., None]
        return self.head((states * mask).sum(1) / mask.sum(1))


class Convolutions(nn.Sequential):
    def __init__(self) -> None:
        sizes = [1, 16, 32, 32]
        layers = [layer for one, two in pairwise(sizes) for layer in (nn.Conv2d(one, two, 3, padding=1), nn.ReLU())]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(128, 10))


def frozen(model: nn.Module, *trained: str) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    return model


def texts(trim: bool, *trained: str) -> sf.Task:
    """Texts of 8 to 64 tokens, half of them below 27; their class is the most frequent of five words."""
    rng = np.random.default_rng(0)
    count = N_TRAIN + N_TEST
    lengths = np.exp(rng.uniform(np.log(8), np.log(LONGEST + 1), count)).astype(int).clip(8, LONGEST)
    lengths[:2] = LONGEST
    mask = (np.arange(LONGEST) < lengths[:, None]).astype(np.int64)
    ids = rng.integers(1, 1000, (count, LONGEST)) * mask
    labels = np.array([np.bincount(row[row > 0] % 5, minlength=5).argmax() for row in ids])
    torch.manual_seed(0)
    model = frozen(Encoder(), *trained)
    sides = [
        ({"input_ids": torch.tensor(ids[s]), "attention_mask": torch.tensor(mask[s])}, torch.tensor(labels[s]))
        for s in (slice(N_TRAIN), slice(N_TRAIN, None))
    ]
    loss = nn.CrossEntropyLoss(reduction="none")
    examples = sf.Examples.numbered(N_TRAIN), sf.Examples.numbered(N_TEST)
    return sf.Task("texts", model, *sides, loss, *examples, trim=trimmed if trim else None)


def images(trim: bool, *trained: str) -> sf.Task:
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(N_TRAIN + N_TEST, 1, 16, 16)).astype(np.float32), rng.integers(10, size=N_TRAIN + N_TEST)
    torch.manual_seed(0)
    model = frozen(Convolutions(), *trained)
    return sf.tasks.from_arrays(model, X[:N_TRAIN], y[:N_TRAIN], "cross_entropy", test=(X[N_TRAIN:], y[N_TRAIN:]))


CASES = {
    "transformer, head": (texts, ["head"]),
    "transformer, top layer and head": (texts, ["layers.5", "head"]),
    "transformer, all (nothing to keep)": (texts, [""]),
    "CNN, head": (images, ["8"]),
    "CNN, top convolution and head": (images, ["4", "8"]),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    few = [sf.Curriculum(np.arange(24).reshape(3, 8), N_TRAIN)]
    recipe = sf.Recipe(optimizer="adamw", lr=1e-3)
    curricula = sf.random_curricula(N_TRAIN, arguments.runs, arguments.steps, 8, subset=0.5)
    print(f"{arguments.runs} runs of {arguments.steps} steps, batches of 8, {N_TEST} test examples at every step")
    print("seconds, median; times as fast as everything at every step; largest difference of a loss\n")
    print(f"{'':40}{'each time':>10}{'trimmed':>16}{'and kept':>16}{'single':>10}{'double':>10}")
    for name, (make, trained) in CASES.items():
        ways = {"each time": (False, 0), "trimmed": (True, 0), "and kept": (True, 2**30)}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        losses = {}
        for _ in range(arguments.repetitions):
            for way, (trim, room) in ways.items():
                task = make(trim, *trained)
                start = time.perf_counter()
                losses[way] = sf.record(task, recipe, curricula, engine="loop", activation_cache_bytes=room).losses
                seconds[way].append(time.perf_counter() - start)
        median = {way: float(np.median(found)) for way, found in seconds.items()}
        exact = {
            way: sf.record(
                make(trim, *trained), recipe.replace(dtype="float64"), few, engine="loop", activation_cache_bytes=room
            ).losses
            for way, (trim, room) in ways.items()
        }  # fmt: skip
        single, double = (
            max(np.abs(found[way] - found["each time"]).max() for way in ways) for found in (losses, exact)
        )
        ratios = [f"{median[way]:8.2f} {median['each time'] / median[way]:6.1f}×" for way in list(ways)[1:]]
        print(
            f"{name:40}{median['each time']:10.2f}{ratios[0]:>16}{ratios[1]:>16}{single:10.1e}{double:10.1e}",
            flush=True,
        )


if __name__ == "__main__":
    main()
