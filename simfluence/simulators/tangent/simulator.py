"""Training in function space: what a model's head reads moves under the tangent kernel of a few recorded runs.

The outputs are ``f(x) = W h(x)``, of the head's weight W and the features h that it reads. With ``r_i = ∂ℓ/∂f`` at
``f(i)``, K the tangent kernel of the *features* at a reference run's parameters, and SGD,

    W_{t+1} = W_t − η_t / |c| Σ_{i∈c_t} r_i h_t(i)ᵀ,      h_{t+1} = h_t − η_t / |c| Σ_{i∈c_t} K_t(·, i) W_tᵀ r_i

so that the head learns as it does in training, and only what is below it is linearised around the reference. That a
larger W lets the features move faster, and larger features W, is what a kernel of the outputs does not know. Where no
trained linear layer gives the outputs they are the features, and W is the identity.

K is computed at a few checkpoints of the reference, in between interpolated, and for a few directions of the features:
those that the outputs read at first, and the largest of the others. W and h are *anchored*: the reference's true path
carries what both curricula have in common, and the equations only the difference, so that the reference's own
curriculum gives the reference's own losses. Momentum, weight decay and clipping have their counterparts; a model that
is linear in its parameters is simulated exactly. Under Adam W takes Adam's own steps, and the kernel is ``J P Jᵀ``, P
from the second moments that are expected of random batches along the reference.
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
from simfluence.simulators.base import Simulator
from simfluence.simulators.tangent.adjoint import final_derivatives
from simfluence.simulators.tangent.function_space import FunctionSpace
from simfluence.simulators.tangent.reference_run import GIB, collect_reference
from simfluence.simulators.tangent.reference_weights import reference_weights, reference_weights_without
from simfluence.task import Task, convert, forward, take, tensors
from simfluence.tasks.losses import BY_NAME, token_cross_entropy

#: Optimizers whose update has a counterpart in function space.
COVERED = ("sgd", "adam", "adamw")
STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)

_AT_ONCE = 100  # curricula simulated together


class TangentKernelSimulator(Simulator):
    """Simulates any curriculum from one recorded run, or a few: see the module's equations.

    Args:
        task, recipe: what the runs trained, and how; by default the recipe that the runs know.
        n_checkpoints: number of kernels for each reference, evenly spread over its steps.
        n_references: number of fitting runs that kernels are computed along; the others correct the kernels' errors.
        n_features: number of feature directions that are tracked, beside those that the outputs read before training.
        landmarks: number of random training examples that stand for all in a kernel (Nyström's approximation: memory
            and time grow with the number of examples, not with its square); None for the whole kernel.
        memory: the most GiB that the kernels may take.

    Attributes:
        kernels_: ``[references, checkpoints, train, moving, train + test, moving]``, or, with landmarks, factors
            ``[references, checkpoints, train + test, moving, landmarks · moving]``.
        times_: steps of the checkpoints.
        features_: what the head reads of all examples along the references, in each one's own basis,
            ``[references, steps + 1, train + test, width]``.
        heads_: the head's weight along them, ``[references, steps + 1, outputs, width]``.
        bases_: ``[references, width, width]``.
        correction_, scale_, centre_: learned from the runs that are no references: a forecast L becomes
            ``L + correction + (scale − 1)(L − centre)``; ``[steps + 1, test]``, the scale ``[steps + 1]``.

    Raises:
        InvalidInput: by ``fit``, a recipe that the update does not cover, a model whose outputs depend on the batch or
            on chance, kernels larger than ``memory``.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=30, n_test=10)
    >>> curricula = sf.random_curricula(n_train=30, runs=3, steps=20, batch_size=4, subset=0.5)
    >>> runs = sf.record(task, sf.Recipe(lr=0.1), curricula)
    >>> fitted = sf.TangentKernelSimulator(task).fit(runs[:1])
    >>> simulated = fitted.simulate(runs.curricula, runs.initial_losses)
    >>> errors = [((forecast - runs.losses) ** 2).mean() for forecast in (simulated, runs[0].losses)]
    >>> bool(errors[0] < 0.05 * errors[1])  # of taking the first run for the others
    True
    """

    name = "tangent"
    needs_task = True

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

    def __sklearn_clone__(self) -> TangentKernelSimulator:
        """A clone shares the task."""
        return type(self)(**self.get_params(deep=False))

    @classmethod
    def suggest(cls, trial: optuna.Trial) -> dict[str, Any]:
        return {
            "n_checkpoints": trial.suggest_int("n_checkpoints", 3, 12, log=True),
            "n_references": trial.suggest_int("n_references", 1, 6),
            "n_features": trial.suggest_int("n_features", 0, 20),
        }

    def _check_parameters(self) -> None:
        for name, least in (("n_checkpoints", 1), ("n_references", 1), ("n_features", 0)):
            whole(name, getattr(self, name), least)
        if self.landmarks is not None:
            whole("landmarks", self.landmarks, 1)
        number("memory", self.memory, above=0)

    def disagreement(self, curricula: Sequence[Curriculum]) -> Losses:
        """Standard deviation of the references' own forecasts around the one given, ``[runs, steps + 1, test]``.

        It tells which curricula to doubt: over 18 of digits, with four references, its root mean square had a rank
        correlation with the error's of 0.89 (with two 0.66). Over test examples it tells little that the height of the
        loss does not. It is no bound: it was 1.7 times too small, with two references 2.7 times. Rows after a
        curriculum's end are NaN.

        Raises:
            NotFittedError: before ``fit``.
            InvalidInput: fitted with one reference, or curricula of other examples.
        """
        self._check_fitted()
        curricula = list(curricula)
        self._check_initial(curricula, np.zeros(self.n_test_))
        if len(self.reference_steps_) == 1:
            raise InvalidInput("one reference cannot disagree with others: fit with n_references=4, on as many runs")
        found = []
        longest = max(len(curriculum) for curriculum in curricula)
        for start in range(0, len(curricula), _AT_ONCE):
            parts = list(self._by_reference(curricula[start : start + _AT_ONCE], longest))
            mean = sum(share * losses for share, losses in parts)
            found.append(np.sqrt(sum(share * (losses - mean) ** 2 for share, losses in parts)))
        times = np.minimum(np.arange(longest + 1), len(self.scale_) - 1)
        spread: np.ndarray = np.concatenate(found) * np.abs(self.scale_[times, None])
        for row, curriculum in enumerate(curricula):
            spread[row, len(curriculum) + 1 :] = np.nan
        return spread

    def _fit(self, runs: Runs) -> None:
        if self.task is None:
            raise InvalidInput("the tangent kernel is of the task's model: give task=")
        recipe = self.recipe or runs[0].recipe
        if recipe is None:
            raise InvalidInput("how were these runs trained? Give recipe=")
        check_covered(self.task, recipe)
        self.recipe_ = recipe.model_dump(mode="json")
        setup = TrainingSetup.of(self.task, recipe)
        self.targets_ = torch.cat([setup.train_data[1], setup.test_data[1]]).numpy()
        self.loss_, self.l2_ = _loss_name(self.task), self.task.l2
        self.shape_ = _output_shape(self.task, recipe, setup)
        chosen = list(runs[: self.n_references])
        self._take_references(chosen, setup)
        rest = Runs(run for run in runs if run.id not in {each.id for each in chosen})
        self.correction_, self.centre_ = np.zeros((1, runs.n_test)), np.zeros((1, runs.n_test))
        self.scale_ = np.ones(1)
        if len(rest) > 2:
            self._learn_from(rest)

    def _take_references(self, runs: list[Run], setup: TrainingSetup) -> None:
        """Train each reference again, and take its outputs and kernels on the way."""
        steps = max(run.steps for run in runs)
        self.times_ = np.unique(np.linspace(0, steps, self.n_checkpoints, endpoint=False).astype(int))
        data = _both_sides(setup)
        most = self.memory * GIB / len(runs)
        landmarks = None if self.landmarks is None else min(self.landmarks, len(setup.task.train))
        with bar("Kernels", len(runs) * len(self.times_), shown=True) as advance:
            found = [
                collect_reference(setup.task, run, data, self.times_, self.n_features, landmarks, most, advance)
                for run in runs
            ]
        self.learned_ = found[0].learned
        self.kernels_ = np.stack([each.kernels for each in found])
        self.bases_ = np.stack([each.basis for each in found])
        self.features_ = np.stack([_lengthened(each.features, steps + 1) for each in found])
        self.heads_ = np.stack([_lengthened(each.heads, steps + 1) for each in found])
        self.reference_indices_ = np.concatenate([run.curriculum.indices for run in runs])
        self.reference_sizes_ = np.stack([_lengthened(run.curriculum.sizes, steps) for run in runs])
        self.reference_steps_ = np.array([run.steps for run in runs])

    def _learn_from(self, rest: Runs) -> None:
        """The mean error and a scale per step, as far as leaving each of the runs out says that they help."""
        simulated = self._uncorrected(rest.curricula)
        true = rest.losses.astype(np.float64)
        pairs = simulated[:, : true.shape[1]], true
        left: dict[tuple[float, bool], float] = {}
        for strength in STRENGTHS:
            for scaled in (False, True):
                errors = 0.0
                for out in range(len(rest)):
                    others = np.arange(len(rest)) != out
                    found = _Correction.of(pairs[0][others], pairs[1][others], strength, scaled)
                    errors += float(np.nansum((found.applied(pairs[0][out]) - pairs[1][out]) ** 2))
                left[strength, scaled] = errors
        found = _Correction.of(*pairs, *min(left, key=lambda choice: left[choice]))
        self.correction_, self.scale_, self.centre_ = found.shift, found.scale, found.centre

    def _simulate(self, curricula: Sequence[Curriculum], initial: np.ndarray) -> np.ndarray:
        self._warn_beyond(curricula)
        return _Correction(self.correction_, self.scale_, self.centre_).applied(self._uncorrected(curricula))

    def _uncorrected(self, curricula: Sequence[Curriculum]) -> np.ndarray:
        longest = max(len(curriculum) for curriculum in curricula)
        losses = np.zeros((len(curricula), longest + 1, self.n_test_))
        for start in range(0, len(curricula), _AT_ONCE):
            some = slice(start, start + _AT_ONCE)
            losses[some] = self._rolled(curricula[some], longest)
        return losses

    def _rolled(self, curricula: Sequence[Curriculum], longest: int) -> np.ndarray:
        """Mean over references, nearer ones counting more, ``[runs, steps + 1, test]``."""
        return np.asarray(sum(share * losses for share, losses in self._by_reference(curricula, longest)))

    def _by_reference(self, curricula: Sequence[Curriculum], longest: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """How much each counts, ``[runs, steps + 1, 1]``, and its own forecasts, ``[runs, steps + 1, test]``."""
        references = self._reference_curricula()
        shares = reference_weights(curricula, references, longest)  # [runs, references, times]
        for index, reference in enumerate(references):
            yield shares[:, index, :, None], self._space(index, reference).roll(curricula, longest)

    def _warn_beyond(self, curricula: Sequence[Curriculum]) -> None:
        longest, known = max(map(len, curricula)), int(self.reference_steps_.max())
        if longest > known:
            warnings.warn(
                f"a curriculum of {longest} steps, but no reference has more than {known}: what comes after them is "
                "forecast with the last kernels, and less well; record a run as long, and fit with it first",
                BeyondReferenceWarning,
                stacklevel=4,
            )

    def _derivatives_without(self, base: Curriculum, initial: np.ndarray) -> np.ndarray:
        """By one pass backwards along each reference; how near it is changes as well."""
        self._warn_beyond([base])
        references = self._reference_curricula()
        shares, moved = reference_weights_without(base, references)
        changes = np.zeros((self.n_train_, self.n_test_))
        for index, reference in enumerate(references):
            final, derivatives = final_derivatives(self._space(index, reference), base)
            changes += shares[index] * derivatives + moved[index][:, None] * final
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
        )

    def _loss(self) -> Any:
        if self.task is not None:
            return self.task.loss
        if self.loss_ is None:
            raise InvalidInput(
                "its task's loss is a function of its own, which no file holds: set simulator.task = task"
            )
        return BY_NAME[self.loss_]

    @classmethod
    def _from_format_0(
        cls, parameters: dict[str, Any], learned: dict[str, Any]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Rename parameters that are counts."""
        for name in ("checkpoints", "references", "features"):
            parameters[f"n_{name}"] = parameters.pop(name)
        return parameters, learned

    def _state(self) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
        """Task and recipe are not kept as parameters: what is needed of them is learned."""
        about, arrays = super()._state()
        about["parameters"] |= {"task": None, "recipe": None}
        return about, arrays


@dataclass(frozen=True, eq=False)
class _Correction:
    """``L + shift + (scale − 1)(L − centre)``, held at its end.

    Args:
        shift, centre: ``[times, test]``.
        scale: ``[times]``.
    """

    shift: np.ndarray
    scale: np.ndarray
    centre: np.ndarray

    @classmethod
    def of(cls, simulated: np.ndarray, true: np.ndarray, strength: float, scaled: bool) -> _Correction:
        """Of forecasts and truths ``[runs, times, test]``: ``strength`` times the mean error, and, if ``scaled``, the
        slope at each step of the truth's deviations from the mean by the forecast's."""
        known = np.isfinite(true)
        count = np.maximum(known.sum(axis=0), 1)  # where nothing was read there is nothing to correct
        centre, mean = (np.where(known, losses, 0.0).sum(axis=0) / count for losses in (simulated, true))
        scale = np.ones(true.shape[1])
        if scaled:
            ours, theirs = np.where(known, simulated - centre, 0.0), np.where(known, true - mean, 0.0)
            size = (ours**2).sum((0, 2))
            scale = np.divide((ours * theirs).sum((0, 2)), size, out=scale, where=size > 0)
        return cls(strength * (mean - centre), scale, centre)

    def applied(self, losses: np.ndarray) -> np.ndarray:
        """To losses ``[…, times, test]``."""
        times = np.minimum(np.arange(losses.shape[-2]), len(self.scale) - 1)
        moved = (self.scale[times, None] - 1) * (losses - self.centre[times])
        corrected: np.ndarray = losses + self.shift[times] + moved
        return corrected


def _both_sides(setup: TrainingSetup) -> Any:
    """Training and test data, one after the other."""
    rest = iter(tensors(setup.test_data[0]))
    inputs = convert(lambda tensor: torch.cat([tensor, next(rest)]), setup.train_data[0])
    return inputs, torch.cat([setup.train_data[1], setup.test_data[1]])


def _lengthened(array: np.ndarray, rows: int) -> np.ndarray:
    """With zeros after its end."""
    return np.concatenate([array, np.zeros((rows - len(array), *array.shape[1:]), array.dtype)])


def _output_shape(task: Task, recipe: Recipe, setup: TrainingSetup) -> list[int]:
    """Of one example's outputs."""
    model = task.build_model(recipe.seed).to(recipe.torch_dtype)
    with evaluating(model), torch.no_grad():
        outputs = one_tensor(forward(model, take(setup.train_data[0], torch.arange(1))))
    return list(outputs.shape[1:])


def _loss_name(task: Task) -> str | None:
    """The name of a loss of the library's own."""
    return next((name for name, loss in BY_NAME.items() if loss is task.loss), None)


def check_covered(task: Task, recipe: Recipe) -> None:
    """Whether training has a counterpart in function space.

    Raises:
        InvalidInput: it has none; says what is in the way.
    """
    problems = []
    if task.loss is token_cross_entropy:
        problems.append("language modelling, whose outputs at every token are too many (choices by rank are covered)")
    if recipe.optimizer not in COVERED:
        problems.append(f"optimizer {recipe.optimizer!r} (covered: {', '.join(COVERED)})")
    if recipe.optimizer == "adam" and recipe.weight_decay:
        problems.append("Adam's weight decay, which goes through its second moments (AdamW's is covered)")
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
                f"layer {name!r} ({type(module).__name__}) mixes the examples of a batch while training, so an output "
                "is no function of the parameters alone: freeze it, or take GroupNorm or LayerNorm"
            )
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            raise InvalidInput(f"layer {name!r} ({type(module).__name__}) makes training random: set its p to 0")
