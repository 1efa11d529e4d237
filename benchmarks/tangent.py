"""How good is the tangent kernel simulator, from one, two or twelve recorded runs?

Skill against the mean trajectory of 24 runs, on the 8 others (split seed 0). Of several choices of references the
median and the range.

    python benchmarks/tangent.py [--stores runs/digits …] [--choices 4]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch

import simfluence as sf

STORES = ("digits", "digits_cnn", "digits_adamw", "diabetes", "breast_cancer_mlp", "breast_cancer")
#: Fitting runs, and how many of them the kernels are of; the others correct the mean error.
SIZES = ((1, 1), (2, 2), (12, 4))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--stores", nargs="+", type=Path, default=[Path("runs") / name for name in STORES])
    parser.add_argument("--choices", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for path in options.stores:
        store = sf.RunStore(path)
        task = sf.tasks.rebuild(store.info)
        part, held = store.load().split(held_out=8, seed=0)
        for count, references in SIZES:
            found, start = [], time.perf_counter()
            for choice in range(options.choices if count < 12 else 1):
                chosen = sf.Runs(part[(choice * 24 // options.choices + k) % 24] for k in range(count))
                fitted = sf.TangentKernelSimulator(task, references=references).fit(chosen)
                table = sf.evaluate({"tangent": fitted}, held, part, metrics=("skill", "final_skill"), bootstrap=10)
                found.append(table[["skill", "final_skill"]].to_numpy()[0])
            median, low, high = np.median(found, 0), np.min(found, 0), np.max(found, 0)
            said = ", ".join(
                f"{name} {m:.3f} [{a:.3f}, {b:.3f}]"
                for name, m, a, b in zip(("skill", "final skill"), median, low, high, strict=True)
            )
            took = (time.perf_counter() - start) / len(found)
            print(
                f"{path.name:18} {count:2} runs, {references} of them references: {said}; {took:.1f} s each", flush=True
            )


if __name__ == "__main__":
    main()
