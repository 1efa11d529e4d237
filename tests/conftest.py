"""Small tasks, recorded runs and a process with known parameters, shared by the tests."""

from __future__ import annotations

import shutil
from pathlib import Path

import hypothesis
import numpy as np
import pandas as pd
import pytest
import torch
import typechecking
from torch import nn

typechecking.install()

import simfluence as sf  # noqa: E402 (after its hook)

hypothesis.settings.register_profile("whatever the machine does", deadline=None)
hypothesis.settings.load_profile("whatever the machine does")


@pytest.fixture(scope="session", autouse=True)
def _one_thread():
    """Small models are fastest on one thread, and pytest's timings steadier."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    """Weights that a test draws are the same whatever ran before it in this worker."""
    torch.manual_seed(0)


def small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 6), nn.Tanh(), nn.Linear(6, 2))


@pytest.fixture(scope="session")
def task() -> sf.Task:
    """12 training and 5 test points of three features in two classes."""
    rng = np.random.default_rng(7)
    X = rng.normal(size=(17, 3)).astype(np.float32)
    y = (X[:, 0] + 0.3 * rng.normal(size=17) > 0).astype(np.int64)
    groups = pd.DataFrame({"label": y[:12], "group": list("abc" * 4), "size": np.arange(12) / 2})
    return sf.tasks.from_arrays(
        small_model, X[:12], y[:12], "cross_entropy", test=(X[12:], y[12:]), metadata=groups, name="small"
    )


@pytest.fixture(scope="session")
def recipe() -> sf.Recipe:
    return sf.Recipe(lr=0.3)


@pytest.fixture(scope="session")
def curricula() -> list[sf.Curriculum]:
    return sf.random_curricula(n_train=12, runs=6, steps=10, batch_size=3, subset=0.5, seed=1)


@pytest.fixture(scope="session")
def runs(task, recipe, curricula) -> sf.Runs:
    return sf.record(task, recipe, curricula)


@pytest.fixture(scope="session")
def _recorded(task, recipe, curricula, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("recorded") / "store"
    sf.record(task, recipe, curricula, folder)
    return folder


@pytest.fixture
def store(_recorded, tmp_path) -> sf.RunStore:
    """A store of the runs, of the test's own."""
    return sf.RunStore(shutil.copytree(_recorded, tmp_path / "store"))


class KnownProcess:
    """Runs of a linear Markov process with known A and B; losses go below 0, α above 1."""

    def __init__(self, n_train=8, n_test=4, runs=30, steps=40, batch=3, seed=0):
        rng = np.random.default_rng(seed)
        self.batch = batch
        self.A = 1 / batch + 0.05 * rng.normal(size=(n_train, n_test))
        self.B = 0.3 * rng.normal(size=(n_train, n_test))
        curricula = sf.random_curricula(n_train, runs, steps, batch, subset=0.75, seed=seed)
        self.runs = sf.Runs.from_arrays(curricula, [self.roll(c, rng.normal(size=n_test)) for c in curricula])

    def roll(self, curriculum: sf.Curriculum, initial: np.ndarray) -> np.ndarray:
        losses = [initial]
        for batch in curriculum:
            scale = self.batch / len(batch) if len(batch) else 0.0
            alpha = scale * self.A[batch].sum(0) if len(batch) else 1.0
            losses.append(alpha * losses[-1] + scale * self.B[batch].sum(0))
        return np.array(losses)


@pytest.fixture(scope="session")
def known() -> KnownProcess:
    return KnownProcess()


@pytest.fixture(scope="session")
def models(tmp_path_factory) -> dict[str, str]:
    """The folders of tiny language models, by kind."""
    pytest.importorskip("transformers")
    import tiny_models

    return {kind: tiny_models.saved(kind, tmp_path_factory.mktemp(kind)) for kind in ("bert", "gpt2", "t5")}


@pytest.fixture(scope="session")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Folders of made-up data, by name."""
    pytest.importorskip("transformers")
    import tiny_models

    return {data: tiny_models.written(data, tmp_path_factory.mktemp(data)) for data in tiny_models.ROWS}
