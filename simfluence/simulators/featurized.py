"""Effects as functions of the examples' features, to simulate unseen examples (after Chai et al. 2024)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import optuna
import torch
from sklearn.linear_model import RidgeCV
from torch import Tensor

from simfluence._internal.validation import number, whole
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.examples import Examples
from simfluence.runs import Runs
from simfluence.simulators.base import Simulator
from simfluence.simulators.batches import usual_batch_size
from simfluence.simulators.learned import MOST, check_arrays, check_counts
from simfluence.simulators.markov.dynamics import Dynamics, Term
from simfluence.simulators.markov.transitions import Transitions, check_every_step
from simfluence.simulators.mean import mean_trajectory
from simfluence.simulators.surrogates import Sides

__all__ = ["FeaturizedSimulator"]

_ITERATIONS = 600
_TOLERANCE = 1e-7
_MEAN_PENALTIES = np.logspace(-3, 4, 22)


class FeaturizedSimulator(Simulator):
    """Linear simulator around the mean trajectory, with effects bilinear in the examples' features.

        L_{t+1} − m_{t+1} = (1 + a + τ a')(L_t − m_t) + Σ_i (w_i − c̄_i)(A_i L_t + B_i + τ A'_i L_t + τ B'_i)
        A_i(z) = h_iᵀ W h_z, with other W for B, A', B'

    τ is the time as a share of the longest fitting run, and h the products of (1, target) and (1, principal components
    of the features), where classes have one target column each. All test examples share W and a, which therefore also
    apply to examples of no run: ``for_examples`` returns their simulator. The mean trajectory of such a test example is
    predicted from h by a ridge regression over the recorded test examples.

    Args:
        l2: penalty on the squared entries of every W.
        components: number of principal components of the features.

    Attributes:
        W_: ``[4, h, h]`` for A, B, A', B'.
        lasting_: a and a', ``[2]``.
        mean_: m of the current test examples, ``[steps + 1, test]``.
        mean_weights_: coefficients of the regression of m on h, with the constant last, ``[h + 1, steps + 1]``.
        train_h_, test_h_: h of the current examples, ``[examples, h]``.
        usual_h_: mean h of the examples of a batch, ``[h]``.

    >>> from simfluence import Examples
    >>> rng = np.random.default_rng(0)
    >>> train, test = (Examples.numbered(n, None, rng.normal(size=(n, 2)), rng.integers(2, size=n)) for n in (6, 3))
    >>> runs = Runs.from_arrays(rng.integers(6, size=(4, 20, 2)), rng.normal(size=(4, 21, 3)), train=train, test=test)
    >>> fitted = FeaturizedSimulator(components=1).fit(runs)
    >>> other = fitted.for_examples(test=Examples.numbered(5, None, rng.normal(size=(5, 2)), [0, 1, 0, 1, 0]))
    >>> other.simulate(runs.curricula, np.ones(5)).shape
    (4, 21, 5)
    """

    name = "featurized"
    _terms = (Term(1), Term(0), Term(1, 1), Term(0, 1))

    def __init__(self, l2: float = 10.0, components: int = 5) -> None:
        self.l2 = l2
        self.components = components

    @classmethod
    def suggest(cls, trial: optuna.Trial) -> dict[str, Any]:
        return {
            "l2": trial.suggest_float("l2", 0.1, 1e4, log=True),
            "components": trial.suggest_int("components", 2, 20, log=True),
        }

    def for_examples(self, train: Examples | None = None, test: Examples | None = None) -> FeaturizedSimulator:
        """Return the simulator of other examples.

        Args:
            train: training examples of its curricula; by default those of the fitting runs.
            test: test examples of its losses; by default those of the fitting runs.

        Raises:
            NotFittedError: before ``fit``.
            InvalidInput: the examples have no features or targets, or features of another width, or other classes.
        """
        self._check_fitted()
        other = copy.copy(self)
        other.fingerprint_ = None  # the examples are those of another task
        if train is not None:
            other.train_h_, other.n_train_ = self._h_of(train, "training"), len(train)
        if test is not None:
            other.test_h_, other.n_test_ = self._h_of(test, "test"), len(test)
            other.mean_ = (_with_one(other.test_h_) @ self.mean_weights_).T
        return other

    def _check_parameters(self) -> None:
        number("l2", self.l2, above=0)
        whole("components", self.components, 0)

    def _fit(self, runs: Runs) -> None:
        Sides.of(runs.train, runs.test, "the featurized simulator")  # checks that features and targets are present
        check_every_step(runs, str(self))
        train, test = cast(Examples, runs.train), cast(Examples, runs.test)
        self._choose_h(train, test)
        self.train_h_ = self._h_of(train, "training")
        self.test_h_ = self._h_of(test, "test")
        self.batch_size_ = usual_batch_size(runs.curricula)
        self.horizon_ = max(run.steps for run in runs)
        rows = Transitions.of(runs, self.batch_size_)
        # The weights of every batch sum to B, so the mean batch can be subtracted from h example by example.
        self.usual_h_ = rows.weights.mean(axis=0) @ self.train_h_ / self.batch_size_
        self.mean_ = mean_trajectory(runs)
        regression = RidgeCV(_MEAN_PENALTIES).fit(self.test_h_, self.mean_.T)
        self.mean_weights_ = np.concatenate([regression.coef_, regression.intercept_[:, None]], axis=1).T
        self._fit_effects(rows)

    def _choose_h(self, train: Examples, test: Examples) -> None:
        """Choose how features and targets become h, from the training features and all examples' classes."""
        features, targets = np.asarray(train.features, np.float64), np.asarray(train.targets)
        self.centre_ = features.mean(0)
        _, sizes, directions = np.linalg.svd(features - self.centre_, full_matrices=False)
        components = slice(0, min(self.components, int((sizes > 1e-9 * max(sizes[0], 1e-300)).sum())))
        length = np.sqrt((sizes[components] ** 2).sum() / len(features)) or 1.0
        self.directions_ = directions[components].T / length  # [features, components]
        are_classes = targets.ndim == 1 and targets.dtype.kind in "iub"
        all_targets = np.concatenate([targets, np.asarray(test.targets)])
        self.classes_ = np.unique(all_targets) if are_classes else np.empty(0)
        flat = targets.reshape(len(targets), -1)
        self.target_shape_ = list(targets.shape[1:])
        self.target_scale_ = np.ones(1) if are_classes else np.maximum(np.abs(flat).max(0), 1e-300)

    def _h_of(self, examples: Examples, role: str) -> np.ndarray:
        """Return h of the training or test examples, ``[examples, h]``."""
        if examples.features is None or examples.targets is None:
            raise InvalidInput(
                f"the {role} examples have no features or targets: give Examples(ids, features=…, targets=…)"
            )
        if examples.features.shape[1] != len(self.centre_):
            raise InvalidInput(
                f"{role} features have {examples.features.shape[1]} columns, not {len(self.centre_)} as in the runs"
            )
        if list(examples.targets.shape[1:]) != self.target_shape_:
            raise InvalidInput(
                f"{role} targets have shape {list(examples.targets.shape)}, not [n, *{self.target_shape_}] as in the "
                "runs"
            )
        components = (examples.features - self.centre_) @ self.directions_
        targets = examples.targets.reshape(len(examples), -1)
        if len(self.classes_):
            unknown = np.setdiff1d(targets, self.classes_)
            if len(unknown):
                raise InvalidInput(
                    f"{role} target {unknown[0]} is none of the classes that the simulator was fitted on"
                )
            targets = (targets == self.classes_).astype(np.float64)
        else:
            targets = targets / self.target_scale_
        one = np.ones((len(examples), 1))
        products = np.hstack([one, targets])[:, :, None] * np.hstack([one, components])[:, None]
        h: np.ndarray = products.reshape(len(examples), -1)
        return h

    def _fit_effects(self, rows: Transitions) -> None:
        """Fit W and a by conjugate gradients: each test example's row of the regression is (batch's h) ⊗ h_z."""
        tests, share = slice(0, self.n_test_), torch.as_tensor(rows.times / self.horizon_)[:, None]
        before, after = (torch.as_tensor(losses) for losses in (rows.before(1, tests), rows.after(tests)))
        deviation = before - torch.as_tensor(self.mean_[rows.times])
        targets = after - torch.as_tensor(self.mean_[rows.times + 1]) - deviation
        batch_h = torch.as_tensor(rows.weights @ (self.train_h_ - self.usual_h_))  # [rows, h]
        multipliers = [before, torch.ones_like(before), before * share, share.expand_as(before)]
        columns = torch.stack([deviation.ravel(), (deviation * share).ravel()], 1)
        problem = _Bilinear(batch_h, torch.as_tensor(self.test_h_), multipliers, torch.linalg.qr(columns).Q)
        W = problem.solved(targets, float(self.l2))
        residual = targets - problem.predicted(W)
        self.W_ = W.numpy()
        self.lasting_ = torch.linalg.lstsq(columns, residual.ravel()[:, None]).solution[:, 0].numpy()

    def _check_learned(self) -> None:
        super()._check_learned()
        check_counts(self, "batch_size_", "horizon_")
        sizes = check_arrays(
            self,
            {
                "W_": "float64 4 h h", "lasting_": "float64 2", "usual_h_": "float64 h", "train_h_": "float64 train h",
                "test_h_": "float64 test h", "mean_": "float64 times test",
                "mean_weights_": "float64 coefficients times",
                "centre_": "float64 features", "directions_": "float64 features components",
                "classes_": "number classes",
                "target_scale_": "float64 targets",
            },
            empty=("classes", "components"),
        )  # fmt: skip
        targets = sizes["classes"] or sizes["targets"]
        if sizes["h"] != (1 + targets) * (1 + sizes["components"]) or sizes["coefficients"] != sizes["h"] + 1:
            raise InvalidInput("the numbers of features, components and targets do not fit together")
        shape = getattr(self, "target_shape_", None)
        if not isinstance(shape, list) or not all(isinstance(size, int) and 0 < size <= MOST for size in shape):
            raise InvalidInput("target_shape_ is no shape")

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        effects = (self.train_h_ - self.usual_h_) @ self.W_ @ self.test_h_.T
        slopes = np.repeat(self.lasting_[:, None], self.n_test_, axis=1)
        dynamics = Dynamics(
            terms=self._terms,
            effects=torch.as_tensor(effects),
            batch_size=self.batch_size_,
            horizon=self.horizon_,
            order=1,
            fixed_slope=1.0,
            mean=torch.as_tensor(self.mean_.copy()),
            deviation_slopes=torch.as_tensor(slopes),
        )
        return dynamics.simulate(curricula, initial)


class _Bilinear:
    """Least squares of ``Σ_k v_k ∘ (G W_k Hᵀ)`` with G ``[rows, h]``, H ``[test, h]``, multipliers v ``[rows, test]``.

    The orthonormal columns ``free`` ``[rows · test, free]`` are projected out.
    """

    def __init__(self, G: Tensor, H: Tensor, multipliers: Sequence[Tensor], free: Tensor) -> None:
        self.G, self.H, self.multipliers, self.free = G, H, multipliers, free

    def predicted(self, W: Tensor) -> Tensor:
        products = (v * (self.G @ (weights @ self.H.T)) for v, weights in zip(self.multipliers, W, strict=True))
        return torch.stack(list(products)).sum(0)

    def transposed(self, values: Tensor) -> Tensor:
        return torch.stack([self.G.T @ ((v * values) @ self.H) for v in self.multipliers])

    def projected(self, values: Tensor) -> Tensor:
        flat = values.ravel()
        return (flat - self.free @ (self.free.T @ flat)).reshape(values.shape)

    def solved(self, targets: Tensor, l2: float) -> Tensor:
        """Solve for W ``[multipliers, h, h]`` by conjugate gradients with a Jacobi preconditioner."""
        squares = [(self.G**2).T @ ((v**2) @ self.H**2) for v in self.multipliers]
        scale = 1 / (torch.stack(squares) + l2)
        residual = self.transposed(self.projected(targets))
        W, direction = torch.zeros_like(residual), scale * residual
        slope = (residual * direction).sum()
        goal = _TOLERANCE**2 * slope
        for _ in range(_ITERATIONS):
            if slope <= goal:
                break
            image = self.transposed(self.projected(self.predicted(direction))) + l2 * direction
            length = slope / (direction * image).sum()
            W += length * direction
            residual -= length * image
            scaled = scale * residual
            last_slope, slope = slope, (residual * scaled).sum()
            direction = scaled + slope / last_slope * direction
        return W


def _with_one(h: np.ndarray) -> np.ndarray:
    return np.hstack([h, np.ones((len(h), 1))])
