"""Do forecasts know when they are wrong? Edits of held-out runs, forecast by the default simulator and retrained.

For each edit: the mean change of the final loss as forecast and as retrained, the relative error over test examples,
the coverage of the 90 % intervals, and whether the forecast was trusted. Of the trusted ones nine in ten should be
right to within a quarter.

    python benchmarks/judgement.py [--settings base moons …] [--seeds 1]
"""

from __future__ import annotations

import argparse
import warnings

import numpy as np
import pandas as pd
import torch
from settings import KNOWN, Setting

import simfluence as sf

HELD_OUT, BASES = 7, 2
FIVE = ("base", "mom.9", "adamw", "moons", "wine")


def edits(task: sf.Task, steps: int) -> dict[str, list[sf.edits.Edit]]:
    """Return removals, repetitions and orders, by name."""
    rng, count, labels = np.random.default_rng(5), len(task.train), sorted(set(task.train.column("label")))

    def some(size: int) -> dict[str, list[int]]:
        return {"rows": rng.choice(count, size, replace=False).tolist()}

    return {
        "one removed": [sf.Remove(some(1))],
        "five removed": [sf.Remove(some(5))],
        "a tenth removed": [sf.Remove(some(count // 10))],
        "half removed": [sf.Remove(some(count // 2))],
        "half removed, resampled": [sf.Remove(some(count // 2), "resample")],
        "a class removed": [sf.Remove(f"label == {labels[0]}")],
        "a class removed, resampled": [sf.Remove(f"label == {labels[-1]}", "resample")],
        "ten shown ten times": [sf.Repeat(some(10), 10)],
        "ten shown ten times, repacked": [sf.Repeat(some(10), 10, "repack")],
        "only ten": [sf.Keep(some(10), "resample")],
        "cut short": [sf.Truncate(steps * 3 // 5)],
        "shuffled": [sf.Shuffle(seed=1)],
        "by class": [sf.Reorder(f"label == {label}") for label in labels[::-1]],
    }


def measured(setting: Setting, seed: int) -> pd.DataFrame:
    """Forecast the edits of two held-out runs, retrain each, and return a row for each."""
    task, runs = setting.recorded(seed)
    part, held = runs.split(held_out=HELD_OUT, seed=0)
    best = sf.BestSimulator(task).fit(part)
    forecasts = sf.what_if(best, held[:BASES], edits(task, setting.steps), task=task)
    verified = forecasts.verify()
    assert forecasts.low is not None
    assert forecasts.high is not None
    inside = (forecasts.low <= verified.final) & (verified.final <= forecasts.high)
    actual = verified.actual_change
    table = forecasts.judgements.assign(
        actual=actual.mean(2).ravel(),
        relative_error=(((forecasts.change - actual) ** 2).mean(2) / (actual**2).mean(2).clip(1e-12)).ravel(),
        coverage=inside.mean(2).ravel(),
        setting=setting.name,
    )
    wrong = (table["change"] - table["actual"]).abs()
    return table.assign(right=(wrong <= 0.25 * table["actual"].abs()) | (wrong < 1e-5))  # rounding is noise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--settings", nargs="+", default=FIVE)
    parser.add_argument("--seeds", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    chosen = [setting for setting in KNOWN if setting.name in arguments.settings]
    tables = []
    for setting in chosen:
        for seed in range(arguments.seeds):
            tables.append(measured(setting, seed))
            print(f"{setting.name}, seed {seed}: {said(tables[-1])}", flush=True)
    table = pd.concat(tables)
    print(table.groupby("query", sort=False)[["relative_error", "coverage", "trusted", "right"]].agg(
        {"relative_error": ["median", "max"], "coverage": ["mean", "min"], "trusted": "mean", "right": "mean"}
    ).round(2).to_string())  # fmt: skip
    print(f"All: {said(table)}")


def said(table: pd.DataFrame) -> str:
    trusted = table[table["trusted"]]
    right = f"{trusted['right'].mean():.0%} of them are" if len(trusted) else "none is"
    large = len(table[(table["relative_error"] > 1) & table["trusted"]])
    return (
        f"{len(table)} edits, {len(trusted)} trusted ({1 - len(trusted) / len(table):.0%} marked), {right} right to "
        f"within a quarter; intervals cover {table['coverage'].mean():.0%}; {large} trusted with a relative "
        "error above 1"
    )


if __name__ == "__main__":
    main()
