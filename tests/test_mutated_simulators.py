"""A file of a simulator that someone changed loads or is refused by name; it never ends the process."""

from __future__ import annotations

import contextlib
import copy
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import safetensors.numpy

import simfluence as sf
from simfluence.errors import SimfluenceError, StoreError
from simfluence.simulators.base import _checksum

OLD = sorted((Path(__file__).parent / "data" / "simulators-format-0").glob("[!e]*.safetensors"))
MUTATIONS = 60  # of each file
VALUES = [
    None,
    True,
    -1,
    0,
    2,
    10**6,
    10**30,
    0.5,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    [1],
    {},
    {"a": 1},
    "2" * 5000,
]

pytestmark = [
    pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning"),
    pytest.mark.filterwarnings("ignore::simfluence.errors.BeyondReferenceWarning"),
    pytest.mark.filterwarnings("ignore::simfluence.errors.RunawayWarning"),
    pytest.mark.filterwarnings("ignore:overflow|invalid value|divide by zero|All-NaN:RuntimeWarning"),
]


def read(path: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    with safetensors.safe_open(path, "np") as file:
        return json.loads(file.metadata()["simfluence"]), safetensors.numpy.load_file(path)


def write(path: Path, about: dict[str, Any], arrays: dict[str, np.ndarray]) -> None:
    """Write the file with a right checksum."""
    text = json.dumps(about)
    content = {"simfluence": text, "sha256": _checksum(text, arrays)}
    path.write_bytes(safetensors.numpy.save(arrays, content))


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in plain content."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, entry in pairs for place in [(value, key), *places(entry)]]


def mutate(about: dict[str, Any], arrays: dict[str, np.ndarray], rng: random.Random) -> None:
    """Change one value, drop or rename an entry, or give an array another size, type or content."""
    kind = rng.choice(["value", "value", "drop", "text", "array", "array", "array"])
    if kind in ("value", "drop"):
        container, key = rng.choice(places(about))
        if kind == "drop":
            del container[key]
        else:
            container[key] = rng.choice(VALUES)
        return
    texts = [(container, key) for container, key in places(about) if isinstance(container[key], str) and container[key]]
    if kind == "text":
        container, key = rng.choice(texts)
        text, place = container[key], rng.randrange(len(container[key]))
        container[key] = text[:place] + (chr(rng.randrange(32, 127)) + text[place + 1 :] if rng.random() < 0.7 else "")
        return
    if not arrays:
        return
    name = rng.choice(sorted(arrays))
    array = arrays[name].copy()
    changes = ["drop", "short", "flat", "type", "empty", "wide"] + ["content"] * 4 * (array.size > 0)
    change = rng.choice(changes)
    if change == "drop":
        del arrays[name]
        return
    if change == "content":
        limit = [-1, 0, 1, -(2**31), 2**31 - 1, 10**6]
        array.flat[rng.randrange(array.size)] = rng.choice(limit) if array.dtype.kind in "iu" else rng.choice([0, 1])
    changed = {
        "content": array, "short": array[:-1], "flat": array.ravel(), "wide": np.repeat(array, 2, axis=-1),
        "type": array.astype(rng.choice(["f4", "f8", "i4", "i8", "?"])), "empty": array[:0],
    }  # fmt: skip
    arrays[name] = np.ascontiguousarray(changed[change])


@pytest.fixture(scope="module")
def files(runs, task, tmp_path_factory) -> dict[str, Path]:
    """One file in the present format of every kind."""
    folder = tmp_path_factory.mktemp("fitted")
    scores = np.random.default_rng(0).normal(size=(5, 12))
    fitted = {
        "mean": sf.MeanTrajectorySimulator(),
        "persistence": sf.PersistenceSimulator(),
        "linear": sf.LinearSimulator(l2=10.0, around="mean", order=2, varying=True),
        "boosted": sf.BoostedSimulator(rounds=5, min_rows=10),
        "featurized": sf.FeaturizedSimulator(components=2),
        "attributed": sf.AttributedSimulator(scores, around="mean"),
        "conformal": sf.ConformalSimulator(sf.BoostedSimulator(rounds=2, min_rows=10), members=2),
        "tangent": sf.TangentKernelSimulator(task, n_checkpoints=2, n_references=2, n_features=1),
    }
    for name, simulator in fitted.items():
        simulator.fit(runs).save(folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in fitted}


KINDS = ["mean", "persistence", "linear", "boosted", "featurized", "attributed", "conformal", "tangent"]


def check_mutations(path: Path, runs: sf.Runs, mutated: Path, count: int, seed: int) -> int:
    """Mutate a file many times, load it and simulate; return how many were refused."""
    original, rng, refused = read(path), random.Random(f"{path.stem} {seed}"), 0  # noqa: S311 (no secret)
    for _ in range(count):
        about, arrays = copy.deepcopy(original)
        mutate(about, arrays, rng)
        write(mutated, about, arrays)
        try:
            loaded = sf.Simulator.load(mutated)
        except StoreError as error:
            assert str(mutated) in str(error)  # noqa: PT017 (it need not raise)
            refused += 1
            continue
        with contextlib.suppress(SimfluenceError):
            loaded.simulate(runs.curricula[:1], runs.initial_losses[0])
    return refused


@pytest.mark.parametrize("name", KINDS)
def test_mutated_files_load_or_are_refused_by_name(name, files, runs, tmp_path):
    assert check_mutations(files[name], runs, tmp_path / "mutated.safetensors", MUTATIONS, 0) > MUTATIONS / 5


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.stem)
def test_mutated_files_of_older_formats_load_or_are_refused_by_name(path, runs, tmp_path):
    assert check_mutations(path, runs, tmp_path / "mutated.safetensors", MUTATIONS // 2, 0) > MUTATIONS / 15


@pytest.mark.parametrize("name", KINDS)
def test_flipped_bytes_are_noticed(name, files, tmp_path):
    content, rng = files[name].read_bytes(), random.Random(name)  # noqa: S311 (no secret)
    mutated = tmp_path / "mutated.safetensors"
    for _ in range(30):
        changed = bytearray(content)
        place = rng.randrange(len(changed))
        changed[place] ^= 1 << rng.randrange(8)
        mutated.write_bytes(bytes(changed))
        with pytest.raises(StoreError, match=r"mutated\.safetensors"):
            sf.Simulator.load(mutated)
    for wrong in (tmp_path, tmp_path / "none" / "file"):
        with pytest.raises(StoreError, match=str(wrong)):
            sf.Simulator.load(wrong)


@pytest.mark.parametrize("name", KINDS)
def test_files_with_a_number_that_is_not_finite_are_refused(name, files, tmp_path):
    about, arrays = read(files[name])
    numbers = {key for key, array in arrays.items() if array.dtype.kind == "f" and array.size}
    for key in numbers:
        for wrong in (np.nan, np.inf, -np.inf):
            changed = arrays[key].copy()
            changed.flat[-1] = wrong
            write(tmp_path / "changed.safetensors", about, arrays | {key: changed})
            with pytest.raises(StoreError, match="has a NaN or an infinity"):
                sf.Simulator.load(tmp_path / "changed.safetensors")
