"""Loops of a user's own, recorded: the same runs as ``record``'s, whatever happens to the process."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

import simfluence as sf
from simfluence.errors import InvalidInput, StoreError
from simfluence.storage import journal as journal_module
from simfluence.storage import recorder as recorder_module
from simfluence.storage import run_file

TRAIN, TEST = [f"t{i}" for i in range(6)], ["x", "y", "z"]


def loop(task, curriculum, rec, lr=0.3, every=1):
    """A training loop as a person writes it, with a recorder in it."""
    model = task.build_model(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    X, y = task.train_data

    def evaluate():
        with torch.no_grad():
            return nn.functional.cross_entropy(model(task.test_data[0]), task.test_data[1], reduction="none")

    rec.read(evaluate())
    for step, batch in enumerate(curriculum):
        rows = torch.tensor(batch).long()
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(X[rows]), y[rows]).backward()
        optimizer.step()
        read = (step + 1) % every == 0 or step + 1 == len(curriculum)
        rec.step([task.train.ids[i] for i in batch], evaluate() if read else None, lr=lr)


@pytest.fixture(scope="module")
def recorded(task, curricula, tmp_path_factory):
    store = sf.RunStore(tmp_path_factory.mktemp("own") / "store")
    for number, curriculum in enumerate(curricula):
        sides = {"train": task.train, "test": task.test} if number == 0 else {}
        with store.recorder(f"run-{number}", task="mine", **sides) as rec:
            loop(task, curriculum, rec)
    return store.load()


def test_the_same_as_record(recorded, runs, curricula, task):
    assert recorded.ids == [f"run-{number}" for number in range(6)]
    assert recorded.curricula == curricula
    assert np.allclose(recorded.losses, runs.losses, rtol=1e-5, atol=1e-6)
    assert recorded.losses.dtype == np.float32
    run = recorded[0]
    assert run.learning_rates.tolist() == [0.3] * 10
    assert (run.engine, run.recipe, run.diverged) == ("recorder", None, False)
    assert run.train.table.equals(task.train.table)
    assert np.array_equal(run.train.features, task.train.features)


def test_every_simulator_takes_them(recorded, task):
    fit, held = recorded.split(held_out=2, seed=0)
    simulators = {
        "linear": sf.LinearSimulator(l2=10.0), "additive": sf.AdditiveSimulator(), "mean": sf.MeanTrajectorySimulator(),
        "featurized": sf.FeaturizedSimulator(), "persistence": sf.PersistenceSimulator(),
        "boosted": sf.BoostedSimulator(),
    }  # fmt: skip
    fitted = {name: simulator.fit(fit) for name, simulator in simulators.items()}
    table = sf.evaluate(fitted, held, baseline_runs=fit)
    assert np.isfinite(table["mse"]).all()
    forecast = sf.what_if(fitted["linear"], held[0], sf.Remove("label == 1"))
    assert np.isfinite(forecast.what_if).all()
    with pytest.raises(InvalidInput, match="pass task="):
        forecast.verify()


def test_into_the_store_of_a_task(store, task, recipe, curricula, runs):
    with store.recorder("by-hand", task=task, recipe=recipe) as rec:
        loop(task, curricula[0], rec)
    run = store.read("by-hand")
    assert (run.fingerprint, run.recipe) == (task.fingerprint, recipe)
    assert np.allclose(run.losses, runs[0].losses, rtol=1e-5, atol=1e-6)
    forecast = sf.what_if(sf.LinearSimulator(l2=10.0).fit(store.load()), run, sf.Remove([0]), task=task)
    assert np.isfinite(forecast.verify().actual).all()


def test_gaps_measures_ragged_and_empty_batches(tmp_path):
    store = sf.RunStore(tmp_path)
    measures = [{"margin": np.array([m, 0.0, -m])} for m in (0.25, 0.5)]
    with store.recorder("a", train=TRAIN, test=TEST, measures=["margin"], recipe=sf.Recipe(dtype="float64")) as rec:
        rec.read(np.array([1 / 3, 2.0, 3.0]), measures[0])
        rec.step(["t3", "t3", "t0"])
        rec.step([])
        rec.step(torch.tensor([5, 1]), lr=0.5)
        rec.read(torch.tensor([-1.0, float("nan"), 1e-300], dtype=torch.float64), measures[1])
    run = store.read("a")
    assert run.curriculum.tolist() == [[3, 3, 0], [], [5, 1]]
    assert run.curriculum.n_train == 6
    assert run.times.tolist() == [0, 3]
    assert run.losses.dtype == np.float64
    assert np.array_equal(run.losses[[0, 3]], [[1 / 3, 2.0, 3.0], [-1.0, np.nan, 1e-300]], equal_nan=True)
    assert run.measures["margin"][3].tolist() == [0.5, 0.0, -0.5]
    assert np.isnan(run.measures["margin"][1:3]).all()
    assert np.array_equal(run.learning_rates, [np.nan, np.nan, 0.5], equal_nan=True)
    assert run.diverged
    assert store.unfinished() == []
    assert not (tmp_path / "partial").exists()


STEPS = 400


def long_loop(path, resume, report=lambda steps: None):
    """A loop that continues from its own checkpoint if it resumes."""
    rng = np.random.default_rng(0)
    with sf.RunStore(path).recorder("long", train=TRAIN, test=TEST, resume=resume) as rec:
        for step in range(STEPS):
            batch, losses = rng.integers(6, size=3), rng.normal(size=3)
            if step < rec.steps:
                continue
            if step == 0:
                rec.read(np.ones(3))
            rec.step(batch, losses)
            report(rec.steps)


KILLED = """
import sys, time
sys.path.insert(0, sys.argv[1])
from test_recorder import long_loop
def report(steps):
    print(steps, flush=True)
    time.sleep(0.005 if steps > 50 else 0.0)  # so that the kill comes before the end
long_loop(sys.argv[2], 0, report)
"""


def test_killed_and_gone_on_with(tmp_path):
    command = [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path / "killed")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        printed = [int(process.stdout.readline()) for _ in range(50)][-1]
        os.kill(process.pid, signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    store = sf.RunStore(tmp_path / "killed")
    assert store.ids() == []  # no run by halves
    assert len(store.load()) == 0
    assert store.unfinished() == ["long"]
    message = r"was interrupted after \d+ recorded steps.*resume="
    with pytest.raises(InvalidInput, match=message) as interrupted, store.recorder("long"):
        pass
    recorded = int(str(interrupted.value).split("after ")[1].split()[0])
    assert printed <= recorded < STEPS  # every step that it reported is in the journal
    long_loop(store.path, recorded - 7)
    long_loop(tmp_path / "whole", None)
    run, whole = store.read("long"), sf.RunStore(tmp_path / "whole").read("long")
    assert run.steps == STEPS
    assert np.array_equal(run.losses, whole.losses)
    assert run.curriculum == whole.curriculum
    assert store.unfinished() == []
    assert (store.path / "run-long.parquet").read_bytes() == (tmp_path / "whole" / "run-long.parquet").read_bytes()


def broken_off(path, steps=5):
    store = sf.RunStore(path)

    class Crash(Exception):
        pass

    with pytest.raises(Crash), store.recorder("a", train=TRAIN, test=TEST) as rec:  # noqa: PT012
        rec.read([0.0, 0.0, 0.0])
        for step in range(steps):
            rec.step([step % 6], [float(step + 1)] * 3)
        raise Crash
    return store, store.partial("a") / "journal.jsonl"


def test_a_torn_last_line_is_cut_off_a_damaged_one_found(tmp_path):
    store, journal = broken_off(tmp_path)
    content = journal.read_bytes()
    for cut in range(1, len(content.splitlines()[-1]) + 1):
        journal.write_bytes(content[:-cut])
        with pytest.raises(InvalidInput, match="after 4 recorded steps"), store.recorder("a"):
            pass
    with store.recorder("a", resume=4) as rec:
        rec.step([4], [5.0] * 3)
    assert store.read("a").losses[:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    store, journal = broken_off(tmp_path / "other")
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    journal.write_bytes(flipped)
    with pytest.raises(StoreError, match="damaged"), store.recorder("a", resume=2):
        pass


def outcome(store, steps=5):
    """Go on with a recording after all its steps: its losses if the store has a run of it then, else None."""
    with contextlib.suppress(InvalidInput, StoreError), store.recorder("a", resume=steps) as rec:
        rec.step([5], [-1.0] * 3)
    return (store.read("a").curriculum.tolist(), store.read("a").losses.tolist()) if "a" in store else None


def test_no_flipped_bit_is_gone_on_with(tmp_path):
    store, journal = broken_off(tmp_path, steps=3)
    content = journal.read_bytes()
    rng = np.random.default_rng(0)
    for place in rng.permutation(len(content))[:120]:
        flipped = bytearray(content)
        flipped[place] ^= 1 << int(rng.integers(8))
        journal.write_bytes(flipped)
        assert outcome(store, steps=3) is None
    lines = content.splitlines(keepends=True)
    for other in (
        [*lines[:2], *lines[3:]],
        [*lines[:3], lines[2], *lines[3:]],
        [*lines[:2], lines[3], lines[2], lines[4]],
    ):
        journal.write_bytes(b"".join(other))  # a line lost, repeated, moved
        assert outcome(store, steps=3) is None
        with pytest.raises(StoreError, match=r"journal.jsonl is damaged at byte .*resume=0"), store.recorder("a"):
            pass
    journal.write_bytes(content)
    assert outcome(store, steps=3) == ([[0], [1], [2], [5]], [[v] * 3 for v in (0.0, 1.0, 2.0, 3.0, -1.0)])


def test_a_damaged_recording_is_made_again(tmp_path):
    store, journal = broken_off(tmp_path)
    journal.write_bytes(journal.read_bytes().replace(b"a", b"b"))
    with pytest.raises(StoreError, match="start over with resume=0"), store.recorder("a"):
        pass
    with store.recorder("a", resume=0) as rec:
        rec.read([7.0] * 3)
        rec.step([1], [8.0] * 3)
    assert store.read("a").losses[:, 0].tolist() == [7, 8]


@pytest.mark.parametrize("event", [
    {"batch": [6]}, {"batch": [-1]}, {"batch": [True]}, {"batch": [0.5]}, {"batch": 3}, {"batch": [[0]]},
    {"batch": [2**80]}, {"batch": [0], "lr": "x"}, {"batch": [0], "losses": "AAAA"}, {"batch": [0], "losses": 5},
    {"batch": [0], "losses": "ä"}, {"batch": [0], "more": 1}, {"losses": None}, {"measure.m": "AAAA"},
])  # fmt: skip
def test_a_journal_of_a_stranger(tmp_path, event):
    store, journal = broken_off(tmp_path)
    last = list(journal_module.journal_entries(journal))[-1]
    with open(journal, "ab") as file:
        file.write(journal_module.journal_line(event, last.checksum)[0])
    with pytest.raises((StoreError, InvalidInput)), store.recorder("a", resume=6):
        pass
    assert store.ids() == []


def test_a_journal_changed_while_it_is_written_is_no_run(tmp_path):
    for change in (lambda content: content[:-1], lambda content: content[:-40], lambda content: b""):
        with pytest.raises(StoreError, match="is damaged"), started(tmp_path) as rec:  # noqa: PT012
            rec.read([1, 2, 3])
            rec.step([0], [1, 2, 3])
            rec.step([1], [4, 5, 6])
            journal = rec.store.partial("a") / "journal.jsonl"
            journal.write_bytes(change(journal.read_bytes()))
        assert sf.RunStore(tmp_path).ids() == []
        shutil.rmtree(tmp_path / "partial")


def test_resuming_keeps_what_it_is_told(tmp_path):
    store, journal = broken_off(tmp_path)
    with pytest.raises(InvalidInput, match="only 5 steps of run 'a' are recorded"), store.recorder("a", resume=6):
        pass
    with pytest.raises(StoreError, match="another recipe"), store.recorder("a", resume=2, recipe=sf.Recipe(lr=1.0)):
        pass
    assert len(journal.read_bytes().splitlines()) == 7  # refusing changed nothing
    with store.recorder("a", resume=2) as rec:
        assert rec.steps == 2
        rec.step([5], [-1.0] * 3)
    run = store.read("a")
    assert run.curriculum.tolist() == [[0], [1], [5]]
    assert run.losses[:, 0].tolist() == [0, 1, 2, -1]
    store, _ = broken_off(tmp_path / "anew")
    with store.recorder("a", resume=0, recipe=sf.Recipe(lr=1.0)) as rec:
        rec.read([0.5] * 3)
        rec.step([5], [-1.0] * 3)
    assert store.read("a").losses[:, 0].tolist() == [0.5, -1.0]


def test_memory_does_not_grow_with_the_run(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder_module, "BLOCK_NUMBERS", 20_000)
    peaks = []
    for steps in (40, 800):
        store = sf.RunStore(tmp_path / str(steps))
        test, losses = range(1000), np.random.default_rng(0).normal(size=1000)
        tracemalloc.start()
        with store.recorder("a", train=TRAIN, test=test) as rec:
            rec.read(losses)
            for _ in range(steps):
                rec.step([1, 2], losses)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        run = store.read("a")  # of several row groups
        assert run.steps == steps
        assert np.array_equal(run.losses, np.tile(losses.astype(np.float32), (steps + 1, 1)))
    assert 2 * peaks[1] < 800 * 1000 * 4
    assert peaks[1] < 1.5 * peaks[0] + 50_000


def test_blocks_and_one_block_are_the_same_run(runs, store, monkeypatch):
    run = runs[0]
    whole = store.read(run.id)
    about = recorder_module.RunHeader("b", store.info.fingerprint, 12, run.recipe, False)
    cut = [
        run_file.RunRows(
            start,
            np.concatenate([run.curriculum[t - 1] for t in times if t]), np.array([3 if t else 0 for t in times]),
            np.array([0.3 if t else np.nan for t in times]), np.ones(len(times), bool), run.losses[times], {},
        )
        for start, times in [(0, list(range(4))), (4, list(range(4, 11)))]
    ]  # fmt: skip
    store.write_rows(about, cut)
    again = store.read("b")
    assert np.array_equal(again.losses, whole.losses)
    assert again.curriculum == whole.curriculum
    assert again.learning_rates.tolist() == whole.learning_rates.tolist()
    with pytest.raises(StoreError, match="another task"):
        store.write_rows(recorder_module.RunHeader("b", "other", 12, None, False), cut)


IN_ANY_ORDER = [3, 1, 2, 0, 4]


@pytest.mark.parametrize("train", [IN_ANY_ORDER, list(map(str, IN_ANY_ORDER)), range(5, 0, -1)])
@pytest.mark.parametrize("batch", [[3, 1], np.array([3, 1]), torch.tensor([3, 1]), pd.Series([3, 1]), (1,)])
def test_ids_that_are_numbers_are_not_taken_for_positions(tmp_path, train, batch):
    with sf.RunStore(tmp_path).recorder("a", train=train, test=["t"]) as rec:
        rec.read([1.0])
        with pytest.raises(InvalidInput, match=r"step 1: .* can mean ids or rows: write ids=\[…\] or rows=\[…\]"):
            rec.step(batch, [0.5])
        rec.leave()
    assert sf.RunStore(tmp_path).ids() == []


def test_rows_and_ids_of_a_batch(tmp_path):
    store = sf.RunStore(tmp_path)
    with store.recorder("a", train=IN_ANY_ORDER, test=["t"]) as rec:
        rec.read([1.0])
        for batch in ({"ids": [3, 1, 3]}, {"rows": [3, 1, 3]}, {"ids": ["0", 4]}, {"batch": ["0", "4"]}, {"batch": []}):
            rec.step(**batch)
        for batch in ({"rows": []}, {"ids": []}, {"ids": torch.tensor([0, 0])}, {"rows": np.array([4])}):
            rec.step(**batch)
        rec.step(np.array(3) == IN_ANY_ORDER, [0.5])  # a mask
        for wrong in ({"ids": [5]}, {"rows": [5]}, {"rows": ["3"]}, {"ids": [3.0]}, {"ids": [3], "rows": [3]}):
            with pytest.raises(InvalidInput, match="step 11: "):
                rec.step(**wrong)
    batches = [[0, 1, 0], [3, 1, 3], [3, 4], [3, 4], [], [], [], [3, 3], [4], [0]]
    assert store.read("a").curriculum.tolist() == batches  # an example that is there twice counts twice
    assert store.read("a").train.ids == list(map(str, IN_ANY_ORDER))


def test_ids_out_of_tensors(tmp_path):
    for number, train in enumerate([list(torch.tensor([3, 1])), list(np.array([3, 1]))]):
        store = sf.RunStore(tmp_path / str(number))
        store.recorder("a", train=train, test=["t"])
        assert store.sides()[0].ids == ["3", "1"]


def test_measures_of_any_name(tmp_path):
    names = ["batch", "lr", "measure.lr", "ids"]  # as the journal's own
    store = sf.RunStore(tmp_path)
    values = {name: [float(n), 0.5, -1.0] for n, name in enumerate(names)}
    with store.recorder("a", train=TRAIN, test=TEST, measures=names) as rec:
        rec.read([1, 2, 3], values)
        rec.step([0], [4, 5, 6], measures=values, lr=torch.tensor(0.25))
    run = store.read("a")
    assert run.curriculum.tolist() == [[0]]
    assert run.learning_rates.tolist() == [0.25]
    assert {name: run.measures[name].tolist() for name in names} == {n: [v, v] for n, v in values.items()}
    with pytest.raises(InvalidInput, match="distinct"):
        store.recorder("b", measures=["m", "m"])


def test_a_full_disk_does_not_damage_the_journal(tmp_path, monkeypatch):
    with started(tmp_path) as rec:
        rec.read([1, 2, 3])
        rec.step([0], [4, 5, 6])

        def full(_):
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(recorder_module, "SECONDS_BETWEEN_SYNCS", -1.0)
            patch.setattr(os, "fsync", full)
            with pytest.raises(StoreError, match="No space left"):
                rec.step([1], [7, 8, 9])
        rec.step([2], [7, 8, 9])
    assert sf.RunStore(tmp_path).read("a").curriculum.tolist() == [[0], [2]]


LONG = """
import sys
from pathlib import Path
import simfluence as sf
from simfluence.storage.journal import journal_line

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1e3

def record(folder, steps):
    store = sf.RunStore(folder)
    with store.recorder("a", train="abcdef".split("-") + ["g"], test=["t"]) as rec:
        rec.read([0.5])
        rec.step([0], [0.5])
        rec.leave()
    with open(store.partial("a") / "journal.jsonl", "ab") as file:  # as step writes it, faster
        checksum = rec._checksum
        for step in range(1, steps):
            line, checksum = journal_line({"batch": [0, 1, 0], "lr": 0.1, "losses": "AAAAPw=="}, checksum)
            file.write(line)
    with store.recorder("a", resume=steps):
        pass
    return store

record(sys.argv[1] + "/warm", 3)
before = peak()
store = record(sys.argv[1] + "/long", int(sys.argv[2]))
print(peak() - before)
run = store.read("a")
assert run.steps == int(sys.argv[2]) and run.losses[:, 0].tolist() == [0.5] * (run.steps + 1)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from /proc")
def test_a_long_run_is_finished_in_little_memory(tmp_path):
    found = subprocess.run([sys.executable, "-c", LONG, str(tmp_path), "100000"], capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert float(found.stdout) < 70  # megabytes; all steps in one block take more than 150


def started(path, **arguments):
    return sf.RunStore(path).recorder("a", train=TRAIN, test=TEST, **arguments)


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda rec: rec.step(["t0"], [1, 2, 3]), "losses before any update are missing"),
        (lambda rec: rec.read([1, 2]), r"one number for each of the 3 test examples, got int64\[2\]"),
        (lambda rec: rec.read(["a", "b", "c"]), "one number for each"),
        (lambda rec: rec.read(0.5), "reduction='none'"),
        (lambda rec: (rec.read([1, 2, 3]), rec.read([1, 2, 3])), "already recorded"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step(["t00"])), "step 1: no example 't00', did you mean 't0'"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step([6])), "step 1: no example 6: indices go from 0 to 5"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step([-1])), "no example -1"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step([True])), "mask has 1 entries for 6 examples"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step("t0")), "step 1: batch must be a list of examples"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step(pd.DataFrame({0: [1]}))), "batch must be a list of examples"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step({"t0": 1})), "batch must be a list of examples"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step(torch.tensor(3))), "batch must be a list of examples"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step(torch.ones(2, 2).long())), "batch must contain ids"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step(np.array([0.0, 1.0]))), "got 0.0"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step([0], ids=["t0"])), "pass one of .*, got batch and ids"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step()), "pass one of .*, got none"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step(["t0", 1])), "step 1"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step([0], [1, 2])), r"step 1: losses: pass one number .* int64\[2\]"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step([0], [[1], [2, 3]])), "step 1: losses: pass one number"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step([0], lr=float("nan"))), "step 1: lr must be a number"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step([0], lr="0.1")), "lr must be"),
        (lambda rec: rec.read([1, np.nan, 3]), "before any update: the loss of test example 'y' is nan"),
        (lambda rec: rec.read([1, 2, 1e300]), "test example 'z' is inf in float32"),
        (lambda rec: rec.read(np.ma.array([1, 2, 3], mask=[0, 1, 0])), "one number for each"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step([0.5])), "got 0.5"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step([0], measures={"m": [1, 2, 3]})), "only together with losses"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step([0], [1, 2, 3], measures={"m": [1, 2, 3]})), "name them all"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step([0])), "losses after the last step .* are missing"),
        (lambda rec: (rec.read([1, 2, 3]), rec.step([], [1, 2, 3])), "no step with an example"),
        (lambda rec: None, "no step with an example"),
    ],
)
def test_bad_input(tmp_path, action, said):
    with pytest.raises(InvalidInput, match=said), started(tmp_path) as rec:
        action(rec)
    assert sf.RunStore(tmp_path).ids() == []


def test_bad_recorders(tmp_path, store, task):
    new = sf.RunStore(tmp_path / "new")
    with pytest.raises(InvalidInput, match="is a new store and needs its examples"):
        new.recorder("a")
    for name in ("", "../up", "a/b", ".hidden", "x" * 65, "ä"):
        with pytest.raises(InvalidInput, match="must be usable as a file name"):
            new.recorder(name, train=TRAIN, test=TEST)
    with pytest.raises(InvalidInput, match="pass its name"):
        new.recorder(train=TRAIN, test=TEST, resume=3)
    with pytest.raises(InvalidInput, match="a measure cannot be called"):
        new.recorder("a", train=TRAIN, test=TEST, measures=["loss"])
    with pytest.raises(InvalidInput, match="appears twice"):
        new.recorder("a", train=["t0", "t0"], test=TEST)
    assert not new.exists
    with pytest.raises(StoreError, match="train examples with other ids"):
        store.recorder("a", train=TRAIN)
    with pytest.raises(InvalidInput, match="leave them out"):
        store.recorder("a", task=task, test=TEST)
    with pytest.raises(InvalidInput, match="already has a finished run"), store.recorder(store.ids()[0]):
        pass
    rec = store.recorder("a")
    with pytest.raises(InvalidInput, match="only inside its with block"):
        rec.read(np.zeros(5))
    with store.recorder("b") as first:
        with pytest.raises(StoreError, match="another process or recorder is recording"), store.recorder("b"):
            pass
        first.read(np.zeros(5))
        first.step([0], np.zeros(5))
    assert "b" in store


def blocks(heading):
    """The Python of a section of the page on loops of one's own."""
    page = (Path(__file__).parents[1] / "docs" / "your_own_loop.md").read_text()
    section = page.split(f"## {heading}\n")[1].split("\n## ")[0]
    return "\n".join(part.split("\n```")[0] for part in section.split("```python\n")[1:])


def test_the_page_runs(tmp_path, capsys):
    X, y = np.random.default_rng(0).normal(size=(45, 3)), np.arange(45) % 7
    names = {
        "folder": tmp_path,
        "test_losses": lambda weights: (X[40:] @ weights - y[40:]) ** 2,
        "update": lambda weights, rows: weights - 0.01 * X[rows].T @ (X[rows] @ weights - y[rows]),
    }
    exec(blocks("Any loop"), names)  # noqa: S102 (our own page)
    assert len(names["runs"]) == 6
    assert names["store"].read("long").steps == 100
    assert "['long']" in capsys.readouterr().out
