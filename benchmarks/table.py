"""How good is each simulator, on every recorded task? The paper's table, with skill beside it.

For every store but those of text (text_table.py does those), 8 runs are held out (seed 0); all else is chosen on the
fitting runs alone, by cross-validation:

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
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

from score_lines import print_scores
from text_table import STORES as OF_TEXT

import simfluence as sf
from simfluence.errors import UnseenWarning

HELD_OUT = 8
STORAGE = Path("build/table.sqlite")


def rows(part: sf.Runs, trials: int) -> Iterator[tuple[str, Callable[[], sf.Simulator]]]:
    """Each row's name, and what makes its simulator from the fitting runs."""
    common = {"folds": min(4, len(part)), "storage": STORAGE}
    papers = {name: value for name, value in sf.LinearSimulator().get_params().items() if name != "l2"}
    yield "mean_trajectory", lambda: sf.MeanTrajectorySimulator().fit(part)
    yield "linear", lambda: sf.tune("linear", part, trials=trials, fixed=papers, **common)
    yield "linear, tuned", lambda: sf.tune("linear", part, trials=trials, **common)
    yield "boosted", lambda: sf.BoostedSimulator().fit(part)
    yield "best", lambda: sf.tune("best", part, trials=trials // 2, **common)


def score(store: Path, trials: int, most: int | None) -> None:
    part, held = sf.RunStore(store).load().split(HELD_OUT, seed=0)
    part = part[:most]
    print_scores(store, part, held, rows(part, trials))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stores", type=Path, nargs="+", help="by default those under runs/ without text")
    parser.add_argument("--trials", type=int, default=20, help="of each search of one kind")
    parser.add_argument("--runs", type=int, help="fit on only so many runs, the first")
    options = parser.parse_args()
    warnings.simplefilter("ignore", UnseenWarning)  # few runs miss examples
    shipped = sorted({path.parent for path in Path("runs").glob("*/store.json")} - set(OF_TEXT))
    for store in options.stores or shipped:
        score(store, options.trials, options.runs)


if __name__ == "__main__":
    main()
