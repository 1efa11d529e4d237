"""What does recording cost? The recording loop against the same training written by hand.

Both make the same updates and the same evaluations, on the digits protocol, in alternation and in one process; the
ratio is the median over pairs of runs. Losses must be equal, or the comparison would mean nothing.

    python benchmarks/record.py [--pairs 60]
"""

from __future__ import annotations

import argparse
import platform
import time

import numpy as np
import torch
from torch import nn

import simfluence as sf


def by_hand(task: sf.Task, lr: float, curriculum: sf.Curriculum) -> np.ndarray:
    (X, y), (X_test, y_test) = task.train_data, task.test_data
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    losses = torch.empty(len(curriculum) + 1, len(y_test))
    with torch.no_grad():
        losses[0] = nn.functional.cross_entropy(model(X_test), y_test, reduction="none")
    for t, batch in enumerate(curriculum):
        rows = torch.tensor(batch).long()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
        optimizer.step()
        with torch.no_grad():
            losses[t + 1] = nn.functional.cross_entropy(model(X_test), y_test, reduction="none")
    return losses.numpy()


def timed(function, *arguments):
    start = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - start, result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)  # the fastest for a model this small, for both sides
    task, recipe = sf.tasks.digits(), sf.Recipe(lr=0.1)
    curricula = sf.random_curricula(300, options.pairs + 1, steps=200, batch_size=8, subset=0.5)
    hand, ours = [], []
    for pair, curriculum in enumerate(curricula):
        sides = [
            lambda c=curriculum: by_hand(task, 0.1, c),
            lambda c=curriculum: sf.record(task, recipe, [c]).losses[0],
        ]
        order = [0, 1] if pair % 2 else [1, 0]
        found = {side: timed(sides[side]) for side in order}
        assert np.array_equal(found[0][1], found[1][1]), "not the same training"
        if pair:  # the first warms up
            hand.append(found[0][0])
            ours.append(found[1][0])
    print(f"{platform.machine()}, 1 thread, torch {torch.__version__}")
    print(f"digits protocol, {options.pairs} pairs of runs of 200 steps; µs per step: median, quartiles")
    for name, seconds in (("by hand", hand), ("record", ours)):
        low, middle, high = np.quantile(1e6 * np.array(seconds) / 200, [0.25, 0.5, 0.75])
        print(f"  {name:8} {middle:6.0f}  ({low:.0f}–{high:.0f})")
    low, middle, high = np.quantile(np.array(ours) / np.array(hand), [0.25, 0.5, 0.75])
    print(f"  record / by hand, in pairs: {middle:.3f}  ({low:.3f}–{high:.3f})")


if __name__ == "__main__":
    main()
