"""How good is the tangent kernel simulator, from one, two or twelve recorded runs?

Skill against the mean trajectory of 24 runs, on the 8 others. Each line is the median, and the range, over choices of
the references and over three seeds of the whole protocol (sample, initial weights, curricula), whose runs are recorded
into build/tangent the first time.

    python benchmarks/tangent.py [--settings digits digits_cnn-lr0.1 …] [--choices 8] [--seeds 3]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

import simfluence as sf
from simfluence.specs import RecordingSpec


@dataclass(frozen=True)
class Setting:
    """A protocol, and how many of its fitting runs are fitted on, some of them as references."""

    protocol: str
    runs: int
    references: int
    lr: float | None = None

    @property
    def name(self) -> str:
        return self.protocol if self.lr is None else f"{self.protocol}-lr{self.lr:g}"


SETTINGS = (
    Setting("digits", 1, 1),
    Setting("digits", 12, 4),
    Setting("digits", 24, 4),
    Setting("breast_cancer_mlp", 1, 1),
    Setting("diabetes", 1, 1),
    Setting("digits_cnn", 1, 1),
    Setting("digits_cnn", 2, 2, lr=0.1),
    Setting("digits_cnn", 10, 2, lr=0.1),
    Setting("digits_adamw", 2, 2),
)
METRICS = ("skill", "final_skill")


def recorded(setting: Setting, seed: int, folder: Path) -> tuple[sf.Task, sf.Runs]:
    """The protocol of curricula/ with all its seeds set to one."""
    spec = RecordingSpec.read(Path("curricula") / f"{setting.protocol}.yaml")
    assert spec.task is not None
    task = getattr(sf.tasks, spec.task.name)(**(spec.task.arguments | {"seed": seed}))
    recipe = spec.recipe.model_copy(update={"seed": seed} | ({} if setting.lr is None else {"lr": setting.lr}))
    curricula = spec.curricula.model_copy(update={"seed": seed}).build(task.train)
    name = f"{setting.protocol}-lr{recipe.lr:g}-seed{seed}"
    return task, sf.record(task, recipe, curricula, folder / name)


def scores(setting: Setting, task: sf.Task, runs: sf.Runs, choice: int, choices: int) -> np.ndarray:
    """Skill and final skill of one choice of the runs that are fitted on."""
    part, held = runs.split(held_out=8, seed=0)
    chosen = sf.Runs(part[(choice * len(part) // choices + k) % len(part)] for k in range(setting.runs))
    fitted = sf.TangentKernelSimulator(task, n_references=setting.references).fit(chosen)
    table = sf.evaluate({"tangent": fitted}, held, part, metrics=METRICS, bootstrap=10)
    found: np.ndarray = table[list(METRICS)].to_numpy()[0]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--settings", nargs="+", default=[], help="only these, by name")
    parser.add_argument("--choices", type=int, default=8)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, default=Path("build/tangent"))
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for setting in SETTINGS:
        if options.settings and setting.name not in options.settings:
            continue
        found, start = [], time.perf_counter()
        for seed in range(options.seeds):
            task, runs = recorded(setting, seed, options.folder)
            for choice in range(options.choices):
                found.append(scores(setting, task, runs, choice, options.choices))
                print(f"  seed {seed}, choice {choice}: {found[-1][0]:.3f} {found[-1][1]:.3f}", flush=True)
        median, low, high = (each(found, axis=0) for each in (np.median, np.min, np.max))
        said = ", ".join(
            f"{name.replace('_', ' ')} {m:.3f} [{a:.3f}, {b:.3f}]"
            for name, m, a, b in zip(METRICS, median, low, high, strict=True)
        )
        took = (time.perf_counter() - start) / len(found)
        print(
            f"{setting.name:18} {setting.runs:2} runs, {setting.references} of them references: {said}; "
            f"{len(found)} choices, {took:.1f} s each",
            flush=True,
        )


if __name__ == "__main__":
    main()
