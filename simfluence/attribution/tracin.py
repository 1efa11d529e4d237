"""Inner products of gradients: at the end of training, or summed over checkpoints (TracIn: Pruthi et al. 2020); and
TracIn-ideal, computed from recorded losses."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import sklearn.base
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from simfluence._internal.checked import checked
from simfluence._internal.types import Count
from simfluence._internal.validation import number
from simfluence.attribution.base import Attributor, AttributorT, LayerFactors, Queries, Solve
from simfluence.attribution.curvature.kronecker import FORMED
from simfluence.attribution.gradients.hooks import Gradients, Loss, Mask, attention_mask
from simfluence.attribution.gradients.inner_products import matrices, self_products
from simfluence.attribution.gradients.layers import Factors
from simfluence.attribution.scores import Scores
from simfluence.errors import InvalidInput, NotFittedError
from simfluence.recording.checkpoints import Checkpoint
from simfluence.runs import Run, Runs
from simfluence.task import Data, Task

__all__ = ["Adam", "GradientCosine", "GradientDot", "State", "TracInCP", "TracInIdeal"]

#: A model's state: a mapping of parameters by name, a recording's checkpoint, or the path of a checkpoint file.
State = Mapping[str, Tensor] | Checkpoint | str | Path


class GradientDot(Attributor):
    """``⟨∇ℓ_z, ∇ℓ_i⟩``: how much a small step on i lowers the loss of z, per learning rate. Influence with G = I.

    Args:
        layers: names or patterns of the layers to attribute to; by default all.
        batch_size: examples per forward and backward pass: affects memory, not results.

    >>> X, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> GradientDot().fit(model, (X, y), loss=lambda f, y: ((f - y) ** 2)[:, 0]).scores((X, y)).values.tolist()
    [[4.0, 0.0], [0.0, 64.0]]
    """

    units: ClassVar[tuple[str, ...]] = ("raw",)

    def __init__(self, layers: Sequence[str] | None = None, batch_size: Count = 64) -> None:
        self.layers = layers
        self.batch_size = batch_size

    def _fit(self) -> None:
        pass

    def _solve(self, factors: LayerFactors) -> Queries:
        return factors


class GradientCosine(Attributor):
    """``⟨∇ℓ_z, ∇ℓ_i⟩ / (‖∇ℓ_z‖ ‖∇ℓ_i‖)``, over all layers together; 0 where a gradient is zero.

    Args:
        layers, batch_size: same as in ``GradientDot``.

    >>> X, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> model = nn.Linear(2, 1, bias=False)
    >>> _ = nn.init.ones_(model.weight)
    >>> GradientCosine().fit(model, (X, y), loss=lambda f, y: ((f - y) ** 2)[:, 0]).scores((X, y)).values.tolist()
    [[1.0, 0.0], [0.0, 1.0]]
    """

    units: ClassVar[tuple[str, ...]] = ("raw",)

    def __init__(self, layers: Sequence[str] | None = None, batch_size: Count = 64) -> None:
        self.layers = layers
        self.batch_size = batch_size

    def _fit(self) -> None:
        pass

    def _solve(self, factors: LayerFactors) -> Queries:
        return factors

    def _prepared(self, factors: LayerFactors) -> LayerFactors:
        like = self.gradients_.like
        squares = torch.stack([self_products(layer, layer).to(like) for layer in factors.values()]).sum(0)
        scales = torch.where(squares > 0, squares.clamp(min=torch.finfo(like.dtype).tiny).rsqrt(), 0.0)
        return {name: _scaled(factors[name], scales) for name in factors}


@dataclass(frozen=True)
class Adam:
    """Adam's settings, which turn the second moments in a checkpoint's optimizer state into a preconditioner.

    Args:
        beta2: decay rate of the second moments, for their bias correction.
        eps: number added to their square root.

    >>> Adam(beta2=0.98)
    Adam(beta2=0.98, eps=1e-08)
    """

    beta2: float = 0.999
    eps: float = 1e-8

    def __post_init__(self) -> None:
        number("Adam: eps", self.eps, least=0)
        if not 0 <= number("Adam: beta2", self.beta2) < 1:
            raise InvalidInput(f"Adam: beta2 must be at least 0 and below 1, got {self.beta2!r}")


class TracInCP(Attributor):
    """``Σ_k η_k ⟨∇ℓ_z(θ_k), ∇ℓ_i(θ_k)⟩`` over checkpoints θ_k with their learning rates η_k (Pruthi et al. 2020, 3.3).

    Args:
        checkpoints: pairs of a state and a learning rate. A state is a mapping of parameters such as
            ``state_dict()``, a recording's ``Checkpoint``, or the path of its file; files are read one at a time.
        adam: for training with Adam or AdamW: its settings. Gradients are multiplied by its preconditioner,
            ``⟨∇ℓ_z, ∇ℓ_i / (√v̂_k + ε)⟩``, with v̂_k from the checkpoint's optimizer state.
        layers, batch_size: same as in ``GradientDot``.

    Raises:
        InvalidInput: in ``fit``, there are no checkpoints, or one is of another architecture; in ``scores``, one lacks
            Adam's moments.

    >>> X, y = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.zeros(2, 1)
    >>> model = nn.Linear(2, 1, bias=False)
    >>> # two checkpoints; at the second the gradients are zero
    >>> states = [({"weight": torch.ones(1, 2)}, 0.1), ({"weight": torch.zeros(1, 2)}, 0.1)]
    >>> fitted = TracInCP(states).fit(model, (X, y), loss=lambda f, y: ((f - y) ** 2)[:, 0])
    >>> fitted.scores((X, y)).values.astype(float).round(3).tolist()  # 0.1 · 2² · 1² and 0.1 · 4² · 2²
    [[0.4, 0.0], [0.0, 6.4]]
    """

    units: ClassVar[tuple[str, ...]] = ("raw",)

    def __init__(
        self,
        checkpoints: Sequence[tuple[State, float]] = (),
        adam: Adam | None = None,
        layers: Sequence[str] | None = None,
        batch_size: Count = 64,
    ) -> None:
        self.checkpoints = checkpoints
        self.adam = adam
        self.layers = layers
        self.batch_size = batch_size

    @classmethod
    @checked
    def from_run(cls, run: Run, **parameters: Any) -> TracInCP:
        """Create an attributor over a run's recorded checkpoints, each with the learning rate of the next step.

        Raises:
            InvalidInput: the run has no checkpoints or no learning rates.
        """
        if not run.checkpoints or run.learning_rates is None:
            raise InvalidInput(
                f"run {run.id} has no checkpoints with learning rates: record it with observe=Observe(checkpoints=…)"
            )
        last = len(run.learning_rates) - 1
        pairs = [(path, float(run.learning_rates[min(step, last)])) for step, path in sorted(run.checkpoints.items())]
        return cls(pairs, **parameters)

    def fit(
        self: AttributorT,
        model: nn.Module,
        data: Data | Sequence[Any] | Task,
        loss: Loss | None = None,
        l2: float | None = None,
        mask: Mask = attention_mask,
    ) -> AttributorT:
        """Fit as in ``Attributor``. The model gives the architecture; the checkpoints' weights go into a copy of it."""
        return super().fit(copy.deepcopy(model), data, loss, l2, mask)

    @checked
    def by_checkpoint(
        self, test_data: Data | Sequence[Any] | None = None
    ) -> tuple[Int[np.ndarray, " checkpoints"], Float[np.ndarray, "checkpoints test train"]]:
        """Return the steps of the checkpoints, and the scores at each of them without its learning rate.

        Raises:
            NotFittedError, InvalidInput: same as in ``scores``; or a state does not contain its step.
        """
        steps, products = [], []
        for state, _ in self.checkpoints:
            checkpoint = Checkpoint.load(Path(state)) if isinstance(state, str | Path) else state
            if not isinstance(checkpoint, Checkpoint):
                raise InvalidInput("a state_dict does not contain its step: pass a Checkpoint or the path of its file")
            tracer = copy.copy(self)
            tracer.checkpoints = [(checkpoint, 1.0)]
            steps.append(checkpoint.step)
            products.append(tracer.scores(test_data).values)
        return np.array(steps), np.stack(products)

    def _fit(self) -> None:
        if not self.checkpoints:
            raise InvalidInput("there are no checkpoints to trace: pass pairs (state, learning rate)")
        for index, (state, rate) in enumerate(self.checkpoints):
            number(f"the learning rate of checkpoint {index}", rate)
            _check_fits(_parameters(state), self.gradients_.model, index)

    def _solve(self, factors: LayerFactors) -> Queries:
        return factors

    def _check_weights(self) -> None:
        """Accept any weights: those of the copy change with every checkpoint."""

    def _states(self) -> Iterator[tuple[Gradients, Solve]]:
        for state, rate in self.checkpoints:
            loaded = Checkpoint.load(Path(state)) if isinstance(state, str | Path) else state
            self.gradients_.model.load_state_dict(dict(_parameters(loaded)))
            yield self.gradients_, self._preconditioner(loaded, rate)

    def _sums(self, test: Data) -> Iterator[tuple[slice, slice, Tensor]]:
        """Process training examples in chunks, at all checkpoints; recompute test gradients per chunk."""
        n_test, n_train = len(test[1]), len(self.train_data_[1])
        step = max(self.batch_size, FORMED // n_test)
        for start in range(0, n_train, step):
            chosen = np.arange(start, min(start + step, n_train))
            totals = torch.zeros(n_test, len(chosen), dtype=self.gradients_.like.dtype)
            for rows, columns, block in self._blocks(test, chosen):
                totals[rows, columns] += block.sum(0)
            yield slice(0, n_test), slice(start, start + len(chosen)), totals

    def _preconditioner(self, state: State, rate: float) -> Solve:
        """Return the function that multiplies test gradients by the learning rate and Adam's preconditioner."""
        if self.adam is None:
            return lambda factors: {name: _scaled(factors[name], rate) for name in factors}
        steps = _adam_steps(state, self.gradients_, self.adam)
        return lambda factors: {name: rate * steps[name] * matrices(factors[name]) for name in factors}


def _scaled(factors: Factors, scales: float | Tensor) -> Factors:
    """Multiply gradients by a number, or by one number per example."""
    if isinstance(scales, Tensor):
        scales = scales.to(factors.gradients)[:, None, None]
    return replace(factors, gradients=factors.gradients * scales)


def _parameters(state: State) -> Mapping[str, Tensor]:
    if isinstance(state, str | Path):
        return Checkpoint.load(Path(state)).model
    return state.model if isinstance(state, Checkpoint) else state


def _check_fits(state: Mapping[str, Tensor], model: nn.Module, index: int) -> None:
    own = model.state_dict()
    problems = [f"{name!r} is missing" for name in own.keys() - state.keys()]
    problems += [f"{name!r} is not in the model" for name in state.keys() - own.keys()]
    problems += [
        f"{name!r} has shape {tuple(state[name].shape)}, not {tuple(own[name].shape)}"
        for name in own.keys() & state.keys()
        if state[name].shape != own[name].shape
    ]
    if problems:
        raise InvalidInput(f"checkpoint {index} is of another architecture: {'; '.join(sorted(problems)[:3])}")


def _adam_steps(state: State, gradients: Gradients, adam: Adam) -> dict[str, Tensor]:
    """Compute ``1 / (√v̂ + ε)`` for each layer, ``[rows, columns]``."""
    moments = state.optimizer if isinstance(state, Checkpoint) else {}
    steps: dict[str, Tensor] = {}
    trained = [(name, p) for name, p in gradients.model.named_parameters() if p.requires_grad]
    for index, (name, parameter) in enumerate(trained):
        if "exp_avg_sq" not in moments.get(index, {}):
            if name in gradients.parameters:
                raise InvalidInput(f"a checkpoint has no second moments of {name!r}: pass adam=None, or Adam's state")
            continue
        corrected = moments[index]["exp_avg_sq"] / (1 - adam.beta2 ** float(moments[index]["step"]))
        steps[name] = 1 / (corrected.sqrt() + adam.eps).to(parameter)
    return {name: layer.from_parameters(steps) for name, layer in gradients.layers.items()}


class TracInIdeal(sklearn.base.BaseEstimator):  # type: ignore[misc]  # scikit-learn is untyped
    """``Σ_t count_ti/|c_t| · (L_t(z) − L_{t+1}(z))`` over the steps t of recorded runs, from their losses.

    A batch's loss change is divided evenly among its examples. The unit is "loss": the predicted rise of z's loss if
    every occurrence of i were removed. Scores are averaged over the runs that show i; an example that no run shows has
    score 0.

    >>> runs = Runs.from_arrays([[[0], [1], [0]]], [[[3.0], [2.0], [2.5], [1.5]]])
    >>> TracInIdeal().fit(runs).scores().values
    array([[ 2. , -0.5]])
    """

    @checked
    def fit(self, runs: Run | Runs) -> TracInIdeal:
        """Compute the scores from the losses of the runs.

        Raises:
            InvalidInput: there is no run, or a loss is missing at some step or not finite.
        """
        several = [runs] if isinstance(runs, Run) else list(runs)
        if not several:
            raise InvalidInput("there is no run to trace: pass one run or more")
        sums = np.zeros((several[0].losses.shape[1], several[0].curriculum.n_train))
        shown = np.zeros(several[0].curriculum.n_train)
        for run in several:
            sums += _loss_shares(run)
            shown += run.curriculum.counts.sum(axis=0) > 0
        self.values_ = sums / np.maximum(shown, 1)
        self.ids_ = [part.ids if part is not None else None for part in (several[0].train, several[0].test)]
        return self

    @checked
    def scores(self, test_data: Any = None, unit: str | None = None) -> Scores:
        """Return the scores ``[test, train]`` of the runs' own test examples.

        Raises:
            NotFittedError: before ``fit``.
            InvalidInput: test data are given, for which the runs have no losses, or another unit than "loss".
        """
        if not hasattr(self, "values_"):
            raise NotFittedError("this TracInIdeal is not fitted yet: call fit(runs) first")
        if test_data is not None:
            raise InvalidInput("TracIn-ideal scores only the runs' own test examples: leave test_data out")
        if unit not in (None, "loss"):
            raise InvalidInput(f"TracIn-ideal has no unit {unit!r}, choose from: loss")
        return Scores(self.values_, "loss", "TracInIdeal", None, *self.ids_)


def _loss_shares(run: Run) -> Float[np.ndarray, "test train"]:
    falls = -np.diff(run.losses.astype(np.float64), axis=0)  # [steps, test]
    if not np.isfinite(falls).all():
        raise InvalidInput(
            f"run {run.id} lacks losses at some steps, or diverged: TracIn-ideal needs finite losses at every step"
        )
    shares = run.curriculum.counts.multiply(1 / np.maximum(run.curriculum.sizes, 1)[:, None])  # [steps, train]
    return np.asarray((shares.T @ falls).T)
