"""Data removal: forecast the losses without some examples, or search for the examples to remove.

forecast_removal(simulator, run, "source == 'web'")      the losses without them
smallest_removal(simulator, run, test=17, past=1.0)      the fewest examples that carry test 17's loss past 1.0
best_removal(simulator, run, test=17, k=10)              the ten whose removal lowers it most
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Float

from simfluence._internal.checked import checked
from simfluence._internal.types import Count, Indices, Seed, Share, Target
from simfluence.edits import Remove
from simfluence.errors import InvalidInput
from simfluence.queries.effects import chosen_tests
from simfluence.queries.forecast import Forecast
from simfluence.queries.forecasts import Forecasts
from simfluence.queries.questions import what_if
from simfluence.queries.tables import check_base
from simfluence.runs import Run
from simfluence.simulators import AdditiveSimulator, Simulator
from simfluence.task import Task

#: Time limit of the exact search, in seconds.
SECONDS = 60.0

_SHORTLIST = 50  # candidates per greedy step, best by their last known gain


@dataclass(frozen=True, eq=False)
class Removal:
    """Training examples to remove, and the forecast of their removal.

    Args:
        examples: indices of the examples; for the greedy search in the order of removal.
        losses: forecast mean final loss of the chosen test examples after 0, 1, 2, … removals in the order of
            ``examples``, ``[removed + 1]``.
        reached: whether the forecast loss reaches the goal.
        exact: whether no other removal is smaller (or better) under this simulator, by proof.

    >>> print(Removal(np.array([4, 1]), np.array([0.5, 0.8, 1.2]), reached=True, exact=False))
    2 examples: loss 0.500 → 1.200 (not proved best)
    """

    examples: Indices
    losses: Float[np.ndarray, " forecasts"]
    reached: bool
    exact: bool

    @property
    def edit(self) -> Remove:
        """The removal as an edit.

        Raises:
            InvalidInput: nothing is removed.
        """
        if len(self.examples) == 0:
            raise InvalidInput("there is nothing to remove")
        return Remove(rows=self.examples)

    @property
    def change(self) -> float:
        """Forecast change of the mean final loss."""
        return float(self.losses[-1] - self.losses[0])

    def __str__(self) -> str:
        text = f"{len(self.examples)} examples: loss {self.losses[0]:.3f} → {self.losses[-1]:.3f}"
        notes = [] if self.reached else ["goal not reached"]
        notes += ["proved best" if self.exact else "not proved best"]
        return f"{text} ({', '.join(notes)})"


@checked
def forecast_removal(
    simulator: Simulator,
    base: Run | Sequence[Run],
    targets: Target | Mapping[str, Target],
    *,
    fill: str = "shrink",
    seed: Seed = 0,
    task: Task | None = None,
    confidence: Share = 0.9,
) -> Forecast | Forecasts:
    """Forecast the losses without some training examples, with intervals if the simulator gives them.

    Args:
        simulator, base, task, confidence: same as in ``what_if``.
        targets: a filter, indices or ids; or many of them by name.
        fill, seed: how to fill the freed slots; same as in ``Remove``.

    Returns:
        ``Forecast`` for one target and run, else ``Forecasts``; their ``by_group`` averages over test examples.

    Raises:
        InvalidInput: same as in ``what_if``.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> fitted = sf.AdditiveSimulator(l2=1e-6).fit(runs)
    >>> forecast_removal(fitted, runs[0], {"first": [0], "second": [1]}).change.round(2).ravel()
    array([ 2. , -0.5])
    """
    if not isinstance(targets, Mapping):
        return what_if(simulator, base, Remove(targets, fill, seed), task=task, confidence=confidence)
    queries = {str(name): Remove(target, fill, seed) for name, target in targets.items()}
    return what_if(simulator, base, queries, task=task, confidence=confidence)


@checked
def smallest_removal(
    simulator: Simulator, run: Run, test: int | Target, past: float, *, exact: bool = False, most: Count | None = None
) -> Removal:
    """Find the fewest training examples whose removal raises a test loss past a value. Batches shrink.

    The greedy search removes, again and again, the example that raises the loss most. For the additive simulator
    ``exact=True`` then solves the problem as a mixed-integer program: a proof for tens of removals from small runs, of
    few from larger ones.

    Args:
        simulator: fitted on runs of the same task.
        run: the base.
        test: index of the test example; or a filter, indices or ids of several, whose mean counts.
        past: the final loss to reach.
        exact: prove that no smaller removal does it; gives up the proof after ``SECONDS``.
        most: largest number of examples to remove; by default all but one.

    Returns:
        The removal; ``reached`` is False if none that reaches ``past`` was found.

    Raises:
        NotFittedError: before ``fit``.
        InvalidInput: ``exact`` for another simulator, an unknown test example, a run of another task.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], [2]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> fitted = sf.AdditiveSimulator(l2=1e-6).fit(runs)
    >>> smallest_removal(fitted, runs[0], test=0, past=3.0, exact=True).examples.tolist()
    [0, 2]
    """
    problem = _Problem.of(simulator, run, test, sign=1.0)
    limit = problem.limit(most)
    return _Program.of(simulator, problem, limit, past).smallest(past) if exact else problem.greedy(limit, past)


@checked
def best_removal(simulator: Simulator, run: Run, test: int | Target, k: Count, *, exact: bool = False) -> Removal:
    """Find at most ``k`` training examples whose removal lowers a test loss most. Batches shrink.

    For arguments, errors and the two searches see ``smallest_removal``; ``reached`` says whether the loss falls.

    >>> import simfluence as sf
    >>> runs = sf.Runs.from_arrays([[[0], [1], [2]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> print(best_removal(sf.AdditiveSimulator(l2=1e-6).fit(runs), runs[0], test=0, k=2, exact=True))
    1 examples: loss 1.500 → 1.000 (proved best)
    """
    problem = _Problem.of(simulator, run, test, sign=-1.0)
    limit = problem.limit(k)
    return _Program.of(simulator, problem, limit, None).best() if exact else problem.greedy(limit, None)


@dataclass(frozen=True, eq=False)
class _Problem:
    """The search for removals from one run that move the mean final loss of some test examples.

    Args:
        tests: indices of these test examples.
        sign: 1 to raise the loss, −1 to lower it.
        start: forecast loss without a removal.
        shown: training examples that the run shows.
    """

    simulator: Simulator
    run: Run
    tests: np.ndarray
    sign: float
    start: float
    shown: np.ndarray

    @classmethod
    def of(cls, simulator: Simulator, run: Run, test: int | Target, sign: float) -> _Problem:
        check_base(simulator, run)
        tests = chosen_tests([test] if isinstance(test, int | np.integer) else test, run.test, run.losses.shape[1])
        start = simulator.simulate([run.curriculum], run.initial_losses)[0, -1, tests].mean()
        return cls(simulator, run, tests, sign, float(start), np.unique(run.curriculum.indices))

    def limit(self, most: int | None) -> int:
        """Return the largest number of removals: as given, but never every example of the run."""
        return min(len(self.shown) - 1, len(self.shown) if most is None else most)

    def greedy(self, limit: int, past: float | None) -> Removal:
        """Repeat the best single removal until the loss is past a value or nothing helps."""
        removed: list[int] = []
        losses = [self.start]
        gains = self._first_gains() if limit else {}
        while len(removed) < limit and not self._is_past(losses[-1], past):
            candidates = sorted(gains, key=lambda index: -gains[index])[:_SHORTLIST]
            for index, change in zip(candidates, self._changes(removed, candidates), strict=True):
                gains[index] = self.sign * (self.start + change - losses[-1])
            best = max(candidates, key=lambda index: gains[index])
            if gains[best] <= 0:
                break
            removed.append(best)
            losses.append(losses[-1] + self.sign * gains.pop(best))
        reached = self._is_past(losses[-1], past) if past is not None else len(removed) > 0
        return Removal(np.array(removed, np.int64), np.array(losses), reached, exact=False)

    def _is_past(self, loss: float, past: float | None) -> bool:
        return past is not None and bool(loss >= past)

    def _first_gains(self) -> dict[int, float]:
        """Compute the gain of each single removal."""
        changes = self.simulator.changes_without(self.run.curriculum, self.shown[:, None], self.run.initial_losses)
        gains = self.sign * changes[:, self.tests].mean(axis=1)
        return dict(zip(self.shown.tolist(), gains.tolist(), strict=True))

    def _changes(self, removed: list[int], candidates: list[int]) -> np.ndarray:
        """Change of the loss by removing each candidate on top of what is removed."""
        groups = np.zeros((len(candidates), self.run.curriculum.n_train), bool)
        groups[:, removed] = True
        groups[np.arange(len(candidates)), candidates] = True
        return self._without(groups)

    def path(self, removed: np.ndarray) -> np.ndarray:
        """Simulate the loss after 0, 1, 2, … of the removals, ``[removed + 1]``."""
        groups = np.zeros((len(removed), self.run.curriculum.n_train), bool)
        for count in range(len(removed)):
            groups[count:, removed[count]] = True
        return self.start + np.concatenate([[0.0], self._without(groups) if len(removed) else []])

    def _without(self, groups: np.ndarray) -> np.ndarray:
        """Change of the loss without each group, a row of ``groups`` [groups, train]."""
        changes = self.simulator.changes_without(self.run.curriculum, groups, self.run.initial_losses)
        means: np.ndarray = changes[:, self.tests].mean(axis=1)
        return means


@dataclass(frozen=True, eq=False)
class _Program:
    """The additive simulator's removals as a mixed-integer linear program.

    Batch t adds ``r_t = B Σ_i m_ti y_i b_i / Σ_i m_ti y_i`` to the loss, where m_ti counts example i in batch t and y_i
    is 1 unless i is removed; it adds 0 once nothing is left. With ``z_ti = y_i r_t`` (McCormick's four inequalities,
    exact for y_i ∈ {0, 1}) this is linear: ``Σ_i m_ti z_ti = B Σ_i m_ti y_i b_i``. The variables are stacked as
    y, r, z. The greedy removal bounds the number of removals, and so each r_t.
    """

    problem: _Problem
    greedy: Removal
    limit: int
    effects: np.ndarray  # B b_i of the shown examples, [shown]
    counts: scipy.sparse.coo_array  # m, [steps, shown]

    @classmethod
    def of(cls, simulator: Simulator, problem: _Problem, limit: int, past: float | None) -> _Program:
        if not isinstance(simulator, AdditiveSimulator) or simulator.around is not None:
            raise InvalidInput(f"exact=True is for AdditiveSimulator, not around the mean; got {simulator}")
        effects = simulator.batch_size_ * simulator.B_[problem.shown][:, problem.tests].mean(axis=1)
        counts = scipy.sparse.coo_array(problem.run.curriculum.counts[:, problem.shown])
        greedy = problem.greedy(limit, past)
        enough = len(greedy.examples) if past is not None and greedy.reached else limit
        return cls(problem, greedy, enough, effects, counts)

    def smallest(self, past: float) -> Removal:
        """Find the smallest removal that carries the loss past a value."""
        to_go = past - self._before
        enough = scipy.optimize.LinearConstraint(self._row(r=np.ones(self.counts.shape[0])), to_go, np.inf)
        loss, removed, proved = self._solved(self._row(y=-np.ones(len(self.effects))), [enough])
        if loss is None or (self.greedy.reached and len(removed) >= len(self.greedy.examples)):
            return dataclasses.replace(self.greedy, exact=proved)
        return Removal(removed, self.problem.path(removed), True, proved)

    def best(self) -> Removal:
        """Find the removal within the limit that moves the loss furthest."""
        sign = self.problem.sign
        loss, removed, proved = self._solved(-sign * self._row(r=np.ones(self.counts.shape[0])), [])
        if loss is None or sign * (self.greedy.losses[-1] - loss) >= -1e-9:
            return dataclasses.replace(self.greedy, exact=proved)
        return Removal(removed, self.problem.path(removed), len(removed) > 0, proved)

    @property
    def _before(self) -> float:
        """The loss before any batch."""
        return float(self.problem.run.initial_losses[self.problem.tests].mean())

    def _row(self, y: Any = 0.0, r: Any = 0.0, z: Any = 0.0) -> np.ndarray:
        sizes = (len(self.effects), self.counts.shape[0], self.counts.nnz)
        return np.concatenate([np.broadcast_to(part, size) for part, size in zip((y, r, z), sizes, strict=True)])

    def _solved(self, objective: np.ndarray, further: list[Any]) -> tuple[float | None, np.ndarray, bool]:
        """Solve the program; return the loss (None without a solution), the removal, and whether it is proved best."""
        shown, steps = len(self.effects), self.counts.shape[0]
        few = scipy.optimize.LinearConstraint(self._row(y=np.ones(shown)), shown - self.limit, np.inf)
        low, high = self._bounds()
        solution = scipy.optimize.milp(
            objective,
            integrality=self._row(y=1),
            bounds=scipy.optimize.Bounds(
                self._row(r=low, z=np.minimum(low, 0)[self.counts.row]),
                self._row(y=1.0, r=high, z=np.maximum(high, 0)[self.counts.row]),
            ),
            constraints=[*self._means(low, high), few, *further],
            options={"time_limit": SECONDS},
        )
        if solution.x is None:
            return None, np.empty(0, np.int64), solution.status == 2  # provably no such removal exists
        removed = self.problem.shown[solution.x[:shown] < 0.5]
        return self._before + float(solution.x[shown : shown + steps].sum()), removed, solution.status == 0

    def _bounds(self) -> tuple[np.ndarray, np.ndarray]:
        """Compute the smallest and largest value of each r_t within the allowed number of removals, ``[steps]``."""
        steps = self.counts.shape[0]
        low, high = np.zeros(steps), np.zeros(steps)
        counts = self.counts.tocsr()
        for step in range(steps):
            part = slice(counts.indptr[step], counts.indptr[step + 1])
            if part.stop == part.start:
                continue
            times = counts.data[part]
            values = np.sort(np.repeat(self.effects[counts.indices[part]], times))
            gone = min(self.limit * int(times.max()), len(values) - 1)
            left = np.arange(len(values), len(values) - gone - 1, -1)  # slots left after each removal
            low[step] = (np.cumsum(values)[left - 1] / left).min()
            high[step] = (np.cumsum(values[::-1])[left - 1] / left).max()
            if self.limit >= len(times):  # nothing may be left
                low[step], high[step] = min(low[step], 0.0), max(high[step], 0.0)
        return low, high

    def _means(self, low: np.ndarray, high: np.ndarray) -> list[Any]:
        """Build the constraints that make each r_t its batch's mean, and z_ti = y_i r_t."""
        steps, shown = self.counts.shape
        pairs, row, col, count = self.counts.nnz, self.counts.row, self.counts.col, self.counts.data
        every, ones = np.arange(pairs), np.ones(pairs)

        def matrix(height: int, y: Any = None, r: Any = None, z: Any = None) -> Any:
            parts = [(y, shown), (r, steps), (z, pairs)]
            return scipy.sparse.hstack([
                scipy.sparse.csr_array((height, size)) if part is None else scipy.sparse.csr_array(part, (height, size))
                for part, size in parts
            ])  # fmt: skip

        by_pair, of_y, of_r = (ones, (every, every)), (every, col), (every, row)
        identity_r = (np.ones(steps), (np.arange(steps), np.arange(steps)))
        linear = scipy.optimize.LinearConstraint
        return [
            linear(
                matrix(steps, y=(-count * self.effects[col], (row, col)), z=(count.astype(float), (row, every))), 0, 0
            ),
            linear(matrix(pairs, y=(-high[row], of_y), z=by_pair), -np.inf, 0),  # z ≤ high·y
            linear(matrix(pairs, y=(-low[row], of_y), z=by_pair), 0, np.inf),  # z ≥ low·y
            linear(matrix(pairs, y=(-low[row], of_y), r=(-ones, of_r), z=by_pair), -np.inf, -low[row]),
            linear(matrix(pairs, y=(-high[row], of_y), r=(-ones, of_r), z=by_pair), -high[row], np.inf),
            linear(
                matrix(steps, y=(-np.maximum(high, 0)[row], (row, col)), r=identity_r), -np.inf, 0
            ),  # 0 if none is left
            linear(matrix(steps, y=(-np.minimum(low, 0)[row], (row, col)), r=identity_r), 0, np.inf),
        ]
