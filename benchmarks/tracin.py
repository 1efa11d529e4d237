"""TracIn over checkpoints against the captum package's TracInCP: the same raw scores, and how long they take.

An MLP 784-1024-1024-10 with three checkpoints of a short training and their learning rates; all parameters on both
sides. captum takes per-example gradients by its own quick way (``sample_wise_grads_per_batch``), in batches that suit
it best of those tried; TracInCPFast looks at the last layer alone, so it is no peer.

    make bench-peers, or: python benchmarks/tracin.py [--train 1000] [--test 50] [--threads 1] [--repetitions 3]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from captum.influence import TracInCP
from ekfac import classification, images, mlp
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from simfluence import attribution

RATES = (0.1, 0.05, 0.01)
#: Training examples at a time of captum, whose gradients it forms.
BATCH = 50


def checkpoints(train: tuple[Tensor, Tensor]) -> list[tuple[dict[str, Tensor], float]]:
    """The weights after each pass over the training examples, with the learning rate of that pass."""
    torch.manual_seed(0)
    model, found = mlp(), []
    for rate in RATES:
        optimizer = torch.optim.SGD(model.parameters(), lr=rate)
        for rows in torch.randperm(len(train[1])).split(50):
            optimizer.zero_grad()
            classification(model(train[0][rows]), train[1][rows]).mean().backward()
            optimizer.step()
        found.append(({name: value.clone() for name, value in model.state_dict().items()}, rate))
    return found


def with_captum(paths: list[str], train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> np.ndarray:
    def load(model: nn.Module, path: str) -> float:
        state, rate = torch.load(path, weights_only=True)
        model.load_state_dict(state)
        return rate

    warnings.filterwarnings("ignore", "Input Tensor 0 did not already require gradients")
    loss = nn.CrossEntropyLoss(reduction="sum")
    tracin = TracInCP(
        mlp(), TensorDataset(*train), paths, load, loss_fn=loss, batch_size=BATCH, sample_wise_grads_per_batch=True
    )
    return tracin.influence(test).detach().numpy()


def with_simfluence(states: list, train: tuple[Tensor, Tensor], test: tuple[Tensor, Tensor]) -> np.ndarray:
    return attribution.TracInCP(states).fit(mlp(), train, loss=classification).scores(test).values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--test", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repetitions", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    inputs, targets = images(options.train + options.test)
    train, test = (
        (inputs[: options.train], targets[: options.train]),
        (inputs[options.train :], targets[options.train :]),
    )
    states = checkpoints(train)
    seconds: dict[str, list[float]] = {"captum": [], "simfluence": []}
    with tempfile.TemporaryDirectory() as folder:
        paths = [str(Path(folder) / f"{number}.pt") for number in range(len(states))]
        for path, state in zip(paths, states, strict=True):
            torch.save(state, path)
        sides = {
            "captum": lambda: with_captum(paths, train, test),
            "simfluence": lambda: with_simfluence(states, train, test),
        }
        scores = {}
        for repetition in range(options.repetitions):
            for side in sorted(sides, reverse=bool(repetition % 2)):
                start = time.perf_counter()
                scores[side] = sides[side]().astype(float)
                seconds[side].append(time.perf_counter() - start)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "captum"))
    print(f"{platform.machine()}, {options.threads} threads, {versions}")
    print(f"MLP 784-1024-1024-10, {options.train:,} × {options.test}, {len(states)} checkpoints; median, range")
    for side, spent in seconds.items():
        print(f"  {side:10} {np.median(spent):8.3f} s  ({min(spent):.3f}–{max(spent):.3f})")
    ratios = np.array(seconds["captum"]) / np.array(seconds["simfluence"])
    print(f"  {np.median(ratios):.1f} × faster ({ratios.min():.1f}–{ratios.max():.1f}; goal 5)")
    theirs, ours = scores["captum"], scores["simfluence"]
    print(f"  scores: relative difference {np.linalg.norm(ours - theirs) / np.linalg.norm(theirs):.1e}")


if __name__ == "__main__":
    main()
