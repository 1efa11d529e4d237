"""An attributor for a recorded run, chosen by name; the model and checkpoints are read or trained again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from simfluence._internal.checked import checked
from simfluence._internal.types import Count
from simfluence.attribution.base import Attributor
from simfluence.attribution.influence import EKFAC, KFAC, Diagonal, Exact
from simfluence.attribution.iterative import Arnoldi, ConjugateGradients, LiSSA
from simfluence.attribution.tracin import Adam, GradientCosine, GradientDot, TracInCP, TracInIdeal
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.recording.replay import replay, trained_model
from simfluence.runs import Run
from simfluence.storage.store import RunStore
from simfluence.task import Task

__all__ = ["METHODS", "OF_MODEL", "attributor_from_run"]

#: Attributors of one trained model, by their names on the command line.
OF_MODEL: Mapping[str, type[Attributor]] = {
    "ekfac": EKFAC,
    "kfac": KFAC,
    "diagonal": Diagonal,
    "exact": Exact,
    "cg": ConjugateGradients,
    "lissa": LiSSA,
    "arnoldi": Arnoldi,
    "dot": GradientDot,
    "cosine": GradientCosine,
}
METHODS = (*OF_MODEL, "tracin", "tracin-ideal")


@checked
def attributor_from_run(
    method: str,
    task: Task,
    run: Run,
    *,
    checkpoints: Count = 10,
    store: str | Path | RunStore | None = None,
    **parameters: Any,
) -> Attributor | TracInIdeal:
    """Fit an attributor to the final model of a recorded run, or to its checkpoints.

    Args:
        method: one of ``METHODS``.
        task: task of the run.
        run: the recorded run.
        checkpoints: for "tracin": number of checkpoints, evenly spread over the run's steps.
        store: folder of a run store to save checkpoints in; without one, the run is trained again each time.
        parameters: parameters of the attributor, such as ``damping``.

    Raises:
        InvalidInput: the method or a parameter is unknown, or the run is of another task or cannot be trained again.

    >>> import simfluence as sf
    >>> task = sf.tasks.digits(n_train=20, n_test=5)
    >>> run = sf.record(task, sf.Recipe(lr=0.1), sf.random_curricula(n_train=20, runs=1, steps=4, batch_size=4))[0]
    >>> attributor_from_run("tracin", task, run, checkpoints=2).scores().shape
    (5, 20)
    """
    if method not in METHODS:
        raise InvalidInput(f"unknown attribution method {method!r}, {did_you_mean(method, METHODS)}")
    attributor = OF_MODEL.get(method, TracInCP if method == "tracin" else TracInIdeal)
    known = [name for name in attributor().get_params() if name not in ("checkpoints", "adam")]
    for name in parameters:
        if name not in known:
            raise InvalidInput(f"attribution method {method!r} has no parameter {name!r}, {did_you_mean(name, known)}")
    if method == "tracin-ideal":
        return TracInIdeal().fit(run)
    if method == "tracin":
        return _tracin(task, run, checkpoints, store, parameters)
    return OF_MODEL[method](**parameters).fit(trained_model(task, run, store), task)


def _tracin(
    task: Task, run: Run, count: int, store: str | Path | RunStore | None, parameters: dict[str, Any]
) -> TracInCP:
    if not 1 <= count <= run.steps:
        raise InvalidInput(f"checkpoints must be from 1 to {run.steps}, the number of steps of the run; got {count}")
    if run.recipe is None:
        raise InvalidInput(
            f"run {run.id} has no recipe, so its learning rates are unknown: choose another method or run"
        )
    steps = np.linspace(0, run.steps, count, endpoint=False).astype(int).tolist()
    states = replay(task, run, steps, store)
    rates = run.recipe.learning_rates(run.steps)
    adam = None
    if run.recipe.optimizer in ("adam", "adamw"):
        states = {
            step: state for step, state in states.items() if step > 0
        }  # Adam has no moments before the first step
        arguments: dict[str, Any] = dict(run.recipe.optimizer_args)
        adam = Adam(arguments.get("betas", (0.9, 0.999))[1], arguments.get("eps", 1e-8))
    pairs = [(state, float(rates[step])) for step, state in states.items()]
    model = task.build_model(run.recipe.seed).to(run.recipe.torch_dtype)
    return TracInCP(pairs, adam, **parameters).fit(model, task)
