"""Language models as tasks: what is refused, what is said, and what is never run."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

import pytest
import torch

import simfluence as sf
from simfluence.errors import InvalidInput

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny_models  # noqa: E402 (needs transformers)
from tiny_models import LABELLED, classified  # noqa: E402


def test_what_is_said_when_something_is_missing(models, folders, tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match="no column 'txet' in the data, did you mean 'text'"):
        classified(models, text="txet")
    with pytest.raises(InvalidInput, match="row 1 has nothing in column 'label'"):
        classified(models, [*LABELLED[:1], {"text": "a", "label": None}, *LABELLED[2:]])
    with pytest.raises(InvalidInput, match="label 'fish' of test row 0 is unknown to the model"):
        classified(models, [*LABELLED[:8], {"text": "a", "label": "fish"}])
    with pytest.raises(InvalidInput, match="all training labels are 'dog'"):
        classified(models, [{"text": "a", "label": "dog"}] * 9)
    with pytest.raises(InvalidInput, match="row 1 has 64 tokens, more than the 48 that are allowed"):
        classified(models, [LABELLED[0], {"text": "ZZZZZZ " * 9, "label": "cat"}, *LABELLED[2:]])
    cut = classified(models, [LABELLED[0], {"text": "ZZZZZZ " * 9, "label": "cat"}, *LABELLED[2:]], truncate=True)
    assert cut.train_data[0]["input_ids"].shape == (8, 48)
    with pytest.raises(InvalidInput, match="no row of text"):
        sf.tasks.classification(models["bert"], LABELLED, [])
    said = [{"text": "the dog", "said": "ran"}, {"text": "a cat", "said": " "}]
    for kind in ("gpt2", "t5"):
        with pytest.raises(InvalidInput, match="the target of row 1 is empty"):
            sf.tasks.language_modelling(models[kind], said, said, prompt="text", target="said")
    with pytest.raises(InvalidInput, match="needs a prompt"):
        sf.tasks.language_modelling(models["t5"], said, said)
    unequal = [{"prompt": "a", "choices": ["b", "c"], "answer": 0}, {"prompt": "a", "choices": ["b"], "answer": 0}]
    with pytest.raises(InvalidInput, match=r"same number of choices, two or more; got \[1, 2\]"):
        sf.tasks.multiple_choice(models["gpt2"], unequal, unequal[:1])
    wrong = [{"prompt": "a", "choices": ["b", "c"], "answer": 2}]
    with pytest.raises(InvalidInput, match="answer 2 of row 0 is not the number of a choice, 0 to 1"):
        sf.tasks.multiple_choice(models["gpt2"], wrong, wrong)
    letters = [{"prompt": "a", "choices": "bc", "answer": 0}]
    with pytest.raises(InvalidInput, match="column 'choices' must have a list of choices in row 0, got 'bc'"):
        sf.tasks.multiple_choice(models["gpt2"], letters, letters)
    number = [{"text": "the dog", "said": "ran"}, {"text": 3, "said": "ran"}]
    for kind in ("gpt2", "t5"):
        with pytest.raises(InvalidInput, match="row 1 must have text, got 3"):
            sf.tasks.language_modelling(models[kind], number, number, prompt="text", target="said")
    for label in (3, ["dog"]):
        with pytest.raises(InvalidInput, match="the labels in column 'label' must be all texts or all numbers"):
            classified(models, [{"text": "a", "label": label}, *LABELLED[1:]])
    with pytest.raises(InvalidInput, match="no column 'choice1'"):
        sf.tasks.copa(model=models["gpt2"], source=folders["rte"])
    with pytest.raises(InvalidInput, match=r"needs a file train\.jsonl"):
        sf.tasks.copa(model=models["gpt2"], source=tmp_path)
    with pytest.raises(InvalidInput, match="200 rows: there are 24"):
        sf.tasks.copa(model=models["gpt2"], source=folders["copa"])


def test_what_is_said_of_models(models, tmp_path, monkeypatch):
    with pytest.raises(InvalidInput, match=r"there is no folder '\./nowhere'"):
        classified({"bert": "./nowhere"})
    with pytest.raises(InvalidInput, match="as save_pretrained writes them"):
        classified({"bert": str(tmp_path)})
    with pytest.raises(InvalidInput, match="unknown tuning 'lroa', did you mean 'lora'"):
        sf.tasks.Pretrained(models["bert"], "lroa")
    with pytest.raises(InvalidInput, match="unknown precision 'fp8'"):
        sf.tasks.Pretrained(models["bert"], precision="fp8")
    with pytest.raises(InvalidInput, match="dropout must be"):
        sf.tasks.Pretrained(models["bert"], dropout=1.0)
    with pytest.raises(InvalidInput, match="full tuning takes no 'r'"):
        sf.tasks.Pretrained(models["bert"], tuning_args={"r": 4})
    for tuning, arguments, message in (
        ("lora", {"rank": 4}, "unexpected keyword argument 'rank'"),
        ("ia3", {"target_modules": ["nothing"]}, "No modules were targeted"),
        ("full", {"layers": ["head.*"]}, "no parameter is called 'head"),
    ):
        task = classified({"bert": sf.tasks.Pretrained(models["bert"], tuning, arguments)})
        with pytest.raises(InvalidInput, match=message):
            task.build_model(0)


def test_what_is_said_without_a_network(models, monkeypatch):
    """The hub's client is told to stay offline."""
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInput, match="`hf download nobody/nothing-of-that-name --local-dir FOLDER`"):
        classified({"bert": "nobody/nothing-of-that-name"})
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidInput, match=r"run `hf download aps/super_glue --repo-type dataset"):
        sf.tasks.rte(model=models["gpt2"], n_train=2, n_test=2)


def test_what_is_said_without_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InvalidInput, match=r"pip install 'simfluence\[hf\]'"):
        sf.tasks.classification("any/model", LABELLED, LABELLED)
    with pytest.raises(InvalidInput, match=r"pip install 'simfluence\[hf\]'"):
        sf.tasks.topics(n_train=2, n_test=2).build_model(0)


def test_code_and_pickles_that_come_with_a_model_are_not_run(models, tmp_path):
    folder = Path(tiny_models.saved("bert", tmp_path / "own"))
    settings = json.loads((folder / "config.json").read_text())
    ran = tmp_path / "ran"
    (folder / "own.py").write_text(f"open({str(ran)!r}, 'w').close()\n")
    own = {"auto_map": {"AutoConfig": "own.Own", "AutoModel": "own.Model"}, "model_type": "own_kind"}
    (folder / "config.json").write_text(json.dumps(settings | own))
    with pytest.raises(InvalidInput, match="trust_remote_code=True"):
        classified({"bert": str(folder)})
    assert not ran.exists()
    (folder / "config.json").write_text(json.dumps(settings))
    weights = transformers.BertModel.from_pretrained(models["bert"]).state_dict()
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(InvalidInput, match="safetensors"):
        classified({"bert": str(folder)})
    with pytest.raises(InvalidInput, match="trust_remote_code"):
        sf.tasks.build("copa", model=models["gpt2"], trust_remote_code=True)


def test_nothing_is_imported_before_it_is_needed():
    for path in Path(sf.__file__).parent.rglob("*.py"):
        imported = {
            name.split(".")[0]
            for node in ast.parse(path.read_text()).body
            for name in (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in getattr(node, "names", [])]
            )
        }
        assert not imported & {"transformers", "peft", "datasets", "accelerate"}, path
