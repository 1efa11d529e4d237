"""A ``transformers.Trainer``, recorded: beside ``record`` of the same curriculum, and beside itself unrecorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comparing import relative
from torch import nn
from torch.utils.data import Dataset, IterableDataset

import simfluence as sf
from simfluence.errors import InvalidInput, StoreError

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from test_recorder import blocks  # noqa: E402

from simfluence.recording.hf_trainer import TrainerRecorder  # noqa: E402 (after the packages that it needs)

N_TRAIN, N_TEST = 12, 5


class RunRows(Dataset):
    def __init__(self, inputs, labels):
        self.rows = [
            {**{name: tensor[row] for name, tensor in inputs.items()}, "labels": labels[row]}
            for row in range(len(labels))
        ]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, row):
        return self.rows[row]


class Stream(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)

    def __len__(self):
        return len(self.rows)


def logits_loss(outputs, targets):
    return nn.functional.cross_entropy(outputs.logits, targets, reduction="none")


@pytest.fixture(scope="module")
def bert():
    """A task of texts of 2 to 7 tokens for a tiny BERT without dropout."""
    config = transformers.BertConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=8, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    rng = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 8, (N_TRAIN + N_TEST,), generator=rng)
    mask = (torch.arange(7) < lengths[:, None]).long()
    ids = torch.randint(3, 20, mask.shape, generator=rng) * mask
    labels = ids[:, 0] % 2
    inputs = {"input_ids": ids, "attention_mask": mask}
    first, last = slice(0, N_TRAIN), slice(N_TRAIN, None)
    train, test = (({k: v[part] for k, v in inputs.items()}, labels[part]) for part in (first, last))
    return sf.Task(
        "bert", model, train, test, logits_loss,
        sf.Examples([f"train-{i}" for i in range(N_TRAIN)]), sf.Examples([f"test-{i}" for i in range(N_TEST)]),
    )  # fmt: skip


@pytest.fixture
def make(bert, tmp_path):
    """A trainer of the task."""

    def trainer(cls=transformers.Trainer, train=None, **arguments):
        settings = {
            "output_dir": str(tmp_path / "out"), "per_device_train_batch_size": 4, "learning_rate": 1e-2,
            "lr_scheduler_type": "linear", "optim": "adamw_torch", "max_grad_norm": 1.0, "report_to": "none",
            "save_strategy": "no", "logging_strategy": "no", "disable_tqdm": True, "use_cpu": True, "max_steps": 6,
            "dataloader_pin_memory": False,
        }  # fmt: skip
        args = transformers.TrainingArguments(**(settings | arguments))
        sides = [RunRows(*side) for side in (bert.train_data, bert.test_data)]
        model = bert.build_model(0)
        model.accepts_loss_kwargs = False  # BERT's loss is a mean, which the Trainer must average over the parts
        return cls(model, args, train_dataset=train or sides[0], eval_dataset=sides[1])

    return trainer


def recipe(steps, **changes):
    return sf.Recipe(optimizer="adamw", lr=1e-2, schedule="linear", horizon=steps, clip_norm=1.0).replace(**changes)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_replayed_curriculum_equals_records(bert, make, tmp_path, accumulate, optimizer):
    curriculum = sf.Curriculum([[0, 5, 5, 11], [7, 1], [2, 3, 4, 6, 8, 9], [10, 0], [1, 2, 3, 4], [11, 9]], N_TRAIN)
    change = {} if optimizer == "adamw" else {"optimizer": "sgd", "lr": 0.3, "clip_norm": None}
    how = recipe(6, **change)
    expected = sf.record(bert, how, [curriculum], engine="loop")[0]
    trainer = make(
        optim="adamw_torch" if optimizer == "adamw" else "sgd",
        learning_rate=how.lr, max_grad_norm=how.clip_norm or 0.0,
        gradient_accumulation_steps=accumulate,
    )  # fmt: skip
    TrainerRecorder(trainer, tmp_path / "runs", "replayed", task=bert, curriculum=curriculum, recipe=how)
    trainer.train()
    run = sf.RunStore(tmp_path / "runs").read("replayed")
    assert run.curriculum == curriculum
    assert relative(run.losses, expected.losses) < 1e-5
    assert np.ptp(run.losses, axis=0).min() > 1e-3  # something was learned
    assert np.allclose(run.learning_rates, expected.learning_rates, rtol=1e-9)
    assert run.fingerprint == bert.fingerprint


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 2}, {"dataloader_drop_last": True}], ids=str)
def test_an_ordinary_run_is_recorded_as_it_was(bert, make, tmp_path, settings):
    settings = {"per_device_train_batch_size": 5, "max_steps": 7, "seed": 3, "max_grad_norm": 0.0} | settings
    plain = make(**settings)
    plain.train()
    trainer = make(**settings)
    TrainerRecorder(trainer, tmp_path / "runs", "mine")
    trainer.train()
    for mine, other in zip(trainer.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(mine, other)  # recording changed nothing
    run = sf.RunStore(tmp_path / "runs").read("mine")
    assert run.steps == 7
    sizes = [5, 5] if "dataloader_drop_last" in settings else [10, 2] if "accumulation" in str(settings) else [5, 5, 2]
    assert run.curriculum.sizes.tolist() == (sizes * 7)[:7]
    if "dataloader_drop_last" not in settings:
        for start in range(0, 7 - len(sizes) + 1, len(sizes)):  # an epoch shows every example once
            epoch = np.concatenate([run.curriculum[t] for t in range(start, start + len(sizes))])
            assert sorted(epoch) == list(range(N_TRAIN))
    if settings.get("gradient_accumulation_steps", 1) == 1:  # unequal parts of a step count alike, not their examples
        how = recipe(7, clip_norm=None)
        assert relative(run.losses, sf.record(bert, how, [run.curriculum], engine="loop")[0].losses) < 1e-5


def test_every_and_losses_of_ones_own(bert, make, tmp_path):
    trainer = make(max_steps=5)
    TrainerRecorder(
        trainer, tmp_path / "runs", "mine", test=["a", "b"], every=2,
        losses=lambda model: torch.tensor([float(model.training), next(model.parameters()).sum()]),
    )  # fmt: skip
    trainer.train()
    run = sf.RunStore(tmp_path / "runs").read("mine")
    assert run.times.tolist() == [0, 2, 4, 5]
    assert run.losses[run.times, 0].tolist() == [0.0] * 4
    assert run.test.ids == ["a", "b"]


def test_runs_of_a_trainer_are_runs(bert, make, tmp_path):
    for seed in range(3):
        trainer = make(seed=seed, data_seed=seed, max_steps=4)
        TrainerRecorder(trainer, tmp_path / "runs", f"seed-{seed}", train=bert.train, test=bert.test)
        trainer.train()
    runs = sf.RunStore(tmp_path / "runs").load()
    assert len({run.curriculum for run in runs}) == 3
    assert np.ptp(runs.initial_losses, axis=0).max() < 1e-6
    simulator = sf.LinearSimulator(l2=1.0).fit(runs[:2])
    forecast = sf.what_if(simulator, runs[2], sf.Remove(["train-0", "train-1"]))
    assert np.isfinite(forecast.what_if).all()
    with pytest.raises(InvalidInput, match="pass task="):
        forecast.verify()


def test_resumed_from_a_checkpoint(bert, make, tmp_path):
    whole = make(max_steps=7)
    TrainerRecorder(whole, tmp_path / "runs", "whole")
    whole.train()

    class Crash(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 5:
                raise RuntimeError("crash")

    saving = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4}
    trainer = make(**saving)
    TrainerRecorder(trainer, tmp_path / "runs", "broken")
    trainer.add_callback(Crash())
    with pytest.raises(RuntimeError, match="crash"):
        trainer.train()
    store = sf.RunStore(tmp_path / "runs")
    assert store.unfinished() == ["broken"]
    assert store.ids() == ["whole"]
    del trainer
    again = make(**saving)
    TrainerRecorder(again, tmp_path / "runs", "broken")
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert store.unfinished() == []
    run, expected = store.read("broken"), store.read("whole")
    assert run.curriculum == expected.curriculum
    assert relative(run.losses, expected.losses) < 1e-5


class HiddenSampler(transformers.Trainer):
    def _get_train_sampler(self, train_dataset=None):
        return [("a", 1), ("b", 2)] * 6


def stream(bert):
    return Stream(RunRows(*bert.train_data).rows)


@pytest.mark.parametrize(
    ("settings", "recorder", "said"),
    [
        ({"train": stream}, {}, "hides which examples it trains on"),
        ({"cls": HiddenSampler}, {}, "sampler hides which examples it draws"),
        ({"auto_find_batch_size": True}, {}, "auto_find_batch_size restarts training"),
        ({"dataloader_num_workers": 2, "dataloader_in_order": False}, {}, "out of order"),
        ({}, {"every": 0}, "every must be at least 1"),
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"}, {"every": 2},
            "record with every=1",
        ),
        ({}, {"train": ["a", "b"]}, "has 12 rows, but there are 2 training examples"),
        ({}, {"test": ["a", "b"]}, "has 5 rows, but there are 2 test examples"),
        ({}, {"curriculum": sf.Curriculum([[0]] * 5, N_TRAIN)}, "set max_steps=5"),
        ({}, {"curriculum": sf.Curriculum([[0]] * 6, 20)}, "is for 20 training examples"),
        ({}, {"curriculum": sf.Curriculum([[0], [], [1], [1], [1], [2]], N_TRAIN)}, "batch 1 has 0 examples"),
        (
            {"gradient_accumulation_steps": 2}, {"curriculum": sf.Curriculum([[0, 1]] * 5 + [[1]], N_TRAIN)},
            "batch 5 has 1 examples.*multiple of 2",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_recorded_is_refused(bert, make, tmp_path, settings, recorder, said):
    train = {"train": settings.pop("train")(bert)} if "train" in settings else {}
    trainer = make(**settings, **train)
    with pytest.raises(InvalidInput, match=said):  # noqa: PT012 (made, or begun)
        TrainerRecorder(trainer, tmp_path / "runs", "bad", **recorder)
        trainer.train()
    store = sf.RunStore(tmp_path / "runs")
    assert not store.exists or store.ids() == store.unfinished() == []


def test_a_second_recorder_takes_the_place_of_the_first(make, tmp_path):
    trainer = make(max_steps=2)
    TrainerRecorder(trainer, tmp_path / "runs", "first")
    TrainerRecorder(trainer, tmp_path / "runs", "second")
    trainer.train()
    assert sf.RunStore(tmp_path / "runs").ids() == ["second"]
    assert sf.RunStore(tmp_path / "runs").read("second").curriculum.sizes.tolist() == [4, 4]


def test_of_other_examples_or_without_transformers(bert, make, tmp_path, monkeypatch):
    with sf.RunStore(tmp_path / "runs").recorder("a", train=range(12), test=range(5)) as rec:
        rec.read(np.zeros(5))
        rec.step([0], np.zeros(5))
    trainer = make()
    TrainerRecorder(trainer, tmp_path / "runs", train=[f"x{i}" for i in range(12)])
    with pytest.raises(StoreError, match="train examples with other ids"):
        trainer.train()
    again = make()
    TrainerRecorder(again, tmp_path / "runs", "a")
    with pytest.raises(InvalidInput, match="finished run"):
        again.train()
    monkeypatch.setattr("simfluence.recording.hf_trainer._Callback", object)
    with pytest.raises(InvalidInput, match=r"pip install 'simfluence\[hf\]'"):
        TrainerRecorder(make(), tmp_path / "runs")


def test_the_page_runs(make, tmp_path):
    exec(blocks("A `transformers.Trainer`"), {"make_trainer": make, "folder": tmp_path / "runs", "sf": sf})  # noqa: S102
    assert sf.RunStore(tmp_path / "runs").ids() == ["curriculum-0", "seed-0"]
