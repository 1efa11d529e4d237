"""Wrong calls of every public function: each ends in an error of ours, in Python's own about the call, or succeeds.

    python tests/fuzz/calls.py --calls 10000 --seed 0

Runs without the tests' runtime type checker, which would refuse wrong types before the library sees them. Every call
starts from a right one, of which one or two arguments are replaced.
"""

from __future__ import annotations

import argparse
import collections
import importlib.util
import inspect
import json
import os
import random
import reprlib
import resource
import signal
import sys
import tempfile
import traceback
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import nn

import simfluence as sf
from simfluence import specs
from simfluence.attribution import EKFAC, GradientCosine, GradientDot, TracInCP
from simfluence.evaluation import metrics
from simfluence.recording import follow, run_id
from simfluence.simulators import check_simulator
from simfluence.tasks.losses import cross_entropy
from simfluence.tasks.text.tables import read_rows

sys.path.insert(0, str(Path(__file__).parent.parent))  # for tiny_models

SECONDS = 20  # of the processor, for one call
GIBIBYTES = 1.0  # that one call may add to the process

Call = tuple[str, Callable[..., Any], dict[str, Any]]


class World:
    """Small objects of every kind, of which right calls are made."""

    def __init__(self, folder: Path) -> None:
        rng = np.random.default_rng(0)
        X, y = rng.normal(size=(17, 3)).astype(np.float32), np.arange(17) % 2
        table = pd.DataFrame({"label": y[:12], "group": list("abc" * 4)})
        self.folder, self.X, self.y = folder, X, y
        self.task = sf.tasks.from_arrays(
            lambda: nn.Linear(3, 2), X[:12], y[:12], "cross_entropy", test=(X[12:], y[12:]), metadata=table
        )
        self.recipe = sf.Recipe(lr=0.3)
        self.curricula = sf.random_curricula(n_train=12, runs=6, steps=8, batch_size=3, subset=0.8)
        self.store = sf.RunStore(folder / "store")
        self.runs = sf.record(self.task, self.recipe, self.curricula, self.store.path)
        self.run = self.runs[0]
        self.simulator = sf.AdditiveSimulator().fit(self.runs[:3])
        self.saved = folder / "additive.safetensors"
        self.simulator.save(self.saved)
        self.model = sf.trained_model(self.task, self.run)
        self.attributor = GradientDot().fit(self.model, self.task)
        self.scores = self.attributor.scores()
        self.forecast = sf.what_if(self.simulator, self.run, sf.Remove([0]), task=self.task)
        self.forecasts = sf.what_if(self.simulator, self.runs[:2], {"no 0": sf.Remove([0])}, task=self.task)
        self.verified = self.forecast.verify()
        observed = sf.record(
            self.task, self.recipe, self.curricula[:1], folder / "seen", observe=sf.Observe(checkpoints=[1])
        )
        self.checkpoint = observed[0].checkpoints[1]
        self.conformal = sf.ConformalSimulator(sf.AdditiveSimulator(), members=2, folds=2).fit(self.runs)

    def axes(self) -> Any:
        return Figure().subplots()

    def wrong(self) -> list[Any]:
        """Values of every kind, most of them wrong wherever they are put."""
        return [
            None,
            True,
            -1,
            0,
            1,
            3,
            10**6,
            2**70,
            0.5,
            -0.5,
            1.5,
            float("nan"),
            float("inf"),
            1e300,
            1j,
            "",
            "x",
            "label",
            "label == 0",
            "ünï\x1b[2J$x$",
            b"x",
            [],
            [0],
            [-1],
            [99],
            [0.5],
            ["a"],
            [[0]],
            [[[0]]],
            [None],
            (),
            {},
            {"a": 1},
            {"rows": [0]},
            {"ids": ["0"]},
            {1, 2},
            range(3),
            iter([1]),
            object(),
            int,
            sf.LinearSimulator,
            len,
            lambda *a: a,
            np.int64(2),
            np.float32(0.5),
            np.nan,
            np.array(3),
            np.zeros(0),
            np.zeros(3),
            np.zeros((5, 12)),
            np.zeros((12, 5)),
            np.zeros((2, 3, 4)),
            np.full((5, 12), np.nan),
            np.array(["a"]),
            np.array([object()]),
            np.ones(12, bool),
            np.ma.masked_all(3),
            torch.zeros(3),
            torch.zeros(5, 12),
            pd.DataFrame({"a": [1, 2]}),
            pd.Series([1, 0]),
            pd.Index([1]),
            pd.NA,
            Path("x"),
            Path(),
            self.folder,
            self.saved,
            self.task,
            self.recipe,
            self.curricula,
            self.curricula[0],
            self.runs,
            self.runs[:0],
            self.run,
            self.store,
            self.simulator,
            sf.LinearSimulator(),
            self.model,
            self.attributor,
            GradientDot(),
            self.scores,
            self.forecast,
            self.forecasts,
            self.verified,
            sf.Remove([0]),
            [sf.Remove([0])],
            self.task.train,
            self.task.train_data,
            self.run.losses,
            self.run.initial_losses,
            Figure(),
            self.axes(),
            self.X,
            self.y,
        ]

    def calls(self) -> list[Call]:
        """Right calls of the public functions, by name."""
        w, new = self, self.folder / "new"
        run, runs, task, sim = w.run, w.runs, w.task, w.simulator
        losses = run.losses.astype(float)
        return [
            given(sf.Curriculum, batches=[[0], [1]], n_train=3),
            given(sf.Curriculum.from_flat, indices=np.array([0, 1]), sizes=np.array([1, 1]), n_train=3),
            given(
                sf.random_curricula,
                n_train=9,
                runs=2,
                steps=3,
                batch_size=2,
                subset=0.5,
                seed=0,
                replacement=False,
                sort_by=None,
                descending=False,
                stages=None,
            ),
            given(sf.Examples, ids=["a", "b"], metadata=None, features=None, targets=None),
            given(sf.Examples.numbered, count=3, metadata=None),
            given(task.train.select, target=[0], rows=None, ids=None),
            given(task.train.column, name="label"),
            given(task.train.with_features, features=np.ones((12, 2)), targets=None),
            given(sf.Remove, target=[0], fill="shrink", seed=0, name=None),
            given(sf.Keep, target=[0], fill="repack"),
            given(sf.Repeat, target=[0], times=2, fill="shrink"),
            given(sf.Insert, target=[0], at=0, fill="shrink"),
            given(sf.Move, target=[0], to=0, fill="shrink"),
            given(sf.Reorder, first=[0], then=None),
            given(sf.Swap, target=[0], by=[1]),
            given(sf.Shuffle, seed=0),
            given(sf.Truncate, steps=2),
            given(sf.Concatenate, batches=[[0]]),
            given(sf.Edit.from_dict, content={"edit": "remove", "target": [0]}),
            given(sf.Remove([0]).apply, curriculum=run.curriculum, examples=task.train),
            given(
                sf.Recipe,
                optimizer="sgd",
                lr=0.1,
                momentum=0.0,
                weight_decay=0.0,
                schedule="constant",
                warmup=0,
                horizon=None,
                clip_norm=None,
                dtype="float32",
                micro_batch=None,
                seed=0,
            ),
            given(w.recipe.learning_rates, steps=3),
            given(sf.Observe, every=1, measures=(), checkpoints=()),
            given(sf.Run, id="a", curriculum=run.curriculum, losses=losses, learning_rates=None, recipe=None),
            given(run.select, name="loss"),
            given(run.times_of, name="loss"),
            given(run.check_task, task=task),
            given(sf.Runs, runs=[run]),
            given(
                sf.Runs.from_arrays,
                curricula=[[[0], [1]]],
                losses=np.zeros((1, 3, 2)),
                n_train=2,
                train=None,
                test=None,
            ),
            given(runs.with_examples, train=None, test=None),
            given(runs.where, text="steps > 1"),
            given(runs.take, indices=[0]),
            given(runs.select, name="loss"),
            given(runs.split, held_out=2, seed=0),
            given(runs.usable, purpose="fit"),
            given(runs.plot, ax=w.axes(), title=""),
            given(
                sf.tasks.from_arrays,
                model=w.model,
                X=w.X,
                y=w.y,
                loss="cross_entropy",
                test=0.25,
                metadata=None,
                test_metadata=None,
                seed=0,
                name="a",
            ),
            given(
                sf.Task,
                name="a",
                model=w.model,
                train_data=task.train_data,
                test_data=task.test_data,
                loss=cross_entropy,
                train=task.train,
                test=task.test,
            ),
            given(sf.tasks.digits, n_train=20, n_test=5, seed=0),
            given(sf.tasks.synthetic, n_train=4, n_test=2, features=2, noise=0.1, l2=0.1, seed=0),
            given(sf.tasks.diabetes, n_train=4, n_test=2, seed=0),
            given(sf.tasks.build, name="digits", n_train=20, n_test=5),
            given(
                sf.record,
                task=task,
                recipe=w.recipe,
                curricula=w.curricula[:1],
                store=None,
                observe=sf.Observe(),
                engine="auto",
            ),
            given(sf.estimate, task=task, recipe=w.recipe, curricula=w.curricula[:1], store=None),
            given(sf.replay, task=task, run=run, steps=[0], store=None),
            given(sf.trained_model, task=task, run=run, store=None),
            given(sf.RunStore, path=w.store.path),
            given(w.store.load, recipe=None, where=None, verification=False, mapped=False),
            given(w.store.read, run_id=run.id),
            given(w.store.write, run=run),
            given(w.store.add, run=run),
            given(w.store.merge, other=w.store),
            given(w.store.copy, path=new, where=None),
            given(w.store.checkpoints, run_id=run.id),
            given(w.store.recorder, run="mine", train=None, test=None, task=None, recipe=None, measures=()),
            given(sf.Checkpoint.load, path=w.checkpoint),
            given(sf.LinearSimulator().fit, runs=runs[:3]),
            given(sf.AdditiveSimulator(around="mean").fit, runs=runs[:3]),
            given(sf.BoostedSimulator(rounds=2).fit, runs=runs[:3]),
            given(sf.ConformalSimulator(sf.AdditiveSimulator(), members=2, folds=2).fit, runs=runs),
            given(sf.MeanTrajectorySimulator().fit, runs=runs),
            given(sf.PersistenceSimulator().fit, runs=runs),
            given(sim.simulate, curricula=w.curricula[:2], initial_losses=run.initial_losses),
            given(sim.score, runs=runs[3:]),
            given(sim.save, path=w.folder / "again.safetensors"),
            given(sf.Simulator.load, path=w.saved),
            given(sf.TangentKernelSimulator, task=task),
            given(sf.AttributedSimulator(w.scores, fit_scale=True).fit, runs=runs[:3]),
            given(sf.what_if, simulator=sim, base=run, queries=sf.Remove([0]), task=None, confidence=0.9),
            given(sf.what_if, simulator=sim, base=runs[:2], queries={"a": sf.Remove([0])}, task=task),
            given(sf.leave_one_out, simulator=sim, run=run, method="simulate"),
            given(sf.move_each, simulator=sim, run=run, to=0),
            given(sf.leave_group_out, simulator=sim, run=run, groups="label"),
            given(sf.show_again, simulator=sim, run=run, at=-1),
            given(sf.rank_suspects, source=sim, base=run, test=None, by=None, examples=None, method="simulate"),
            given(sf.rank_suspects, source=np.zeros((5, 12)), by="label", examples=task.train),
            given(sf.forecast_removal, simulator=sim, base=run, targets="label == 0", fill="shrink", seed=0),
            given(sf.smallest_removal, simulator=sim, run=run, test=0, past=1.0, exact=False, most=3),
            given(sf.best_removal, simulator=sim, run=run, test=0, k=2, exact=False),
            given(w.forecast.by_group, column="label"),
            given(w.forecast.plot, ax=w.axes(), title="", test=None),
            given(w.forecast.verify, recipe=None, task=task, store=None, seeds=1),
            given(w.forecast.against, verification=w.verified),
            given(w.forecast.to_parquet, path=w.folder / "f.parquet"),
            given(w.verified.hit_rate, k=3),
            given(w.forecasts.by_group, column="label"),
            given(w.forecasts.verify, task=task, seeds=1),
            given(w.forecasts.plot, title=""),
            given(
                sf.evaluate,
                simulators={"a": sim},
                held=runs[3:],
                baseline_runs=runs[:3],
                metrics=("skill",),
                bootstrap=10,
                confidence=0.9,
                seed=0,
            ),
            given(
                sf.tune,
                simulator="additive",
                runs=runs,
                trials=1,
                seed=0,
                folds=2,
                fixed=None,
                storage=None,
                progress=False,
            ),
            given(
                sf.learning_curve,
                simulator=sf.AdditiveSimulator(),
                runs=runs,
                sizes=[2],
                held_out=2,
                repeats=1,
                seed=0,
                progress=False,
            ),
            given(sf.lds, scores=w.scores, runs=runs, bootstrap=10, confidence=0.9, seed=0),
            given(sf.agreement, scores=w.scores, truth=np.zeros((5, 12))),
            given(sf.brittleness, scores=w.scores, task=task, run=run, k=1, test=[0], seed=0),
            given(metrics.relative_error, predicted=np.zeros(4), actual=np.ones(4)),
            given(metrics.delta_correlation, predicted=np.zeros(4), actual=np.ones(4)),
            given(GradientDot().fit, model=w.model, data=task, loss=None),
            given(EKFAC().fit, model=w.model, data=task),
            given(GradientCosine().fit, model=w.model, data=(task.train_data), loss=cross_entropy),
            given(w.attributor.scores, test_data=task.test_data, unit=None, by_layer=False, train=[0]),
            given(w.attributor.self_influence),
            given(w.attributor.top_k, k=3),
            given(w.attributor.set_params, batch_size=3),
            given(TracInCP(checkpoints=[(w.model.state_dict(), 0.1)]).fit, model=w.model, data=task),
            given(sf.attribution.attributor_from_run, method="dot", task=task, run=run, checkpoints=2),
            given(
                sf.plots.scatter,
                predicted=np.zeros(4),
                actual=np.ones(4),
                ax=w.axes(),
                title="t",
                metrics={"a": 0.5},
                groups=(),
                what="x",
            ),
            given(sf.plots.recorded, losses=np.ones((2, 4)), ax=w.axes(), title="t", mean=None, unit="loss"),
            given(sf.plots.changes, names=["a"], predicted=np.ones(1), actual=None, ax=w.axes(), title="t"),
            given(sf.plots.fan, losses={"a": np.ones(4)}, ax=w.axes(), title="t"),
            *self._of_recordings(),
            *self._of_specifications(),
            *self._of_simulators(),
            *self._of_texts(),
        ]

    def _of_recordings(self) -> list[Call]:
        w, losses = self, np.ones(5)

        def recorded(before: Any, batch: Any, after: Any, lr: Any, measures: Any) -> None:
            with sf.RunStore(w.folder / uuid.uuid4().hex).recorder("a", task=w.task, measures=["margin"]) as recorder:
                recorder.read(before, measures={"margin": losses})
                recorder.step(batch, after, lr=lr, measures=measures)

        def followed(task: Any, run: Any, device: Any) -> None:
            for training in follow(task, run, device):
                if training.step == 2:
                    return

        return [
            given(
                sf.Recorder, store=w.store, run="mine", train=w.task.train, test=w.task.test, task=w.task,
                recipe=w.recipe, measures=["margin"], resume=0,
            ),
            given(recorded, before=losses, batch=[0, 1], after=losses, lr=0.1, measures={"margin": losses}),
            given(
                sf.record, task=w.task, recipe=w.recipe, curricula=w.curricula[:1], store=w.folder / "seen too",
                observe=sf.Observe(every=2, checkpoints=(1,)), engine="loop", device="cpu",
                verification=False, activation_cache_bytes=0,
            ),
            given(followed, task=w.task, run=w.run, device="cpu"),
            given(run_id, task=w.task, recipe=w.recipe, curriculum=w.curricula[0]),
            given(
                sf.random_curricula, n_train=12, runs=2, steps=3, batch_size=2, sort_by=list(range(12)), descending=True
            ),
            given(sf.random_curricula, n_train=4, runs=2, steps=4, batch_size=1, stages=[[0, 1], [2, 3]]),
            given(sf.random_curricula, n_train=4, runs=2, steps=4, batch_size=1, replacement=True),
        ]  # fmt: skip

    def _of_specifications(self) -> list[Call]:
        w = self
        numbers = {"runs": 2, "steps": 3, "batch_size": 2, "subset": 0.5, "seed": 0}
        recording = {
            "task": {"name": "digits", "arguments": {"n_train": 20}}, "recipe": {"lr": 0.1, "optimizer": "sgd"},
            "curricula": {"kind": "subset", **numbers}, "observe": {"every": 2, "checkpoints": [1]},
        }  # fmt: skip
        path, text = w.folder / "recording.yaml", json.dumps(recording)
        path.write_text(text)

        def parsed(**content: Any) -> None:
            specs.RecordingSpec.parse(json.dumps(content, default=str)).dump()

        def curricula(**content: Any) -> None:
            specs.RecordingSpec.parse(json.dumps({"curricula": content}, default=str)).curricula.build(w.task.train)

        def queries(edit: Any, name: Any, **content: Any) -> None:
            query = {str(name): [{"edit": edit, **content}]}
            specs.WhatIfSpec.parse(json.dumps({"queries": query}, default=str)).dump()

        return [
            given(specs.RecordingSpec.read, path=path),
            given(specs.RecordingSpec.parse, text=text),
            given(specs.WhatIfSpec.parse, text="queries: {a: {edit: remove, target: label == 0}}"),
            given(specs.RecordingSpec, **recording),
            given(specs.WhatIfSpec, queries={"a": [sf.Remove([0])]}),
            given(specs.ExplicitCurricula, curricula=[[[0], [1]]]),
            given(specs.ExplicitCurricula.of, curricula=w.curricula[:1]),
            given(specs.TaskSpec, name="digits", arguments={}),
            given(parsed, **recording),
            given(curricula, kind="subset", **numbers),
            given(curricula, kind="sorted", column="label", descending=True, **numbers),
            given(curricula, kind="staged", column="label", stages=[[0], [1]], **numbers),
            given(curricula, kind="explicit", curricula=[[[0], [1]]]),
            given(queries, edit="remove", name="a", target=[0], fill="shrink", seed=0),
            given(queries, edit="insert", name="a", target={"rows": [0]}, at=1, fill="repack"),
            given(queries, edit="concatenate", name="a", batches=[[0], [1]]),
        ]

    def _of_simulators(self) -> list[Call]:
        w, task, run = self, self.task, self.run
        both: dict[str, Any] = {"curricula": w.curricula[:2], "initial_losses": run.initial_losses}

        def conformal(**parameters: Any) -> None:
            sf.ConformalSimulator(**parameters).fit(w.runs)

        return [
            given(conformal, simulator=sf.AdditiveSimulator(), members=2, folds=2, seed=0),
            given(w.conformal.simulate, **both),
            given(w.conformal.interval, confidence=0.9, **both),
            given(sf.what_if, simulator=w.conformal, base=run, queries=sf.Remove([0]), task=task, confidence=0.9),
            given(sf.simulators.build, name="additive", l2=1.0),
            given(check_simulator, simulator=sf.MeanTrajectorySimulator()),
            given(sf.leave_one_out, simulator=w.simulator, run=run, method="derivative"),
            given(sf.leave_group_out, simulator=w.conformal, run=run, groups={"a": [0, 1], "b": "label == 1"}),
            given(sf.show_again, simulator=w.conformal, run=run, at=2),
            given(sf.rank_suspects, source=w.conformal, base=run, test=[0], by="group", examples=None),
            given(sf.smallest_removal, simulator=w.simulator, run=run, test="id == '0'", past=0.1, exact=True, most=2),
        ]

    def _of_texts(self) -> list[Call]:
        """Tables of text and their encoding, by tiny models with random weights."""
        rows = [{"text": f"the dog {k}", "label": "ab"[k % 2]} for k in range(4)]
        os.environ["HF_HUB_OFFLINE"] = "1"  # a wrong name of a model is not asked for elsewhere
        tables = [
            given(read_rows, source=rows),
            given(sf.tasks.Pretrained, name="x", tuning="full", tuning_args={}, dropout=0.0),
        ]
        if importlib.util.find_spec("transformers") is None:
            return tables
        import tiny_models

        folders = {kind: tiny_models.saved(kind, self.folder / kind) for kind in ("bert", "gpt2")}
        bert, gpt2 = (sf.tasks.Pretrained(folder) for folder in folders.values())
        choices = [{"prompt": "the dog", "choices": ["ran", "fell"], "answer": k % 2} for k in range(4)]
        limits: dict[str, Any] = {"max_length": 9, "truncate": True, "features": False}

        def classified(text: Any, label: Any) -> None:
            sf.tasks.classification(bert, [*rows, {"text": text, "label": label}], rows, features=False)

        def ranked(prompt: Any, choices: Any, answer: Any) -> None:
            row = {"prompt": prompt, "choices": choices, "answer": answer}
            sf.tasks.multiple_choice(gpt2, [row, row], [row], features=False)

        def modelled(prompt: Any, target: Any) -> None:
            row = {"prompt": prompt, "text": target}
            sf.tasks.language_modelling(gpt2, [row], [row], prompt="prompt", features=False)

        return [
            *tables,
            given(
                sf.tasks.classification, model=bert, train=rows, test=rows, text="text", label="label",
                classes=["a", "b"], keep_text=True, name="a", arguments=None, **limits,
            ),
            given(
                sf.tasks.multiple_choice, model=gpt2, train=choices, test=choices, prompt="prompt", choices="choices",
                answer="answer", name="a", **limits,
            ),
            given(
                sf.tasks.language_modelling, model=gpt2, train=rows, test=rows, target="text", prompt=None,
                keep_text=False, name="a", **limits,
            ),
            given(classified, text="the cat", label="a"),
            given(ranked, prompt="the dog", choices=["ran", "fell"], answer=0),
            given(modelled, prompt="the dog", target="ran"),
            given(sf.tasks.topics, n_train=2, n_test=1, shape="gpt2", length=16, seed=0),
        ]  # fmt: skip


def given(function: Callable[..., Any], /, **kwargs: Any) -> Call:
    """Describe a right call. Its parameters must exist: a renamed one must not hide a function from the fuzzer."""
    inspect.signature(function).bind(**kwargs)
    return getattr(function, "__qualname__", str(function)), function, kwargs


def mutated(rng: random.Random, kwargs: dict[str, Any], wrong: list[Any]) -> dict[str, Any]:
    """Replace one or two arguments by wrong values, or swap two arguments."""
    changed = dict(kwargs)
    names = list(kwargs)
    if len(names) > 1 and rng.random() < 0.15:
        one, other = rng.sample(names, 2)
        changed[one], changed[other] = changed[other], changed[one]
        return changed
    for name in rng.sample(names, min(len(names), 1 if rng.random() < 0.8 else 2)):
        changed[name] = rng.choice(wrong)
    return changed


class OutOfTimeError(BaseException):
    """A call took longer than ``SECONDS`` of the processor."""


def _out_of_time(*_: Any) -> None:
    raise OutOfTimeError


def outcome(function: Callable[..., Any], kwargs: dict[str, Any]) -> str:
    """Call a function; return "ok", "refused", "call" (Python's own error about the call) or what went wrong."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            function(**kwargs)
        said = "ok"
    except sf.SimfluenceError:
        said = "refused"
    except OutOfTimeError:
        said = "more than 20 s"
    except BaseException as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "/simfluence/" in f.filename]
        where = f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else f"{Path(last.filename).name}"
        said = f"{type(error).__name__} at {where}: {str(error)[:80]!r}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**20
    return said if grown < GIBIBYTES else f"{grown:.1f} GiB"


def main() -> int:
    """Make the calls, print what went wrong, and return how many kinds of it there were."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGPROF, _out_of_time)
    counts: collections.Counter[str] = collections.Counter()
    wrong: dict[str, list[str]] = collections.defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        (Path(folder) / "work").mkdir()
        world = World(Path(folder) / "work")
        calls = [call for call in world.calls() if arguments.only in call[0]]
        if not calls:
            parser.error(f"no function has {arguments.only!r} in its name")
        rng = random.Random(arguments.seed)
        for number in range(arguments.calls):
            name, function, right = calls[number % len(calls)]
            kwargs = mutated(rng, right, world.wrong())
            with open(os.devnull, "w") as quiet:
                out, sys.stdout = sys.stdout, quiet
                try:
                    said = outcome(function, kwargs)
                finally:
                    sys.stdout = out
            counts[said if said in ("ok", "refused") else "wrong"] += 1
            if said not in ("ok", "refused"):
                changed = {k: v for k, v in kwargs.items() if v is not right[k]}
                wrong[f"{name}: {said}"].append(reprlib.repr(changed))
    for place, examples in sorted(wrong.items()):
        print(f"{len(examples):4d}  {place}\n        with {examples[0]}")
    print(f"{arguments.calls} calls: {dict(counts)}")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(min(main(), 100))
