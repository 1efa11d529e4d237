"""The simulator to use when nothing speaks for another: several simulators, weighted by how well they forecast."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import sklearn.base

from simfluence._internal.checked import checked
from simfluence._internal.progress import bar
from simfluence._internal.types import Losses
from simfluence._internal.validation import whole
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.runs import Runs
from simfluence.simulators.base import InitialLosses, Simulator
from simfluence.simulators.boosted import BoostedSimulator
from simfluence.simulators.cost import ModelCost
from simfluence.simulators.folds import at_times, fold_of, means_of_others, quiet
from simfluence.simulators.intervals import LEVELS, USUAL_CONFIDENCE, UsualErrors, half_widths, mean_over_runs, widened
from simfluence.simulators.learned import check_arrays
from simfluence.simulators.markov.simulators import LinearSimulator
from simfluence.simulators.response.simulator import ResponseSimulator
from simfluence.simulators.stacking import stacking_weights
from simfluence.simulators.tangent.simulator import TangentKernelSimulator
from simfluence.simulators.trust import Trust
from simfluence.task import Task

__all__ = ["BestSimulator"]

_LEAST_WEIGHT = 1e-3  # members with less at every time are left out
_MOST_OPERATIONS = 3e13  # of fitting one member: a few minutes of a processor
_KERNELS = 2 * 2**30  # bytes of the tangent kernel's references, beyond the first: half a minute
_USUAL_L2 = 30.0


class BestSimulator(Simulator):
    """The mean trajectory, plus the deviations that several simulators forecast, each as far as it has proved right.

    Every simulator that the runs allow is tried: a linear one around the mean, the boosted one if examples have
    features, and with ``task`` the tangent kernel and the response. Each forecasts every run while it is held out
    (cross-validation over whole runs). With m the mean trajectory, f_k the forecasts and w_k ≥ 0 the weights that do
    best on the held-out runs (stacked regression: Breiman 1996),

        L_t = m_t + Σ_k w_k(t) (f_k,t − m_t)

    The weights change along training. Where no simulator is of any use they are 0, and the mean trajectory is forecast.
    From a single run nothing can be held out: then the first simulator that can be fitted is used as it is, the
    tangent kernel before the others.

    Intervals are as wide as the errors on held-out runs. They widen for a curriculum unlike those of the runs: in
    proportion to how far its forecast is from the mean trajectory, and to how far the simulators disagree.

    Args:
        task: the task that the runs trained; without it, no simulator is tried that needs one.
        members: the simulators to try, instead of those above; they are cloned.
        folds: number of parts of the runs that are held out in turn.
        stretches: number of weights of each simulator along training.
        seed: seed of the folds.

    Attributes:
        members_: the simulators with a weight, fitted on all runs.
        weights_: their weights, ``[steps + 1, members]``.
        baseline_: m, ``[steps + 1, test]``.
        left_out_: why simulators have no weight, by name.
        variance_: mean square of the errors on held-out runs, ``[steps + 1, test]``.
        usual_square_, usual_disagreement_: mean squares, over held-out runs, of the forecasts' deviations from the
            mean trajectory and of the members' disagreement, ``[steps + 1, test]``.
        quantiles_: of errors on held-out runs relative to their usual size, at confidences of 0.50, 0.51, … 0.99.

    >>> rng = np.random.default_rng(0)
    >>> runs = Runs.from_arrays(rng.integers(3, size=(8, 5, 2)), rng.normal(size=(8, 6, 2)).cumsum(axis=1))
    >>> fitted = BestSimulator().fit(runs)
    >>> fitted.simulate(runs.curricula, runs.initial_losses).shape
    (8, 6, 2)
    >>> sorted(fitted.left_out_)  # these examples have no features
    ['boosted']
    """

    name = "best"
    holds_out = True

    def __init__(
        self,
        task: Task | None = None,
        members: Sequence[Simulator] | None = None,
        folds: int = 4,
        stretches: int = 4,
        seed: int = 0,
    ) -> None:
        self.task = task
        self.members = members
        self.folds = folds
        self.stretches = stretches
        self.seed = seed

    @property
    def gives_intervals(self) -> bool:
        """Whether it was fitted on two runs or more, so that its errors on held-out runs are known."""
        return not hasattr(self, "n_train_") or bool(self.quantiles_.size)

    def __sklearn_clone__(self) -> BestSimulator:
        """Clone the parameters, but share the task."""
        return type(self)(**self.get_params(deep=False))

    @checked
    def interval(
        self, curricula: Sequence[Curriculum], initial_losses: InitialLosses, confidence: float = 0.9
    ) -> tuple[Losses, Losses]:
        """Return the lower and upper ends of each loss's interval, each ``[runs, steps + 1, test]``.

        At time 0 both are the initial losses.

        Args:
            curricula, initial_losses: see ``simulate``.
            confidence: fraction of the losses that the intervals should contain, from 0.5 to 0.99.

        Raises:
            NotFittedError: before ``fit``.
            InvalidInput: the confidence is out of range, the simulator was fitted on a single run, or ``simulate``
                refuses the curricula or losses.
        """
        self._check_fitted()
        if not self.gives_intervals:
            raise InvalidInput("fitted on a single run, it knows nothing of its errors: fit it on several")
        curricula = list(curricula)
        initial = self._check_initial(curricula, initial_losses)
        self._warn_beyond(curricula)
        stacked, disagreements = self._stack(curricula, initial)  # once, for the forecasts and their errors
        times = stacked.shape[1]
        forecast = self._finished(at_times(self.baseline_, times) + stacked, curricula, initial)
        variance = self._widened(at_times(self.variance_, times)[None], stacked**2, disagreements)
        half = half_widths(self.quantiles_, variance, confidence)
        return forecast - half, forecast + half

    def _check_parameters(self) -> None:
        for name, least in (("folds", 2), ("stretches", 1), ("seed", 0)):
            whole(name, getattr(self, name), least)
        if not isinstance(self.task, Task | None):
            raise InvalidInput(f"task must be a Task or None, got {self.task!r}")
        members = [] if self.members is None else self.members
        if not isinstance(members, Sequence) or not all(isinstance(member, Simulator) for member in members):
            raise InvalidInput(f"members must be a list of simulators or None, got {self.members!r}")
        if self.members is not None and not self.members:
            raise InvalidInput("members is empty: give a simulator or more, or None for all that the runs allow")

    def _fit(self, runs: Runs) -> None:
        self.left_out_: dict[str, str] = {}
        candidates = self._candidates(runs) if self.members is None else list(self.members)
        if len(set(runs.ids)) == 1:
            self._fit_first(candidates, runs)
        else:
            self._fit_stack(candidates, runs)

    def _candidates(self, runs: Runs) -> list[Simulator]:
        """Return the simulators to try, those before that need fewer runs; say why one is too dear to be tried."""
        has_features = runs.train is not None and runs.train.features is not None
        # Where the surrogates compare features, the linear simulator adds so little that its penalty is not chosen.
        linear = LinearSimulator(around="mean", l2=_USUAL_L2 if has_features else "auto")
        others: list[Simulator] = [BoostedSimulator(), linear]
        if self.task is None or runs[0].recipe is None:
            return others
        cost = ModelCost.of(self.task, runs[0].recipe)
        tangent, response = TangentKernelSimulator(self.task), ResponseSimulator(self.task)
        kernels = cost.of_kernels(runs.n_train, tangent.n_features, tangent.n_checkpoints)
        tangent.n_references = max(1, min(tangent.n_references, int(_KERNELS // kernels)))
        of_response = cost.of_derivatives(cost.outputs, response.n_checkpoints) + cost.of_training(runs)
        operations = {
            tangent: cost.of_derivatives(cost.outputs + tangent.n_features, tangent.n_checkpoints),
            response: of_response * (self.folds + 1),  # it is fitted anew for each fold
        }
        for simulator, count in operations.items():
            if count > _MOST_OPERATIONS:
                self.left_out_[simulator.name] = (
                    f"fitting it takes {count:.0e} operations, which is many minutes: to try it all the same, pass "
                    f"members=[{type(simulator).__name__}(task), …]"
                )
        return [*(each for each in operations if each.name not in self.left_out_), *others]

    def _fit_first(self, candidates: Sequence[Simulator], runs: Runs) -> None:
        """Take the first simulator that can be fitted on a single run."""
        self.members_: list[Simulator] = []
        for candidate in candidates:
            try:
                self.members_ = [_clone(candidate).fit(runs)]
                break
            except InvalidInput as problem:
                self.left_out_[candidate.name] = str(problem)
        self.weights_ = np.ones((len(self.baseline_), len(self.members_)))
        self.variance_, self.quantiles_ = np.zeros((0, runs.n_test)), np.zeros((0, len(LEVELS)))
        self.usual_square_ = self.usual_disagreement_ = self.variance_

    def _fit_stack(self, candidates: Sequence[Simulator], runs: Runs) -> None:
        """Weigh the simulators by their forecasts of held-out runs, then fit those with a weight on all runs."""
        folds = fold_of(runs, int(self.folds), int(self.seed))
        means = means_of_others(runs, folds)  # [runs, times, test]
        tried: list[Simulator] = []
        forecasts: list[np.ndarray] = []
        with bar("Fitting", len(candidates), shown=True) as advance:
            for candidate in map(_clone, candidates):
                try:
                    with quiet():
                        forecasts.append(candidate._cross_fit(runs, folds))
                    tried.append(candidate)
                except InvalidInput as problem:
                    self.left_out_[candidate.name] = str(problem)
                advance()
            deviations = np.stack(forecasts) - means if forecasts else np.zeros((0, *means.shape))
            actual = runs.losses.astype(np.float64) - means
            self.weights_ = stacking_weights(deviations, actual, self.stretches)
            self._fit_errors(deviations, actual, means, folds)
            useful = [bool((column > _LEAST_WEIGHT).any()) for column in self.weights_.T]
            self.weights_ = self.weights_[:, useful]
            self.members_ = [member for member, used in zip(tried, useful, strict=True) if used]
        for member, used in zip(tried, useful, strict=True):
            if not used:
                self.left_out_[member.name] = "it adds nothing to the forecasts of the others"

    def _fit_errors(self, deviations: np.ndarray, actual: np.ndarray, means: np.ndarray, folds: np.ndarray) -> None:
        """Learn how large errors are where neither a member nor the weights have seen the run.

        Args:
            deviations: of the members' forecasts from the mean, ``[members, runs, times, test]``.
            actual: of the recorded losses, ``[runs, times, test]``.
            means: mean trajectories of the other runs, ``[runs, times, test]``.
            folds: number of each run's fold, ``[runs]``.
        """
        squares, disagreements, errors = (np.full(actual.shape, np.nan) for _ in range(3))
        for fold in np.unique(folds):
            held = folds == fold
            weights = stacking_weights(deviations[:, ~held], actual[~held], self.stretches)
            stacked, disagreements[held] = _stacked(deviations[:, held], weights)
            squares[held], errors[held] = stacked**2, stacked - actual[held]
        usual = UsualErrors.of(errors)
        self.variance_ = usual.variance
        self.usual_square_, self.usual_disagreement_ = (mean_over_runs(part) for part in (squares, disagreements))
        expected = self._widened(usual.without, squares, disagreements)
        self.quantiles_ = usual.quantiles(expected)
        inside = np.abs(errors) <= half_widths(self.quantiles_, expected, USUAL_CONFIDENCE)
        self.trust_ = dataclasses.asdict(Trust.of(means + actual + errors, means + actual, means, inside))

    def _widened(self, variance: np.ndarray, squares: np.ndarray, disagreements: np.ndarray) -> np.ndarray:
        """Widen usual squared errors by the deviations from the mean and by the members' disagreement."""
        unusual = (squares, self.usual_square_), (disagreements, self.usual_disagreement_)
        return widened(variance, self.variance_, *unusual)

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        stacked = self._stack(curricula, initial)[0]
        losses: np.ndarray = at_times(self.baseline_, stacked.shape[1]) + stacked
        return losses

    def _stack(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the weighted deviations from the mean trajectory, and the members' disagreement; see ``_stacked``."""
        times = max(len(curriculum) for curriculum in curricula) + 1
        with quiet():
            forecasts = [member.simulate(curricula, initial) for member in self.members_]
        shape = (len(self.members_), len(curricula), times, self.n_test_)
        deviations = np.asarray(forecasts).reshape(shape) - at_times(self.baseline_, times)
        return _stacked(deviations, at_times(self.weights_, times))

    def _changes_without(self, base: Curriculum, groups: Sequence[np.ndarray], initial: np.ndarray) -> np.ndarray:
        """Add up the members' changes, as curricula without a group are as long as the base."""
        weights = self.weights_[min(len(base), len(self.weights_) - 1)]
        changes = [member.changes_without(base, groups, initial) for member in self.members_]
        shaped = np.asarray(changes).reshape(len(weights), len(groups), self.n_test_)
        return self._bounded_changes(base, np.einsum("m,mgz->gz", weights, shaped), initial)

    def _check_learned(self) -> None:
        super()._check_learned()
        members = getattr(self, "members_", None)
        if not isinstance(members, list) or not all(isinstance(member, Simulator) for member in members):
            raise InvalidInput("members_ is not a list of simulators")
        if any((member.n_train_, member.n_test_) != (self.n_train_, self.n_test_) for member in members):
            raise InvalidInput("the simulators in members_ are of other numbers of examples")
        check_arrays(
            self,
            {
                "weights_": f"float times {len(members)}",
                "variance_": "float errors test", "usual_square_": "float errors test",
                "usual_disagreement_": "float errors test", "quantiles_": f"float errors {len(LEVELS)}",
            },
            empty=("errors",),
        )  # fmt: skip

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Leave out the task and the unfitted members: the fitted ones are in the file."""
        about, arrays = super()._state()
        about["parameters"] |= {"task": None, "members": None}
        return about, arrays


def _clone(simulator: Simulator) -> Simulator:
    cloned: Simulator = sklearn.base.clone(simulator)
    return cloned


def _stacked(deviations: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Add up members' deviations, and measure how much they disagree.

    Args:
        deviations: ``[members, runs, times, test]``.
        weights: ``[times, members]``.

    Returns:
        The weighted sum, and the weighted variance around the weighted mean, both ``[runs, times, test]``.
    """
    stacked = np.einsum("tm,mrtz->rtz", weights, deviations)
    total = weights.sum(axis=1)[:, None]
    shares = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    centre = np.einsum("tm,mrtz->rtz", shares, deviations)
    return stacked, np.einsum("tm,mrtz->rtz", shares, (deviations - centre) ** 2)
