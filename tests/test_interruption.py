"""The command line, killed, interrupted and run by several processes while it records."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import simfluence as sf

SPEC = """
task: {name: digits, arguments: {n_train: 60, n_test: 20}}
recipe: {optimizer: adam, lr: 0.003}
curricula: {runs: 32, steps: 200, batch_size: 8, subset: 0.5, seed: 0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "spec.yaml").write_text(SPEC)
    for engine in ("loop", "batched"):
        assert start(folder, f"whole-{engine}", engine).wait() == 0
    return folder


#: Records on one thread, keeps unfinished runs on disk every 50 ms, and counts the trainings it starts.
RECORDER = """
import atexit, os, signal, sys, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it be ignored
torch.set_num_threads(1)
from simfluence import cli
from simfluence.recording import session
from simfluence.recording.engines import Group
session.SECONDS_BETWEEN_SAVES = 0.05
started, start = [], Group.start
Group.start = lambda self, *arguments: started.append(self.name) or start(self, *arguments)
atexit.register(lambda: open(f"{sys.argv[4]}.{os.getpid()}.started", "w").write(chr(10).join(started)))
cli.main()
"""


def start(folder: Path, store: str, engine: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", RECORDER, "record", "spec.yaml", "--store", store, "--engine", engine]
    with open(folder / f"{store}.err", "w") as errors:
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)


def wait_until_recording(process: subprocess.Popen[bytes], store: Path) -> None:
    """Until the process has claimed its next runs."""
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
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
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        else:
            check(folder, name, engine)
            stores += 1
    check(folder, name, engine)


def check(folder: Path, name: str, engine: str) -> None:
    """The store is as an uninterrupted recording leaves it."""
    assert start(folder, name, engine).wait() == 0, (folder / f"{name}.err").read_text()
    whole, broken = sf.RunStore(folder / f"whole-{engine}").load(), sf.RunStore(folder / name).load()
    assert broken.ids == whole.ids
    assert len(broken) == 32
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
    assert process.wait() == 130
    assert "the same command goes on from there" in (folder / f"{name}.err").read_text()
    check(folder, name, engine)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_four_processes_record_into_one_store(folder, engine):
    name = f"shared-{engine}"
    processes = [start(folder, name, engine) for _ in range(4)]
    assert [process.wait() for process in processes] == [0] * 4, (folder / f"{name}.err").read_text()
    started = [line for file in folder.glob(f"{name}.*.started") for line in file.read_text().split()]
    assert len(started) == len(set(started)) == (32 if engine == "loop" else 1)  # no run's work was done twice
    check(folder, name, engine)
