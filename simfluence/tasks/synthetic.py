"""Linear regression on synthetic data: convex, with an optimum in closed form."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import nn

from simfluence._internal.checked import checked
from simfluence._internal.types import Seed
from simfluence.errors import InvalidInput
from simfluence.examples import Examples
from simfluence.task import Task
from simfluence.tasks.losses import squared_error

__all__ = ["synthetic", "synthetic_optimum"]


@checked
def synthetic(
    n_train: int = 40, n_test: int = 20, features: int = 5, noise: float = 0.1, l2: float = 0.01, seed: Seed = 0
) -> Task:
    """Build a task ``y = ⟨x, w⟩ + noise`` with normal x and w: a linear layer without bias, squared error.

    The objective ``mean (⟨x, θ⟩ − y)² + l2/2 ‖θ‖²`` is quadratic: ``synthetic_optimum`` returns its minimiser.

    Args:
        n_train, n_test: numbers of examples.
        features: length of x.
        noise: standard deviation of the noise.
        l2: L2 penalty of the objective.
        seed: seed of the data.

    Raises:
        InvalidInput: a number of examples or features is below 1.

    >>> synthetic(n_train=4, n_test=2)
    Task('synthetic', train=4, test=2)
    """
    if min(n_train, n_test, features) < 1:
        raise InvalidInput(f"n_train={n_train}, n_test={n_test}, features={features}: each must be 1 or more")
    rng = np.random.default_rng(seed)
    w = rng.normal(size=features)
    X = rng.normal(size=(n_train + n_test, features))
    y = X @ w + noise * rng.normal(size=len(X))
    inputs, targets = torch.tensor(X), torch.tensor(y)
    table = pd.DataFrame({"target": y, "norm": np.linalg.norm(X, axis=1)})
    arguments = {
        "n_train": n_train, "n_test": n_test, "features": features, "noise": noise, "l2": l2, "seed": seed,
    }  # fmt: skip
    return Task(
        "synthetic",
        partial(nn.Linear, features, 1, bias=False),
        (inputs[:n_train], targets[:n_train]),
        (inputs[n_train:], targets[n_train:]),
        squared_error,
        Examples.numbered(n_train, table[:n_train]),
        Examples.numbered(n_test, table[n_train:]),
        arguments,
        l2=l2,
    )


def synthetic_optimum(task: Task, kept: np.ndarray | None = None) -> Float[np.ndarray, " features"]:
    """Compute the minimiser of a synthetic task's objective in closed form, in float64.

    Args:
        kept: indices of the training examples in the objective; by default all.

    >>> task = synthetic(n_train=20, n_test=5)
    >>> optimum = synthetic_optimum(task)
    >>> optimum.shape == (task.train_data[0].shape[1],)
    True
    """
    X, y = (tensor.numpy().astype(np.float64) for tensor in task.train_data)
    if kept is not None:
        X, y = X[kept], y[kept]
    hessian = 2 * X.T @ X / len(y) + task.l2 * np.eye(X.shape[1])
    return np.linalg.solve(hessian, 2 * X.T @ y / len(y))
