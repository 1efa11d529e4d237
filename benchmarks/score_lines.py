"""Scores on held-out runs as lines of a table, one for each simulator, printed as soon as it is known."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pandas as pd

import simfluence as sf
from simfluence.errors import InvalidInput
from simfluence.simulators import build

METRICS = ("mse", "final_spearman", "skill", "final_skill")
LINE = "  {:24}{:>22}{:>18}{:>30}{:>30}  {}"
HEAD = LINE.format("", "all-steps MSE ± sd", "final ρ ± sd", "skill [95 %]", "final skill [95 %]", "chosen, in seconds")


def print_scores(
    store: Path, part: sf.Runs, held: sf.Runs, rows: Iterable[tuple[str, Callable[[], sf.Simulator]]]
) -> None:
    """Make each row's simulator from ``part``, and say how it does on ``held``; or why there is none."""
    print(f"\n{store}: {len(part)} runs to fit on, {len(held)} held out\n{HEAD}", flush=True)
    for name, make in rows:
        start = time.perf_counter()
        try:
            simulator = make()
            scores = sf.evaluate({name: simulator}, held, part, metrics=METRICS).loc[name]
        except InvalidInput as error:
            print(f"  {name:24}{error}", flush=True)
            continue
        print(shown(name, scores, f"{named(simulator)}, {time.perf_counter() - start:.0f} s"), flush=True)


def shown(name: str, scores: pd.Series, chosen: str) -> str:
    spread = [f"{scores[metric]:.4g} ± {scores[f'{metric}_sd']:.2g}" for metric in METRICS[:2]]
    intervals = [
        f"{number(scores[metric])} [{number(scores[f'{metric}_low'])}, {number(scores[f'{metric}_high'])}]"
        for metric in METRICS[2:]
    ]
    return LINE.format(name, *spread, *intervals, chosen)


def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def named(simulator: sf.Simulator) -> str:
    """With the parameters that are not its defaults, but for those that are no plain values (a task, an attributor)."""
    defaults = build(simulator.name).get_params()
    changed = {name: value for name, value in simulator.get_params().items() if value != defaults[name]}
    said = [
        f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in changed.items()
        if isinstance(value, str | float | int)
    ]
    return f"{simulator.name}({', '.join(said)})"
