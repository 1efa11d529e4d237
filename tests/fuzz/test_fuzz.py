"""Two minutes' worth of the fuzzers, for ``make fuzz-ci``; ``make fuzz`` runs them for longer.

They run in processes of their own, without the tests' runtime type checker, which would refuse wrong types first.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.fuzz

HERE = Path(__file__).parent

RUNS = {"calls.py": ["--calls", "2000"], "files.py": ["--files", "2000"], "kills.py": ["--kills", "54"]}


@pytest.mark.parametrize("script", RUNS)
def test_nothing_but_our_own_errors(script):
    command = [sys.executable, str(HERE / script), *RUNS[script], "--seed", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
