"""See how many recorded runs a simulator needs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

from simfluence._internal.progress import bar
from simfluence.errors import InvalidInput
from simfluence.evaluation.cross_validation import fitted_errors
from simfluence.evaluation.metrics import bounded_skill
from simfluence.runs import Runs
from simfluence.simulators import MeanTrajectorySimulator, Simulator, build
from simfluence.simulators.base import usable

_BOOTSTRAP = 1000


def learning_curve(
    simulator: str | Simulator,
    runs: Runs,
    *,
    sizes: Iterable[int] | None = None,
    held_out: int | float = 8,
    repeats: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """How many runs are needed? Skill on the same held-out runs against the number of fitting runs.

    Args:
        simulator: name, or one with its parameters; it is not changed.
        runs: to fit on and to hold out; diverged ones are left out with a warning.
        sizes: numbers of fitting runs; by default 2, 4, 8, … and all that are not held out.
        held_out: how many (int) or which fraction (float) of the runs are scored on.
        repeats: random sets of fitting runs of each size. In each repeat the smaller sets are part of the larger.
        seed: of the split, the sets and the intervals.
        progress: show a bar, if on a terminal.

    Returns:
        A row per size: ``runs``, ``repeats``, and for ``skill`` and ``final_skill`` the median over the repeats with
        ``_low`` and ``_high``: a 95 % interval for one set of so many runs, by resampling the sets and the held-out
        runs. The mean trajectory with skill 0 is that of the same set. Below ``MIN_SKILL`` nothing is told apart.

    Raises:
        InvalidInput: sizes out of range, or what ``split`` and ``fit`` refuse.

    >>> rng = np.random.default_rng(0)
    >>> runs = Runs.from_arrays(rng.integers(3, size=(8, 5, 2)), rng.normal(size=(8, 6, 2)).cumsum(axis=1))
    >>> learning_curve("additive", runs, held_out=3)[["runs", "repeats"]].to_numpy().tolist()
    [[2, 5], [4, 5], [5, 1]]
    """
    part, held = usable(runs, "learn from").split(held_out, seed)
    chosen = build(simulator) if isinstance(simulator, str) else simulator
    counts = _sizes(sizes, len(part))
    if repeats < 1:
        raise InvalidInput(f"repeats={repeats}: at least 1 is needed")
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


def _sizes(sizes: Iterable[int] | None, most: int) -> list[int]:
    if sizes is None:
        return sorted({*(2**k for k in range(1, most.bit_length()) if 2**k < most), most})
    found = sorted(set(sizes))
    if not found or found[0] < 1 or found[-1] > most:
        raise InvalidInput(f"sizes={found}: from 1 to the {most} runs that are not held out")
    return found


def _subset(runs: Runs, size: int, seed: Sequence[int]) -> Runs:
    chosen = np.random.default_rng(seed).permutation(len(runs))[:size]
    return Runs(runs[int(index)] for index in sorted(chosen))


def _spread(name: str, sse: np.ndarray, baseline_sse: np.ndarray, seed: int) -> dict[str, float]:
    """Median of the sets' skills, and the bootstrap interval of one set's; errors are ``[sets, held]``."""
    rng = np.random.default_rng(seed)
    sets = rng.integers(len(sse), size=(_BOOTSTRAP, 1))
    held = rng.integers(sse.shape[1], size=(_BOOTSTRAP, sse.shape[1]))
    low, high = np.quantile(bounded_skill(sse[sets, held].sum(1), baseline_sse[sets, held].sum(1)), [0.025, 0.975])
    middle = np.median(bounded_skill(sse.sum(1), baseline_sse.sum(1)))
    return {name: float(middle), f"{name}_low": float(low), f"{name}_high": float(high)}
