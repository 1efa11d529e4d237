from __future__ import annotations

from pathlib import Path

import pytest

import simfluence as sf
from simfluence.errors import InvalidInput
from simfluence.specs import RecordingSpec

GOOD = """
task: {name: digits, arguments: {n_train: 30, n_test: 10}}
recipe: {optimizer: AdamW, lr: 0.01, schedule: cosine, horizon: 5}
curricula: {runs: 3, steps: 5, batch_size: 4, subset: 0.5, seed: 2}
"""


def test_a_specification_makes_what_it_says():
    spec = RecordingSpec.parse(GOOD)
    task = spec.task.build()
    assert task.fingerprint == sf.tasks.digits(n_train=30, n_test=10).fingerprint
    assert spec.recipe == sf.Recipe(optimizer="adamw", lr=0.01, schedule="cosine", horizon=5)
    expected = sf.random_curricula(n_train=30, runs=3, steps=5, batch_size=4, subset=0.5, seed=2)
    assert spec.curricula.build(30) == expected


@pytest.mark.parametrize(("subset", "examples"), [("1", 1), ("1.0", 30), ("7", 7)])
def test_subset_is_a_number_or_a_fraction(subset, examples):
    spec = RecordingSpec.parse(GOOD.replace("subset: 0.5", f"subset: {subset}").replace("steps: 5, b", "steps: 99, b"))
    assert len(set(spec.curricula.build(30)[0].indices.tolist())) == examples


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("runs: 3", "runs: 0", "curricula.runs"),
        ("runs: 3", "run: 3", "curricula.runs: .*curricula.run: unknown field, did you mean 'runs'"),
        ("lr: 0.01", "lr: fast", "lr"),
        ("optimizer: AdamW", "optimizer: adamx", "did you mean"),
        ("task:", "tasks:", "tasks: unknown field, did you mean 'task'"),
        (GOOD, "- 1", "expected the keys"),
        (GOOD, "a: [", "not plain YAML"),
        ("name: digits", "name: !!python/name:os.system", "not plain YAML"),
        ("name: digits", "name: !!python/object/apply:os.getcwd []", "not plain YAML"),
    ],
)
def test_bad_specifications_name_the_key(old, new, said):
    with pytest.raises(InvalidInput, match=said):
        RecordingSpec.parse(GOOD.replace(old, new))


def test_files(tmp_path):
    with pytest.raises(InvalidInput, match=r"none\.yaml: "):
        RecordingSpec.read(tmp_path / "none.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InvalidInput, match=r"binary\.yaml: "):
        RecordingSpec.read(tmp_path / "binary.yaml")


def test_the_shipped_specification_made_the_shipped_runs():
    root = Path(__file__).parent.parent
    spec = RecordingSpec.read(root / "curricula" / "digits.yaml")
    runs = sf.RunStore(root / "runs" / "digits").load()
    task = spec.task.build()
    wanted = spec.curricula.build(len(task.train))
    assert sorted(sf.recording.run_id(task, spec.recipe, curriculum) for curriculum in wanted) == runs.ids
    assert set(runs.curricula) == set(wanted)
