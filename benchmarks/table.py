"""How good is each simulator, on every recorded task? The paper's table, with skill beside it.

For every store, 8 runs are held out (seed 0); all else is chosen on the fitting runs alone, by cross-validation:

    mean_trajectory   the mean of the fitting runs; has skill 0
    linear            the paper's, of which l2 is chosen
    linear, tuned     all that is searched of it
    boosted           as it comes
    best              the best kind with the best parameters, in half as many trials: those of slow kinds take long

Trials are kept in build/table.sqlite, so a table that was stopped goes on from there.

    python benchmarks/table.py [--stores runs/digits ...] [--trials 20] [--runs 4]
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd

import simfluence as sf
from simfluence.errors import InvalidInput, UnseenWarning
from simfluence.simulators import build

HELD_OUT = 8
STORAGE = Path("build/table.sqlite")
METRICS = ("mse", "final_spearman", "skill", "final_skill")
ROW = "  {:16}{:>22}{:>18}{:>30}{:>30}  {}"
HEAD = ROW.format("", "all-steps MSE ± sd", "final ρ ± sd", "skill [95 %]", "final skill [95 %]", "chosen, in seconds")


def rows(part: sf.Runs, trials: int) -> Iterator[tuple[str, Callable[[], sf.Simulator]]]:
    """Each row's name, and what makes its simulator from the fitting runs."""
    common = {"folds": min(4, len(part)), "storage": STORAGE}
    papers = {name: value for name, value in sf.LinearSimulator().get_params().items() if name != "l2"}
    yield "mean_trajectory", lambda: sf.MeanTrajectorySimulator().fit(part)
    yield "linear", lambda: sf.tune("linear", part, trials=trials, fixed=papers, **common)
    yield "linear, tuned", lambda: sf.tune("linear", part, trials=trials, **common)
    yield "boosted", lambda: sf.BoostedSimulator().fit(part)
    yield "best", lambda: sf.tune("best", part, trials=trials // 2, **common)


def number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.3g}"


def shown(name: str, scores: pd.Series, chosen: str) -> str:
    spread = [f"{scores[metric]:.4g} ± {scores[f'{metric}_sd']:.2g}" for metric in METRICS[:2]]
    intervals = [
        f"{number(scores[metric])} [{number(scores[f'{metric}_low'])}, {number(scores[f'{metric}_high'])}]"
        for metric in METRICS[2:]
    ]
    return ROW.format(name, *spread, *intervals, chosen)


def named(simulator: sf.Simulator) -> str:
    """With the parameters that are not its defaults."""
    defaults = build(simulator.name).get_params()
    changed = {name: value for name, value in simulator.get_params().items() if value != defaults[name]}
    said = [f"{name}={value:.3g}" if isinstance(value, float) else f"{name}={value}" for name, value in changed.items()]
    return f"{simulator.name}({', '.join(said)})"


def score(store: Path, trials: int, most: int | None) -> None:
    part, held = sf.RunStore(store).load().split(HELD_OUT, seed=0)
    part = part[:most]
    print(f"\n{store}: {len(part)} runs to fit on, {len(held)} held out\n{HEAD}", flush=True)
    for name, make in rows(part, trials):
        start = time.perf_counter()
        try:
            simulator = make()
            scores = sf.evaluate({name: simulator}, held, part, metrics=METRICS).loc[name]
        except InvalidInput as error:
            print(f"  {name:16}{error}", flush=True)
            continue
        print(shown(name, scores, f"{named(simulator)}, {time.perf_counter() - start:.0f} s"), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", type=Path, nargs="+", help="by default all under runs/")
    parser.add_argument("--trials", type=int, default=20, help="of each search of one kind")
    parser.add_argument("--runs", type=int, help="fit on only so many runs, the first")
    options = parser.parse_args()
    warnings.simplefilter("ignore", UnseenWarning)  # few runs miss examples
    for store in options.stores or sorted(path.parent for path in Path("runs").glob("*/store.json")):
        score(store, options.trials, options.runs)


if __name__ == "__main__":
    main()
