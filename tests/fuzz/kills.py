"""Processes killed at random moments, six at a time, while they write: nothing may be lost, wrong or short.

    python tests/fuzz/kills.py --kills 300 --seed 0

Every operation is begun by six processes at once and killed, again and again; then it is run to its end, and the result
must be what an undisturbed run of it gives.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

import simfluence as sf
from simfluence.recording import session

PROCESSES = 6
N_TRAIN, N_TEST = 20, 5


@dataclass(frozen=True)
class Operation:
    """One thing that is killed: ``work(k, turn)`` by process k, in turn after turn, and then ``check(turns)``."""

    name: str
    work: Callable[[int, int], Any]
    check: Callable[[int], None]
    may_refuse: bool = False  # such as a copy to a folder that has one


def same(one: Any, other: Any) -> None:
    if not np.array_equal(np.asarray(one), np.asarray(other)):
        raise AssertionError("the results differ from those of an undisturbed run")


def operations(folder: Path) -> list[Operation]:
    """Prepare every operation in a folder of its own."""
    task, recipe = sf.tasks.digits(n_train=N_TRAIN, n_test=N_TEST), sf.Recipe(optimizer="adam", lr=0.01)
    curricula = sf.random_curricula(n_train=N_TRAIN, runs=6, steps=60, batch_size=4, subset=0.8)
    truth = sf.record(task, recipe, curricula)
    source = sf.RunStore(folder / "source")
    sf.record(task, recipe, curricula, source.path)
    simulator = sf.AdditiveSimulator().fit(source.load())
    forecast = sf.what_if(simulator, source.load()[0], sf.Remove([0, 1]), task=task)
    verified = forecast.verify().actual
    batches = [curricula[0][step].tolist() for step in range(40)]
    losses = np.random.default_rng(0).random((41, N_TEST)).astype(np.float32)
    tuned = sf.tune("additive", truth, trials=6, folds=2, progress=False)

    def recording(engine: str) -> Operation:
        path = folder / engine

        def work(k: int, turn: int) -> sf.Runs:
            return sf.record(task, recipe.replace(seed=turn), curricula, path, engine=engine)

        def check(turns: int) -> None:
            for turn in range(turns):
                whole = sf.record(task, recipe.replace(seed=turn), curricula, engine=engine)
                same(_losses(work(0, turn)), _losses(whole))
            same(len(sf.RunStore(path).ids()), turns * len(curricula))

        return Operation(f"record, {engine}", work, check)

    def by_recorder(k: int, turn: int) -> None:
        name = f"run{k}-{turn}"
        store = sf.RunStore(folder / "recorder")
        train, test = [f"a{i}" for i in range(N_TRAIN)], [f"b{i}" for i in range(N_TEST)]
        for resume in (10, 0) if store.exists and name in store.unfinished() else (0,):
            try:
                with store.recorder(name, train=train, test=test, resume=resume) as recorder:
                    if resume == 0:
                        recorder.read(losses[0].tolist())
                    for step in range(resume, 40):
                        recorder.step([f"a{i}" for i in batches[step]], losses[step + 1].tolist())
                return
            except sf.SimfluenceError:  # fewer than ten steps are on disk, or the run is finished
                if name in store.ids():
                    return

    def check_recorder(turns: int) -> None:
        names = [f"run{k}-{turn}" for k in range(PROCESSES) for turn in range(turns)]
        for k in range(PROCESSES):
            for turn in range(turns):
                by_recorder(k, turn)
        runs = sf.RunStore(folder / "recorder").load()
        same(sorted(set(names) - set(runs.ids)), [])
        for run in runs:
            same(run.losses, losses)
            same(run.curriculum.tolist(), batches)

    def add(k: int, turn: int) -> None:
        run = source.load()[0]
        sf.RunStore(folder / "adding").add(replace(run, measures={f"m{k}": np.full_like(run.losses, k)}))

    def check_adding(turns: int) -> None:
        for k in range(PROCESSES):
            add(k, 0)
        run = next(run for run in sf.RunStore(folder / "adding").load() if run.measures)
        same(sorted(run.measures), [f"m{k}" for k in range(PROCESSES)])
        for k in range(PROCESSES):
            same(run.measures[f"m{k}"], np.full_like(run.losses, k))

    def verify(k: int, turn: int) -> np.ndarray:
        return forecast.verify(store=folder / f"verify{turn}").actual

    def tune(k: int, turn: int) -> float:
        storage = folder / f"tune{turn}.sqlite"
        return sf.tune("additive", truth, trials=6, folds=2, storage=storage, progress=False).l2

    def merge(k: int, turn: int) -> np.ndarray:
        target = folder / f"merged{turn}"
        if not sf.RunStore(target).exists:
            sf.RunStore(target).open_for(task)
        sf.RunStore(target).merge(source)
        return _losses(sf.RunStore(target).load())

    def check_save(turns: int) -> None:
        same(sf.Simulator.load(saved).B_, simulator.B_)
        simulator.save(saved)
        same(sorted(path.name for path in saved.parent.iterdir()), [saved.name])

    def all_the_same(work: Callable[[int, int], Any], right: Any) -> Callable[[int], None]:
        return lambda turns: [same(work(0, turn), right) for turn in range(turns)].clear()

    source.copy(folder / "adding")
    saved = folder / "saved" / "simulator.safetensors"
    simulator.save(saved)
    return [
        recording("loop"),
        recording("batched"),
        Operation("recorder", by_recorder, check_recorder),
        Operation("verify", verify, all_the_same(verify, verified)),
        Operation("tune", tune, all_the_same(tune, tuned.l2)),
        Operation("save", lambda k, turn: simulator.save(saved), check_save),
        Operation("merge", merge, all_the_same(merge, _losses(source.load()))),
        Operation(
            "copy",
            lambda k, turn: source.copy(folder / f"copy{k}-{turn}"),
            lambda turns: _check_copies(source, folder),
            True,
        ),
        Operation("add", add, check_adding),
    ]


def _check_copies(source: sf.RunStore, folder: Path) -> None:
    """An interrupted copy is refused, and never loads short."""
    for path in folder.glob("copy*"):
        try:
            runs = sf.RunStore(path).load()
        except sf.SimfluenceError:
            continue
        same(_losses(runs), _losses(source.load()))


def _losses(runs: sf.Runs) -> np.ndarray:
    return np.stack([run.losses for run in sorted(runs, key=lambda run: run.curriculum.digest)])


def begun(operation: Operation, k: int, turn: int) -> int:
    """Begin an operation in a child process, turn after turn until it is killed; return its process id."""
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    while True:
        try:
            operation.work(k, turn)
        except sf.SimfluenceError:
            if not operation.may_refuse:
                os._exit(1)
            time.sleep(0.01)
        except BaseException:
            os._exit(1)


def killed(operation: Operation, rng: random.Random, turn: int) -> int:
    """Begin six processes, kill them at moments of their own, and return how many had not ended by themselves."""
    children = [begun(operation, k, turn) for k in range(PROCESSES)]
    count = 0
    for child in children:
        time.sleep(rng.uniform(0, 0.05) if rng.random() < 0.7 else rng.uniform(0, 0.3))
        os.kill(child, signal.SIGKILL)
        count += os.WIFSIGNALED(os.waitpid(child, 0)[1])
    if count < PROCESSES:
        raise AssertionError(f"{PROCESSES - count} processes ended with an error")
    return count


def main() -> int:
    """Kill, check, print what went wrong, and return how many operations it went wrong with."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    session.SECONDS_BETWEEN_SAVES = 0.0
    rng = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp())
    failed = total = 0
    try:
        every = [operation for operation in operations(folder) if arguments.only in operation.name]
        if not every:
            parser.error(f"no operation has {arguments.only!r} in its name")
        for operation in every:
            turns = -(-arguments.kills // (len(every) * PROCESSES))
            try:
                count = sum(killed(operation, rng, turn) for turn in range(turns))
                operation.check(turns)
                total += count
                print(f"{operation.name}: {count} kills, nothing lost")
            except Exception:
                failed += 1
                print(f"{operation.name}:\n{traceback.format_exc()}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"{total} kills, {failed} operations went wrong")
    return failed


if __name__ == "__main__":
    sys.exit(main())
