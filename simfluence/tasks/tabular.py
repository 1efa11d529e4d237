"""Scikit-learn's small tables: breast cancer (classification) and diabetes (regression)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_breast_cancer, load_diabetes
from torch import nn

from simfluence._internal.checked import checked
from simfluence._internal.types import Seed
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.examples import Examples
from simfluence.task import Task
from simfluence.tasks.losses import CLASSIFICATION, cross_entropy, squared_error

__all__ = ["breast_cancer", "diabetes"]


@checked
def breast_cancer(
    n_train: int = 200, n_test: int = 150, model: str = "logistic", l2: float | None = None, seed: Seed = 0
) -> Task:
    """Build a task of scikit-learn's 569 breast-cancer diagnoses: 30 measurements, standardised on the training
    examples, and two classes.

    Args:
        n_train, n_test: sizes of the two disjoint random samples.
        model: "logistic" (a linear layer with two logits) or "mlp" (30-64-2, ReLU).
        l2: L2 penalty of the objective; by default 0.01 for "logistic", as the data are separable and have no optimum
            without it, and 0 for "mlp".
        seed: seed of the samples.

    Raises:
        InvalidInput: there are fewer examples than requested, or the model is unknown.

    >>> breast_cancer(n_train=20, n_test=10).train.table["label"].drop_duplicates().sort_values().tolist()
    ['benign', 'malignant']
    """
    if model not in _CANCER_MODELS:
        raise InvalidInput(f"unknown model {model!r}, {did_you_mean(model, _CANCER_MODELS)}")
    penalty = (0.01 if model == "logistic" else 0.0) if l2 is None else l2
    data = load_breast_cancer()
    train, test = _sample(len(data.target), n_train, n_test, seed)
    X = _standardised(data.data, train)
    labels = data.target_names[data.target]
    examples = [
        Examples([f"case-{row}" for row in rows], pd.DataFrame({"label": labels[rows]})) for rows in (train, test)
    ]
    y = torch.tensor(data.target)
    arguments = {"n_train": n_train, "n_test": n_test, "model": model, "l2": l2, "seed": seed}
    return Task(
        "breast_cancer", _CANCER_MODELS[model], (X[train], y[train]), (X[test], y[test]), cross_entropy,
        examples[0], examples[1], arguments, CLASSIFICATION, penalty,
    )  # fmt: skip


@checked
def diabetes(n_train: int = 200, n_test: int = 150, seed: Seed = 0) -> Task:
    """Build a task of scikit-learn's 442 diabetes patients: 10 measurements and the disease's progression, standardised
    on the training examples; an MLP 10-64-1 (ReLU) with squared error.

    Args:
        n_train, n_test: sizes of the two disjoint random samples.
        seed: seed of the samples.

    Raises:
        InvalidInput: there are fewer examples than requested.

    >>> diabetes(n_train=20, n_test=10).train.table.columns.tolist()
    ['id', 'progression']
    """
    X, y = load_diabetes(return_X_y=True)
    train, test = _sample(len(y), n_train, n_test, seed)
    inputs, targets = _standardised(X, train), _standardised(y, train)
    examples = [
        Examples([f"patient-{row}" for row in rows], pd.DataFrame({"progression": y[rows]})) for rows in (train, test)
    ]
    arguments = {"n_train": n_train, "n_test": n_test, "seed": seed}
    return Task(
        "diabetes", _diabetes_mlp, (inputs[train], targets[train]), (inputs[test], targets[test]), squared_error,
        examples[0], examples[1], arguments,
    )  # fmt: skip


def _sample(count: int, n_train: int, n_test: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    if min(n_train, n_test) < 1 or n_train + n_test > count:
        raise InvalidInput(
            f"n_train={n_train} and n_test={n_test} must be 1 or more, and at most {count} examples together"
        )
    rows = np.random.default_rng(seed).permutation(count)
    return rows[:n_train], rows[n_train : n_train + n_test]


def _standardised(values: np.ndarray, train: np.ndarray) -> torch.Tensor:
    """Scale to mean 0 and standard deviation 1 on the training rows."""
    scaled = (values - values[train].mean(0)) / values[train].std(0)
    return torch.tensor(scaled, dtype=torch.float32)


def _logistic() -> nn.Module:
    return nn.Linear(30, 2)


def _cancer_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(30, 64), nn.ReLU(), nn.Linear(64, 2))


def _diabetes_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(10, 64), nn.ReLU(), nn.Linear(64, 1))


_CANCER_MODELS: dict[str, Callable[[], nn.Module]] = {"logistic": _logistic, "mlp": _cancer_mlp}
