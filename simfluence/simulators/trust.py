"""How right a simulator was about runs that were held out of its fitting runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from simfluence._internal.ranks import row_spearman
from simfluence.errors import InvalidInput

__all__ = ["Trust"]

_CONFIDENCE = 0.9  # of change_error
_MOST_PAIRS = 5_000


@dataclass(frozen=True)
class Trust:
    """Cross-validated quality of a simulator's forecasts.

    Args:
        runs: number of runs, each of which was held out once.
        skill: 1 − the squared error, relative to that of the mean trajectory of the other runs; over all steps.
        final_skill: the same for the final losses.
        run_correlation: Spearman's ρ over runs of forecast and true final losses, averaged over test examples; NaN for
            two runs or fewer.
        coverage: share of the final losses within their 90 % intervals; NaN for simulators without intervals.
        change_error: how wrong the forecast of a change is. Between two held-out runs the mean final loss differs; the
            error of that difference, relative to the root mean square of the forecast changes of single final losses,
            is below this number in nine of ten pairs. NaN for a single run.

    >>> print(Trust(24, 0.971, 0.95, 0.93, 0.91, 0.08))
    skill 0.97, final skill 0.95, run correlation 0.93, 90 % intervals cover 91 % (24 runs, each held out once)
    """

    runs: int
    skill: float
    final_skill: float
    run_correlation: float
    coverage: float
    change_error: float

    @classmethod
    def of(cls, forecasts: np.ndarray, true: np.ndarray, means: np.ndarray, covered: np.ndarray | None = None) -> Trust:
        """Compare forecasts of held-out runs with the true losses and the means of the other runs.

        Args:
            forecasts, true, means: losses ``[runs, steps + 1, test]``; NaN in the true losses where none was recorded.
            covered: whether each loss is within its interval, ``[runs, steps + 1, test]``; the final ones count.
        """
        missing = np.isnan(true)
        errors, baseline = (np.where(missing, 0.0, (losses - true) ** 2) for losses in (forecasts, means))
        last = true.shape[1] - 1 - np.argmax(~missing.any(axis=2)[:, ::-1], axis=1)
        rows = np.arange(len(true))
        final, final_true = forecasts[rows, last], true[rows, last]
        correlations = row_spearman(final.T, final_true.T) if len(true) > 2 else np.full(1, np.nan)
        defined = correlations[~np.isnan(correlations)]
        return cls(
            len(true),
            _skill(errors[:, 1:].sum(), baseline[:, 1:].sum()),
            _skill(errors[rows, last].sum(), baseline[rows, last].sum()),
            float(defined.mean()) if len(defined) else float("nan"),
            float("nan") if covered is None else float(covered[rows, last].mean()),
            _change_error(final, final_true),
        )

    @classmethod
    def checked(cls, numbers: Any) -> Trust:
        """Read the numbers of a file.

        Raises:
            InvalidInput: they are of another kind, or some are missing.
        """
        names = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(numbers, dict) or sorted(numbers) != sorted(names):
            raise InvalidInput(f"trust_ does not hold {', '.join(names)}")
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int if name == "runs" else float | int):
                raise InvalidInput(f"trust_ holds no number {name}")
        return cls(**numbers)

    def __str__(self) -> str:
        said = [f"skill {self.skill:.2f}", f"final skill {self.final_skill:.2f}"]
        if not np.isnan(self.run_correlation):
            said.append(f"run correlation {self.run_correlation:.2f}")
        if not np.isnan(self.coverage):
            said.append(f"90 % intervals cover {100 * self.coverage:.0f} %")
        return f"{', '.join(said)} ({self.runs} runs, each held out once)"


def _skill(error: float, baseline: float) -> float:
    return float(1 - error / baseline) if baseline > 0 else float("nan")


def _change_error(final: np.ndarray, true: np.ndarray) -> float:
    """Return the quantile, over pairs of runs, of the errors of changes relative to their size; see ``Trust``."""
    first, second = np.triu_indices(len(final), 1)
    chosen = np.linspace(0, len(first) - 1, min(len(first), _MOST_PAIRS)).astype(int) if len(first) else first
    changes = final[first[chosen]] - final[second[chosen]]  # [pairs, test]
    wrong = changes - (true[first[chosen]] - true[second[chosen]])
    size = np.sqrt((changes**2).mean(axis=1))
    ratios = np.abs(wrong.mean(axis=1))[size > 0] / size[size > 0]
    return float(np.quantile(ratios, _CONFIDENCE)) if len(ratios) else float("nan")
