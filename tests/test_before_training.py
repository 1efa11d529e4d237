"""What would spoil a recording is refused before any run is trained, or named with its step and examples."""

from __future__ import annotations

import dataclasses
import json
import sys
import threading

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import simfluence as sf
from simfluence.attribution.gradients.inner_products import low_rank
from simfluence.errors import InvalidInput, SimfluenceError, StoreError
from simfluence.recording import session
from simfluence.recording.engines.base import Training

RNG = np.random.default_rng(0)
X, Y = RNG.normal(size=(48, 6)).astype(np.float32), np.arange(48) % 3
CURRICULA = sf.random_curricula(36, runs=2, steps=4, batch_size=4)


def net():
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))


def normalised():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3))


def task_of(model=net, x=X, y=Y, loss="cross_entropy", measures=None):
    """A task of 36 training and 12 test examples, whose data are not checked as those of ``from_arrays`` are."""
    task = sf.tasks.from_arrays(model, X[:36], Y[:36], loss, test=(X[36:], Y[36:]))
    x, y = torch.as_tensor(x), torch.as_tensor(y)
    return dataclasses.replace(task, train_data=(x[:36], y[:36]), test_data=(x[36:], y[36:]), measures=measures or {})


@pytest.fixture
def never_trained(monkeypatch):
    monkeypatch.setattr(Training, "advance", lambda self: pytest.fail("a run was trained"))


class Scaled(nn.Module):
    """A model whose code can change."""

    scale = 1.0

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        return self.head(x) * self.scale


def scaled_loss(outputs, targets):
    return cross_entropy(outputs, targets, reduction="none") * scaled_loss.scale


def scaled_measure(outputs, targets):
    return outputs.sum(1) * scaled_measure.scale


@pytest.mark.parametrize("asked", ["the same runs", "one more", "others only"])
@pytest.mark.parametrize("changed", [Scaled, scaled_loss, scaled_measure])
def test_runs_of_code_that_changed_are_refused(tmp_path, monkeypatch, changed, asked):
    scaled_loss.scale = scaled_measure.scale = 1.0
    curricula = sf.random_curricula(36, runs=4, steps=3, batch_size=4)
    observe = sf.Observe(measures=["scaled"])

    def record(some, store):
        task = task_of(Scaled, loss=scaled_loss, measures={"scaled": scaled_measure})
        return sf.record(task, sf.Recipe(lr=0.1), some, store, observe=observe)

    before = record(curricula[:2], tmp_path / "old")
    some = {"the same runs": curricula[:2], "one more": curricula[:3], "others only": curricula[2:]}[asked]
    assert np.allclose(record(some, tmp_path / "old").initial_losses[0], before.initial_losses[0])
    files = sorted(path.name for path in (tmp_path / "old").iterdir())
    monkeypatch.setattr(changed, "scale", 3.0, raising=False)
    with pytest.raises(StoreError, match=r"code of the model, the loss or the measure has changed.*new folder"):
        record(sf.random_curricula(36, 1, 3, 4, seed=9) if asked == "others only" else some, tmp_path / "old")
    assert sorted(path.name for path in (tmp_path / "old").iterdir()) == files
    assert len(record(some, tmp_path / "new")) == len(some)


def test_stored_runs_of_another_seed_or_dtype_are_no_obstacle(tmp_path):
    task = task_of()
    for change in ({}, {"seed": 1}, {"dtype": "float64"}):
        sf.record(task, sf.Recipe(lr=0.1, **change), CURRICULA, tmp_path)
    assert len(sf.RunStore(tmp_path).all_runs()) == 6


def first_is_mean(outputs, targets):
    return ((outputs - targets) ** 2).mean(1)


def over_the_batch(outputs, targets):
    losses = (outputs[:, 0] - targets) ** 2
    return losses / losses.mean()


def centred(outputs, targets):
    return (outputs[:, 0] - outputs.mean() - targets) ** 2


def scaled_by_largest(outputs, targets):
    return (outputs[:, 0] / outputs.abs().max() - targets) ** 2


@pytest.mark.parametrize("test", [12, 1])
@pytest.mark.parametrize("loss", [first_is_mean, over_the_batch, centred, scaled_by_largest])
def test_a_loss_that_mixes_examples_is_refused(never_trained, loss, test):
    y = X.sum(1)
    task = sf.tasks.from_arrays(nn.Linear(6, 1), X[:36], y[:36], loss, test=(X[-test:], y[-test:]))
    with pytest.raises(InvalidInput, match=rf"{loss.__name__}.*depends on the other examples.*\[2, 1\].*targets \[2\]"):
        sf.record(task, sf.Recipe(), CURRICULA)


def test_a_measure_that_mixes_examples_is_refused(never_trained):
    task = task_of(measures={"rank": lambda outputs, targets: outputs[:, 0].argsort().float()})
    with pytest.raises(InvalidInput, match="measure 'rank'"):
        sf.record(task, sf.Recipe(), CURRICULA, observe=sf.Observe(measures=["rank"]))
    with pytest.raises(InvalidInput, match="measure 'rank'"):
        sf.estimate(task, sf.Recipe(), CURRICULA, observe=sf.Observe(measures=["rank"]))


class Squeezing(nn.Linear):
    """Drops the axis of a batch of one."""

    def forward(self, x):
        return super().forward(x).squeeze()


class Drawing(nn.Linear):
    """Draws random numbers in evaluation mode too."""

    def forward(self, x):
        return super().forward(x) + 0.1 * torch.randn(len(x), 3)


@pytest.mark.parametrize("model", [lambda: Squeezing(6, 1), lambda: Drawing(6, 3)], ids=["squeezing", "drawing"])
def test_models_that_cannot_be_compared_by_example_are_recorded(model):
    loss = "cross_entropy" if isinstance(model(), Drawing) else lambda o, t: (o - t) ** 2
    runs = sf.record(task_of(model, loss=loss), sf.Recipe(lr=0.01), CURRICULA)
    assert np.isfinite(runs.losses).all()


def mixing_in_training():
    class Centred(nn.Linear):
        def forward(self, x):
            return super().forward(x - x.mean(0) if self.training else x)

    return Centred(6, 3)


def noisy_and_normalised():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.RReLU(), nn.Linear(8, 3))


@pytest.mark.parametrize("model", [normalised, mixing_in_training, noisy_and_normalised])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_micro_batches_that_change_the_training_are_refused(never_trained, model, size):
    with pytest.raises(InvalidInput, match=r"micro_batch|BatchNorm"):
        sf.record(task_of(model), sf.Recipe(lr=0.1, micro_batch=size), CURRICULA)


@pytest.mark.parametrize(
    "layers", [[nn.Dropout(0.5)], [nn.RReLU()], [nn.LayerNorm(8)], [nn.GroupNorm(2, 8)], [nn.BatchNorm1d(8).eval()]]
)
def test_micro_batches_that_change_nothing_are_recorded(layers):
    class Frozen(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            for layer in self.modules():
                if isinstance(layer, nn.BatchNorm1d):
                    layer.training = False
            return self

    task = task_of(lambda: Frozen(nn.Linear(6, 8), *layers, nn.Linear(8, 3)))
    whole, parts = (sf.record(task, sf.Recipe(lr=0.1, micro_batch=m), CURRICULA[:1]).losses for m in (None, 2))
    assert np.isfinite(parts).all()
    if not isinstance(layers[0], nn.Dropout | nn.RReLU):
        assert np.allclose(whole, parts, atol=1e-5)


def test_micro_batches_longer_than_every_batch_are_whole_batches():
    task = task_of(normalised)
    whole, parts = (sf.record(task, sf.Recipe(lr=0.1, micro_batch=m), CURRICULA[:1]).losses for m in (None, 4))
    assert np.array_equal(whole, parts)


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_test_example_without_a_finite_loss_is_named(never_trained, bad, engine):
    x = X.copy()
    x[40, 0] = bad
    with pytest.raises(InvalidInput, match=r"loss of 1 of 12 test examples is NaN or infinite: row 4 \(id '?4'?\)"):
        sf.record(task_of(lambda: nn.Linear(6, 3), x=x), sf.Recipe(), CURRICULA, engine=engine)


def test_a_bad_test_label_is_named(never_trained):
    y = Y.copy()
    y[41] = 7
    with pytest.raises(InvalidInput, match=r"evaluation before training.*By itself.*row 5 \("):
        sf.record(task_of(y=y), sf.Recipe(), CURRICULA, engine="loop")


def test_a_batch_of_one_for_batch_normalisation_is_named(never_trained, tmp_path):
    curricula = [sf.Curriculum([[0, 1], [2, 3]], 36), sf.Curriculum([[4, 5], [17]], 36)]
    task = task_of(normalised)
    with pytest.raises(
        InvalidInput, match=rf"step 1, in run {sf.recording.run_id(task, sf.Recipe(), curricula[1])}.*17"
    ):
        sf.record(task, sf.Recipe(), curricula, tmp_path)
    with pytest.raises(InvalidInput, match="row 17"):  # the last part of a batch of three
        sf.record(task, sf.Recipe(micro_batch=2), [sf.Curriculum([[4, 5, 17]], 36)], tmp_path)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_a_bad_label_in_a_later_batch_is_named(engine):
    y = Y.copy()
    y[20] = 3
    curricula = [sf.Curriculum([[0, 1], [2, 3], [20, k], [4, 5]], 36) for k in (21, 22)]
    with pytest.raises(InvalidInput, match=r"update of step 2.*row 20 .*row 21.*By itself, .*: row 20 \(id '?20'?\)\."):
        sf.record(task_of(y=y), sf.Recipe(), curricula, engine=engine)


def test_an_error_of_a_later_evaluation_is_named():
    class Fragile(nn.Linear):
        def forward(self, x):
            if not self.training and self.weight.detach().abs().max() > 1:
                raise KeyError("weights are too large")
            return super().forward(x)

    with pytest.raises(InvalidInput, match=r"evaluation of step \d+ failed on the test examples.*too large"):
        sf.record(task_of(lambda: Fragile(6, 3)), sf.Recipe(lr=5.0), CURRICULA)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("model", [net, net()], ids=["factory", "module"])
def test_the_callers_gradient_mode_does_not_matter(mode, model, tmp_path):
    expected = sf.record(task_of(model), sf.Recipe(lr=0.1), CURRICULA)
    with mode():
        inside = task_of(model, x=torch.tensor(X), y=torch.tensor(Y))
        for engine in ("loop", "batched"):
            runs = sf.record(inside, sf.Recipe(lr=0.1), CURRICULA, engine=engine)
            assert np.allclose(runs.losses, expected.losses, atol=1e-6)
        assert sf.estimate(inside, sf.Recipe(lr=0.1), CURRICULA, steps=1).runs == 2
        trained = sf.trained_model(inside, runs[0])
        steps = [training.step for training in sf.recording.follow(inside, runs[0])]
    assert steps == [0, 1, 2, 3, 4]
    losses = cross_entropy(trained(torch.tensor(X[36:])), torch.tensor(Y[36:]), reduction="none")
    assert np.allclose(losses.detach(), expected.losses[0, -1], atol=1e-5)


def test_threads_record_the_losses_of_one_thread():
    interval = sys.getswitchinterval()
    task = task_of(lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)))

    def record(seed):
        return sf.record(task, sf.Recipe(lr=0.1, seed=seed), CURRICULA[:1]).losses

    expected, state, wrong = [record(seed) for seed in range(4)], torch.get_rng_state(), []

    def work(seed):
        for _ in range(3):
            if not np.array_equal(record(seed), expected[seed]):
                wrong.append(seed)

    def prepare(seed):
        """Everything else that seeds torch: building a model, making a task, a low-rank decomposition."""
        for _ in range(20):
            task.build_model(seed)
            task_of(lambda: nn.Linear(6, 3))
            low_rank(torch.ones(2, 5, 4), 2, seed)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    threads += [threading.Thread(target=prepare, args=(seed,)) for seed in range(2)]
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert wrong == []
    assert torch.equal(state, torch.get_rng_state())


def test_following_a_run_is_undisturbed_by_the_callers_random_numbers():
    task = task_of(lambda: nn.Sequential(nn.Linear(6, 8), nn.Dropout(0.5), nn.Linear(8, 3)))
    run = sf.record(task, sf.Recipe(lr=0.1), CURRICULA[:1])[0]
    torch.manual_seed(3)
    expected = torch.rand(5)
    torch.manual_seed(3)
    drawn = []
    for training in sf.recording.follow(task, run):
        drawn.append(torch.rand(1))
        training.model.eval()
    assert torch.equal(torch.cat(drawn), expected)
    losses = task.evaluate(training.model, task.test_data)["loss"]
    assert np.allclose(losses, run.losses[-1], atol=1e-6)


@pytest.mark.parametrize(
    "column",
    [
        pd.cut(pd.Series(range(36)), 3),
        pd.Series([1 + 2j] * 36),
        pd.Series([object()] * 36),
        pd.Series([{"a": 1}, [2]] * 18),
        pd.period_range("2020", periods=36, freq="M").to_series(),
        pd.Series([b"bytes"] * 36),
    ],
    ids=["interval", "complex", "object", "mixed", "period", "bytes"],
)
def test_metadata_that_cannot_be_stored_are_refused_before_training(column, tmp_path, monkeypatch):
    """Where ``record`` begins to train, the runs are stored and load."""
    made, advance = [], Training.advance
    monkeypatch.setattr(Training, "advance", lambda self: (made.append(1), advance(self)))
    task = task_of()
    try:
        examples = sf.Examples(task.train.ids, pd.DataFrame({"column": column.to_numpy()}))
        sf.record(dataclasses.replace(task, train=examples), sf.Recipe(), CURRICULA, tmp_path)
    except SimfluenceError:
        assert made == []
    else:
        assert len(sf.RunStore(tmp_path).load()) == 2


@pytest.fixture
def checkpoint(tmp_path):
    observe = sf.Observe(checkpoints=[2, 4])
    run = sf.record(task_of(), sf.Recipe(optimizer="adam"), CURRICULA[:1], tmp_path, observe=observe)[0]
    return run.checkpoints[4]


def test_every_flipped_byte_of_a_checkpoint_is_found(checkpoint):
    content = checkpoint.read_bytes()
    rng = np.random.default_rng(0)
    for place in [*range(0, 700, 7), *rng.integers(700, len(content), 100)]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        checkpoint.write_bytes(bytes(damaged))
        with pytest.raises(StoreError, match="step-4"):
            sf.Checkpoint.load(checkpoint)
        assert not sf.Checkpoint.is_whole(checkpoint)
    for damaged in (content[:-1], content + b"\0", content[:100], b"", content[:-64] + bytes(64)):
        checkpoint.write_bytes(damaged)
        with pytest.raises(StoreError, match="damaged"):
            sf.Checkpoint.load(checkpoint)
    checkpoint.unlink()
    with pytest.raises(StoreError, match="there is no checkpoint"):
        sf.Checkpoint.load(checkpoint)


@pytest.mark.parametrize("version", [0, 1, 2])
def test_only_checkpoints_of_old_formats_load_without_a_checksum(tmp_path, version):
    import safetensors.torch

    header = {"step": 3, "numbers": {"optimizer/0/step": 3}} | ({"format": version} if version else {})
    file = tmp_path / "step-3.safetensors"
    file.write_bytes(safetensors.torch.save({"model/weight": torch.ones(2)}, {"simfluence": json.dumps(header)}))
    if version == 2:
        with pytest.raises(StoreError, match="checksum does not match"):
            sf.Checkpoint.load(file)
    else:
        assert sf.Checkpoint.load(file).model["weight"].tolist() == [1, 1]


@pytest.mark.parametrize(
    "header",
    [[], {"step": "3", "numbers": {}}, {"step": -1, "numbers": {}}, {"step": 3}, {"step": 3, "numbers": {"x": 1}},
     {"step": 3, "numbers": {"optimizer/0/step": "3"}}, {"step": 3, "numbers": {"optimizer/x/step": 3}},
     {"step": 3, "numbers": {"other/0/step": 3}}, {"step": 3, "numbers": {"model/w": 3}}],
)  # fmt: skip
def test_forged_checkpoints_are_refused_by_name(tmp_path, header):
    import safetensors.torch

    file = tmp_path / "forged.safetensors"
    file.write_bytes(safetensors.torch.save({"model/weight": torch.ones(2)}, {"simfluence": json.dumps(header)}))
    with pytest.raises(StoreError, match="forged"):
        sf.Checkpoint.load(file)


def test_a_checkpoint_of_another_model_is_refused(checkpoint):
    with pytest.raises(InvalidInput, match="does not fit this model"):
        sf.Checkpoint.load(checkpoint).restore(nn.Linear(6, 3))


def test_a_damaged_checkpoint_is_recorded_again(checkpoint, tmp_path):
    whole = sf.Checkpoint.load(checkpoint).model
    checkpoint.write_bytes(checkpoint.read_bytes()[:-3] + b"abc")
    run = sf.RunStore(tmp_path).all_runs()[0]
    with pytest.raises(StoreError, match="record the run again"):
        sf.trained_model(task_of(), run)
    sf.record(task_of(), run.recipe, [run.curriculum], tmp_path, observe=sf.Observe(checkpoints=[2, 4]))
    again = sf.Checkpoint.load(checkpoint).model
    assert all(torch.equal(again[name], weights) for name, weights in whole.items())


@pytest.mark.parametrize("engine", ["loop", "batched"])
@pytest.mark.parametrize("spoil", ["flip", "zeros", "shorter", "forged"])
def test_a_damaged_unfinished_recording_is_made_again(tmp_path, monkeypatch, engine, spoil):
    task, recipe = task_of(), sf.Recipe(optimizer="adam", lr=0.01)
    expected = sf.record(task, recipe, CURRICULA, engine=engine)
    monkeypatch.setattr(session, "SECONDS_BETWEEN_SAVES", -1.0)
    advance = Training.advance

    def interrupted(self):
        if self.step == 3:
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(Training, "advance", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sf.record(task, recipe, CURRICULA, tmp_path, engine=engine)
    monkeypatch.setattr(Training, "advance", advance)
    file = next(tmp_path.rglob("training.safetensors"))
    content = bytearray(file.read_bytes())
    if spoil == "flip":
        content[-9] ^= 0x40
    elif spoil == "zeros":
        content[-64:] = bytes(64)
    elif spoil == "shorter":
        del content[-1]
    file.write_bytes(bytes(content))
    if spoil == "forged":
        saved = sf.Checkpoint.load(file)
        other = {name: torch.ones(7) for name in saved.model}
        sf.Checkpoint(saved.step, other, saved.optimizer, saved.extra).save(file)
    with pytest.warns(UserWarning, match=r"made again from the start.*"):
        runs = sf.record(task, recipe, CURRICULA, tmp_path, engine=engine)
    assert np.array_equal(runs.losses, expected.losses)
    assert np.array_equal(sf.RunStore(tmp_path).load().losses[0], expected.take(np.argsort(expected.ids)).losses[0])
