"""Training in function space: the inputs of a model's head move under the tangent kernels of a few recorded runs.

The outputs are ``f(x) = W h(x)``, with W the head's weight and h the features that it reads. With ``r_i = ∂ℓ/∂f`` at
``f(i)``, K the tangent kernel of the *features* at a reference run's parameters, and SGD,

    W_{t+1} = W_t − η_t / |c| Σ_{i∈c_t} r_i h_t(i)ᵀ,      h_{t+1} = h_t − η_t / |c| Σ_{i∈c_t} K_t(·, i) W_tᵀ r_i

so the head learns as it does in training, and only the layers below it are linearised around the reference. A larger
W makes the features move faster, and larger features W; a kernel of the outputs would miss both. If no trained linear
layer gives the outputs, they are the features, and W is the identity.

K is computed at a few checkpoints of the reference and interpolated in between. It covers a few directions of the
features: those that the outputs first depend on, and the largest of the others. W and h are *anchored*: they follow the
reference's true path, and the equations add only the difference between the curricula. So the reference's own
curriculum gives the reference's own losses. Momentum, weight decay and clipping have their counterparts, and a model
that is linear in its parameters is simulated exactly. Under Adam, W takes Adam's own steps, and the kernel is
``J P Jᵀ``, with P from the second moments in expectation over random batches along the reference.

Kernels know no bound. So features, and the head with them, stay within *reach* of the reference: deviations that grow
beyond a share of the reference's own size are shrunk to it, and their momentum with them.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
import torch
from torch import nn

from simfluence._internal.deprecation import renamed_arguments
from simfluence._internal.progress import bar
from simfluence._internal.types import Losses
from simfluence._internal.validation import number, whole
from simfluence.attribution.gradients.hooks import evaluating
from simfluence.attribution.gradients.tangent_kernel import one_tensor
from simfluence.curriculum import Curriculum
from simfluence.errors import BeyondReferenceWarning, InvalidInput
from simfluence.recipe import Recipe
from simfluence.recording.engines.base import TrainingSetup
from simfluence.runs import Run, Runs
from simfluence.simulators.folds import forecasts_by_others, quiet
from simfluence.simulators.learned import check_arrays, check_indices
from simfluence.simulators.tangent.adjoint import final_derivatives
from simfluence.simulators.tangent.function_space import FunctionSpace
from simfluence.simulators.tangent.reference_run import GIB, collect_reference
from simfluence.simulators.tangent.reference_weights import reference_weights, reference_weights_without
from simfluence.simulators.with_task import TaskSimulator
from simfluence.task import Task, forward, take
from simfluence.tasks.losses import token_cross_entropy

__all__ = ["COVERED", "STRENGTHS", "TangentKernelSimulator", "check_covered"]

#: Optimizers whose update has a counterpart in function space.
COVERED = ("sgd", "adam", "adamw", "rmsprop")
#: Fractions of the mean error that the correction may add back; the best in leave-one-out is chosen.
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

_AT_ONCE = 100  # curricula simulated together


class TangentKernelSimulator(TaskSimulator):
    """Simulate any curriculum from one recorded run or a few; the module has the equations.

    Args:
        task: the task that the runs trained.
        recipe: the runs' recipe; by default the one recorded with them.
        n_checkpoints: number of kernels per reference, evenly spread over its steps.
        n_references: number of fitting runs that get kernels; the other runs correct the kernels' errors.
        n_features: number of tracked feature directions besides those that the outputs first depend on.
        landmarks: number of random training examples that a Nyström approximation of each kernel uses, so that memory
            and time are linear in the number of examples, not quadratic; None for whole kernels.
        memory: GiB that the kernels may take.

    Attributes:
        kernels_: ``[references, checkpoints, train, n_tracked, train + test, n_tracked]``, or, with landmarks, factors
            ``[references, checkpoints, train + test, n_tracked, landmarks · n_tracked]``.
        times_: steps of the checkpoints.
        features_: input features of the head for all examples along the references, each in its own basis,
            ``[references, steps + 1, train + test, width]``.
        heads_: the head's weight along the references, ``[references, steps + 1, outputs, width]``.
        bases_: the references' bases of the features, ``[references, width, width]``.
        correction_, scale_, centre_: learned from the runs that are not references: a forecast L becomes
            ``L + correction + (scale − 1)(L − centre)``; ``[steps + 1, test]``, the scale ``[steps + 1]``.

    Raises:
        InvalidInput: from ``fit``, if the simulator does not cover the recipe, the model's outputs depend on the batch
            or are random in training, or the kernels take more than ``memory``.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=30, n_test=10)
    >>> curricula = sf.random_curricula(n_train=30, runs=3, steps=20, batch_size=4, subset=0.5)
    >>> runs = sf.record(task, sf.Recipe(lr=0.1), curricula)
    >>> fitted = sf.TangentKernelSimulator(task).fit(runs[:1])
    >>> simulated = fitted.simulate(runs.curricula, runs.initial_losses)
    >>> errors = [((forecast - runs.losses) ** 2).mean() for forecast in (simulated, runs[0].losses)]
    >>> bool(errors[0] < 0.05 * errors[1])  # the error of taking the first run's losses for all
    True
    """

    name = "tangent"

    @renamed_arguments(checkpoints="n_checkpoints", references="n_references", features="n_features")
    def __init__(
        self,
        task: Task | None = None,
        recipe: Recipe | None = None,
        n_checkpoints: int = 6,
        n_references: int = 4,
        n_features: int = 10,
        landmarks: int | None = None,
        memory: float = 8.0,
    ) -> None:
        self.task = task
        self.recipe = recipe
        self.n_checkpoints = n_checkpoints
        self.n_references = n_references
        self.n_features = n_features
        self.landmarks = landmarks
        self.memory = memory

    @classmethod
    def suggest(cls, trial: optuna.Trial) -> dict[str, Any]:
        return {
            "n_checkpoints": trial.suggest_int("n_checkpoints", 3, 12, log=True),
            "n_references": trial.suggest_int("n_references", 1, 6),
            "n_features": trial.suggest_int("n_features", 0, 20),
        }

    def _check_parameters(self) -> None:
        super()._check_parameters()
        for name, least in (("n_checkpoints", 1), ("n_references", 1), ("n_features", 0)):
            whole(name, getattr(self, name), least)
        if self.landmarks is not None:
            whole("landmarks", self.landmarks, 1)
        number("memory", self.memory, above=0)

    def disagreement(self, curricula: Sequence[Curriculum]) -> Losses:
        """Return the standard deviation of the references' forecasts around their mean, ``[runs, steps + 1, test]``.

        It tells which curricula to doubt: over 18 curricula of digits, its root mean square and that of the error had
        a rank correlation of 0.89 with four references, and 0.66 with two. Between test examples it tells little more
        than the height of the loss does. It is not a bound: it was 1.7 times too small with four references, and 2.7
        times with two. Rows after a curriculum's end are NaN.

        Args:
            curricula: curricula of the training examples that the simulator was fitted on.

        Raises:
            NotFittedError: before ``fit``.
            InvalidInput: the simulator has one reference, or the curricula are of other examples.
        """
        self._check_fitted()
        curricula = list(curricula)
        self._check_initial(curricula, np.zeros(self.n_test_))
        if len(self.reference_steps_) == 1:
            raise InvalidInput(
                "one reference cannot disagree with others: fit with n_references=4 on at least four runs"
            )
        deviations = []
        longest = max(len(curriculum) for curriculum in curricula)
        for start in range(0, len(curricula), _AT_ONCE):
            parts = list(self._by_reference(curricula[start : start + _AT_ONCE], longest))
            mean = sum(weight * losses for weight, losses in parts)
            deviations.append(np.sqrt(sum(weight * (losses - mean) ** 2 for weight, losses in parts)))
        times = np.minimum(np.arange(longest + 1), len(self.scale_) - 1)
        spread: np.ndarray = np.concatenate(deviations) * np.abs(self.scale_[times, None])
        for row, curriculum in enumerate(curricula):
            spread[row, len(curriculum) + 1 :] = np.nan
        return spread

    def _fit(self, runs: Runs) -> None:
        task, recipe = self._task_and_recipe(runs)
        check_covered(task, recipe)
        setup = TrainingSetup.of(task, recipe)
        self._keep(setup, _output_shape(task, recipe, setup))
        self.bounded_ = True
        references = list(runs[: self.n_references])
        self._collect_references(references, setup)
        reference_ids = {reference.id for reference in references}
        others = Runs(run for run in runs if run.id not in reference_ids)
        self.correction_, self.centre_ = np.zeros((1, runs.n_test)), np.zeros((1, runs.n_test))
        self.scale_ = np.ones(1)
        if len(others) > 2:
            self._fit_correction(others)

    def _collect_references(self, runs: list[Run], setup: TrainingSetup) -> None:
        """Retrain each reference and store its features, heads and kernels."""
        steps = max(run.steps for run in runs)
        self.times_ = np.unique(np.linspace(0, steps, self.n_checkpoints, endpoint=False).astype(int))
        data = setup.all_data
        memory = self.memory * GIB / len(runs)
        landmarks = None if self.landmarks is None else min(self.landmarks, len(setup.task.train))
        with bar("Kernels", len(runs) * len(self.times_), shown=True) as advance:
            references = [
                collect_reference(setup.task, run, data, self.times_, self.n_features, landmarks, memory, advance)
                for run in runs
            ]
        self.learned_ = references[0].learned
        self.kernels_ = np.stack([reference.kernels for reference in references])
        self.bases_ = np.stack([reference.basis for reference in references])
        self.features_ = np.stack([_padded(reference.features, steps + 1) for reference in references])
        self.heads_ = np.stack([_padded(reference.heads, steps + 1) for reference in references])
        self.reference_indices_ = np.concatenate([run.curriculum.indices for run in runs])
        self.reference_sizes_ = np.stack([_padded(run.curriculum.sizes, steps) for run in runs])
        self.reference_steps_ = np.array([run.steps for run in runs])

    def _cross_fit(self, runs: Runs, folds: np.ndarray) -> np.ndarray:
        """Fit on all runs, and return forecasts of each run by the references of the other folds.

        The kernels are taken once. See ``Simulator._cross_fit``.
        """
        self.fit(runs)
        curricula, true = runs.curricula, runs.losses.astype(np.float64)
        references = self._reference_curricula()
        with quiet():
            parts = np.stack([self._rolled(index, curricula) for index in range(len(references))])
        forecasts = np.full(true.shape, np.nan)
        of_reference = folds[: len(references)]
        for fold in np.unique(folds):
            held, kept = folds == fold, np.flatnonzero(of_reference != fold)
            if not len(kept):
                others, part = (runs.take(np.flatnonzero(rows)) for rows in (~held, held))
                losses = forecasts_by_others(self, others, part)
                forecasts[held, : losses.shape[1]] = losses
                continue
            weights = reference_weights(curricula, [references[index] for index in kept], true.shape[1] - 1)
            mean = np.einsum("rkt,krtz->rtz", weights, parts[kept])
            correcting = ~held
            correcting[kept] = False
            if correcting.sum() > 2:
                mean = _Correction.best(mean[correcting], true[correcting]).applied(mean)
            forecasts[held] = mean[held]
        return self._bounded(forecasts, curricula)

    def _fit_correction(self, runs: Runs) -> None:
        """Fit the correction whose strength and scaling do best in leave-one-out over the runs."""
        true = runs.losses.astype(np.float64)
        correction = _Correction.best(self._uncorrected(runs.curricula)[:, : true.shape[1]], true)
        self.correction_, self.scale_, self.centre_ = correction.shift, correction.scale, correction.centre

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        return _Correction(self.correction_, self.scale_, self.centre_).applied(self._uncorrected(curricula))

    def _rolled(self, number: int, curricula: Sequence[Curriculum]) -> np.ndarray:
        """Return one reference's forecasts, ``[runs, steps + 1, test]``."""
        space, longest = self._space(number, self._reference_curricula()[number]), max(map(len, curricula))
        chunks = [curricula[start : start + _AT_ONCE] for start in range(0, len(curricula), _AT_ONCE)]
        return np.concatenate([space.roll(chunk, longest) for chunk in chunks])

    def _uncorrected(self, curricula: Sequence[Curriculum]) -> np.ndarray:
        longest = max(len(curriculum) for curriculum in curricula)
        losses = np.zeros((len(curricula), longest + 1, self.n_test_))
        for start in range(0, len(curricula), _AT_ONCE):
            chunk = slice(start, start + _AT_ONCE)
            losses[chunk] = self._mean_forecast(curricula[chunk], longest)
        return losses

    def _mean_forecast(self, curricula: Sequence[Curriculum], longest: int) -> np.ndarray:
        """Return the references' weighted mean forecast, ``[runs, steps + 1, test]``."""
        return np.asarray(sum(weight * losses for weight, losses in self._by_reference(curricula, longest)))

    def _by_reference(self, curricula: Sequence[Curriculum], longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield each reference's weight, ``[runs, steps + 1, 1]``, and forecasts, ``[runs, steps + 1, test]``."""
        references = self._reference_curricula()
        weights = reference_weights(curricula, references, longest)  # [runs, references, times]
        for index, reference in enumerate(references):
            yield weights[:, index, :, None], self._space(index, reference).roll(curricula, longest)

    def _warn_beyond(self, curricula: Sequence[Curriculum]) -> None:
        longest, longest_reference = max(map(len, curricula)), int(self.reference_steps_.max())
        if longest > longest_reference:
            warnings.warn(
                f"a curriculum has {longest} steps, but no reference has more than {longest_reference}: later steps "
                "are simulated with the last kernels, less accurately; record a run of that length and put it first in "
                "fit(runs)",
                BeyondReferenceWarning,
                stacklevel=4,
            )

    def _derivatives_without(self, base: Curriculum, initial: np.ndarray) -> np.ndarray:
        """Run one backward pass per reference; the references' weights are differentiated too."""
        self._warn_beyond([base])
        references = self._reference_curricula()
        weights, weight_changes = reference_weights_without(base, references)
        changes = np.zeros((self.n_train_, self.n_test_))
        for index, reference in enumerate(references):
            final, derivatives = final_derivatives(self._space(index, reference), base)
            changes += weights[index] * derivatives + weight_changes[index][:, None] * final
        changes *= self.scale_[min(len(base), len(self.scale_) - 1)]
        return changes

    def _reference_curricula(self) -> list[Curriculum]:
        sizes = self.reference_sizes_
        ends = np.concatenate([[0], np.cumsum(sizes.sum(1))])
        return [
            Curriculum.from_flat(self.reference_indices_[ends[k] : ends[k + 1]], sizes[k, :count], self.n_train_)
            for k, count in enumerate(self.reference_steps_)
        ]

    def _space(self, number: int, reference: Curriculum) -> FunctionSpace:
        return FunctionSpace(
            loss=self._loss(),
            targets=torch.from_numpy(self.targets_),
            recipe=Recipe(**self.recipe_),
            kernels=torch.from_numpy(self.kernels_[number]),
            times=self.times_,
            n_train=self.n_train_,
            features=torch.from_numpy(self.features_[number]),
            heads=torch.from_numpy(self.heads_[number]),
            learned=self.learned_,
            basis=torch.from_numpy(self.bases_[number]),
            reference=reference,
            shape=tuple(self.shape_),
            l2=self.l2_,
            bounded=getattr(self, "bounded_", False),
        )

    def _check_learned(self) -> None:
        super()._check_learned()
        sizes = check_arrays(
            self,
            {
                "times_": "int checkpoints", "features_": "float references times examples width",
                "heads_": "float references times outputs width", "bases_": "float references width width",
                "reference_steps_": "int references", "reference_sizes_": "int references steps",
                "reference_indices_": "int slots", "scale_": "float corrected", "correction_": "float corrected test",
                "centre_": "float corrected test",
            },
        )  # fmt: skip
        kernels, examples = getattr(self, "kernels_", np.empty(0)), self.n_train_ + self.n_test_
        axes = "train tracked examples tracked" if kernels.ndim == 6 else "examples tracked rank"
        shapes = {"kernels_": f"float {sizes['references']} {sizes['checkpoints']} {axes}"}
        tracked = check_arrays(self, shapes)["tracked"]
        if {array.dtype for array in (self.heads_, self.bases_, kernels)} != {self.features_.dtype}:
            raise InvalidInput("the arrays of the references are of several types")
        check_indices("times_", self.times_, sizes["times"])
        check_indices("reference_steps_", self.reference_steps_ - 1, sizes["steps"])
        check_indices("reference_sizes_", self.reference_sizes_, sizes["slots"] + 1)
        check_indices("reference_indices_", self.reference_indices_, self.n_train_)
        wrong = sizes["examples"] != examples or sizes["times"] != sizes["steps"] + 1 or tracked > sizes["width"]
        if wrong or kernels.shape[-2 if kernels.ndim == 6 else 2] != examples:
            raise InvalidInput("the numbers of examples, steps and features do not fit together")
        self._reference_curricula()
        if not isinstance(getattr(self, "learned_", None), bool):
            raise InvalidInput("learned_ is not true or false")
        if not isinstance(getattr(self, "bounded_", False), bool):  # not in files of older versions
            raise InvalidInput("bounded_ is not true or false")
        recipe = self._check_kept(sizes["outputs"] if self.learned_ else sizes["width"])
        if recipe.optimizer not in COVERED:
            raise InvalidInput(f"the optimizer {recipe.optimizer!r} is not covered")

    @classmethod
    def _from_format_0(
        cls, parameters: dict[str, Any], learned: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Rename the parameters that are counts."""
        for name in ("checkpoints", "references", "features"):
            parameters[f"n_{name}"] = parameters.pop(name)
        return parameters, learned


@dataclass(frozen=True, eq=False)
class _Correction:
    """``L + shift + (scale − 1)(L − centre)``; later times use the last shift, scale and centre.

    Args:
        shift, centre: ``[times, test]``.
        scale: ``[times]``.
    """

    shift: np.ndarray
    scale: np.ndarray
    centre: np.ndarray

    @classmethod
    def of(cls, simulated: np.ndarray, true: np.ndarray, strength: float, scaled: bool) -> _Correction:
        """Fit simulated to true losses, both ``[runs, times, test]``.

        The shift is ``strength`` times the mean error. If ``scaled``, the scale at each step is the least-squares slope
        from simulated to true deviations from the mean.
        """
        observed = np.isfinite(true)
        count = np.maximum(observed.sum(axis=0), 1)  # without a reading the correction is 0
        centre, mean = (np.where(observed, losses, 0.0).sum(axis=0) / count for losses in (simulated, true))
        scale = np.ones(true.shape[1])
        if scaled:
            predictor, response = np.where(observed, simulated - centre, 0.0), np.where(observed, true - mean, 0.0)
            variance = (predictor**2).sum((0, 2))
            scale = np.divide((predictor * response).sum((0, 2)), variance, out=scale, where=variance > 0)
        return cls(strength * (mean - centre), scale, centre)

    @classmethod
    def best(cls, simulated: np.ndarray, true: np.ndarray) -> _Correction:
        """Fit the correction whose strength and scaling do best in leave-one-out over the runs."""
        errors: dict[tuple[float, bool], float] = {}
        for strength in STRENGTHS:
            for scaled in (False, True):
                total = 0.0
                for left_out in range(len(true)):
                    others = np.arange(len(true)) != left_out
                    correction = cls.of(simulated[others], true[others], strength, scaled)
                    total += float(np.nansum((correction.applied(simulated[left_out]) - true[left_out]) ** 2))
                errors[strength, scaled] = total
        return cls.of(simulated, true, *min(errors, key=lambda choice: errors[choice]))

    def applied(self, losses: np.ndarray) -> np.ndarray:
        """Correct losses ``[…, times, test]``."""
        times = np.minimum(np.arange(losses.shape[-2]), len(self.scale) - 1)
        scaled = (self.scale[times, None] - 1) * (losses - self.centre[times])
        corrected: np.ndarray = losses + self.shift[times] + scaled
        return corrected


def _padded(array: np.ndarray, rows: int) -> np.ndarray:
    """Append rows of zeros."""
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])


def _output_shape(task: Task, recipe: Recipe, setup: TrainingSetup) -> list[int]:
    """Return the shape of one example's outputs."""
    model = task.build_model(recipe.seed).to(recipe.torch_dtype)
    with evaluating(model), torch.no_grad():
        outputs = one_tensor(forward(model, take(setup.train_data[0], torch.arange(1))))
    return list(outputs.shape[1:])


def check_covered(task: Task, recipe: Recipe) -> None:
    """Check that the simulator covers this way of training.

    Args:
        task: gives model, loss and l2.
        recipe: gives the optimizer and its options.

    Raises:
        InvalidInput: it does not; the message names the reasons.
    """
    problems = []
    if task.loss is token_cross_entropy:
        problems.append("language modelling, which has too many outputs per example (choices by rank are covered)")
    if recipe.optimizer not in COVERED:
        problems.append(f"optimizer {recipe.optimizer!r} (covered: {', '.join(COVERED)})")
    if recipe.optimizer in ("adam", "rmsprop") and recipe.weight_decay:
        problems.append("Adam's or RMSprop's weight decay, which enters the second moments (AdamW's is covered)")
    if recipe.optimizer == "rmsprop" and (recipe.momentum or recipe.optimizer_args.get("centered")):
        problems.append("RMSprop's momentum or centred moments")
    if recipe.optimizer_args.get("amsgrad"):
        problems.append("amsgrad")
    if recipe.optimizer_args.get("maximize"):
        problems.append("maximize")
    if recipe.clip_norm is not None and (task.l2 or recipe.optimizer != "sgd"):
        problems.append("clipping together with the task's l2, or with Adam")
    if problems:
        raise InvalidInput(f"the tangent kernel simulator does not cover {'; '.join(problems)}")
    for name, module in task.build_model(recipe.seed).named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase) and not isinstance(module, nn.LayerNorm):
            raise InvalidInput(
                f"layer {name!r} ({type(module).__name__}) mixes the examples of a batch in training, so outputs "
                "depend on the batch: use GroupNorm or LayerNorm instead"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise InvalidInput(f"layer {name!r} ({type(module).__name__}) makes training random: set its p to 0")
