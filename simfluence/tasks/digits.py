"""Handwritten digits: scikit-learn's 8×8 images in ten classes, with an MLP or a small CNN."""

from __future__ import annotations

from functools import partial

import numpy as np
import pandas as pd
import torch
from sklearn.datasets import load_digits
from torch import nn

from simfluence._internal.checked import checked
from simfluence._internal.types import Seed
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.examples import Examples
from simfluence.task import Data, Task
from simfluence.tasks.losses import CLASSIFICATION, cross_entropy

__all__ = ["digits"]


@checked
def digits(n_train: int = 300, n_test: int = 100, model: str = "mlp", seed: Seed = 0) -> Task:
    """Build a task of scikit-learn's 1,797 digit images: pixels divided by 16, cross-entropy over ten classes.

    Args:
        n_train, n_test: sizes of the two disjoint random samples.
        model: "mlp" (64-128-10, ReLU) or "cnn" (conv 8, pool, conv 16, pool, linear; 1,898 parameters).
        seed: seed of the samples.

    Raises:
        InvalidInput: there are fewer images than requested, or the model is unknown.

    >>> digits(n_train=30, n_test=10).train.table.columns.tolist()
    ['id', 'label']
    """
    if model not in _MODELS:
        raise InvalidInput(f"unknown model {model!r}, {did_you_mean(model, _MODELS)}")
    images, labels = load_digits(return_X_y=True)  # [1797, 64], [1797]
    if min(n_train, n_test) < 1 or n_train + n_test > len(images):
        raise InvalidInput(
            f"n_train={n_train} and n_test={n_test} must be 1 or more, and at most {len(images)} images together"
        )
    chosen = np.random.default_rng(seed).permutation(len(images))[: n_train + n_test]
    pixels = torch.tensor(images / 16, dtype=torch.float32)
    if model == "cnn":
        pixels = pixels.reshape(-1, 1, 8, 8)

    def part(rows: np.ndarray) -> tuple[Examples, Data]:
        examples = Examples([f"digits-{row}" for row in rows], pd.DataFrame({"label": labels[rows]}))
        return examples, (pixels[rows], torch.tensor(labels[rows]))

    train, train_data = part(chosen[:n_train])
    test, test_data = part(chosen[n_train:])
    arguments = {"n_train": n_train, "n_test": n_test, "model": model, "seed": seed}
    return Task(
        "digits", _MODELS[model], train_data, test_data, cross_entropy, train, test, arguments, CLASSIFICATION
    )  # fmt: skip


def _mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


def _cnn() -> nn.Module:
    convolution = partial(nn.Conv2d, kernel_size=3, padding=1)
    return nn.Sequential(
        convolution(1, 8), nn.ReLU(), nn.MaxPool2d(2),
        convolution(8, 16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 10),
    )  # fmt: skip


_MODELS = {"mlp": _mlp, "cnn": _cnn}
