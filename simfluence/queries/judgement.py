"""How far the forecast of a change can be trusted, judged from what is known without retraining."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from simfluence.simulators import Simulator

__all__ = ["Judgement"]

#: Largest error of a forecast that is trusted, as a share of the forecast change.
TOLERANCE = 0.25

# Distance beyond which errors grow faster than changes, with its square root. On the known settings of
# benchmarks/settings.py, edits at most this far from the recorded runs were as right as these runs themselves.
_NEAR = 3.0


@dataclass(frozen=True)
class Judgement:
    """What is known of the error of a forecast change of the mean final loss.

    Args:
        change: the forecast change.
        error: in nine of ten cases the error is smaller. It is learned from pairs of runs that were held out of
            fitting: errors of their differences are in proportion to how much single losses differ; far from the
            fitting runs they are taken to grow faster. NaN if no runs were held out.
        distance: how far the edited curriculum's final losses are forecast from the mean of the fitting runs, as a
            multiple of how far these runs are from it themselves; NaN for simulators of older files.
        ran_away: whether a forecast loss had to be stopped at a bound.
        longer: whether the edited curriculum is longer than every fitting run.

    >>> print(Judgement(0.5, 0.04, 1.2, False, False))
    Trusted: the change is right to within 0.04 (8 %) in nine of ten cases.
    >>> print(Judgement(0.1, 0.06, 1.2, False, False))
    Not to be trusted: the error may be 60 % of the change.
    """

    change: float
    error: float
    distance: float
    ran_away: bool
    longer: bool

    @classmethod
    def of(cls, simulator: Simulator, base: np.ndarray, what_if: np.ndarray, steps: int) -> Judgement:
        """Judge a forecast.

        Args:
            simulator: gives what was learned from held-out runs.
            base, what_if: forecast final losses under the base and the edited curriculum, ``[test]``.
            steps: of the edited curriculum.
        """
        changes = what_if - base
        trust, mean = simulator.trust, getattr(simulator, "baseline_", None)
        size, distance = float(np.sqrt((changes**2).mean())), _distance(simulator, what_if, steps)
        error = float("nan") if trust is None else trust.change_error * size * max(1.0, distance / _NEAR) ** 0.5
        return cls(
            float(changes.mean()),
            error,
            distance,
            bool(simulator.beyond_bounds(what_if).any()),
            mean is not None and steps >= len(mean),
        )

    @property
    def share(self) -> float:
        """The error as a share of the change; NaN if it is unknown, infinite if no change is forecast."""
        if np.isnan(self.error) or self.error == 0:
            return self.error
        return self.error / abs(self.change) if self.change else float("inf")

    @property
    def trusted(self) -> bool:
        """Whether the error is known and nothing speaks against the forecast."""
        return not np.isnan(self.error) and not self.doubts

    @property
    def doubts(self) -> list[str]:
        """What speaks against the forecast: each a clause, such as "the error may be 60 % of the change"."""
        said = []
        if self.ran_away:
            said.append("it ran away from every recorded loss")
        if self.longer:
            said.append("no fitting run is as long")
        if self.share > TOLERANCE:
            size = f"{100 * self.share:.0f} % of" if self.share < 10 else "many times"
            said.append(f"the error may be {size} the change")
        return said

    def __str__(self) -> str:
        if self.doubts:
            return f"Not to be trusted: {'; '.join(self.doubts)}."
        if np.isnan(self.error):
            return "Its error is not known, as no runs were held out in fitting: fit with cross_fit(runs)."
        share = f" ({100 * self.share:.0f} %)" if self.change else ""
        return f"Trusted: the change is right to within {self.error:.2g}{share} in nine of ten cases."


def _distance(simulator: Simulator, what_if: np.ndarray, steps: int) -> float:
    """Return the distance of final losses from the mean of the fitting runs; see ``Judgement``."""
    mean, spread = getattr(simulator, "baseline_", None), getattr(simulator, "spread_of_runs_", None)
    if mean is None or spread is None:
        return float("nan")
    at = min(steps, len(mean) - 1)
    usual, far = float(spread[at]), float(((what_if - mean[at]) ** 2).mean())
    if usual == 0:
        return float("inf") if far else 0.0
    return float(np.sqrt(far / usual))
