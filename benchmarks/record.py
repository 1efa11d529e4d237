"""What does recording cost?

1. The ``loop`` engine against the same training written by hand: the same updates and evaluations, losses equal bit
   for bit, run by run in alternation.
2. The ``batched`` engine against ``loop`` on 32 runs: steps per second, memory, and where its time goes.

    python benchmarks/record.py [--pairs 60] [--repetitions 5] [--model mlp|cnn] [--threads 1]
"""

from __future__ import annotations

import argparse
import platform
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

import simfluence as sf

RUNS, STEPS = 32, 200
PEAK = """
import sys, torch, simfluence as sf
torch.set_num_threads(1)
task = sf.tasks.digits(model=sys.argv[2])
curricula = sf.random_curricula(300, 32, steps=20, batch_size=8, subset=0.5)
def read(key):
    return next(int(line.split()[1]) / 1024 for line in open("/proc/self/status") if line.startswith(key))
sf.record(task, sf.Recipe(lr=0.1), curricula[:2], engine=sys.argv[1])  # loads the libraries
open("/proc/self/clear_refs", "w").write("5")  # the peak is that of what follows
before = read("VmRSS")
sf.record(task, sf.Recipe(lr=0.1), curricula, engine=sys.argv[1])
print(before, read("VmHWM"))
"""


def by_hand(task: sf.Task, lr: float, curriculum: sf.Curriculum) -> np.ndarray:
    (X, y), (X_test, y_test) = task.train_data, task.test_data
    torch.manual_seed(0)
    model = task.model()
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


def timed(function):
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def compare_with_hand(task: sf.Task, pairs: int) -> None:
    recipe = sf.Recipe(lr=0.1)
    curricula = sf.random_curricula(300, pairs + 1, steps=STEPS, batch_size=8, subset=0.5)
    hand, ours = [], []
    for pair, curriculum in enumerate(curricula):
        sides = [
            lambda c=curriculum: by_hand(task, 0.1, c),
            lambda c=curriculum: sf.record(task, recipe, [c], engine="loop").losses[0],
        ]
        order = [0, 1] if pair % 2 else [1, 0]
        found = {side: timed(sides[side]) for side in order}
        assert np.array_equal(found[0][1], found[1][1]), "not the same training"
        if pair:  # the first warms up
            hand.append(found[0][0])
            ours.append(found[1][0])
    print(f"\nloop against by hand: {pairs} pairs of runs of {STEPS} steps; µs per step: median, quartiles")
    for name, seconds in (("by hand", hand), ("loop", ours)):
        low, middle, high = np.quantile(1e6 * np.array(seconds) / STEPS, [0.25, 0.5, 0.75])
        print(f"  {name:8} {middle:6.0f}  ({low:.0f}–{high:.0f})")
    low, middle, high = np.quantile(np.array(ours) / np.array(hand), [0.25, 0.5, 0.75])
    print(f"  loop / by hand, in pairs: {middle:.3f}  ({low:.3f}–{high:.3f})")


def compare_engines(task: sf.Task, repetitions: int) -> None:
    recipe = sf.Recipe(lr=0.1)
    curricula = sf.random_curricula(300, RUNS, steps=STEPS, batch_size=8, subset=0.5)
    seconds: dict[str, list[float]] = {"loop": [], "batched": []}
    for repetition in range(repetitions + 1):
        losses = {}
        for engine in sorted(seconds, reverse=bool(repetition % 2)):
            spent, runs = timed(lambda engine=engine: sf.record(task, recipe, curricula, engine=engine))
            losses[engine] = runs.losses
            if repetition:
                seconds[engine].append(spent)
        assert np.abs(losses["loop"] - losses["batched"]).max() < 1e-3, "not the same training"
    print(f"\nbatched against loop: {RUNS} runs × {STEPS} steps, {repetitions} repetitions in alternation")
    for engine, spent in seconds.items():
        rates = RUNS * STEPS / np.array(spent)
        print(f"  {engine:8} {np.median(rates):7.0f} steps/s  ({rates.min():.0f}–{rates.max():.0f})")
    ratios = np.array(seconds["loop"]) / np.array(seconds["batched"])
    print(f"  batched / loop, in pairs: {np.median(ratios):.2f}  ({ratios.min():.2f}–{ratios.max():.2f})")


def limits(task: sf.Task) -> None:
    """The floor of one step of all runs: its plain matrix products, as fast as this machine multiplies."""
    A = torch.randn(1024, 1024)
    rate = 2 * 1024**3 / min(timed(lambda: A @ A)[0] for _ in range(20))
    parameters = sum(p.numel() for p in task.build_model(0).parameters() if p.ndim > 1)
    flops = RUNS * parameters * (2 * len(task.test) + 6 * 8)  # reading forwards; the batch forwards and twice backwards
    print(f"\nlimit: {rate / 1e9:.0f} GFLOP/s in a large product; a dense model's products of one step of {RUNS} runs")
    print(f"  take {flops / 1e6:.0f} MFLOP, {1e3 * flops / rate:.2f} ms, that is {RUNS * rate / flops:,.0f} steps/s")


def memory(model: str) -> None:
    if not Path("/proc/self/clear_refs").exists():
        return
    print(f"\npeak memory of recording {RUNS} runs, beyond what the process had before (MB)")
    for engine in ("loop", "batched"):
        command = [sys.executable, "-c", PEAK, engine, model]
        before, peak = map(float, subprocess.run(command, check=True, capture_output=True).stdout.split())
        print(f"  {engine:8} {peak - before:5.1f}  (of {peak:.0f} in all)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--model", default="mlp")
    parser.add_argument("--threads", type=int, default=1, help="one is the fastest for models this small")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    task = sf.tasks.digits(model=options.model)
    print(
        f"{platform.machine()}, {options.threads} threads, torch {torch.__version__}; digits protocol, {options.model}"
    )
    compare_with_hand(task, options.pairs)
    compare_engines(task, options.repetitions)
    if options.model == "mlp":
        limits(task)
    memory(options.model)


if __name__ == "__main__":
    main()
