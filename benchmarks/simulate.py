"""How much faster is simulating than training?

1,000 random curricula of the digits protocol, simulated by members of the Markov family fitted on runs/digits, against
the same protocol recorded by the ``batched`` engine; steps per second, alternating in one process.

    python benchmarks/simulate.py [--threads 2] [--repeats 5]
"""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import numpy as np
import torch

import simfluence as sf

SIMULATORS = {
    "additive": sf.AdditiveSimulator(l2=10),
    "multiplicative": sf.MultiplicativeSimulator(l2=10),
    "linear": sf.LinearSimulator(l2=10),
    "linear around the mean": sf.LinearSimulator(l2=10, around="mean"),
    "the same, order 2, varying": sf.LinearSimulator(l2=10, around="mean", order=2, varying=True),
}


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--curricula", type=int, default=1000)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    store = sf.RunStore("runs/digits")
    runs, task = store.load(), sf.tasks.rebuild(store.info)
    protocol = {"n_train": 300, "steps": 200, "batch_size": 8, "subset": 0.5}
    few = sf.random_curricula(runs=32, seed=1, **protocol)
    many = sf.random_curricula(runs=given.curricula, seed=2, **protocol)
    initial = runs.initial_losses[0]
    fitted = {name: simulator.fit(runs) for name, simulator in SIMULATORS.items()}

    def train() -> None:
        sf.record(task, runs[0].recipe, few, engine="batched")

    rates: dict[str, list[float]] = {name: [] for name in ("batched recorder", *fitted)}
    for _ in range(given.repeats + 1):
        rates["batched recorder"].append(200 * len(few) / seconds(train))
        for name, simulator in fitted.items():
            rates[name].append(200 * len(many) / seconds(lambda chosen=simulator: chosen.simulate(many, initial)))
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {given.threads} threads")
    recorder = np.array(rates["batched recorder"][1:])  # the first go warms up
    for name, each in rates.items():
        ratios = np.array(each[1:]) / recorder
        low, middle, high = np.quantile(ratios, [0, 0.5, 1])
        print(f"{name:28} {np.median(each[1:]):12,.0f} steps/s   {middle:6.1f} ({low:.1f}–{high:.1f}) × the recorder")


if __name__ == "__main__":
    main()
