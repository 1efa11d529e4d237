"""The mean-path response beside other simulators, on the known settings of ``settings.py``.

For each setting and seed 7 of 18 runs are held out (split seed 0). A cell is skill / final skill, and the processor's
seconds for fitting and simulating; "–" where a simulator refuses the setting.

    python benchmarks/response.py [--settings resln mom.9 …] [--seeds 0 1 2] [--simulators response boosted tangent]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable

import numpy as np
import torch
from settings import KNOWN

import simfluence as sf
from simfluence.errors import InvalidInput
from simfluence.simulators.response.simulator import ResponseSimulator

SIMULATORS: dict[str, Callable[[sf.Task], sf.Simulator]] = {
    "response": ResponseSimulator,
    "samples": lambda task: ResponseSimulator(task, n_samples=100),
    "boosted": lambda task: sf.BoostedSimulator(),
    "tangent": sf.TangentKernelSimulator,
}


def cell(simulator: sf.Simulator, part: sf.Runs, held: sf.Runs) -> str:
    start = time.process_time()
    try:
        simulator.fit(part)
    except InvalidInput:
        return "–"
    errors = (simulator.simulate(held.curricula, held.initial_losses) - held.losses.astype(float)) ** 2
    seconds = time.process_time() - start
    baseline = (simulator.baseline_ - held.losses.astype(float)) ** 2
    skills = [
        1 - np.nansum(errors[:, times]) / np.nansum(baseline[:, times]) for times in (slice(1, None), slice(-1, None))
    ]
    return f"{skills[0]:.3f}/{skills[1]:.3f} ({seconds:.1f} s)"


def main() -> None:
    names = [setting.name for setting in KNOWN]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=names, choices=names)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--simulators", nargs="+", default=["response", "boosted"], choices=SIMULATORS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print("setting seed", *options.simulators, sep=" | ", flush=True)
    chosen = {setting.name: setting for setting in KNOWN if setting.name in options.settings}
    for seed in options.seeds:
        for name in options.settings:
            task, runs = chosen[name].recorded(seed)
            part, held = runs.split(held_out=7, seed=0)
            cells = [cell(SIMULATORS[kind](task), part, held) for kind in options.simulators]
            print(f"{name} {seed}", *cells, sep=" | ", flush=True)


if __name__ == "__main__":
    main()
