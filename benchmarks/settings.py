"""Settings of training that forecasts are measured on: small networks, each trained under eighteen random curricula.

``KNOWN`` are settings that the methods were developed on. ``GRID`` are thirty others, which nothing was tuned on; they
were written down before any of them was run.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
import sklearn.datasets
import torch
from torch import Tensor, nn
from torch.nn import functional

import simfluence as sf

Loss = str | Callable[[Any, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """How a network is trained, and on what.

    Args:
        name: name in tables.
        data: name of the data set, a key of ``DATA``.
        model: function that returns a fresh network.
        recipe: arguments of ``Recipe``; plain SGD at 0.1 by default.
        loss: loss of each example.
        n_train, n_test: sizes of the two samples.
        batch_size, subset, steps: of the random curricula.
    """

    name: str
    data: str
    model: Callable[[], nn.Module]
    recipe: dict[str, Any] = field(default_factory=dict)
    loss: Loss = "cross_entropy"
    n_train: int = 150
    n_test: int = 60
    batch_size: int = 8
    subset: float = 0.5
    steps: int = 100

    def task(self, seed: int) -> sf.Task:
        """Draw the sample of training and test examples."""
        X, y = DATA[self.data]()
        rows = np.random.default_rng(seed).permutation(len(X))[: self.n_train + self.n_test]
        train, test = rows[: self.n_train], rows[self.n_train :]
        groups = y if y.ndim == 1 and len(np.unique(y)) <= 10 else np.digitize(y.reshape(len(y), -1)[:, 0], [-0.5, 0.5])
        table = pd.DataFrame({"label": groups.astype(int)})
        return sf.tasks.from_arrays(
            self.model, X[train], y[train], self.loss, test=(X[test], y[test]), name=self.name,
            metadata=table.iloc[train].reset_index(drop=True), test_metadata=table.iloc[test].reset_index(drop=True),
        )  # fmt: skip

    def recorded(self, seed: int, runs: int = 18, store: str | None = None) -> tuple[sf.Task, sf.Runs]:
        """Train under random curricula; the weights, the sample and the curricula all depend on the seed."""
        task = self.task(seed)
        recipe = sf.Recipe(seed=seed, **({"lr": 0.1} | self.recipe))
        curricula = sf.random_curricula(
            n_train=self.n_train, runs=runs, steps=self.steps, batch_size=self.batch_size, subset=self.subset, seed=seed
        )
        return task, sf.record(task, recipe, curricula, store)


def standardized(load: Callable[..., Any], columns: slice = slice(None)) -> tuple[np.ndarray, np.ndarray]:
    X, y = load(return_X_y=True)
    X = (X - X.mean(0)) / X.std(0)
    return X[:, columns].astype(np.float32), y


def digits(shape: tuple[int, ...] = (64,)) -> tuple[np.ndarray, np.ndarray]:
    X, y = sklearn.datasets.load_digits(return_X_y=True)
    return (X / 16).astype(np.float32).reshape(-1, *shape), y


def noisy_digits() -> tuple[np.ndarray, np.ndarray]:
    X, y = digits()
    rng = np.random.default_rng(7)
    return X, np.where(rng.random(len(y)) < 0.2, rng.integers(10, size=len(y)), y)


def cancer(dtype: type) -> tuple[np.ndarray, np.ndarray]:
    X, y = standardized(sklearn.datasets.load_breast_cancer)
    return X, y.astype(dtype)


def diabetes() -> tuple[np.ndarray, np.ndarray]:
    X, y = standardized(sklearn.datasets.load_diabetes)
    return X, ((y - y.mean()) / y.std()).astype(np.float32)


def linnerud() -> tuple[np.ndarray, np.ndarray]:
    """Three outputs that depend on the inputs of diabetes without being linear in them."""
    X, _ = standardized(sklearn.datasets.load_diabetes)
    rng = np.random.default_rng(3)
    hidden = np.tanh(X @ rng.normal(size=(10, 6)) / 2)
    return X, (hidden @ rng.normal(size=(6, 3)) / 2).astype(np.float32)


def sinus() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    X = rng.uniform(-2, 2, size=(400, 2)).astype(np.float32)
    return X, np.sin(2 * X[:, 0]) * np.cos(X[:, 1]).astype(np.float32)


def moons() -> tuple[np.ndarray, np.ndarray]:
    X, y = sklearn.datasets.make_moons(400, noise=0.2, random_state=0)
    return X.astype(np.float32), y


def circles() -> tuple[np.ndarray, np.ndarray]:
    X, y = sklearn.datasets.make_circles(400, noise=0.1, factor=0.5, random_state=0)
    return X.astype(np.float32), y


def blobs() -> tuple[np.ndarray, np.ndarray]:
    X, y = sklearn.datasets.make_blobs(400, n_features=8, centers=5, cluster_std=4.0, random_state=0)
    return (X / 8).astype(np.float32), y


def sequences() -> tuple[np.ndarray, np.ndarray]:
    """The rows of digits from top to bottom, as sequences of eight vectors."""
    return digits((8, 8))


DATA: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
    "digits": digits,
    "images": functools.partial(digits, (1, 8, 8)),
    "sequences": sequences,
    "noisy_digits": noisy_digits,
    "cancer_int": functools.partial(cancer, np.int64),
    "cancer_float": functools.partial(cancer, np.float32),
    "wine": functools.partial(standardized, sklearn.datasets.load_wine),
    "iris": functools.partial(standardized, sklearn.datasets.load_iris),
    "diabetes": diabetes,
    "outputs": linnerud,
    "sinus": sinus,
    "moons": moons,
    "circles": circles,
    "blobs": blobs,
}


def mlp(*widths: int, act: type[nn.Module] = nn.ReLU, norm: type[nn.Module] | None = None) -> Callable[[], nn.Module]:
    """Return a function that builds a multi-layer perceptron of these widths."""

    def build() -> nn.Module:
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths[:-1]):
            layers += [nn.Linear(before, after), *([] if norm is None else [norm(after)]), act()]
        return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))

    return build


class Residual(nn.Module):
    """Residual blocks of two layers, each with a norm before it, or none."""

    def __init__(
        self, inputs: int, width: int, outputs: int, blocks: int, norm: type[nn.Module] = nn.LayerNorm
    ) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(
            nn.Sequential(norm(width), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
            for _ in range(blocks)
        )
        self.last = nn.Sequential(norm(width), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = x + block(x)
        return self.last(x)


class Attention(nn.Module):
    """A transformer encoder of one or more layers over short sequences, averaged over positions."""

    def __init__(self, inputs: int, width: int, outputs: int, layers: int, before: bool = True) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, width)
        self.place = nn.Parameter(0.02 * torch.randn(8, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, batch_first=True, norm_first=before)
            for _ in range(layers)
        )
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x) + self.place
        for layer in self.layers:
            x = layer(x)
        return self.last(x.mean(1))


class Recurrent(nn.Module):
    """A recurrent network that reads a short sequence."""

    def __init__(self, inputs: int, width: int, outputs: int) -> None:
        super().__init__()
        self.cell = nn.GRU(inputs, width, batch_first=True)
        self.last = nn.Linear(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.cell(x)[0][:, -1])


def cnn(norm: Callable[[int], nn.Module] | None = None) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        def block(before: int, after: int) -> list[nn.Module]:
            norms = [] if norm is None else [norm(after)]
            return [nn.Conv2d(before, after, 3, padding=1), *norms, nn.ReLU(), nn.MaxPool2d(2)]

        return nn.Sequential(*block(1, 8), *block(8, 16), nn.Flatten(), nn.Linear(64, 10))

    return build


def binary(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the binary cross-entropy of one logit."""
    return functional.binary_cross_entropy_with_logits(outputs[:, 0], targets.to(outputs.dtype), reduction="none")


def smooth(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy with labels smoothed by 0.1."""
    return functional.cross_entropy(outputs, targets, reduction="none", label_smoothing=0.1)


def huber(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return Huber's loss of one output."""
    return functional.huber_loss(outputs[:, 0], targets, reduction="none", delta=0.5)


def hinge(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the multi-class hinge loss."""
    return functional.multi_margin_loss(outputs, targets, reduction="none")


def focal(outputs: Tensor, targets: Tensor) -> Tensor:
    """Return the focal loss, with an exponent of 2."""
    losses = functional.cross_entropy(outputs, targets, reduction="none")
    return (1 - torch.exp(-losses)) ** 2 * losses


base = mlp(64, 128, 10)

#: The settings that the methods were developed on.
KNOWN = (
    Setting("base", "digits", base),
    Setting("lr.3", "digits", base, {"lr": 0.3}),
    Setting("2x64", "digits", mlp(64, 64, 64, 10)),
    Setting("mom.9", "digits", base, {"lr": 0.05, "momentum": 0.9}),
    Setting("adamw", "digits", base, {"optimizer": "adamw", "lr": 3e-3}),
    Setting("cnn", "images", cnn()),
    Setting("resln", "digits", functools.partial(Residual, 64, 64, 10, 2), {"lr": 0.05}),
    Setting("bce_f", "cancer_float", mlp(30, 32, 1), loss=binary),
    Setting("bce_i", "cancer_int", mlp(30, 32, 1), loss=binary),
    Setting("lr1", "digits", base, {"lr": 1.0}),
    Setting(
        "dropout", "digits", lambda: nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Dropout(0.2), nn.Linear(128, 10))
    ),
    Setting("bnorm", "digits", mlp(64, 128, 10, norm=nn.BatchNorm1d)),
    Setting("rmsprop", "digits", base, {"optimizer": "rmsprop", "lr": 1e-3}),
    Setting("moons", "moons", mlp(2, 32, 2)),
    Setting("multi", "outputs", mlp(10, 64, 3), loss="squared_error"),
    Setting("nest.9", "digits", base, {"lr": 0.05, "momentum": 0.9, "optimizer_args": {"nesterov": True}}),
    Setting("wine", "wine", mlp(13, 32, 3), n_train=110, n_test=50),
)

#: Thirty settings that nothing was tuned on.
GRID = (
    # networks
    Setting("mlp-deep", "digits", mlp(64, 48, 48, 48, 48, 10), {"lr": 0.2}),
    Setting("mlp-narrow", "digits", mlp(64, 12, 10), {"lr": 0.2}),
    Setting("mlp-wide-elu", "digits", mlp(64, 400, 10, act=nn.ELU), {"lr": 0.05}),
    Setting("mlp-silu-momentum", "digits", mlp(64, 96, 96, 10, act=nn.SiLU), {"lr": 0.05, "momentum": 0.8}),
    Setting("mlp-layernorm", "digits", mlp(64, 96, 96, 10, norm=nn.LayerNorm), {"lr": 0.05}),
    Setting("residual-4", "digits", functools.partial(Residual, 64, 48, 10, 4), {"lr": 0.03}),
    Setting("residual-rms", "digits", functools.partial(Residual, 64, 64, 10, 2, nn.RMSNorm), {"lr": 0.03}),
    Setting("residual-adamw", "digits", functools.partial(Residual, 64, 64, 10, 2), {"optimizer": "adamw", "lr": 1e-3}),
    Setting("cnn-momentum", "images", cnn(), {"lr": 0.02, "momentum": 0.9}, steps=150),
    Setting("cnn-groupnorm", "images", cnn(functools.partial(nn.GroupNorm, 4)), {"lr": 0.1}),
    Setting("cnn-batchnorm", "images", cnn(nn.BatchNorm2d), {"lr": 0.05}),
    Setting("attention", "sequences", functools.partial(Attention, 8, 32, 10, 1), {"lr": 0.1}),
    Setting(
        "attention-adamw", "sequences", functools.partial(Attention, 8, 32, 10, 2), {"optimizer": "adamw", "lr": 2e-3}
    ),
    Setting(
        "attention-post",
        "sequences",
        functools.partial(Attention, 8, 32, 10, 1, before=False),
        {"optimizer": "adam", "lr": 2e-3},
    ),
    Setting("gru-adam", "sequences", functools.partial(Recurrent, 8, 48, 10), {"optimizer": "adam", "lr": 5e-3}),
    # optimizers and learning rates up to divergence
    Setting("lr-0.6", "digits", mlp(64, 100, 10), {"lr": 0.6}),
    Setting("lr-2", "digits", mlp(64, 100, 10), {"lr": 2.0}),
    Setting("momentum-0.95", "digits", mlp(64, 100, 10), {"lr": 0.03, "momentum": 0.95}),
    Setting("adam-high", "digits", mlp(64, 100, 10), {"optimizer": "adam", "lr": 1e-2}),
    Setting(
        "adamw-cosine",
        "digits",
        mlp(64, 64, 64, 10),
        {"optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.1, "schedule": "cosine", "warmup": 10, "horizon": 100},
    ),
    Setting("nadam", "digits", mlp(64, 100, 10), {"optimizer": "nadam", "lr": 2e-3}),
    Setting("adagrad", "digits", mlp(64, 100, 10), {"optimizer": "adagrad", "lr": 0.02}),
    # losses and data
    Setting("label-noise", "noisy_digits", mlp(64, 128, 10), {"lr": 0.2}, n_train=200),
    Setting("smooth-momentum", "digits", mlp(64, 80, 10), {"lr": 0.1, "momentum": 0.7}, smooth),
    Setting("focal", "digits", mlp(64, 80, 10), {"lr": 0.3}, focal),
    Setting("hinge", "wine", mlp(13, 24, 3), {"lr": 0.2}, hinge, n_train=110, n_test=50),
    Setting("huber-adam", "diabetes", mlp(10, 64, 1), {"optimizer": "adam", "lr": 3e-3}, huber),
    Setting("circles-tanh", "circles", mlp(2, 48, 48, 2, act=nn.Tanh), {"lr": 0.3}, steps=200),
    # sizes
    Setting("small-batches", "blobs", mlp(8, 64, 5), {"lr": 0.05}, n_train=80, n_test=40, batch_size=2, subset=0.7),
    Setting(
        "five-hundred", "digits", mlp(64, 128, 10), {"lr": 0.15}, n_train=500, n_test=100, batch_size=16, steps=150
    ),
)
