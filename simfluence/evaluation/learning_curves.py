"""Learning curves: how many recorded runs a simulator needs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from simfluence._internal.checked import checked
from simfluence._internal.progress import bar
from simfluence._internal.types import Count, Seed, Share
from simfluence.errors import InvalidInput
from simfluence.evaluation.cross_validation import fitted_errors
from simfluence.evaluation.metrics import bounded_skill
from simfluence.runs import Runs
from simfluence.simulators import MeanTrajectorySimulator, Simulator, build

__all__ = ["learning_curve"]

_BOOTSTRAP = 1000


@checked
def learning_curve(
    simulator: str | Simulator,
    runs: Runs,
    *,
    sizes: Sequence[int] | None = None,
    held_out: Count | Share = 8,
    repeats: Count = 5,
    seed: Seed = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Compute the skill on the same held-out runs for increasing numbers of fitting runs.

    Args:
        simulator: name of a simulator, or a simulator with its parameters, which is not changed.
        runs: runs to fit on and to hold out; diverged ones are left out with a warning.
        sizes: numbers of fitting runs; by default 2, 4, 8, … and all that are not held out.
        held_out: number (int) or fraction (float) of the runs to hold out.
        repeats: number of random sets of fitting runs per size. In each repeat the smaller sets are part of the larger.
        seed: seed of the split, the sets and the intervals.
        progress: show a progress bar on a terminal.

    Returns:
        A row per size: ``runs``, ``repeats``, and for ``skill`` and ``final_skill`` the median over the repeats with
        ``_low`` and ``_high``, a 95 % interval for one set of this size, from resampled sets and held-out runs. The
        mean trajectory of the same set has skill 0. Skills are never below ``MIN_SKILL``.

    Raises:
        InvalidInput: a size is out of range, or ``split`` or ``fit`` refuses the runs.

    >>> rng = np.random.default_rng(0)
    >>> runs = Runs.from_arrays(rng.integers(3, size=(8, 5, 2)), rng.normal(size=(8, 6, 2)).cumsum(axis=1))
    >>> learning_curve("additive", runs, held_out=3)[["runs", "repeats"]].to_numpy().tolist()
    [[2, 5], [4, 5], [5, 1]]
    """
    part, held = runs.usable("learn from").split(held_out, seed)
    chosen = build(simulator) if isinstance(simulator, str) else simulator
    counts = _sizes(sizes, len(part))
    rows = []
    with bar("learning curve", len(counts), progress) as advance:
        for size in counts:
            subsets = [_subset(part, size, [seed, repeat]) for repeat in range(repeats if size < len(part) else 1)]
            sse = np.stack([fitted_errors(chosen, subset, held) for subset in subsets])
            baseline_sse = np.stack([fitted_errors(MeanTrajectorySimulator(), subset, held) for subset in subsets])
            row: dict[str, float] = {"runs": size, "repeats": len(subsets)}
            row |= _spread("skill", sse[:, 0], baseline_sse[:, 0], seed)
            rows.append(row | _spread("final_skill", sse[:, 1], baseline_sse[:, 1], seed))
            advance()
    table = pd.DataFrame(rows)
    table.attrs |= {"task": runs.task_name, "held": len(held)}
    return table


def _sizes(sizes: Sequence[int] | None, most: int) -> list[int]:
    if sizes is None:
        return sorted({*(2**k for k in range(1, most.bit_length()) if 2**k < most), most})
    ordered = sorted(set(sizes))
    if not ordered or ordered[0] < 1 or ordered[-1] > most:
        raise InvalidInput(f"sizes={ordered}: give sizes from 1 to {most}, the number of runs that are not held out")
    return ordered


def _subset(runs: Runs, size: int, seed: Sequence[int]) -> Runs:
    chosen = np.random.default_rng(seed).permutation(len(runs))[:size]
    return Runs(runs[int(index)] for index in sorted(chosen))


def _spread(name: str, sse: np.ndarray, baseline_sse: np.ndarray, seed: int) -> dict[str, float]:
    """Compute the median skill of the sets and a bootstrap interval for one set; errors are ``[sets, held]``."""
    rng = np.random.default_rng(seed)
    sets = rng.integers(len(sse), size=(_BOOTSTRAP, 1))
    held = rng.integers(sse.shape[1], size=(_BOOTSTRAP, sse.shape[1]))
    low, high = np.quantile(bounded_skill(sse[sets, held].sum(1), baseline_sse[sets, held].sum(1)), [0.025, 0.975])
    middle = np.median(bounded_skill(sse.sum(1), baseline_sse.sum(1)))
    return {name: float(middle), f"{name}_low": float(low), f"{name}_high": float(high)}
