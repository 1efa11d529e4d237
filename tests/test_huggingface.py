"""Language models as tasks: padding, choices, targets, adapters, and what is refused."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pandas as pd
import pytest
import torch
from comparing import relative

import simfluence as sf
from simfluence.errors import InvalidInput, PlainGradientsWarning
from simfluence.task import take
from simfluence.tasks.text.padding import IGNORED, trimmed
from simfluence.tasks.text.prompted import DATA
from simfluence.tasks.text.tasks import losses_by_token

transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")

import tiny_models  # noqa: E402 (needs transformers)
from tiny_models import LABELLED, classified  # noqa: E402

TUNINGS = ("full", "lora", "ia3")


def moved(task):
    """A model away from where adapters do nothing, in evaluation mode."""
    model = task.build_model(0).eval()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def language_tasks(models):
    rows = [{"text": "the dog ran", "said": "it was cold"}, {"text": "a cat fell because", "said": "so"}] * 4
    sides = rows[:4], [{"text": "the tree", "said": "he saw it because she ran"}] * 2
    yield sf.tasks.language_modelling(models["gpt2"], *sides)
    yield sf.tasks.language_modelling(models["gpt2"], *sides, prompt="text", target="said")
    yield sf.tasks.language_modelling(models["t5"], *sides, prompt="text", target="said")


@pytest.mark.parametrize(
    ("kind", "data", "tuning"),
    [
        ("gpt2", "copa", "ia3"), ("gpt2", "rte", "full"), ("gpt2", "winogrande", "lora"),
        ("t5", "copa", "full"), ("t5", "rte", "lora"), ("t5", "winogrande", "ia3"),
    ],
)  # fmt: skip
def test_rank_classification_goes_from_record_to_what_if(models, folders, kind, data, tuning, tmp_path):
    task = getattr(sf.tasks, data)(model=models[kind], source=folders[data], n_train=24, n_test=8, tuning=tuning)
    curricula = sf.random_curricula(n_train=24, runs=2, steps=4, batch_size=4, subset=0.5, seed=0)
    runs = sf.record(task, sf.Recipe(optimizer="adamw", lr=0.02), curricula, tmp_path / "runs", engine="loop")
    names = {name: parameter.requires_grad for name, parameter in task.build_model(0).named_parameters()}
    mark = {"ia3": ".ia3_l.", "lora": ".lora_", "full": ""}[tuning]
    assert {name for name, trained in names.items() if trained} == {name for name in names if mark in name}
    assert np.abs(runs.losses[:, -1] - runs.losses[:, 0]).max() > 1e-3
    stored = sf.RunStore(tmp_path / "runs").load()
    simulator = sf.AdditiveSimulator(l2=1.0, around="mean").fit(stored)
    forecast = sf.what_if(simulator, stored[0], [sf.Remove('text contains "dog"'), sf.Keep("length > 3")])
    assert np.isfinite(forecast.change).all()
    assert np.abs(forecast.change).max() > 0


def test_a_forecast_on_text_is_verified_by_a_task_rebuilt_from_the_store(models, folders, tmp_path):
    task = sf.tasks.rte(model=models["gpt2"], source=folders["rte"], n_train=16, n_test=4)
    curricula = sf.random_curricula(n_train=16, runs=2, steps=3, batch_size=4, seed=0)
    runs = sf.record(task, sf.Recipe(lr=0.1), curricula, tmp_path / "runs")
    rebuilt = sf.tasks.rebuild(sf.RunStore(tmp_path / "runs").info)
    mean = sf.MeanTrajectorySimulator().fit(runs)
    found = sf.what_if(mean, runs[0], sf.Remove('label == "entailment"'), task=rebuilt).verify()
    assert np.abs(found.actual_change).max() > 0


@pytest.mark.parametrize("data", tiny_models.ROWS)
def test_a_choices_score_is_the_mean_log_likelihood_of_its_tokens(models, folders, data):
    task = getattr(sf.tasks, data)(model=models["gpt2"], source=folders[data], n_train=4, n_test=2)
    model = task.build_model(0).eval()
    words = sf.tasks.Pretrained(models["gpt2"]).tokenizer
    table = task.train.table
    form = DATA[data]
    rows = form.rows(pd.read_json(folders[data] / "train.jsonl", lines=True, dtype={"answer": str}))
    scores = model(**task.train_data[0]).detach()
    for number, text in enumerate(table["text"]):
        row = rows[rows["text"] == text].iloc[0]
        assert table["label"][number] == row["label"]
        assert int(task.train_data[1][number]) == row["answer"]
        for choice, said in enumerate(row["choices"]):
            before = words(text, add_special_tokens=False)["input_ids"]
            after = words(" " + said, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logits = model.outputs.model(input_ids=torch.tensor([before + after])).logits[0].log_softmax(-1)
            wanted = sum(float(logits[len(before) + k - 1, token]) for k, token in enumerate(after)) / len(after)
            assert float(scores[number, choice]) == pytest.approx(wanted, rel=2e-6)


def test_a_decoders_choice_is_scored_as_by_transformers(models, folders):
    task = sf.tasks.copa(model=models["t5"], source=folders["copa"], n_train=4, n_test=2, seed=1)
    model, words = task.build_model(0).eval(), sf.tasks.Pretrained(models["t5"]).tokenizer
    scores = model(**task.train_data[0]).detach()
    rows = [json.loads(line) for line in (folders["copa"] / "train.jsonl").read_text().splitlines()]
    for number, name in enumerate(task.train.ids):
        row = rows[int(name)]
        for choice in (1, 2):
            said = row[f"choice{choice}"]
            labels = words(said[0].lower() + said[1:], return_tensors="pt")["input_ids"]
            read = words(task.train.table["text"][number], return_tensors="pt")
            with torch.no_grad():
                loss = model.outputs.model(**read, labels=labels).loss
            assert float(scores[number, choice - 1]) == pytest.approx(-float(loss), rel=2e-6)


def test_language_modelling_has_transformers_losses(models):
    for task in language_tasks(models):
        model = task.build_model(0).eval()
        inputs, targets = task.train_data
        found = task.batch_losses(model, task.train_data)
        by_token = losses_by_token(task, model, task.train_data)
        torch.testing.assert_close(by_token.sum(1) / (targets >= 0).sum(1), found)
        for row in range(len(found)):
            kept = inputs["attention_mask"][row].bool()
            one = {"input_ids": inputs["input_ids"][row][kept][None]}
            if "decoder_input_ids" in inputs:
                labels = targets[row][targets[row] >= 0][None]
            else:  # transformers shifts by itself
                labels = torch.cat([torch.tensor([-100]), targets[row][: int(kept.sum()) - 1]])[None]
            with torch.no_grad():
                assert float(model.model(**one, labels=labels).loss) == pytest.approx(float(found[row]), rel=2e-6)


def test_padding_and_company_change_no_loss_and_no_gradient(models, folders):
    tasks = [
        classified(models),
        sf.tasks.copa(model=models["gpt2"], source=folders["copa"], n_train=4, n_test=2),  # tied embeddings
        sf.tasks.copa(model=models["t5"], source=folders["copa"], n_train=4, n_test=2, tuning="lora"),
        *language_tasks(models),
    ]
    for task in tasks:
        model = moved(task).double()
        together = task.batch_losses(model, task.train_data)
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for row in range(2):
            alone = shortened(take(task.train_data, torch.tensor([row])))
            loss = task.batch_losses(model, alone)
            assert loss.item() == pytest.approx(together[row].item(), rel=1e-11)
            pairs = zip(
                torch.autograd.grad(together[row], parameters, retain_graph=True, allow_unused=True),
                torch.autograd.grad(loss.sum(), parameters, allow_unused=True), strict=True,
            )  # fmt: skip
            for one, other in pairs:
                torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def shortened(data):
    """One example without its padding."""
    inputs, targets = data
    length = int(inputs["attention_mask"].sum(-1).max())
    found = {name: tensor[..., :length] if "decoder" not in name else tensor for name, tensor in inputs.items()}
    if "labels" in inputs and "decoder_input_ids" in inputs:
        found["labels"] = inputs["labels"]
    same = targets.ndim == 2 and "decoder_input_ids" not in inputs
    return found, targets[:, :length] if same else targets


@pytest.mark.parametrize("kind", ["gpt2", "t5"])
@pytest.mark.parametrize("tuning", TUNINGS)
def test_per_example_gradients_are_autograds(models, folders, kind, tuning):
    """Tied embeddings, modules called for each choice, masked padding, adapters: all of those by rules."""
    task = sf.tasks.copa(model=models[kind], source=folders["copa"], n_train=3, n_test=2, tuning=tuning)
    model = moved(task)
    with warnings.catch_warnings():
        if tuning == "full":  # positions, and T5's relative ones, have no rule
            warnings.simplefilter("ignore", PlainGradientsWarning)
        found = sf.attribution.per_example_gradients(model, task.loss, task.train_data)
    assert all(layer.sources or "wpe" in name or "relative" in name for name, layer in found.layers.items())
    factors, named = found.factors(task.train_data), found.parameters
    for row in range(3):
        loss = task.batch_losses(model, take(task.train_data, torch.tensor([row]))).sum()
        gradients = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
        true = dict(zip(named, gradients, strict=True))
        for name, layer in found.layers.items():
            for part, made in layer.to_parameters(factors[name].matrices()).items():
                torch.testing.assert_close(made[row].reshape(true[part].shape), true[part], rtol=1e-3, atol=1e-5)


def seq2seq_tasks(models, folders):
    yield sf.tasks.copa(model=models["t5"], source=folders["copa"], n_train=4, n_test=2)
    yield list(language_tasks(models))[-1]


def longer(data, read, said):
    """With so many more places of padding."""
    fill = {"labels": IGNORED}
    more = {name: said if "decoder" in name or name == "labels" else read for name in data[0]}
    inputs = {n: torch.nn.functional.pad(t, (0, more[n]), value=fill.get(n, 0)) for n, t in data[0].items()}
    return inputs, torch.nn.functional.pad(data[1], (0, said), value=IGNORED) if data[1].ndim > 1 else data[1]


def test_padding_has_no_part_in_curvature(models, folders):
    """What comes into each layer of an encoder and a decoder, beside examples one at a time without padding."""
    for task in seq2seq_tasks(models, folders):
        model = moved(task).double()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", PlainGradientsWarning)  # T5's relative positions
            found = sf.attribution.per_example_gradients(model, task.loss, task.train_data)
        ones = [trimmed(take(task.train_data, torch.tensor([row]))) for row in range(4)]
        alone = [found.factors(one) for one in ones]
        inputs = task.train_data[0]
        gap = inputs["input_ids"].shape[-1] - inputs["decoder_input_ids"].shape[-1]
        alike = longer(task.train_data, max(0, -gap), max(0, gap))  # as long to read as to say
        assert alike[0]["input_ids"].shape[-1] == alike[0]["decoder_input_ids"].shape[-1]
        for data in (task.train_data, longer(task.train_data, 3, 2), alike):
            for name, factors in found.factors(data).items():
                kept, wanted = factors.unpadded()[0], torch.cat([each[name].unpadded()[0] for each in alone])
                assert len(kept) == len(wanted), name
                torch.testing.assert_close(kept.T @ kept, wanted.T @ wanted, rtol=1e-8, atol=1e-10)


def recorded(task, runs=1, **recipe):
    curricula = sf.random_curricula(n_train=len(task.train), runs=runs, steps=5, batch_size=4, subset=0.75, seed=0)
    return sf.record(task, sf.Recipe(**({"lr": 0.1} | recipe)), curricula, engine="loop")


@pytest.mark.parametrize("tuning", ["lora", "ia3"])
def test_attribution_and_tangent_kernel_work_on_adapters(models, folders, tuning):
    task = sf.tasks.copa(model=models["gpt2"], source=folders["copa"], n_train=8, n_test=3, tuning=tuning)
    runs = recorded(task, runs=2, lr=0.5)
    model = sf.trained_model(task, runs[0])
    scores = np.asarray(sf.attribution.EKFAC(damping=0.1, labels="sampled").fit(model, task).scores(task.test_data))
    by_hand = np.asarray(sf.attribution.GradientDot().fit(model, task).scores(task.test_data))
    exact = np.asarray(sf.attribution.Exact(damping=0.1).fit(model, task).scores(task.test_data))
    assert np.corrcoef(scores.ravel(), exact.ravel())[0, 1] > np.corrcoef(by_hand.ravel(), exact.ravel())[0, 1]
    tracin = np.asarray(sf.attribution.attributor_from_run("tracin", task, runs[0], checkpoints=2).scores())
    assert np.isfinite(tracin).all()
    tangent = sf.TangentKernelSimulator(task, n_checkpoints=3, n_references=1).fit(runs[:1])
    simulated = tangent.simulate([run.curriculum for run in runs], runs.initial_losses)
    error = ((simulated[1:] - runs.losses[1:]) ** 2).sum()
    assert error < 0.2 * ((runs.losses[:1] - runs.losses[1:]) ** 2).sum()


def test_micro_batches_and_the_batch_as_a_whole_train_alike(models):
    task = classified(models)
    whole, parts = (recorded(task, momentum=0.9, micro_batch=size) for size in (None, 3))
    assert relative(whole.losses, parts.losses) < 1e-5
    assert np.abs(whole.losses[:, -1] - whole.losses[:, 0]).max() > 0.01


def test_bfloat16_rounds_the_outputs_and_keeps_weights_in_single_precision(models):
    losses = {}
    for precision in (None, "bfloat16"):
        task = classified({"bert": sf.tasks.Pretrained(models["bert"], precision=precision)})
        assert {p.dtype for p in task.build_model(0).parameters()} == {torch.float32}
        losses[precision] = recorded(task).losses
    assert 1e-6 < relative(losses["bfloat16"], losses[None]) < 0.02


def test_a_seed_gives_the_head_and_the_adapters(models):
    task = classified({"bert": sf.tasks.Pretrained(models["bert"], "lora")})
    one, same, other = (task.build_model(seed).state_dict() for seed in (0, 0, 1))
    drawn = {name for name in one if not torch.equal(one[name], other[name])}
    assert drawn == {name for name in one if "lora_A" in name or ("classifier" in name and name.endswith("weight"))}
    assert all(torch.equal(one[name], same[name]) for name in one)


def test_the_fingerprint_sees_the_pretrained_weights(models, tmp_path):
    tiny_models.saved("bert", tmp_path, seed=1)
    assert classified(models).fingerprint == classified(models).fingerprint
    assert classified(models).fingerprint != classified({"bert": str(tmp_path)}).fingerprint


def test_a_head_of_its_own_is_kept_where_it_knows_the_labels(models, tmp_path):
    names = {0: "dog", 1: "fish", 2: "cat"}
    head = transformers.AutoModelForSequenceClassification.from_pretrained(
        models["bert"], id2label=names, label2id={name: number for number, name in names.items()}
    )
    head.save_pretrained(tmp_path)
    tiny_models.tokenizer(ending=False).save_pretrained(tmp_path)
    task = classified({"bert": str(tmp_path)})
    assert task.train_data[1].tolist() == [0, 2, 2, 0] * 2
    torch.testing.assert_close(task.build_model(1).model.classifier.weight, head.classifier.weight)
    other = classified({"bert": str(tmp_path)}, classes=["cat", "dog"])  # a new one is drawn
    assert other.build_model(1).model.classifier.weight.shape == (2, 16)
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(InvalidInput, match="cannot be loaded"):
        task.build_model(0)


def test_dropout_is_off_unless_asked_for(models):
    quiet, own = (
        classified({"bert": sf.tasks.Pretrained(models["bert"], dropout=dropout)}).build_model(0)
        for dropout in (0.0, None)
    )
    rates = [{m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} for model in (quiet, own)]
    assert rates == [{0.0}, {0.1}]


def test_some_parameters_only_are_trained(models):
    top = sf.tasks.Pretrained(models["bert"], tuning_args={"layers": ["*layer.1.*", "classifier.*"]})
    trained = [name for name, p in classified({"bert": top}).build_model(0).named_parameters() if p.requires_grad]
    assert trained
    assert all("layer.1." in name or "classifier" in name for name in trained)


def test_metadata_and_features_of_text(models):
    task = classified(models)
    assert task.train.table.columns.tolist() == ["id", "text", "label", "weight", "length"]
    assert task.train.select('label == "dog" and text contains "ran" and weight > 1').tolist() == [4]
    inputs = task.train_data[0]
    assert task.train.table["length"].tolist() == inputs["attention_mask"].sum(1).tolist()
    base = transformers.AutoModel.from_pretrained(models["bert"])
    for row in (0, 2):
        kept = inputs["input_ids"][row][inputs["attention_mask"][row].bool()][None]
        with torch.no_grad():
            wanted = base.eval()(input_ids=kept).last_hidden_state[0].mean(0)
        assert relative(task.train.features[row], wanted) < 2e-6
    secret = classified(models, keep_text=False, features=False)
    assert "text" not in secret.train.table
    assert secret.train.features is None


def test_pairs_of_texts_and_named_columns(models):
    rows = [{"a": "the dog", "b": text, "kind": kind} for text, kind in (("ran", 1), ("fell", 0), ("saw", 1))]
    task = sf.tasks.classification(models["bert"], rows, rows, text=("a", "b"), label="kind")
    words = sf.tasks.Pretrained(models["bert"]).tokenizer
    assert (
        task.train_data[0]["input_ids"][0].tolist()[: len(words("the dog", "ran")["input_ids"])]
        == (words("the dog", "ran")["input_ids"])
    )
    assert task.train_data[1].tolist() == [1, 0, 1]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "dataset"])
def test_rows_from_anywhere_are_the_same(models, kind, tmp_path):
    frame = pd.DataFrame(LABELLED)
    if kind == "dataset":
        datasets = pytest.importorskip("datasets")
        classes = datasets.ClassLabel(names=["cat", "dog"])
        given = datasets.Dataset.from_pandas(frame).cast_column("label", classes)
    else:
        given = tmp_path / f"rows.{kind}"
        write = {"csv": frame.to_csv, "parquet": frame.to_parquet}.get(kind)
        if write:
            write(given, index=False)
        else:
            frame.to_json(given, orient="records", lines=True)
    found = sf.tasks.classification(models["bert"], given, LABELLED[:2], features=False)
    expected = sf.tasks.classification(models["bert"], LABELLED, LABELLED[:2], features=False)
    assert found.fingerprint == expected.fingerprint
    assert found.train.table["label"].tolist() == frame["label"].tolist()


def test_the_literatures_recipes_train(models):
    task = classified(models)
    for recipe in (sf.tasks.recipes.ia3(5), sf.tasks.recipes.full_tuning(), sf.tasks.recipes.gptfluence(5)):
        losses = recorded(task, **recipe.model_dump()).losses
        assert np.abs(losses[:, -1] - losses[:, 0]).max() > 0
