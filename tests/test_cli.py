from __future__ import annotations

import dataclasses
import functools
import json
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import simfluence as sf
from simfluence import cli
from simfluence.cli.demo import COMPARED, run_demo
from simfluence.cli.options import SIMULATOR_NAMES
from simfluence.cli.output import print_table
from simfluence.cli.queries import _costs
from simfluence.cli.text import complain
from simfluence.errors import UnseenWarning
from simfluence.simulators import registry

#: Five fitting runs of half the examples each may miss one; a test of its own looks at what is said then.
pytestmark = pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")

SPEC = """
task: {name: digits, arguments: {n_train: 40, n_test: 12}}
recipe: {lr: 0.1}
curricula: {runs: 8, steps: 12, batch_size: 4, subset: 0.5, seed: 0}
"""


QUERIES = """
queries:
  no threes: {edit: remove, target: label == 3}
  short:
    - {edit: truncate, steps: 6}
    - {edit: shuffle, seed: 2}
"""


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line as its entry point does: exit code, standard output, standard error."""
    monkeypatch.setattr("warnings.showwarning", None)

    def _run(*arguments):
        monkeypatch.setattr(sys, "argv", ["simfluence", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return stopped.value.code or 0, captured.out, captured.err

    return _run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    (folder / "spec.yaml").write_text(SPEC)
    spec = sf.specs.RecordingSpec.parse(SPEC)
    task = spec.task.build()
    sf.record(task, spec.recipe, spec.curricula.build(task.train), folder / "runs")
    return folder


def test_record(run, folder, tmp_path):
    code, out, _ = run("record", folder / "spec.yaml", "--store", tmp_path / "s", "--checkpoints", "0,12", "--json")
    assert (code, json.loads(out)) == (0, {"store": str(tmp_path / "s"), "runs": 8, "diverged": 0})
    assert np.array_equal(sf.RunStore(tmp_path / "s").load().losses, sf.RunStore(folder / "runs").load().losses)
    assert list(sf.RunStore(tmp_path / "s").load()[0].checkpoints) == [0, 12]


def test_what_to_record(run, folder, tmp_path):
    options = ["--every", 5, "--measure", "margin", "--measure", "correct", "--engine", "loop"]
    assert run("record", folder / "spec.yaml", "--store", tmp_path / "s", *options)[0] == 0
    found = sf.RunStore(tmp_path / "s").load()
    assert found[0].times.tolist() == [0, 5, 10, 12]
    assert set(found[0].measures) == {"margin", "correct"}
    assert {each.engine for each in found} == {"loop"}


def test_dry_run(run, folder, tmp_path):
    code, out, _ = run("record", folder / "spec.yaml", "--store", tmp_path / "s", "--dry-run", "--json")
    found = json.loads(out)
    assert (code, found["runs"], found["already_recorded"]) == (0, 8, 0)
    assert min(found["seconds"], found["disk"], found["memory"]) > 0
    code, out, _ = run("record", folder / "spec.yaml", "--store", tmp_path / "s", "--dry-run")
    assert code == 0
    assert out.startswith("8 runs to record (8 by batched), 0 recorded already\ntime    about ")
    assert not (tmp_path / "s").exists()


def test_a_users_own_task(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_cli_task.py").write_text(
        "import simfluence as sf\nimport dataclasses\n"
        "def make():\n    return dataclasses.replace(sf.tasks.synthetic(n_train=12, n_test=4), name='mine')\n"
    )
    (tmp_path / "spec.yaml").write_text("recipe: {lr: 0.05}\ncurricula: {runs: 6, steps: 9, batch_size: 3}")
    assert run("record", "spec.yaml", "--store", "s")[0] == 1  # a task is required
    assert run("record", "spec.yaml", "--store", "s", "--task", "own_cli_task:make")[0] == 0
    what_if = ["what-if", "s", "--remove", "target > 0", "--held-out", 2, "--verify", "--json"]
    code, _, err = run(*what_if)
    assert code == 1
    assert "'mine' is not a ready-made one" in err
    code, out, _ = run(*what_if, "--task", "own_cli_task:make")
    assert code == 0
    assert len(json.loads(out)["actual_change"]) == 4


def test_evaluate(run, folder):
    code, out, _ = run("evaluate", folder / "runs", "--held-out", 3, "--json")
    rows = {row["simulator"]: row for row in json.loads(out)}
    assert code == 0
    assert list(rows) == [name for name in SIMULATOR_NAMES if name not in ("tangent", "response")]
    fit, held = sf.RunStore(folder / "runs").load().split(held_out=3)
    expected = sf.evaluate({"linear": sf.LinearSimulator().fit(fit)}, held, fit)
    assert rows["linear"]["skill"] == pytest.approx(expected.loc["linear", "skill"])
    assert rows["mean_trajectory"]["run_correlation"] is None
    code, out, _ = run("evaluate", folder / "runs", "--held-out", 3, "--simulator", "linear")
    assert code == 0
    assert "run correlation" in out
    assert "persistence" not in out


def test_evaluate_several_stores(run, folder, tmp_path):
    task = sf.tasks.synthetic(n_train=12, n_test=4)
    sf.record(task, sf.Recipe(lr=0.05), sf.random_curricula(12, runs=6, steps=9, batch_size=3), tmp_path / "other")
    stores = [tmp_path / "other", folder / "runs"]
    options = ["--held-out", 3, "--simulator", "mean_trajectory", "--simulator", "linear"]
    code, out, _ = run("evaluate", *stores, *options, "--json")
    assert code == 0
    alone = [json.loads(run("evaluate", store, *options, "--json")[1]) for store in stores]
    both = [{"store": str(store)} | row for store, rows in zip(stores, alone, strict=True) for row in rows]
    assert json.loads(out) == both
    assert [row["test_examples"] for row in both] == [4, 4, 12, 12]
    picture = ["--plot", tmp_path / "stores.png"]
    code, out, _ = run("evaluate", *stores, *options, "--metric", "mse", "--metric", "final_spearman", *picture)
    assert (tmp_path / "stores.png").stat().st_size > 5000
    titles, header = out.strip().splitlines()[:2], out.splitlines()[4].split("┃")
    assert code == 0
    assert titles[0].endswith("other: 3 held-out runs, 3 to fit on")
    assert titles[1].endswith("runs: 3 held-out runs, 5 to fit on")
    assert [name.strip() for name in header[1:5]] == ["store", "simulator", "mse", "final spearman"]
    rows = [line.split("│")[1:3] for line in out.splitlines() if " ± " in line]
    assert [name.strip() for _, name in rows] == ["mean_trajectory", "linear"] * 2


def test_warnings_are_one_line(run, folder):
    warnings.simplefilter("always", UnseenWarning)  # until the end of this test
    code, out, err = run("evaluate", folder / "runs", "--held-out", 5, "--simulator", "linear", "--json")
    assert (code, len(json.loads(out))) == (0, 1)
    assert err.startswith("warning: ")
    assert "training examples" in err
    assert len(err.splitlines()) == 1


def test_fit_then_use_the_file(run, folder, tmp_path):
    file = tmp_path / "linear.safetensors"
    fit = ["fit", folder / "runs", "--out", file, "--simulator", "linear", "--set", "l2=10", "--set", "prior=zero"]
    assert run(*fit, "--held-out", 8)[0] == 1  # of 8
    assert "fitted on 6 runs" in run(*fit)[1]  # a quarter is held out
    code, out, _ = run(*fit, "--held-out", 3)
    assert code == 0
    assert "fitted on 5 runs" in out
    assert "Forecasts of held-out runs: skill" in out
    assert sf.LinearSimulator.load(file).get_params() == sf.LinearSimulator(l2=10, prior="zero").get_params()
    code, out, _ = run("evaluate", folder / "runs", "--held-out", 3, "--simulator", file, "--json")
    assert code == 0
    assert [row["simulator"] for row in json.loads(out)] == [str(file)]


def test_tune(run, folder, tmp_path):
    file, trials = tmp_path / "tuned.safetensors", tmp_path / "trials.sqlite"
    options = ["--held-out", 3, "--folds", 2, "--trials", 2, "--seed", 1, "--set", "around=mean", "--storage", trials]
    options += ["--simulator", "linear"]
    code, out, _ = run("tune", folder / "runs", "--out", file, *options, "--json")
    found = json.loads(out)
    assert code == 0
    part, held = sf.RunStore(folder / "runs").load().split(3, seed=1)
    expected = sf.evaluation.search("linear", part, trials=2, seed=1, folds=2, fixed={"around": "mean"})
    assert (found["parameters"], found["skill"]) == (expected.parameters, expected.skill)
    assert [row["skill"] for row in found["trials"]] == expected.trials["skill"].tolist()
    tuned = sf.LinearSimulator.load(file)
    assert np.array_equal(tuned.A_, expected.simulator.fit(part).A_)
    assert found["held_out"]["skill"] == sf.evaluate({"linear": tuned}, held, part).loc["linear", "skill"]
    code, out, _ = run("tune", folder / "runs", "--out", file, *options)
    assert code == 0
    assert "Best of 2 candidates: linear with l2=" in out
    assert "3 held-out runs" in out


def test_tangent_kernel(run, folder, tmp_path):
    """The ready-made task that the store is of is rebuilt."""
    _, held = sf.RunStore(folder / "runs").load().split(3, 0)
    options = ["--held-out", 3, "--simulator", "tangent", "--set", "n_checkpoints=2", "--set", "n_references=1"]
    options += ["--set", "n_features=0"]
    file = tmp_path / "tuned.safetensors"
    code, out, _ = run("tune", folder / "runs", "--out", file, *options, "--folds", 2, "--trials", 1, "--json")
    assert code == 0
    assert json.loads(out)["parameters"] == {"n_checkpoints": 2, "n_references": 1, "n_features": 0}
    assert json.loads(out)["held_out"]["skill"] > 0.5
    code, out, _ = run("leave-one-out", folder / "runs", "--simulator", file, "--held-out", 3, "--derivative", "--json")
    assert code == 0
    changes = sf.leave_one_out(sf.Simulator.load(file), held[0], "derivative").values.mean(0)
    assert json.loads(out)["ranking"][0]["gain"] == pytest.approx(-changes.min())
    code, out, _ = run("learning-curve", folder / "runs", *options, "--repeats", 1, "--json")
    assert code == 0
    assert all(row["skill"] > 0.5 for row in json.loads(out))
    code, _, err = run("leave-one-out", folder / "runs", "--held-out", 3, "--derivative", "--simulator", "linear")
    assert code == 1
    assert "'linear' has no derivatives" in err


def test_tune_interrupted(run, folder, tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("simfluence.evaluation.tuning._race", interrupted)
    tune = ["tune", folder / "runs", "--out", tmp_path / "out", "--held-out", 3, "--folds", 2]
    code, out, err = run(*tune, "--storage", tmp_path / "trials.sqlite")
    assert (code, out) == (130, "")
    assert "trials.sqlite; run the same command again to continue" in err
    code, _, err = run(*tune)
    assert (code, err.strip()) == (130, "Stopped.")


def test_learning_curve(run, folder, tmp_path):
    options = ["--simulator", "linear", "--held-out", 3, "--repeats", 1, "--set", "l2=10", "--set", "around=mean"]
    code, out, _ = run("learning-curve", folder / "runs", *options, "--json")
    assert code == 0
    simulator = sf.LinearSimulator(l2=10, around="mean")
    expected = sf.learning_curve(simulator, sf.RunStore(folder / "runs").load(), held_out=3, repeats=1)
    assert json.loads(out) == expected.to_dict("records")
    code, out, _ = run("learning-curve", folder / "runs", *options, "--plot", tmp_path / "curve.svg")
    assert code == 0
    assert "digits: 3 runs held out, linear" in (tmp_path / "curve.svg").read_text()
    assert "final skill" in out


def test_what_if(run, folder, tmp_path):
    out_file = tmp_path / "frame.parquet"
    code, out, _ = run(
        "what-if", folder / "runs", "--remove", "label == 3", "--repeat", "label == 1", "--times", 3,
        "--held-out", 3, "--verify", "--out", out_file, "--json",
    )  # fmt: skip
    answer = json.loads(out)
    assert code == 0
    assert answer["edits"] == ["remove examples where label == 3", "show examples where label == 1 3 times as often"]
    assert len(answer["change"]) == len(answer["actual_change"]) == 12
    assert 0 <= answer["group_correlation"] <= 1
    assert -1 <= answer["within_correlation"] <= 1
    frame = pd.read_parquet(out_file)
    assert list(frame.columns)[:5] == ["step", "test", "base", "what_if", "change"]
    assert np.allclose(frame["change"].tail(12), answer["change"])
    code, out, _ = run("what-if", folder / "runs", "--first", "label < 5", "--held-out", 3, "--verify")
    assert code == 0
    assert "Delta correlation" in out
    assert "within each label" in out
    assert "Retraining takes 0." in out


@pytest.mark.parametrize(
    ("simulate", "fit", "said"),
    [
        (None, 3.0, "Retraining takes 2.0 s a question."),
        (2.5, 3.0, "Retraining takes 2.0 s a question, the simulator 2.5 s: retraining is cheaper, and exact."),
        (0.01, None, "Retraining takes 2.0 s a question, the simulator 0.01 s once it is fitted."),
        (0.5, 3.1, "the simulator 0.5 s and 3.1 s to fit: it is cheaper from 3 questions on, not counting the runs"),
    ],
)
def test_when_to_retrain_instead(folder, monkeypatch, simulate, fit, said):
    runs, task = sf.RunStore(folder / "runs").load(), sf.tasks.digits(n_train=40, n_test=12)
    forecast = sf.what_if(sf.MeanTrajectorySimulator().fit(runs[:3]), runs[3], sf.Remove([0]), task=task)
    timed = dataclasses.replace(forecast, simulate_seconds=simulate, fit_seconds=fit)
    costs = sf.recording.Estimate(1, 0, {"loop": 1}, seconds=2.0, disk=0, memory=0)
    monkeypatch.setattr(sys.modules["simfluence.recording.estimate"], "estimate", lambda *args, **options: costs)
    assert said in _costs(timed, task, runs[3].recipe)


def test_queries_of_a_file(run, folder, tmp_path):
    (tmp_path / "queries.yaml").write_text(QUERIES)
    asked = ["what-if", folder / "runs", "--spec", tmp_path / "queries.yaml", "--held-out", 3, "--bases", 2]
    picture, frame = tmp_path / "queries.png", tmp_path / "frame.parquet"
    code, out, _ = run(*asked, "--verify", "--seeds", 2, "--by", "label", "--plot", picture, "--out", frame, "--json")
    answer = json.loads(out)
    assert code == 0
    assert {row["query"] for row in answer["queries"]} == {"no threes", "short"}
    assert [row["query"] for row in answer["verification"]] == ["no threes", "short", "all"]
    assert all(row["seed_share"] > 0 for row in answer["verification"])
    assert len(pd.read_parquet(frame)) == 2 * 2 * 12
    assert picture.stat().st_size > 5_000
    code, out, _ = run(*asked, "--intervals", "--set", "l2=10", "--verify")
    assert code == 0
    assert "coverage" in out
    assert run(*asked)[0] == 0


def test_what_if_pictures_and_groups(run, folder, tmp_path):
    picture = tmp_path / "one.png"
    asked = ["what-if", folder / "runs", "--keep", "label < 5", "--fill", "resample", "--held-out", 3]
    code, out, _ = run(*asked, "--by", "label", "--plot", picture)
    assert code == 0
    assert "keep only examples where label < 5, filling their slots from the rest (seed 0)" in out
    assert "By label" in out
    assert picture.stat().st_size > 5_000


def test_verifying_twice_trains_nothing(run, folder, monkeypatch):
    asked = ["what-if", folder / "runs", "--remove", "label == 5", "--held-out", 3, "--verify", "--json"]
    first = run(*asked)

    def trained(*_):
        raise AssertionError("it trained")

    monkeypatch.setattr("simfluence.recording.session._Session._record", trained)
    assert run(*asked) == first
    assert sf.RunStore(folder / "runs").load().n_train == 40  # verification runs are left out


def test_leave_one_out(run, folder, tmp_path):
    asked = ["leave-one-out", folder / "runs", "--simulator", "linear", "--held-out", 3, "--set", "l2=10"]
    part, held = sf.RunStore(folder / "runs").load().split(3, 0)
    changes = sf.leave_one_out(sf.LinearSimulator(l2=10).fit(part), held[0])
    code, out, _ = run(*asked, "--json", "--test", 4, "--out", tmp_path / "f.parquet", "--plot", tmp_path / "f.png")
    answer = json.loads(out)
    assert code == 0
    assert answer["ranking"][0]["gain"] == pytest.approx(-changes[4].min())
    frame = pd.read_parquet(tmp_path / "f.parquet")
    assert list(frame.columns) == ["test", "train", "change"]
    assert np.allclose(frame.pivot_table(index="test", columns="train", values="change"), changes)
    assert (tmp_path / "f.png").stat().st_size > 5_000
    code, out, _ = run(*asked, "--top", 3)
    assert (code, "The most useful" in out) == (0, True)
    code, out, _ = run(*asked, "--by", "label", "--test", "label == 3")
    assert (code, "together" in out) == (0, True)


def test_removal(run, folder, tmp_path):
    asked = ["removal", folder / "runs", "--held-out", 3]
    part, held = sf.RunStore(folder / "runs").load().split(3, 0)
    additive = sf.AdditiveSimulator().fit(part)
    code, out, _ = run(*asked, "--simulator", "additive", "--test", 2, "--best", 2, "--exact", "--json")
    answer = json.loads(out)
    best = sf.best_removal(additive, held[0], 2, 2, exact=True)
    assert (code, answer["exact"], answer["reached"]) == (0, True, True)
    assert {row["train"] for row in answer["removed"]} == set(best.examples.tolist())
    past = float(best.losses[0]) + 0.01
    files = ["--out", tmp_path / "f.parquet", "--plot", tmp_path / "f.png"]
    code, out, _ = run(*asked, "--simulator", "additive", "--test", 2, "--past", past, *files)
    assert code == 0
    assert "In the order of removal" in out
    assert list(pd.read_parquet(tmp_path / "f.parquet").columns) == ["train", "id", "loss"]
    assert (tmp_path / "f.png").stat().st_size > 5_000
    code, out, _ = run(*asked, "--by", "label", "--json", "--set", "l2=10", "--out", tmp_path / "g.parquet")
    assert code == 0
    assert "label 3" in {row["query"] for row in json.loads(out)["queries"]}
    code, out, _ = run(*asked, "--where", "label == 3", "--intervals", "--set", "l2=10", "--plot", tmp_path / "g.png")
    assert (code, "low" in out) == (0, True)


def test_version(run):
    assert run("--version") == (0, f"simfluence {sf.__version__}\n", "")


@pytest.mark.parametrize("name", ["[bold red]x[/]", "[/nope]", "\x1b[2Jx", "a\u202eb", "\x9b2J", ":smile:"])
def test_names_of_files_are_shown_as_they_are(run, tmp_path, name):
    store = sf.RunStore(tmp_path)
    for number in range(3):
        with store.recorder(str(number), train=["a", "b"], test=["t"], task=name) as rec:
            rec.read([1.0])
            rec.step(["a"], [0.5])
    code, out, err = run("runs", "ls", tmp_path)
    assert (code, err) == (0, "")
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)
    assert f"task {shown}, 2 training" in out
    code, out, err = run("what-if", tmp_path, "--remove", "id == 'a'", "--held-out", 1, "--verify")
    assert (code, out) == (1, "")
    assert not set(err) & set("\x1b\x9b\u202e")


def test_cells_and_columns_are_no_markup(capsys):
    table = pd.DataFrame({"[red]": ["[/nope]", "\x1b[2J"]}, index=pd.Index(["[b]x[/b]", "two\nlines"], name="[i]"))
    print_table(table, "[bold]title")
    out = capsys.readouterr().out
    for text in ("[red]", "[/nope]", r"\x1b[2J", "[b]x[/b]", r"two\nlines", "[i]", "[bold]title"):
        assert text in out


def test_half_characters_can_be_printed(capsys):
    complain("a\ud800\nb")
    assert capsys.readouterr().err == "a\\ud800\nb\n"


def test_numbers_that_could_be_ids(run, tmp_path):
    rng = np.random.default_rng(0)
    task = sf.tasks.from_arrays(
        torch.nn.Linear(2, 2), rng.normal(size=(9, 2)).astype("float32"), np.arange(9) % 2, "cross_entropy", test=1 / 3
    )
    sf.record(task, sf.Recipe(lr=0.1), sf.random_curricula(6, runs=5, steps=6, batch_size=2), tmp_path / "s")
    row = next(row for row, name in enumerate(task.train.ids) if name != str(row))
    name = task.train.ids[row]
    asked = ["what-if", tmp_path / "s", "--held-out", 2, "--json", "--remove"]
    code, _, err = run(*asked, row)
    assert (code, len(err.splitlines())) == (1, 1)
    assert f"write rows:{row} or ids:{row}" in err
    answers = [json.loads(run(*asked, text)[1]) for text in (f"rows:{row}", f"ids:{name}")]
    assert answers[0]["change"] == answers[1]["change"]
    assert answers[0]["test"] == task.test.ids
    for command in (["leave-one-out"], ["removal", "--best", 1], ["attribute", "--method", "dot"]):
        held_out = [] if command[0] == "attribute" else ["--held-out", 2]
        ask = [command[0], tmp_path / "s", *command[1:], *held_out, "--json", "--test"]
        assert "write rows:0 or ids:0" in run(*ask, "0")[2]
        if command[0] == "attribute":  # to go on, it would need the task
            continue
        found = [run(*ask, text) for text in ("rows:0", f"ids:{task.test.ids[0]}")]
        assert found[0] == found[1]
        assert found[0][0] == 0, found[0][2]


def test_removal_warns_once(run, folder):
    warnings.simplefilter("always", UnseenWarning)  # until the end of this test
    code, _, err = run("removal", folder / "runs", "--held-out", 5, "--best", 3, "--json")
    assert code == 0
    assert sum(line.startswith("warning: ") for line in err.splitlines()) == 1


def test_a_dry_run_notices_the_store_of_another_task(run, folder, tmp_path):
    (tmp_path / "spec.yaml").write_text(SPEC.replace("n_train: 40", "n_train: 41"))
    code, _, err = run("record", tmp_path / "spec.yaml", "--store", folder / "runs", "--dry-run")
    assert (code, "has runs of another task" in err) == (1, True)


def test_attribute_and_lds(run, folder, tmp_path):
    store = sf.RunStore(folder / "runs")
    first = store.load()[0]
    files = ["--out", tmp_path / "scores.parquet", "--plot", tmp_path / "scores.png"]
    code, out, _ = run("attribute", folder / "runs", "--test", 3, "--set", "damping=0.1", *files, "--json")
    answer = json.loads(out)
    assert (code, answer["run"], answer["unit"]) == (0, first.id, "loss")
    task = sf.tasks.rebuild(store.info)
    ekfac = sf.attribution.EKFAC(damping=0.1).fit(sf.trained_model(task, first), task).scores()
    assert answer["ranking"][0]["train"] == int(np.argmax(ekfac.values[3]))
    assert answer["ranking"][0]["score"] == pytest.approx(ekfac.values[3].max(), rel=1e-4)
    assert len(pd.read_parquet(tmp_path / "scores.parquet")) == 12 * 40
    assert (tmp_path / "scores.png").stat().st_size > 5_000
    code, out, _ = run("attribute", folder / "runs", "--method", "tracin", "--checkpoints", 3, "--test", "label == 3")
    assert (code, "The most helpful" in out, "The most harmful" in out) == (0, True, True)
    assert list(store.read(first.id).checkpoints) == [0, 4, 8, 12]  # of both: kept with the run
    code, out, _ = run("lds", folder / "runs", "--method", "dot", "--method", "tracin-ideal", "--json")
    found = json.loads(out)["methods"]
    assert [row["method"] for row in found] == ["dot", "tracin-ideal"]
    assert found[0]["runs"] == 7  # without the run that it is of
    assert run("lds", folder / "runs", "--method", "tracin", "--checkpoints", 3)[0] == 0


def test_runs(run, folder, tmp_path):
    code, out, _ = run("runs", "ls", folder / "runs", "--json", "--plot", tmp_path / "runs.png")
    assert (tmp_path / "runs.png").stat().st_size > 5000
    listed = [row for row in json.loads(out) if not row["verification"]]
    assert (code, len(listed)) == (0, 8)
    code, out, _ = run("runs", "show", folder / "runs", listed[0]["run"], "--json")
    shown = json.loads(out)
    assert shown["recipe"]["lr"] == 0.1
    assert shown["final_loss"] == listed[0]["final_loss"]
    assert sf.Curriculum(shown["curriculum"], n_train=40) == sf.RunStore(folder / "runs").load()[0].curriculum
    assert run("runs", "ls", folder / "runs")[0] == 0
    assert run("runs", "show", folder / "runs", listed[0]["run"])[0] == 0


@pytest.mark.filterwarnings("ignore::simfluence.errors.RunawayWarning")  # the paper\'s linear one
def test_demo(run, tmp_path, monkeypatch):
    sf.RunStore(Path(__file__).parents[1] / "runs" / "digits").copy(tmp_path / "demo" / "runs")  # the demo's own runs
    monkeypatch.setattr("simfluence.cli.demo.run_demo", functools.cache(run_demo))  # printed twice, made once
    code, out, _ = run("demo", "--folder", tmp_path / "demo", "--json")
    found = json.loads(out)
    assert code == 0
    skill = {row["simulator"]: row["skill"] for row in found["evaluation"]}
    assert list(skill) == list(COMPARED)
    assert skill["linear"] < 0 < 0.6 < skill["linear, tuned"] < 0.85 < skill["boosted"]
    assert found["what_if"][-1]["simulator"] == "retrained"
    assert found["what_if"][-1]["change_of_3s"] > 1
    assert (tmp_path / "demo" / "demo.png").stat().st_size > 10_000
    code, out, _ = run("demo", "--folder", tmp_path / "demo")
    assert code == 0
    assert "What if we remove examples where label == 3?" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs", "ls", "nowhere"], "no run store at nowhere"),
        (["demo", "--task", "docstring"], "did you mean 'docstrings'"),
        (["runs", "show", "{runs}", "abc"], "no run 'abc'"),
        (["evaluate", "{runs}", "--simulator", "linera", "--held-out", "3"], "did you mean 'linear'"),
        (["evaluate", "{runs}", "--metric", "skil", "--held-out", "3"], "did you mean 'skill'"),
        (["evaluate", "{runs}", "--set", "l3=1", "--held-out", "3"], "no parameter 'l3'"),
        (["evaluate", "{runs}", "--set", "l2", "--held-out", "3"], "write name=value"),
        (["evaluate", "{runs}", "--set", "l2=abc", "--held-out", "3"], "l2 must be"),
        (["evaluate", "{runs}", "--held-out", "8"], "leave at least one"),
        (["tune", "{runs}", "--out", "x", "--held-out", "3", "--folds", "6"], "use folds=5"),
        (["tune", "{runs}", "--out", "x", "--simulator", "bset", "--held-out", "3"], "did you mean 'best'"),
        (["learning-curve", "{runs}", "--set", "l3=1"], "no parameter 'l3'"),
        (["what-if", "{runs}", "--held-out", "3"], "an edit is required"),
        (["what-if", "{runs}", "--then", "label == 1", "--held-out", "3"], "--then requires --first"),
        (["what-if", "{runs}", "--remove", "label == 77", "--held-out", "3"], "matches none"),
        (["what-if", "{runs}", "--remove", "label.max()", "--held-out", "3"], "position 5"),
        (["what-if", "{runs}", "--remove", "label == 3", "--spec", "x.yaml"], "an edit is required"),
        (["what-if", "{runs}", "--spec", "x.yaml", "--held-out", "3"], "x.yaml"),
        (["what-if", "{runs}", "--remove", "label == 3", "--fill", "squeeze"], "unknown fill 'squeeze'"),
        (["what-if", "{runs}", "--remove", "label == 3", "--bases", "4", "--held-out", "3"], "4 base runs"),
        (["what-if", "{runs}", "--remove", "label == 3", "--by", "lable", "--held-out", "3"], "did you mean 'label'"),
        (["leave-one-out", "{runs}", "--by", "lable", "--held-out", "3"], "did you mean 'label'"),
        (["leave-one-out", "{runs}", "--test", "99", "--held-out", "3"], "no example 99"),
        (["what-if", "{runs}", "--remove", "label == 3", "--seeds", "3"], "--seeds is the number of retrainings"),
        (["what-if", "{runs}", "--remove", "rows:x", "--held-out", "3"], "must list whole numbers"),
        (["leave-one-out", "{runs}", "--test", "ids:zz", "--held-out", "3"], "no example 'zz'"),
        (["removal", "{runs}", "--held-out", "3"], "a question is required"),
        (["removal", "{runs}", "--past", "1", "--best", "2"], "a question is required"),
        (["removal", "{runs}", "--best", "2", "--exact", "--held-out", "3"], "exact=True is for AdditiveSimulator"),
        (["attribute", "{runs}", "--method", "ekfca"], "did you mean 'ekfac'"),
        (["attribute", "{runs}", "--set", "dampnig=1"], "did you mean 'damping'"),
        (["attribute", "{runs}", "--method", "tracin", "--checkpoints", "99"], "got 99"),
        (["attribute", "{runs}", "--test", "99"], "no example 99"),
        (["attribute", "{runs}", "--plot", "x.xyz"], "not supported"),
        (["lds", "{runs}", "--run", "abc"], "no run 'abc'"),
        (["record", "nowhere.yaml", "--store", "s"], "nowhere.yaml"),
        (["record", "{spec}", "--store", "s", "--checkpoints", "a"], "write step numbers"),
    ],
)
def test_errors_are_one_line(run, folder, arguments, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    filled = [argument.format(runs=folder / "runs", spec=folder / "spec.yaml") for argument in arguments]
    code, out, err = run(*filled)
    assert code == 1
    assert err.startswith("error: ")
    assert said in err
    assert out == ""


def test_intervals(run, folder, tmp_path, monkeypatch):
    file, store = str(tmp_path / "fitted.safetensors"), folder / "runs"
    assert run("fit", store, "--out", file, "--simulator", "mean_trajectory", "--held-out", 2, "--intervals")[0] == 0
    assert isinstance(sf.Simulator.load(file), sf.ConformalSimulator)
    fits, fit = [], sf.MeanTrajectorySimulator._fit
    monkeypatch.setattr(sf.MeanTrajectorySimulator, "_fit", lambda self, runs: fits.append(runs) or fit(self, runs))
    options = ("--simulator", "mean_trajectory", "--held-out", 2, "--intervals", "--json")
    assert 0 <= json.loads(run("evaluate", store, *options)[1])[0]["coverage"] <= 1
    assert len(fits) == 1 + 10 + 4  # on all runs, on each resample, without each fold


MINE = '''
import numpy as np
from simfluence import Simulator


class Mine(Simulator):
    """The mean trajectory, plus an effect of how often each training example is shown."""

    name = "mine of the command line"

    def __init__(self, l2: float = 1.0) -> None:
        self.l2 = l2

    def _fit(self, runs):
        self.mean_ = np.asarray(runs.losses, np.float64).mean(axis=0)
        self.counts_ = np.mean([curriculum.counts.sum(axis=0) for curriculum in runs.curricula], axis=0)
        X = np.array([curriculum.counts.sum(axis=0) for curriculum in runs.curricula]) - self.counts_
        self.effects_ = X.T @ np.linalg.solve(X @ X.T + self.l2 * np.eye(len(X)), runs.losses[:, -1] - self.mean_[-1])

    def _simulate(self, curricula, initial):
        losses = np.repeat(self.mean_[None], len(curricula), axis=0)
        losses[:, -1] += np.array([c.counts.sum(axis=0) - self.counts_ for c in curricula]) @ self.effects_
        return losses
'''


@pytest.fixture
def mine(run, tmp_path, monkeypatch):
    """Run a command that may import ``mine:Mine``, and nothing has imported it before, as in a new process."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(tmp_path)

    def forget():
        sys.modules.pop("mine", None)
        for kinds in (registry._ALL, registry._BUILT_BY_NAME):
            kinds.pop("mine of the command line", None)

    def _run(*arguments):
        forget()
        code, out, err = run(*arguments)
        assert code == 0, err
        return json.loads(out) if "--json" in arguments else out

    yield _run
    forget()


def test_a_simulator_of_ones_own(mine, run, folder, tmp_path):
    assert len(MINE.strip().splitlines()) < 30
    store, file = folder / "runs", tmp_path / "mine.safetensors"
    options = ("--held-out", 3, "--json")
    assert "fitted on 5 runs" in mine(
        "fit", store, "--simulator", "mine:Mine", "--set", "l2=3", "--out", file, *options[:2]
    )
    own, loaded = ("--simulator", "mine:Mine", "--set", "l2=3"), ("--simulator", f"mine:Mine={file}")
    (scores,) = mine("evaluate", store, *own, *options)
    assert np.isfinite(scores["skill"])
    assert mine("evaluate", store, *loaded, *options) == [scores | {"simulator": loaded[1]}]
    query = ("what-if", store, "--remove", "label == 3")
    answer = mine(*query, *own, *options)
    assert np.any(answer["change"])
    assert mine(*query, *loaded, *options) == answer
    bounded = mine(*query, *own, "--intervals", *options)
    assert bounded["change"] == answer["change"]
    final = bounded["final_loss"]
    assert np.all(np.less(final["low"], final["what_if"]) & np.less(final["what_if"], final["high"]))
    mine("fit", store, *own, "--intervals", "--out", file, "--held-out", 3)
    assert mine(*query, *loaded, *options) == bounded
    mine("runs", "ls", store)  # forgets the class
    code, _, err = run(*query, "--simulator", file, *options)
    assert code == 1
    assert "unknown simulator 'mine of the command line'" in err
