"""The command line, killed and interrupted while it records, and started again."""

from __future__ import annotations

import os
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
curricula: {runs: 12, steps: 400, batch_size: 8, subset: 0.5, seed: 0}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    (folder / "spec.yaml").write_text(SPEC)
    start(folder, "whole").wait()
    return folder


def start(folder: Path, store: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "simfluence", "record", "spec.yaml", "--store", store]
    with open(folder / f"{store}.err", "w") as errors:
        return subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=errors)


def stop_after(process: subprocess.Popen[bytes], store: Path, runs: int, signal_number: int) -> None:
    """Send the signal in the middle of the next run, once so many are whole."""
    deadline = time.monotonic() + 60
    while len(list(store.glob("run-*.parquet"))) < runs and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    os.kill(process.pid, signal_number)
    process.wait()


def check(folder: Path, name: str) -> None:
    assert start(folder, name).wait() == 0
    whole, broken = sf.RunStore(folder / "whole").load(), sf.RunStore(folder / name).load()
    assert broken.ids == whole.ids
    assert len(broken) == 12
    assert np.array_equal(broken.losses, whole.losses)
    assert {path.name for path in (folder / name).iterdir()} == {path.name for path in (folder / "whole").iterdir()}


def test_kill_and_start_again(folder):
    for runs in (0, 3, 7):
        stop_after(start(folder, "killed"), folder / "killed", runs, signal.SIGKILL)
        assert len(list((folder / "killed").glob("run-*.parquet"))) < 12
    check(folder, "killed")


def test_ctrl_c_says_how_to_go_on(folder):
    process = start(folder, "stopped")
    stop_after(process, folder / "stopped", 2, signal.SIGINT)
    assert process.returncode == 130
    assert "the same command goes on from there" in (folder / "stopped.err").read_text()
    check(folder, "stopped")
