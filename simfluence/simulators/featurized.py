"""Effects as functions of what examples are, so that examples never seen can be simulated (after Chai et al. 2024)."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

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
from simfluence.simulators.markov.dynamics import Dynamics, Term
from simfluence.simulators.markov.transitions import Transitions, check_every_step
from simfluence.simulators.mean import mean_trajectory
from simfluence.simulators.surrogates import Sides

_ITERATIONS = 600
_TOLERANCE = 1e-7
_MEAN_PENALTIES = np.logspace(-3, 4, 22)


class FeaturizedSimulator(Simulator):
    """A linear simulator around the mean trajectory whose effects are bilinear in the examples' features:

        L_{t+1} − m_{t+1} = (1 + a + τ a')(L_t − m_t) + Σ_i (w_i − c̄_i)(A_i L_t + B_i + τ A'_i L_t + τ B'_i)
        A_i(z) = h_iᵀ W h_z, and so for B, A', B'

    with τ the share of training gone by, and h the products of (1, target) and (1, principal components of the
    features); targets are one column per class. W and a are shared by all test examples, so they are learned from all
    of them, and hold for others: ``for_examples`` gives the simulator of training or test examples that no run has.
    The mean trajectory of a test example that no run has is a ridge regression on h, over the recorded test examples.

    Args:
        l2: penalty on the squared entries of every W.
        components: how many principal components of the features.

    Attributes:
        W_: ``[4, h, h]`` for A, B, A', B'.
        lasting_: a and a', ``[2]``.
        mean_: m of the test examples at hand, ``[steps + 1, test]``.
        mean_weights_: of the regression of m on h, with the constant last, ``[h + 1, steps + 1]``.
        train_h_, test_h_: of the examples at hand, ``[examples, h]``; ``usual_h_``: h of a usual batch per example.

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
        """The simulator of other examples: of curricula of the given training side, and losses of the given test side.

        Raises:
            NotFittedError: before ``fit``.
            InvalidInput: the examples have no features or targets, or those of another width or other classes.
        """
        self._check_fitted()
        other = copy.copy(self)
        other.fingerprint_ = None  # it is of another task than the fitting runs
        if train is not None:
            other.train_h_, other.n_train_ = self._described(train, "training"), len(train)
        if test is not None:
            other.test_h_, other.n_test_ = self._described(test, "test"), len(test)
            other.mean_ = (_with_one(other.test_h_) @ self.mean_weights_).T
        return other

    def _check_parameters(self) -> None:
        number("l2", self.l2, above=0)
        whole("components", self.components, 0)

    def _fit(self, runs: Runs) -> None:
        Sides.of(runs.train, runs.test, "the featurized simulator")  # says what is missing
        check_every_step(runs, str(self))
        assert runs.train is not None and runs.test is not None  # noqa: S101, PT018 (for the type checker)
        self._choose_h(runs.train, runs.test)
        self.train_h_ = self._described(runs.train, "training")
        self.test_h_ = self._described(runs.test, "test")
        self.batch_size_ = usual_batch_size(runs.curricula)
        self.horizon_ = max(run.steps for run in runs)
        rows = Transitions.of(runs, self.batch_size_)
        # Every batch has weights that sum to B, so a usual batch can be taken off example by example.
        self.usual_h_ = rows.weights.mean(axis=0) @ self.train_h_ / self.batch_size_
        self.mean_ = mean_trajectory(runs)
        regression = RidgeCV(_MEAN_PENALTIES).fit(self.test_h_, self.mean_.T)
        self.mean_weights_ = np.concatenate([regression.coef_, regression.intercept_[:, None]], axis=1).T
        self._fit_effects(rows)

    def _choose_h(self, train: Examples, test: Examples) -> None:
        """How features and targets become h: from the training side's features, and both sides' classes."""
        features, targets = np.asarray(train.features, np.float64), np.asarray(train.targets)
        self.centre_ = features.mean(0)
        _, sizes, directions = np.linalg.svd(features - self.centre_, full_matrices=False)
        kept = slice(0, min(self.components, int((sizes > 1e-9 * max(sizes[0], 1e-300)).sum())))
        length = np.sqrt((sizes[kept] ** 2).sum() / len(features)) or 1.0
        self.directions_ = directions[kept].T / length  # [features, components]
        whole = targets.ndim == 1 and targets.dtype.kind in "iub"
        both = np.concatenate([targets, np.asarray(test.targets)])
        self.classes_ = np.unique(both) if whole else np.empty(0)
        flat = targets.reshape(len(targets), -1)
        self.target_shape_ = list(targets.shape[1:])
        self.target_scale_ = np.ones(1) if whole else np.maximum(np.abs(flat).max(0), 1e-300)

    def _described(self, examples: Examples, side: str) -> np.ndarray:
        """h, ``[examples, h]``."""
        if examples.features is None or examples.targets is None:
            raise InvalidInput(f"the {side} examples have no features or targets: Examples(ids, features=…, targets=…)")
        if examples.features.shape[1] != len(self.centre_):
            raise InvalidInput(f"{side} features have {examples.features.shape[1]} columns, not {len(self.centre_)}")
        if list(examples.targets.shape[1:]) != self.target_shape_:
            raise InvalidInput(f"{side} targets have shape {examples.targets.shape}, not [n, *{self.target_shape_}]")
        components = (examples.features - self.centre_) @ self.directions_
        targets = examples.targets.reshape(len(examples), -1)
        if len(self.classes_):
            unknown = np.setdiff1d(targets, self.classes_)
            if len(unknown):
                raise InvalidInput(
                    f"{side} target {unknown[0]} is none of the classes that the simulator was fitted on"
                )
            targets = (targets == self.classes_).astype(np.float64)
        else:
            targets = targets / self.target_scale_
        one = np.ones((len(examples), 1))
        products = np.hstack([one, targets])[:, :, None] * np.hstack([one, components])[:, None]
        return products.reshape(len(examples), -1)

    def _fit_effects(self, rows: Transitions) -> None:
        """W and a by conjugate gradients: each test example's row of the regression is (batch's h) ⊗ h_z."""
        every, share = slice(0, self.n_test_), torch.as_tensor(rows.times / self.horizon_)[:, None]
        before, after = (torch.as_tensor(losses) for losses in (rows.before(1, every), rows.after(every)))
        deviation = before - torch.as_tensor(self.mean_[rows.times])
        wanted = after - torch.as_tensor(self.mean_[rows.times + 1]) - deviation
        batch_h = torch.as_tensor(rows.weights @ (self.train_h_ - self.usual_h_))  # [rows, h]
        multipliers = [before, torch.ones_like(before), before * share, share.expand_as(before)]
        columns = torch.stack([deviation.ravel(), (deviation * share).ravel()], 1)
        problem = _Bilinear(batch_h, torch.as_tensor(self.test_h_), multipliers, torch.linalg.qr(columns).Q)
        W = problem.solved(wanted, float(self.l2))
        left = wanted - problem.predicted(W)
        self.W_ = W.numpy()
        self.lasting_ = torch.linalg.lstsq(columns, left.ravel()[:, None]).solution[:, 0].numpy()

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        effects = (self.train_h_ - self.usual_h_) @ self.W_ @ self.test_h_.T
        lasting = np.repeat(self.lasting_[:, None], self.n_test_, axis=1)
        dynamics = Dynamics(
            terms=self._terms,
            effects=torch.as_tensor(effects),
            batch_size=self.batch_size_,
            horizon=self.horizon_,
            order=1,
            fixed_slope=1.0,
            mean=torch.as_tensor(self.mean_.copy()),
            lasting=torch.as_tensor(lasting),
        )
        return dynamics.simulate(curricula, initial)


class _Bilinear:
    """Least squares of ``Σ_k v_k ∘ (G W_k Hᵀ)`` with G ``[rows, h]``, H ``[test, h]``, multipliers v ``[rows, test]``.

    What the orthonormal columns ``free`` ``[rows · test, free]`` explain is set aside.
    """

    def __init__(self, G: Tensor, H: Tensor, multipliers: Sequence[Tensor], free: Tensor) -> None:
        self.G, self.H, self.multipliers, self.free = G, H, multipliers, free

    def predicted(self, W: Tensor) -> Tensor:
        products = (v * (self.G @ (each @ self.H.T)) for v, each in zip(self.multipliers, W, strict=True))
        return torch.stack(list(products)).sum(0)

    def transposed(self, values: Tensor) -> Tensor:
        return torch.stack([self.G.T @ ((v * values) @ self.H) for v in self.multipliers])

    def projected(self, values: Tensor) -> Tensor:
        flat = values.ravel()
        return (flat - self.free @ (self.free.T @ flat)).reshape(values.shape)

    def solved(self, wanted: Tensor, l2: float) -> Tensor:
        """W ``[multipliers, h, h]`` by conjugate gradients with a Jacobi preconditioner."""
        squares = [(self.G**2).T @ ((v**2) @ self.H**2) for v in self.multipliers]
        scale = 1 / (torch.stack(squares) + l2)
        residual = self.transposed(self.projected(wanted))
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
            before, slope = slope, (residual * scaled).sum()
            direction = scaled + slope / before * direction
        return W


def _with_one(h: np.ndarray) -> np.ndarray:
    return np.hstack([h, np.ones((len(h), 1))])
