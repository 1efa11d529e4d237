"""What older versions stored is still read: runs, checkpoints, simulators; and tasks keep their fingerprints."""

from __future__ import annotations

import json
import platform
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

import simfluence as sf

DATA = Path(__file__).parent / "data"
SIMULATORS = DATA / "simulators-format-0"
FINGERPRINTS = json.loads((DATA / "fingerprints.json").read_text())
SHIPPED_RUNS = {
    "breast_cancer": 32,
    "breast_cancer_mlp": 32,
    "diabetes": 32,
    "digits": 32,
    "digits_adamw": 32,
    "digits_cnn": 32,
    "docstrings-minilm-ia3": 16,
    "docstrings-minilm-lora": 16,
}


def read_made(name: str, models: dict[str, str], folders: dict[str, Path]) -> sf.Task:
    """The ready-made task that a name in fingerprints.json means: ``task`` or ``task/variant``."""
    kind, _, variant = name.partition("/")
    if kind in ("digits", "breast_cancer"):
        return sf.tasks.build(kind, **({"model": variant} if variant else {}))
    if kind == "topics":
        return sf.tasks.topics(n_train=16, n_test=8, shape=variant)
    if kind == "docstrings":
        return sf.tasks.docstrings(n_train=16, n_test=8, model=models["bert"], tuning=variant)
    if kind in folders:
        return sf.tasks.build(kind, model=models["gpt2"], source=folders[kind], n_train=4, n_test=2)
    return sf.tasks.build(kind)


@pytest.mark.parametrize("name", FINGERPRINTS["tasks"])
def test_ready_made_tasks_keep_their_fingerprints(name, request):
    of_python = name.startswith(("docstrings", "topics"))
    if of_python and platform.python_version() != FINGERPRINTS["python"]:
        pytest.skip(f"their texts are those of Python {FINGERPRINTS['python']}")
    needs_model = not name.startswith(("digits", "breast_cancer", "diabetes", "synthetic"))
    sides = [request.getfixturevalue(each) for each in ("models", "folders")] if needs_model else [{}, {}]
    assert read_made(name, *sides).fingerprint == FINGERPRINTS["tasks"][name]


@pytest.mark.parametrize("name", sorted(SHIPPED_RUNS))
def test_shipped_runs_load(name):
    store = sf.RunStore(Path(__file__).parent.parent / "runs" / name)
    runs = store.load()
    assert len(runs) == SHIPPED_RUNS[name]
    assert {run.fingerprint for run in runs} == {store.info.fingerprint}


@pytest.mark.parametrize("path", sorted(SIMULATORS.glob("[!e]*.safetensors")), ids=lambda path: path.stem)
@pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")
def test_simulators_of_older_formats_simulate_as_they_did(path, tmp_path):
    """As the version that saved them did, and to the bit as when saved again in the present format."""
    expected = safetensors.numpy.load_file(SIMULATORS / "expected.safetensors")
    curricula = [sf.Curriculum(batches, n_train=12) for batches in expected["batches"]]
    loaded = sf.Simulator.load(path)
    simulated = loaded.simulate(curricula, expected["initial_losses"])
    rtol = 1e-5 if loaded.name == "tangent" else 1e-12  # in single precision, and in double
    np.testing.assert_allclose(simulated, expected[f"simulated.{path.stem}"], rtol=rtol)
    loaded.save(tmp_path / "again.safetensors")
    again = sf.Simulator.load(tmp_path / "again.safetensors").simulate(curricula, expected["initial_losses"])
    assert np.array_equal(simulated, again)


def test_checkpoints_of_older_formats_load():
    checkpoint = sf.Checkpoint.load(DATA / "checkpoint-format-0.safetensors")
    assert checkpoint.step == 5
    assert set(checkpoint.model) == {"0.weight", "0.bias", "2.weight", "2.bias"}
    assert checkpoint.optimizer[0]["exp_avg"].shape == checkpoint.model["0.weight"].shape
    assert float(checkpoint.optimizer[0]["step"]) == 5
