"""How long does leaving each example out take, all at once and one simulation at a time?

1,000 training × 100 test examples, a base curriculum of 500 steps of 8; linear simulators fitted on a known process.
Then the tangent kernel of one recorded run of digits, 300 × 100, 200 steps of 8: simulated, and by derivatives.

    python benchmarks/leave_one_out.py [--threads 2]
"""

from __future__ import annotations

import argparse
import platform
import time
from pathlib import Path

import numpy as np
import torch

import simfluence as sf

ROOT = Path(__file__).parents[1]
TRAIN, TEST, STEPS, BATCH, RUNS = 1000, 100, 500, 8, 6
SIMULATORS = {
    "linear": sf.LinearSimulator(l2=10),
    "around the mean": sf.LinearSimulator(l2=10, around="mean"),
    "order 2, varying": sf.LinearSimulator(l2=10, around="mean", order=2, varying=True),
}


def recorded() -> sf.Runs:
    """Runs of a linear Markov process with noise."""
    rng = np.random.default_rng(0)
    curricula = sf.random_curricula(TRAIN, RUNS, STEPS, BATCH, seed=0)
    A, B = 1 / BATCH - 0.0005 + 0.002 * rng.normal(size=(TRAIN, TEST)), 0.002 * rng.normal(size=(TRAIN, TEST))
    losses = np.full((RUNS, STEPS + 1, TEST), 2.3)
    for run, curriculum in enumerate(curricula):
        for step, batch in enumerate(curriculum):
            losses[run, step + 1] = A[batch].sum(0) * losses[run, step] + B[batch].sum(0) + 0.01 * rng.normal(size=TEST)
    return sf.Runs.from_arrays(curricula, losses)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    torch.set_num_threads(parser.parse_args().threads)
    runs = recorded()
    base = runs[0]
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {torch.get_num_threads()} threads")
    for name, simulator in SIMULATORS.items():
        fitted = simulator.fit(runs)
        start = time.perf_counter()
        usual = fitted.simulate([base.curriculum], base.losses[0])[0, -1]
        one_by_one = np.zeros((TEST, TRAIN))
        for index in np.unique(base.curriculum.indices):
            edited = sf.Remove([int(index)]).apply(base.curriculum)
            one_by_one[:, index] = fitted.simulate([edited], base.losses[0])[0, -1] - usual
        slow, times = time.perf_counter() - start, []
        for _ in range(5):
            start = time.perf_counter()
            at_once = sf.leave_one_out(fitted, base)
            times.append(time.perf_counter() - start)
        difference = np.abs(at_once - one_by_one).max() / np.abs(one_by_one).max()
        fast = np.median(times)
        ratio = f"{slow / fast:5.0f} ×; differ by {difference:.1e}"
        print(f"{name:18} {slow:8.2f} s one by one, {fast:6.3f} s at once: {ratio}")
    tangent()


def tangent() -> None:
    """Derivatives beside simulations, of two held-out runs."""
    store = sf.RunStore(ROOT / "runs" / "digits")
    part, held = store.load().split(8, 0)
    fitted = sf.TangentKernelSimulator(sf.tasks.rebuild(store.info)).fit(part[:1])
    for base in held[:2]:
        shown, found, seconds = np.unique(base.curriculum.indices), {}, {}
        for method in ("simulate", "derivative"):
            start = time.perf_counter()
            found[method] = sf.leave_one_out(fitted, base, method)[:, shown]
            seconds[method] = time.perf_counter() - start
        true, estimate = found.values()
        correlation = np.corrcoef(true.ravel(), estimate.ravel())[0, 1]
        error = np.linalg.norm(estimate - true) / np.linalg.norm(true)
        times = ", ".join(f"{method} {taken:.2f} s" for method, taken in seconds.items())
        ratio = f"{seconds['simulate'] / seconds['derivative']:.1f} ×"
        print(f"{'tangent kernel':18} {times}: {ratio}; correlation {correlation:.3f}, relative error {error:.3f}")


if __name__ == "__main__":
    main()
