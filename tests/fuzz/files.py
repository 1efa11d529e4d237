"""Damaged and edited files for every reader: each is refused by an error of ours, or read as what it is.

    python tests/fuzz/files.py --files 10000 --seed 0

Every mutation is read in a child process of its own, so that a crash, a hang or a flood of memory is counted and not
suffered. Of files that carry a checksum, a changed content that is read without a word counts as wrong, too.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.numpy
import torch

import simfluence as sf
from simfluence.specs import RecordingSpec, WhatIfSpec
from simfluence.storage.run_file import read_table, to_bytes
from simfluence.tasks.text.tables import read_rows

SECONDS = 20
GIBIBYTES = 1.0


@dataclass(frozen=True)
class Case:
    """A kind of file: where it lies, how it is read, and how its parts are edited with a right checksum.

    ``signed``: the file carries a checksum, so that a damaged one must not be read as something else.
    """

    name: str
    path: Path
    read: Callable[[], str]
    signed: bool = False
    edit: Callable[[random.Random, bytes], bytes] | None = None


def damaged(rng: random.Random, content: bytes) -> bytes:
    """Flip, cut, repeat, insert or zero bytes, as disks and networks do."""
    bytes_, place = bytearray(content), rng.randrange(max(1, len(content)))
    kind = rng.randrange(6)
    if kind == 0:
        for _ in range(rng.choice([1, 1, 1, 8])):
            bytes_[rng.randrange(len(bytes_))] ^= 1 << rng.randrange(8)
    elif kind == 1:
        del bytes_[place:]
    elif kind == 2:
        bytes_[place:place] = bytes_[rng.randrange(len(bytes_)) :][: rng.randrange(1, 200)]
    elif kind == 3:
        bytes_[place : place + 512] = bytes(len(bytes_[place : place + 512]))
    elif kind == 4:
        bytes_ += bytes(rng.randrange(1, 5000))
    else:
        bytes_[place : place + 8] = rng.randbytes(8)
    return bytes(bytes_)


SCALARS = [
    None,
    True,
    -1,
    0,
    2,
    1.5,
    10**9,
    2**63,
    10**30,
    1e300,
    float("nan"),
    "",
    "x",
    "../../x",
    "a" * 10_000,
    [],
    {},
    [[]],
    {"a": {}},
]


def edited_json(rng: random.Random, content: Any) -> Any:
    """Replace, remove or add one value somewhere in JSON content."""
    if isinstance(content, dict) and content and rng.random() < 0.85:
        key = rng.choice(list(content))
        if rng.random() < 0.2:
            return {k: v for k, v in content.items() if k != key}
        if rng.random() < 0.1:
            return content | {"unknown": rng.choice(SCALARS)}
        return content | {key: edited_json(rng, content[key])}
    if isinstance(content, list) and content and rng.random() < 0.85:
        place = rng.randrange(len(content))
        return [*content[:place], edited_json(rng, content[place]), *content[place + rng.randrange(2) :]]
    if isinstance(content, int | float) and not isinstance(content, bool) and rng.random() < 0.4:
        return content * rng.choice([-1, 0, 2, 1000, 0.5]) + rng.choice([0, 1])
    return rng.choice(SCALARS)


def edited_json_file(rng: random.Random, content: bytes) -> bytes:
    return json.dumps(edited_json(rng, json.loads(content))).encode()


def edited_run_file(rng: random.Random, content: bytes) -> bytes:
    """Edit the header of a run file, and sign it again."""
    with tempfile.NamedTemporaryFile(suffix=".parquet") as file:
        file.write(content)
        file.flush()
        table, metadata = read_table(Path(file.name))
    about = edited_json(rng, json.loads(metadata[b"simfluence"]))
    if rng.random() < 0.2:
        table = table.drop_columns([rng.choice(table.column_names)])
    elif rng.random() < 0.2:
        table = table.slice(0, rng.randrange(len(table)))
    return to_bytes(table.replace_schema_metadata({b"simfluence": json.dumps(about).encode()}))


def edited_simulator(rng: random.Random, content: bytes) -> bytes:
    """Edit the JSON or an array of a simulator file, and sign it again."""
    from simfluence.simulators.base import _checksum

    arrays = safetensors.numpy.load(content)
    length = int.from_bytes(content[:8], "little")
    text = json.loads(content[8 : 8 + length])["__metadata__"]["simfluence"]
    if arrays and rng.random() < 0.5:
        name = rng.choice(list(arrays))
        array = arrays[name]
        changed = {
            0: lambda: array[: len(array) // 2] if array.ndim else array,
            1: lambda: array.reshape(-1),
            2: lambda: (array * 1e30 if array.dtype.kind == "f" else array * 0 - 7).astype(array.dtype),
            3: lambda: array.astype(np.float16 if array.dtype.kind == "f" else np.int8),
            4: lambda: np.full_like(array, np.nan) if array.dtype.kind == "f" else array * 0 + 2**30 % 127,
        }
        with np.errstate(all="ignore"):
            arrays[name] = np.ascontiguousarray(changed[rng.randrange(5)]())
        if rng.random() < 0.2:
            del arrays[name]
    else:
        text = json.dumps(edited_json(rng, json.loads(text)))
    return safetensors.numpy.save(arrays, {"simfluence": text, "sha256": _checksum(text, arrays)})


def edited_text(rng: random.Random, content: bytes) -> bytes:
    """Edit YAML, CSV or JSON lines: words, marks, numbers and lines."""
    lines = content.decode().split("\n")
    place = rng.randrange(len(lines))
    pieces = [
        "&a [1]",
        "*a",
        "!!python/object:os.system x",
        "? [1]",
        "2024-13-45",
        "9" * 5000,
        "0x",
        "1e999",
        "{",
        "[[[[" * 500,
        "~",
        "- - -",
        "\t",
        "'",
        '"',
        "label == " * 300,
        "!!binary x",
        "1:99:99",
        "!!set {a}",
        "<<: 3",
        "\ufeff",
        "\x00",
        "a: b: c",
        "runs: 999999999",
        "kind: [subset]",
        "steps: 1.5",
        "NA",
        ",,,,",
        "01",
    ]
    kind = rng.randrange(4)
    if kind == 0:
        lines.insert(place, rng.choice(pieces))
    elif kind == 1:
        lines[place] = lines[place][: rng.randrange(len(lines[place]) + 1)] + rng.choice(pieces)
    elif kind == 2:
        key = lines[place].split(":")[0]
        lines[place] = f"{key}: {rng.choice(pieces)}"
    else:
        del lines[place]
    return "\n".join(lines).encode(errors="replace")


RECORDING = """
task: {name: digits, arguments: {n_train: 20, n_test: 5}}
recipe: {lr: 0.1, schedule: linear, horizon: 9}
curricula:
  kind: staged
  column: label
  runs: 2
  steps: 20
  batch_size: 4
  subset: 1.0
observe: {every: 2}
"""
QUERIES = """
queries:
  none:
    - edit: remove
      target: label == 3
    - {edit: shuffle, seed: 3}
  twice: {edit: repeat, target: [0, 1], times: 2}
"""


def digest(*values: Any) -> str:
    hasher = hashlib.sha256()
    for value in values:
        hasher.update(np.ascontiguousarray(value).tobytes() if isinstance(value, np.ndarray) else repr(value).encode())
    return hasher.hexdigest()


def cases(folder: Path) -> list[Case]:
    """Make a file of every kind, and say how it is read."""
    task = sf.tasks.digits(n_train=20, n_test=5)
    recipe, curricula = sf.Recipe(lr=0.1), sf.random_curricula(n_train=20, runs=4, steps=8, batch_size=4)
    store = sf.RunStore(folder / "store")
    runs = sf.record(task, recipe, curricula, store.path, observe=sf.Observe(checkpoints=(8,)))
    run = runs[0]

    def load() -> str:
        loaded = store.load()
        parts = [(one.id, one.curriculum.digest, one.losses, one.recipe) for one in loaded]
        train, test = loaded.train, loaded.test
        return digest(
            *(value for part in parts for value in part), train.table.to_csv(), test.table.to_csv(), train.features
        )

    found = [
        Case("run", store.path / f"run-{run.id}.parquet", load, True, edited_run_file),
        Case("train.parquet", store.path / "train.parquet", load, True),
        Case("store.json", store.path / "store.json", load, False, edited_json_file),
        Case("checkpoint", run.checkpoints[8], lambda: digest(*_state(sf.Checkpoint.load(run.checkpoints[8]))), True),
    ]
    for simulator in _simulators(task, runs):
        path = folder / f"{simulator.name}.safetensors"
        simulator.save(path)
        found.append(Case(simulator.name, path, _simulating(path, run), True, edited_simulator))
    texts = {
        "record.yaml": RECORDING,
        "what_if.yaml": QUERIES,
        "rows.csv": "id,text,label\n01,one fish,a\n02,NA,b\n03,red fish,a\n",
        "rows.jsonl": '{"text": "one", "label": 1}\n{"text": "two", "label": 0}\n',
    }
    readers: dict[str, Callable[[Path], Any]] = {
        "record.yaml": lambda path: RecordingSpec.read(path).curricula.build(task.train),
        "what_if.yaml": WhatIfSpec.read,
        "rows.csv": read_rows,
        "rows.jsonl": read_rows,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
        found.append(Case(name, folder / name, _reading(readers[name], folder / name), False, edited_text))
    return found


def _reading(reader: Callable[[Path], Any], path: Path) -> Callable[[], str]:
    return lambda: digest(repr(reader(path)))


def _state(checkpoint: sf.Checkpoint) -> list[Any]:
    return [checkpoint.step, *(tensor.numpy() for _, tensor in sorted(checkpoint.model.items()))]


def _simulators(task: sf.Task, runs: sf.Runs) -> list[sf.Simulator]:
    simulators = [
        sf.AdditiveSimulator(),
        sf.LinearSimulator(order=2),
        sf.MultiplicativeSimulator(),
        sf.MeanTrajectorySimulator(),
        sf.PersistenceSimulator(),
        sf.FeaturizedSimulator(components=2),
        sf.BoostedSimulator(rounds=3, min_rows=2),
        sf.ConformalSimulator(sf.AdditiveSimulator(), members=2, folds=2),
        sf.TangentKernelSimulator(task),
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [simulator.fit(runs) for simulator in simulators]


def _simulating(path: Path, run: sf.Run) -> Callable[[], str]:
    def read() -> str:
        simulator = sf.Simulator.load(path)
        with np.errstate(all="ignore"):
            return digest(simulator.simulate([run.curriculum], run.initial_losses))

    return read


def outcome(case: Case, right: str) -> str:
    """Read in a child process; return "ok", "refused", "changed" or what went wrong."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        os.write(writing, _read(case, right).encode()[:4000])
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        said = pipe.read().decode()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return f"killed by {signal.Signals(os.WTERMSIG(status)).name}"
    return said or f"exit {os.WEXITSTATUS(status)}"


def _read(case: Case, right: str) -> str:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = "ok" if case.read() == right else "changed"
    except sf.SimfluenceError:
        said = "refused"
    except BaseException as error:
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/simfluence/" in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
        said = f"{type(error).__name__} at {where}: {str(error)[:100]!r}"
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    return said if grown < GIBIBYTES else f"{grown:.1f} GiB"


def main() -> int:
    """Mutate and read, print what went wrong, and return how many kinds of it there were."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp())
    rng = random.Random(arguments.seed)
    counts: collections.Counter[str] = collections.Counter()
    wrong: collections.Counter[str] = collections.Counter()
    seconds: collections.Counter[str] = collections.Counter()
    try:
        every = [case for case in cases(folder) if arguments.only in case.name]
        if not every:
            parser.error(f"no case has {arguments.only!r} in its name")
        originals = [(case.path.read_bytes(), case.read()) for case in every]
        for number in range(arguments.files):
            place = number % len(every)
            case, (content, right) = every[place], originals[place]
            by_edit = case.edit is not None and rng.random() < 0.5
            mutation = case.edit(rng, content) if by_edit and case.edit else damaged(rng, content)
            case.path.write_bytes(mutation)
            start = time.perf_counter()
            said = outcome(case, right)
            seconds[case.name] += time.perf_counter() - start
            silent = said == "changed" and case.signed and not by_edit
            case.path.write_bytes(content)
            plain = said in ("ok", "refused", "changed") and not silent
            counts[said if plain else "wrong"] += 1
            if not plain:
                wrong[f"{case.name}: {'damaged and read without a word' if silent else said}"] += 1
    finally:
        shutil.rmtree(folder)
    for place, count in sorted(wrong.items()):
        print(f"{count:4d}  {place}")
    print(f"{arguments.files} files: {dict(counts)}; slowest kinds: {seconds.most_common(3)}")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(min(main(), 100))
