"""The command line, killed, interrupted and run by several processes while it records."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sys
import time
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import simfluence as sf
from simfluence import cli
from simfluence.recording import session
from simfluence.recording.plan import RunGroup

RUNS = 6

SPEC = f"""
task: {{name: digits, arguments: {{n_train: 60, n_test: 20}}}}
recipe: {{optimizer: adam, lr: 0.003}}
curricula: {{runs: {RUNS}, steps: 150, batch_size: 8, subset: 0.5, seed: 0}}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "spec.yaml").write_text(SPEC)
    for engine in ("loop", "batched"):
        assert ended(start(folder, f"whole-{engine}", engine)) == 0
    return folder


#: Starts processes that have already imported what a recording imports: this takes longer than the recording.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(
    ["torch", "torch._dynamo", "sklearn.datasets", "matplotlib.pyplot", "pytest", "simfluence.cli"]
)


def record_from_the_command_line(folder: Path, store: str, engine: str) -> None:
    """On one thread; unfinished runs are kept on disk every 50 ms, and trainings that it starts are written down."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it be ignored
    os.chdir(folder)
    with open(f"{store}.err", "w") as errors:
        os.dup2(errors.fileno(), 2)
    torch.set_num_threads(1)
    session.SECONDS_BETWEEN_SAVES = 0.05
    begin = RunGroup.start

    def noted(self: RunGroup, *arguments: Any) -> Any:
        with open(f"{store}.{os.getpid()}.started", "a") as file:
            file.write(f"{self.name}\n")
        return begin(self, *arguments)

    RunGroup.start = noted
    sys.argv = ["simfluence", "record", "spec.yaml", "--store", store, "--engine", engine]
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (as long as the process lives)
    cli.main()


def start(folder: Path, store: str, engine: str) -> ForkServerProcess:
    process = PROCESSES.Process(target=record_from_the_command_line, args=(folder, store, engine))
    process.start()
    return process


def ended(process: ForkServerProcess) -> int:
    """Its exit code, once it has one; that of the signal that killed it, negative."""
    process.join()
    return process.exitcode


def wait_until_recording(process: ForkServerProcess, store: Path) -> None:
    """Until the process has claimed its next runs."""
    deadline = time.monotonic() + 60
    while process.exitcode is None and time.monotonic() < deadline:
        if (store / "partial").is_dir() and any((store / "partial").iterdir()):
            return
        time.sleep(0.005)


def kill_and_start_again(folder: Path, engine: str, kills: int) -> None:
    """Kill so many recorders at random moments; whenever one gets through, look at its store and begin another."""
    rng = random.Random(kills)  # noqa: S311 (moments, not secrets)
    killed, stores = 0, 0
    while killed < kills:
        name = f"killed-{engine}-{kills}-{stores}"
        process = start(folder, name, engine)
        wait_until_recording(process, folder / name)
        time.sleep(rng.uniform(0, 0.3))
        if process.exitcode is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += ended(process) == -signal.SIGKILL
        else:
            check(folder, name, engine)
            stores += 1
    check(folder, name, engine)


def check(folder: Path, name: str, engine: str) -> None:
    """The store is as an uninterrupted recording leaves it."""
    assert ended(start(folder, name, engine)) == 0, (folder / f"{name}.err").read_text()
    whole, broken = sf.RunStore(folder / f"whole-{engine}").load(), sf.RunStore(folder / name).load()
    assert broken.ids == whole.ids
    assert len(broken) == RUNS
    assert np.array_equal(broken.losses, whole.losses)
    expected = {path.name for path in (folder / f"whole-{engine}").iterdir()}
    assert {path.name for path in (folder / name).iterdir()} == expected


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_kill_and_start_again(folder, engine):
    kill_and_start_again(folder, engine, kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_kill_and_start_again_at_twenty_moments(folder, engine):
    kill_and_start_again(folder, engine, kills=20)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_ctrl_c_says_how_to_go_on(folder, engine):
    name = f"stopped-{engine}"
    process = start(folder, name, engine)
    wait_until_recording(process, folder / name)
    os.kill(process.pid, signal.SIGINT)
    assert ended(process) == 130
    assert "run the same command again to continue" in (folder / f"{name}.err").read_text()
    check(folder, name, engine)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_four_processes_record_into_one_store(folder, engine):
    name = f"shared-{engine}"
    processes = [start(folder, name, engine) for _ in range(4)]
    assert [ended(process) for process in processes] == [0] * 4, (folder / f"{name}.err").read_text()
    started = [line for file in folder.glob(f"{name}.*.started") for line in file.read_text().split()]
    assert len(started) == len(set(started)) == (RUNS if engine == "loop" else 1)  # no run's work was done twice
    check(folder, name, engine)
