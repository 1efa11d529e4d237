"""The paper's simulators: a linear Markov process for each test example (Guu et al. 2023, arXiv 2303.08114).

    L_{t+1}(z) = α(c_t) · L_t(z) + β(c_t),    α(c) = Σ_{i∈c} w A_i(z),    β(c) = Σ_{i∈c} w B_i(z)

with ``w = B/|c|`` for a batch of size |c| and fitting runs of batch size B, so that A_i and B_i are effects of an
example in a full batch; at |c| = B this is the paper's equation. An empty batch is a step without an update.

    additive          α = 1
    multiplicative    β = 0
    linear            both

Around the mean trajectory m of the fitting runs (``around="mean"``, not in the paper), effects are those of a batch's
difference from c̄, the mean weights of a fitting step:

    L_{t+1} − m_{t+1} = (1 + a)(L_t − m_t) + Σ_i (w_i − c̄_i)(A_i L_t + B_i)

where a, the slope of deviations, is not penalised. Beyond the longest fitting run m keeps its last value. Rollouts are
still affine in the losses, with α = 1 + a + Σ (w − c̄) A and β = m_{t+1} − (1 + a) m_t + Σ (w − c̄) B.

Options of both forms: ``order`` n lets a step depend on n earlier losses, each with slopes of its own (Chai et al.
2024), which follows an optimizer's momentum; ``varying`` lets effects change linearly in τ, the time as a share of the
longest fitting run, A_i + τ A'_i; ``rollout`` k trains on rollouts of k steps instead of one.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import numpy as np
import optuna
import sklearn.base
import torch
from jaxtyping import Float

from simfluence._internal.validation import number, whole
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput, UnseenWarning, did_you_mean
from simfluence.runs import Runs
from simfluence.simulators.base import Simulator
from simfluence.simulators.batches import usual_batch_size
from simfluence.simulators.learned import check_arrays, check_counts
from simfluence.simulators.markov.dynamics import Differences, Dynamics, Steps, Term, free_terms, trained_on_rollouts
from simfluence.simulators.markov.least_squares import Columns, Lazy, Problem
from simfluence.simulators.markov.ridge import free_coefficients, ridge, ridge_path
from simfluence.simulators.markov.transitions import Transitions, check_every_step
from simfluence.simulators.mean import mean_trajectory

__all__ = [
    "AROUND",
    "L2_PATH",
    "PRIORS",
    "AdditiveSimulator",
    "LinearSimulator",
    "MarkovSimulator",
    "MultiplicativeSimulator",
]

PRIORS = ("identity", "zero")
AROUND = (None, "mean")
#: Penalties that ``l2="auto"`` chooses from, for each test example.
L2_PATH = tuple(float(10**power) for power in np.arange(-1, 4.5, 0.5))

_FOLDS = 4
_MOST_STEPS = 10_000  # of order and rollout, from which lists are built


class MarkovSimulator(Simulator):
    """Common part of the family: a least-squares fit, and simulation by rollout.

    Fitting minimises squared one-step errors from the true previous loss, plus ``l2`` times the squared effects.
    Simulating rolls the equation out from the losses before training.

    Attributes:
        effects_: effects of the training examples, one set for each of ``terms``, ``[terms, train, test]``. ``A_`` and
            ``B_`` are those on the slope of the last loss and on the intercept, ``[train, test]``.
        l2_: penalty of each test example, ``[test]``.
        seen_: whether each training example is in a fitting run, ``[train]``; the others have the prior's effects.
        batch_size_: batch size of the fitting runs, the most frequent if they have several.
        horizon_: steps of the longest fitting run.
        mean_, centre_: around the mean only: m ``[steps + 1, test]``, c̄ ``[train]``.
        deviation_slopes_: around the mean only: a of each earlier loss and, if ``varying``, the change of the first
            with τ, ``[free, test]``.
    """

    l2: Any
    prior: str = "identity"
    around: str | None
    order: int = 1
    varying: bool = False
    guard: bool = False
    rollout: int = 1
    learns_slope: ClassVar[bool]
    learns_intercept: ClassVar[bool]

    @property
    def terms(self) -> list[Term]:
        """The terms that a step sums, those of ``A_`` and ``B_`` first if they are learned."""
        lags = [*range(1, self.order + 1)] if self.learns_slope else []
        first = lags[:1] + ([0] if self.learns_intercept else [])
        return [Term(lag) for lag in first + lags[1:]] + ([Term(lag, 1) for lag in first] if self.varying else [])

    @property
    def A_(self) -> Float[np.ndarray, "train test"]:  # noqa: N802 (the paper's name)
        """Effects on the slope of the last loss.

        Raises:
            AttributeError: before ``fit``, or simulators of this kind learn no slope.
        """
        return self._effects_of(Term(1))

    @property
    def B_(self) -> Float[np.ndarray, "train test"]:  # noqa: N802 (the paper's name)
        """Effects on the intercept.

        Raises:
            AttributeError: before ``fit``, or simulators of this kind learn no intercept.
        """
        return self._effects_of(Term(0))

    def _effects_of(self, term: Term) -> np.ndarray:
        if term not in self.terms:
            raise AttributeError(
                f"simulator {self.name!r} learns no effects on the {'slope' if term.lag else 'intercept'}"
            )
        effects: np.ndarray = self.effects_[self.terms.index(term)]
        return effects

    def effects(self, curricula: Sequence[Curriculum]) -> tuple[Float[np.ndarray, "order runs steps test"], Any]:
        """Return α ``[order, runs, steps, test]`` and β ``[runs, steps, test]`` of every step.

        ``L_{t+1} = Σ_j α_j L_{t+1−j} + β``; steps after a curriculum's end have α = 1, β = 0.
        """
        self._check_fitted()
        alphas, beta = self._dynamics().affine(Steps.of(curricula, self.batch_size_))
        return alphas.numpy().swapaxes(1, 2), beta.numpy().swapaxes(0, 1)

    @classmethod
    def suggest(cls, trial: optuna.Trial) -> dict[str, Any]:
        drawn: dict[str, Any] = {"l2": trial.suggest_float("l2", 0.1, 1e5, log=True)}
        drawn["around"] = trial.suggest_categorical("around", AROUND)
        if cls.learns_slope and drawn["around"] is None:
            drawn["prior"] = trial.suggest_categorical("prior", PRIORS)
        return drawn

    def _check_parameters(self) -> None:
        if not isinstance(self.l2, str) or self.l2 != "auto":
            number("l2", self.l2, above=0)
        for name in ("order", "rollout"):
            whole(name, getattr(self, name), 1, _MOST_STEPS)
        for name in ("varying", "guard"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise InvalidInput(f"{name} must be True or False, got {getattr(self, name)!r}")
        if not isinstance(self.prior, str) or self.prior not in PRIORS:
            raise InvalidInput(f"unknown prior {self.prior!r}, {did_you_mean(str(self.prior), PRIORS)}")
        if self.around is not None and not (isinstance(self.around, str) and self.around in AROUND):
            raise InvalidInput(f"around must be None or 'mean', got {self.around!r}")
        if self.around == "mean" and self.prior != "identity":
            raise InvalidInput(
                f"prior={self.prior!r} shrinks α to 0, but around='mean' shrinks losses to the mean: choose one"
            )

    def _fit(self, runs: Runs) -> None:
        rows = self._prepare(runs)
        self.seen_ = np.zeros(runs.n_train, bool)
        self.seen_[np.concatenate([run.curriculum.indices for run in runs])] = True
        chosen = self._best_l2(runs) if self.l2 == "auto" else self.l2
        self.l2_ = np.broadcast_to(np.asarray(chosen, np.float64), (runs.n_test,)).copy()
        problem = self._problem(rows)
        solution = ridge(problem, self.l2_)
        fitted = self._dynamics(solution + self._prior, free_coefficients(problem, solution))
        if self.rollout > 1:
            fitted = trained_on_rollouts(fitted, runs, self.l2_, self._prior, self.rollout)
        self.effects_ = fitted.effects.numpy()
        if fitted.deviation_slopes is not None:
            self.deviation_slopes_ = fitted.deviation_slopes.numpy()

    def _prepare(self, runs: Runs) -> Transitions:
        """Set batch size, horizon and, for around="mean", the mean trajectory and the mean weights."""
        self.batch_size_ = usual_batch_size(runs.curricula)
        self.horizon_ = max(run.steps for run in runs)
        if self.learns_slope or self.around == "mean" or self.varying or self.rollout > 1:
            check_every_step(runs, str(self))
        rows = Transitions.of(runs, self.batch_size_)
        if self.around == "mean":
            self.mean_ = mean_trajectory(runs)
            self.centre_ = np.asarray(rows.weights.mean(axis=0)).ravel()
        return rows

    @property
    def _prior(self) -> np.ndarray:
        """The effects that the penalty shrinks to, ``[terms, 1, 1]``: A = 1/B makes α = 1."""
        prior = np.zeros((len(self.terms), 1, 1))
        if self.learns_slope and self.around is None and self.prior == "identity":
            prior[0] = 1 / self.batch_size_
        return prior

    def _problem(self, rows: Transitions) -> Problem:
        """Return the least-squares problem of one step, with columns computed block by block."""
        around = self.around == "mean"

        def deviation(lag: int, span: slice) -> np.ndarray:
            mean = self.mean_[np.maximum(rows.times + 1 - lag, 0), span]
            values: np.ndarray = rows.before(lag, span) - mean
            return values

        def target(span: slice) -> np.ndarray:
            values = rows.after(span)
            if around:
                values = values - self.mean_[rows.times + 1, span] - deviation(1, span)
            elif self.prior == "identity" or not self.learns_slope:
                values = values - rows.before(1, span)
            return values

        def multiplier(term: Term) -> Columns | None:
            if term == Term(0):
                return None
            loss = partial(rows.before, term.lag) if term.lag else rows.ones
            return rows.lazy(lambda span: loss(span) * self._share(rows.times, term))

        def free(term: Term) -> Lazy:
            return rows.lazy(lambda span: deviation(term.lag, span) * self._share(rows.times, term))

        columns = [free(term) for term in free_terms(self.order, self.varying)] if around else []
        multipliers = [multiplier(term) for term in self.terms]
        return Problem(rows.weights, multipliers, rows.lazy(target), self.centre_ if around else None, columns)

    def _share(self, times: np.ndarray, term: Term) -> np.ndarray:
        """Return τ of each row to the term's power, ``[rows, 1]``."""
        share: np.ndarray = (times[:, None] / self.horizon_) ** term.power
        return share

    def _dynamics(
        self,
        effects: np.ndarray | None = None,
        deviation_slopes: np.ndarray | None = None,
        span: slice = slice(None),
    ) -> Dynamics:
        """Return the process for a slice of the test examples, by default as fitted. Arrays are not copied."""
        around = self.around == "mean"
        effects = self.effects_ if effects is None else effects
        if around and deviation_slopes is None:
            deviation_slopes = self.deviation_slopes_
        return Dynamics(
            terms=self.terms,
            effects=torch.as_tensor(effects),
            batch_size=self.batch_size_,
            horizon=self.horizon_,
            order=int(self.order),
            fixed_slope=1.0 if around or not self.learns_slope else 0.0,
            guard=self.guard,
            centre=torch.as_tensor(self.centre_) if around else None,
            mean=torch.as_tensor(np.ascontiguousarray(self.mean_[:, span])) if around else None,
            deviation_slopes=torch.as_tensor(deviation_slopes) if around else None,
        )

    def _check_learned(self) -> None:
        super()._check_learned()
        check_counts(self, "batch_size_", "horizon_")
        check_arrays(
            self, {"effects_": f"float64 {len(self.terms)} train test", "l2_": "float64 test", "seen_": "bool train"}
        )
        if self.around == "mean":
            free = len(free_terms(self.order, self.varying))
            shapes = {
                "mean_": "float64 times test",
                "centre_": "float64 train",
                "deviation_slopes_": f"float64 {free} test",
            }
            check_arrays(self, shapes)

    @classmethod
    def _from_format_0(
        cls, parameters: dict[str, Any], learned: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Join A_, B_ and further_, which were separate arrays."""
        first = [learned.pop(name)[None] for name in ("A_", "B_") if name in learned]
        if first:  # a file of unfitted parameters has none
            learned["effects_"] = np.concatenate([*first, learned.pop("further_")])
        if "lasting_" in learned:
            learned["deviation_slopes_"] = learned.pop("lasting_")
        return parameters, learned

    def _best_l2(self, runs: Runs) -> np.ndarray:
        """Choose for each test example the value of ``L2_PATH`` with the best rollouts of held-out runs, ``[test]``."""
        ids = list(dict.fromkeys(runs.ids))  # copies of a run, as in a bootstrap, are held out together
        folds = min(_FOLDS, len(ids))
        if folds < 2:
            raise InvalidInput("l2='auto' needs held-out runs: give 2 runs or more, or set l2 to a number")
        errors = np.zeros((len(L2_PATH), runs.n_test))
        for fold in range(folds):
            held_ids = set(ids[fold::folds])
            held = Runs(run for run in runs if run.id in held_ids)
            fit = Runs(run for run in runs if run.id not in held_ids)
            errors += sklearn.base.clone(self)._path_errors(fit, held)
        best: np.ndarray = np.array(L2_PATH)[np.argmin(errors, axis=0)]
        return best

    def _path_errors(self, fit: Runs, held: Runs) -> np.ndarray:
        """Return squared errors of rollouts of ``held`` under ``L2_PATH`` fitted on ``fit``, ``[path, test]``."""
        problem, true = self._problem(self._prepare(fit)), held.losses.astype(np.float64)
        errors = np.empty((len(L2_PATH), held.n_test))
        for span, solutions in ridge_path(problem, L2_PATH):
            for index, solution in enumerate(solutions):
                slopes = free_coefficients(problem.block(span), solution)
                fitted = self._dynamics(solution + self._prior, slopes, span)
                with np.errstate(all="ignore"):
                    residuals = fitted.simulate(held.curricula, true[:, 0, span]) - true[:, :, span]
                    residuals[np.isnan(true[:, :, span])] = 0.0
                    errors[index, span] = (residuals**2).sum((0, 1))
        return np.nan_to_num(errors, nan=np.inf)

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        self._warn_of_unseen(curricula)
        return self._dynamics().simulate(curricula, initial)

    def _changes(self, base: Curriculum, edited: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        if any(len(curriculum) != len(base) for curriculum in edited):
            return super()._changes(base, edited, initial)
        self._warn_of_unseen([base, *edited])
        changes = self._dynamics().changes(base, Differences.between(base, edited), initial)
        return self._bounded_changes(base, changes, initial)

    def _changes_without(self, base: Curriculum, groups: Sequence[np.ndarray], initial: np.ndarray) -> np.ndarray:
        self._warn_of_unseen([base])
        dynamics, changes = self._dynamics(), np.zeros((len(groups), self.n_test_))
        for block in Differences.blocks(base, groups):
            changes[block] = dynamics.changes(base, Differences.without(base, groups[block]), initial)
        return self._bounded_changes(base, changes, initial)

    def _warn_of_unseen(self, curricula: Sequence[Curriculum]) -> None:
        shown = np.zeros(self.n_train_, bool)
        shown[np.concatenate([curriculum.indices for curriculum in curricula])] = True
        if unseen := int((shown & ~self.seen_).sum()):
            warnings.warn(
                f"{unseen} training examples of these curricula are in no run that the {self.name} simulator was "
                "fitted on: their effects are those of the prior",
                UnseenWarning,
                stacklevel=5,
            )


class AdditiveSimulator(MarkovSimulator):
    """Additive effects, ``L_{t+1} = L_t + β(c_t)``: the best that TracIn could reach (Guu et al. 2023, section 3).

    Args:
        l2: penalty on the squared effects, or "auto": for each test example the best on held-out runs.
        around: "mean" for effects around the mean trajectory of the fitting runs.
        rollout: number of steps of the rollouts to train on.

    >>> runs = Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> AdditiveSimulator(l2=1e-6).fit(runs).B_.round(3).ravel()
    array([-1. ,  0.5])
    """

    name = "additive"
    learns_slope = False
    learns_intercept = True

    def __init__(self, l2: float | str = 1.0, around: str | None = None, rollout: int = 1) -> None:
        self.l2 = l2
        self.around = around
        self.rollout = rollout


class MultiplicativeSimulator(MarkovSimulator):
    """Multiplicative effects, ``L_{t+1} = α(c_t) · L_t`` (Guu et al. 2023, section 3).

    Args:
        l2, around, rollout: see ``AdditiveSimulator``.
        prior: "identity" shrinks to α = 1, which leaves losses unchanged; "zero", the paper's, to α = 0.

    >>> runs = Runs.from_arrays([[[0], [1], [0]]], [[[4.0], [2.0], [3.0], [1.5]]])
    >>> MultiplicativeSimulator(l2=1e-6).fit(runs).A_.round(3).ravel()
    array([0.5, 1.5])
    """

    name = "multiplicative"
    learns_slope = True
    learns_intercept = False

    def __init__(
        self, l2: float | str = 1.0, prior: str = "identity", around: str | None = None, rollout: int = 1
    ) -> None:
        self.l2 = l2
        self.prior = prior
        self.around = around
        self.rollout = rollout


class LinearSimulator(MarkovSimulator):
    """Linear effects, ``L_{t+1} = α(c_t) · L_t + β(c_t)`` (Guu et al. 2023, equations 1–3), of order 1 or higher.

    Args:
        l2, around, rollout: see ``AdditiveSimulator``.
        prior: "identity" shrinks to α = 1, which leaves losses unchanged; "zero", the paper's, to α = 0.
        order: number of earlier losses that a step depends on, ``L_{t+1} = Σ_j α_j(c_t) L_{t+1−j} + β(c_t)``; losses
            before time 0 are those of time 0. 2 follows a momentum.
        varying: whether effects change along training.
        guard: whether to scale the slopes of a step down where they sum to more than 1 in size, so that no loss (around
            the mean: no deviation) grows by itself. The scale depends on the curriculum alone, so rollouts stay affine.

    >>> rng = np.random.default_rng(0)
    >>> curricula = [rng.integers(3, size=(50, 1)) for _ in range(4)]
    >>> losses = np.cumsum(rng.normal(size=(4, 51, 2)), axis=1)
    >>> LinearSimulator(l2=0.1).fit(Runs.from_arrays(curricula, losses)).A_.shape
    (3, 2)
    """

    name = "linear"
    learns_slope = True
    learns_intercept = True

    def __init__(
        self,
        l2: float | str = 1.0,
        prior: str = "identity",
        around: str | None = None,
        order: int = 1,
        varying: bool = False,
        guard: bool = False,
        rollout: int = 1,
    ) -> None:
        self.l2 = l2
        self.prior = prior
        self.around = around
        self.order = order
        self.varying = varying
        self.guard = guard
        self.rollout = rollout

    @classmethod
    def suggest(cls, trial: optuna.Trial) -> dict[str, Any]:
        drawn = super().suggest(trial) | {"order": trial.suggest_int("order", 1, 3)}
        return drawn | {"varying": trial.suggest_categorical("varying", (False, True))}
