"""Training as a response: the deviation from the mean path of the fitting runs, linear in the weights.

With θ̄_t the mean weights of the fitting runs, f̄ their mean outputs, and J = ∂f/∂θ at θ̄,

    f_i(θ) = f̄_i + J_i d,      d = θ − θ̄
    θ_{t+1} = θ_t − η_t Opt[ P_t Σ_{i∈c_t} w_i J_iᵀ ∂ℓ_i/∂f(f̄_i + J_i d) ]

and θ̄ is the mean of the same recursion over the fitting curricula, which are simulated alongside, so that the error
that all curricula share cancels. The loss is applied to the outputs exactly, in the gradients and in the forecast: only
the outputs are linearised, and only over the distance to the mean, which is less than that to any one run.

θ has k coordinates: along the main directions of all J, at all checkpoints and of all examples. J is taken at a few
checkpoints, with a straight line in between. P is the identity for SGD; for Adam and its like it is ``1 / (√v + ε)``
with v *expected of random batches* on the mean path, and the coordinates are those of ``P^−½ θ``. A forecast is the
mean recorded loss plus the simulated deviation of the loss, scaled at each step as fits the fitting runs best. A model
that is linear in its parameters is simulated exactly under SGD.

Averaging J over the fitting runs' own weights (``n_samples``) gives the best linear fit of the outputs where deviations
are normal (Stein's lemma); J at the mean weights is the slope at one point.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import optuna
import torch

from simfluence._internal.progress import bar
from simfluence._internal.validation import number, whole
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.recipe import Recipe
from simfluence.recording.engines.base import TrainingSetup
from simfluence.runs import Runs
from simfluence.simulators.batches import usual_batch_size
from simfluence.simulators.learned import check_arrays, check_indices
from simfluence.simulators.response.dynamics import Response
from simfluence.simulators.response.mean_path import MOST_OUTPUTS, mean_path
from simfluence.simulators.response.optimizers import Optimizer
from simfluence.simulators.response.projections import project
from simfluence.simulators.with_task import TaskSimulator
from simfluence.task import Task

__all__ = ["ResponseSimulator"]

_GIB = 2**30
_AT_ONCE = 100  # curricula simulated together


class ResponseSimulator(TaskSimulator):
    """Simulate any curriculum as a deviation from the mean path of the fitting runs; the module has the equations.

    Args:
        task: the task that the runs trained.
        recipe: the runs' recipe; by default the one recorded with them.
        n_checkpoints: number of steps at which derivatives are taken, evenly spread over the longest run.
        n_directions: most coordinates of the state.
        n_samples: number of fitting runs at whose own weights derivatives are taken and averaged, instead of at the
            mean weights: a slower fit, and better forecasts where outputs bend much between runs; 0 for the mean.
        memory: GiB that the projected derivatives may take.

    Attributes:
        times_: steps of the checkpoints.
        outputs_: mean outputs of all examples, ``[steps + 1, train + test, outputs]``.
        reads_: change of the outputs with the state, ``[checkpoints, train + test, outputs, directions]``.
        writes_: change of the state by a training example, ``[checkpoints, train, outputs, directions]``.
        kept_: share of the squares of the derivatives along the directions, ``[checkpoints]``.
        path_: mean state of the fitting curricula, ``[steps + 1, directions]``.
        expected_: mean simulated losses of the fitting curricula, ``[steps + 1, test]``.
        scale_: factor of deviations from it at each step, ``[steps + 1]``.

    Raises:
        InvalidInput: from ``fit``, if the optimizer is not covered, an example has too many outputs, the runs start
            from different weights, or the derivatives take more than ``memory``.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=30, n_test=10)
    >>> curricula = sf.random_curricula(n_train=30, runs=6, steps=20, batch_size=4, subset=0.5)
    >>> runs = sf.record(task, sf.Recipe(lr=0.1), curricula)
    >>> fitted = ResponseSimulator(task, n_directions=100).fit(runs[:5])
    >>> fitted.score(runs[5:]) > 0.9
    True
    """

    name = "response"

    def __init__(
        self,
        task: Task | None = None,
        recipe: Recipe | None = None,
        n_checkpoints: int = 6,
        n_directions: int = 300,
        n_samples: int = 0,
        memory: float = 4.0,
    ) -> None:
        self.task = task
        self.recipe = recipe
        self.n_checkpoints = n_checkpoints
        self.n_directions = n_directions
        self.n_samples = n_samples
        self.memory = memory

    @classmethod
    def suggest(cls, trial: optuna.Trial) -> dict[str, Any]:
        return {
            "n_checkpoints": trial.suggest_int("n_checkpoints", 3, 12, log=True),
            "n_directions": trial.suggest_int("n_directions", 100, 800, log=True),
        }

    def _check_parameters(self) -> None:
        super()._check_parameters()
        whole("n_checkpoints", self.n_checkpoints, 1)
        whole("n_directions", self.n_directions, 1)
        whole("n_samples", self.n_samples, 0)
        number("memory", self.memory, above=0)

    def _fit(self, runs: Runs) -> None:
        task, recipe = self._task_and_recipe(runs)
        optimizer = Optimizer.of(recipe)
        if optimizer.scales and recipe.clip_norm is not None:
            recipe = recipe.model_copy(update={"clip_norm": None})  # a step does not depend on a gradient's size
        for run in runs:
            run.check_task(task)
        setup = TrainingSetup.of(task, recipe)
        data, steps = setup.all_data, max(run.steps for run in runs)
        self.times_ = np.unique(np.linspace(0, max(steps - 1, 0), self.n_checkpoints).round().astype(np.int64))
        with bar("Response", len(runs) + 2 * len(self.times_), shown=True) as advance:
            path = mean_path(task, runs, data, self.times_, self.n_samples, lambda: advance(1))
            self._check_memory(path.outputs.shape[1], path.outputs.shape[2], optimizer.scales)
            model = task.build_model(recipe.seed).to(recipe.torch_dtype)
            found = project(
                task, model, path, data, self.times_, optimizer, self.n_directions,
                usual_batch_size(runs.curricula), _coupled(task.l2, recipe) > 0, lambda: advance(1),
            )  # fmt: skip
        self._keep(setup, list(path.shape))
        self.outputs_, self.reads_, self.kept_ = path.outputs.numpy(), found.reads.numpy(), found.kept.numpy()
        self.writes_ = found.reads[:, : self.n_train_].numpy() if found.writes is None else found.writes.numpy()
        size = self.reads_.shape[-1]
        self.decays_ = np.zeros((0, size, size), self.reads_.dtype) if found.decays is None else found.decays.numpy()
        centre, losses = self._response().centre(runs.curricula)
        self.path_ = centre.numpy()
        self._fit_scale(runs, losses.double().numpy())

    def _fit_scale(self, runs: Runs, simulated: np.ndarray) -> None:
        """Fit the mean simulated losses, and the factor of deviations: the slope of least squares at each step."""
        true = runs.losses.astype(np.float64)
        observed = np.isfinite(true)
        count = np.maximum(observed.sum(0), 1)
        self.expected_ = np.where(observed, simulated, 0.0).sum(0) / count
        unread = ~observed.any((0, 2))
        lengths = np.array([run.steps for run in runs])
        for time in np.flatnonzero(unread):
            self.expected_[time] = simulated[lengths >= time, time].mean(0)
        predictor = np.where(observed, simulated - self.expected_, 0.0)
        response = np.where(observed, true - self.baseline_, 0.0)
        products, squares = (predictor * response).sum((0, 2)), (predictor**2).sum((0, 2))
        known = np.flatnonzero(squares > 0)
        self.scale_ = np.ones(len(squares))
        if len(runs) > 1 and len(known):
            self.scale_ = np.interp(np.arange(len(squares)), known, products[known] / squares[known])

    def _check_memory(self, examples: int, outputs: int, scaled: bool) -> None:
        numbers = len(self.times_) * (examples + self.n_train_ * scaled) * outputs * self.n_directions
        if numbers * 4 > self.memory * _GIB:
            raise InvalidInput(
                f"derivatives of {examples} examples with {outputs} outputs at {len(self.times_)} checkpoints along "
                f"{self.n_directions} directions take {numbers * 4 / _GIB:.2g} GiB, more than memory={self.memory:g}: "
                "lower n_directions= or n_checkpoints=, or raise memory="
            )

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        longest = max(len(curriculum) for curriculum in curricula)
        times = np.minimum(np.arange(longest + 1), len(self.expected_) - 1)
        response, centre = self._response(), torch.from_numpy(self.path_)
        losses = np.empty((len(curricula), longest + 1, self.n_test_))
        for start in range(0, len(curricula), _AT_ONCE):
            chunk = slice(start, start + _AT_ONCE)
            losses[chunk] = response.roll(curricula[chunk], longest, centre).double().numpy()
        scaled: np.ndarray = self.baseline_[times] + self.scale_[times, None] * (losses - self.expected_[times])
        return scaled

    def _response(self) -> Response:
        recipe = Recipe(**self.recipe_)
        return Response(
            loss=self._loss(),
            targets=torch.from_numpy(self.targets_),
            recipe=recipe,
            outputs=torch.from_numpy(self.outputs_),
            shape=tuple(self.shape_),
            times=self.times_,
            reads=torch.from_numpy(self.reads_),
            writes=torch.from_numpy(self.writes_),
            decays=torch.from_numpy(self.decays_) if len(self.decays_) else None,
            n_train=self.n_train_,
            coupled=_coupled(self.l2_, recipe),
        )

    def _check_learned(self) -> None:
        super()._check_learned()
        sizes = check_arrays(
            self,
            {
                "times_": "int checkpoints", "outputs_": "float times examples outputs",
                "reads_": "float checkpoints examples outputs directions",
                "writes_": "float checkpoints train outputs directions", "kept_": "float checkpoints",
                "path_": "float times directions", "expected_": "float times test", "scale_": "float times",
                "decays_": "float decayed directions directions",
            },
            empty=("decayed",),
        )  # fmt: skip
        check_indices("times_", self.times_, sizes["times"])
        if self.times_[0] != 0 or (np.diff(self.times_) <= 0).any():
            raise InvalidInput("times_ does not rise from 0")
        if sizes["examples"] != self.n_train_ + self.n_test_ or sizes["decayed"] not in (0, sizes["checkpoints"]):
            raise InvalidInput("the numbers of examples and checkpoints do not fit together")
        if len({array.dtype for array in (self.outputs_, self.reads_, self.writes_, self.path_, self.decays_)}) > 1:
            raise InvalidInput("the arrays of the response are of several types")
        if sizes["outputs"] > MOST_OUTPUTS:
            raise InvalidInput("an example has too many outputs")
        Optimizer.of(self._check_kept(sizes["outputs"]))


def _coupled(l2: float, recipe: Recipe) -> float:
    """Return the weight decay in the gradient: the task's L2, and the optimizer's own where it is there."""
    return l2 + (0.0 if recipe.optimizer == "adamw" else recipe.weight_decay)
