"""The activation cache of frozen layers, and test losses read in trimmed batches, do not change the losses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comparing import relative
from torch import nn

import simfluence as sf
from simfluence.recording.activation_cache import build_activation_cache
from simfluence.recording.engines.base import TrainingSetup
from simfluence.task import take
from simfluence.tasks.text.padding import trimmed

N_TRAIN, N_TEST, LENGTH = 10, 7, 9


def frozen(model: nn.Module, *trained: str) -> nn.Module:
    """The model with all parameters frozen but those whose names begin so."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(trained))
    return model


class Block(nn.Module):
    """A residual block that ends in place."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.inner = nn.Linear(8, 8)
        self.drop = nn.Dropout(dropout)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        return self.act(x + self.drop(self.inner(x)))


class Skipping(nn.Module):
    """The head reads two frozen layers, one of them detached and written into; the last gives a tuple."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(4, 8), Pair(), nn.Linear(8, 3)

    def forward(self, x):
        one = self.first(x)
        two, scale = self.second(one)
        two += one.detach().abs()
        return self.head(two * scale)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x):
        return self.inner(x), 2.0


class Stopped(nn.Module):
    """A frozen layer that reads a trained one through a detached value: no gradient passes, yet it changes."""

    def __init__(self):
        super().__init__()
        self.low, self.frozen, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        low = self.low(x)
        return self.head(low + self.frozen(low.detach()))


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.low, self.shared, self.head = nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.shared(torch.tanh(self.shared(self.low(x)))))


class Mixing(nn.Module):
    """A frozen layer whose examples see one another."""

    def __init__(self):
        super().__init__()
        self.low, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.centre = Centre()

    def forward(self, x):
        return self.head(self.centre(self.low(x)))


class Centre(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(8))

    def forward(self, x):
        return (x - x.mean(0)) @ self.weight


def plain(dropout=0.0):
    return nn.Sequential(nn.Linear(4, 8), Block(dropout), Block(dropout), Block(), nn.Linear(8, 3))


def normed():
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 8), nn.Linear(8, 3))


#: Name: model, trained parameters, the cached modules (None: no cache), and whether they are cached in training too.
MODELS = {
    "head": (plain, ["4"], ["0", "1", "2", "3"], True),
    "top": (plain, ["3", "4"], ["0", "1", "2"], True),
    "bias of a block": (plain, ["2.inner.bias"], ["0", "1"], True),
    "dropout": (lambda: plain(0.5), ["3", "4"], ["0", "1", "2"], False),
    "running statistics": (normed, ["3"], ["0"], True),  # what is above them moves with them
    "skipping": (Skipping, ["head"], ["first", "second"], True),
    "stopped gradient": (Stopped, ["low", "head"], None, None),
    "stopped below": (Stopped, ["head"], ["low", "frozen"], True),
    "called twice": (Twice, ["head"], ["low"], True),
    "mixing": (Mixing, ["head"], ["low"], True),
    "all trained": (plain, [""], None, None),
    "bottom trained": (plain, ["0"], None, None),
}


def task_of(model, n_train=N_TRAIN):
    rng = np.random.default_rng(3)
    X, y = rng.normal(size=(n_train + N_TEST, 4)).astype(np.float32), rng.integers(3, size=n_train + N_TEST)
    return sf.tasks.from_arrays(model, X[:n_train], y[:n_train], "cross_entropy", test=(X[n_train:], y[n_train:]))


RECIPE = sf.Recipe(optimizer="adamw", lr=0.02, weight_decay=0.1, clip_norm=1.0)
CURRICULA = [
    sf.Curriculum([[0, 1, 2], [2, 2, 9], [], [3, 3], [4, 5, 6, 7, 8], [0, 1]], N_TRAIN),
    sf.Curriculum([[9, 8], [7, 7, 0], [1, 2], [], [2, 3, 4, 5], [6, 9]], N_TRAIN),
]


def counted(task, recipe, curricula, **arguments):
    """The runs, and how many examples the first module was called on, apart from the passes before training."""
    seen = []
    original = nn.Linear.forward

    def forward(self, x):
        seen.append(len(x)) if self.in_features == 4 else None
        return original(self, x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nn.Linear, "forward", forward)
        patch.setattr("simfluence.recording.session.check_before_training", lambda setup, curricula: None)
        return sf.record(task, recipe, curricula, engine="loop", **arguments), sum(seen)


@pytest.mark.parametrize("name", MODELS)
def test_losses_are_the_same(name):
    factory, trained, expected, in_training = MODELS[name]
    torch.manual_seed(0)
    task = task_of(frozen(factory(), *trained))
    cache = build_activation_cache(task, task.build_model(0), task.train_data)
    assert (None if cache is None else list(cache.needed)) == expected
    assert cache is None or cache.in_training == in_training
    kept, calls = counted(task, RECIPE, CURRICULA)
    each_time, calls_each_time = counted(task, RECIPE, CURRICULA, activation_cache_bytes=0)
    assert relative(kept.losses, each_time.losses) < 1e-6
    assert np.ptp(kept.losses, axis=1).min() > 1e-3  # something was learned
    trial = 15  # three examples: as a batch, each alone, perturbed (training, evaluation), with cached outputs
    visits = 28  # of training examples in both runs
    if expected is None:
        assert calls <= calls_each_time + trial
    elif in_training:
        again = 3 if name == "skipping" else 0  # trial with all leaves: some needed ones get no gradient
        assert calls == trial + again + N_TRAIN + N_TEST  # each once, for both runs
    else:
        assert calls == trial + visits + N_TEST


def test_only_what_is_needed_is_kept():
    torch.manual_seed(0)
    task = task_of(frozen(plain(), "4"))
    cache = build_activation_cache(task, task.build_model(0), task.train_data)
    assert cache.needed == {"0": [False], "1": [False], "2": [False], "3": [True]}
    skipping = task_of(frozen(Skipping(), "head"))
    cache = build_activation_cache(skipping, skipping.build_model(0), skipping.train_data)
    assert all(map(all, cache.needed.values()))  # the detached one too


def test_memory_is_bounded():
    torch.manual_seed(0)
    task = task_of(frozen(plain(), "4"))
    each_time, calls_each_time = counted(task, RECIPE, CURRICULA, activation_cache_bytes=0)
    row = 8 * 4 + 3 * 4  # what the head reads of an example, and a number each for what it does not
    counts = []
    for room in (N_TRAIN + N_TEST, N_TRAIN + N_TEST - 1, N_TEST, N_TEST - 2):
        setup = TrainingSetup.of(task, RECIPE, activation_cache_bytes=row * room)
        cached_model = setup.cached_model(task.build_model(0))
        assert cached_model.cache.in_training == (room == N_TRAIN + N_TEST)
        runs, calls = counted(task, RECIPE, CURRICULA, activation_cache_bytes=row * room)
        assert relative(runs.losses, each_time.losses) < 1e-6
        counts.append(calls)
    assert counts[0] < counts[1] == counts[2] < counts[3] == calls_each_time + 15


def test_gradients_of_trained_layers_are_the_same():
    torch.manual_seed(0)
    task = task_of(frozen(plain(), "3", "4"))
    model = task.build_model(0)
    cached_model = TrainingSetup.of(task, RECIPE).cached_model(model)
    rows = [3, 1, 1, 8]
    gradients = []
    for kept in (False, True):
        model.zero_grad()
        if kept:
            cached_model.prepare(cached_model.missing(rows))
            with cached_model.training(rows):
                task.batch_losses(model, take(task.train_data, torch.tensor(rows))).sum().backward()
        else:
            task.batch_losses(model, take(task.train_data, torch.tensor(rows))).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, two in zip(*gradients, strict=True):
        assert (one is None) == (two is None)
        assert one is None or torch.allclose(one, two, atol=1e-6)
    assert not any("forward" in vars(module) for module in model.modules())  # nothing stays behind


@pytest.fixture(scope="module")
def split():
    """A frozen layer below a trained one; and the trained one alone, on what the frozen one gives."""
    torch.manual_seed(0)
    whole = frozen(nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), "2").double()
    task = task_of(whole)
    with torch.no_grad():
        below = [whole[:2](side[0].double()) for side in (task.train_data, task.test_data)]
    sides = [(X, side[1]) for X, side in zip(below, (task.train_data, task.test_data), strict=True)]
    return task, sf.Task("arrays", whole[2], *sides, task.loss, task.train, task.test)


@pytest.mark.parametrize("engine", ["loop", "batched"])
def test_frozen_parameters_stay_as_they_are(split, engine):
    task, _ = split
    for changes in ({"clip_norm": 0.05}, {"optimizer": "sgd", "momentum": 0.9}):
        recipe = RECIPE.replace(dtype="float64", **changes)  # with weight decay
        curricula = sf.random_curricula(N_TRAIN, 2, 6, 3)
        runs = [sf.record(each, recipe, curricula, engine=engine) for each in split]
        assert np.allclose(runs[0].losses, runs[1].losses, rtol=1e-10, atol=1e-12)
        assert {run.engine for run in runs[0]} == {engine}
        before, after = task.build_model(0), sf.trained_model(task, runs[0][0])
        assert torch.equal(before[0].weight, after[0].weight)
        assert not torch.equal(before[2].weight, after[2].weight)


@pytest.mark.parametrize("method", ["ekfac", "exact", "dot", "tracin"])
def test_attribution_is_of_what_is_trained(split, method):
    damping = {"damping": 0.1} if method in ("ekfac", "exact") else {}
    scores = []
    for task in split:
        run = sf.record(task, RECIPE.replace(dtype="float64"), [sf.Curriculum([[1, 2], [3, 4]] * 3, N_TRAIN)])[0]
        scores.append(sf.attribution.attributor_from_run(method, task, run, checkpoints=3, **damping).scores().values)
    assert np.ptp(scores[1]) > 0
    assert np.allclose(*scores, rtol=1e-6, atol=1e-9)


def test_the_tangent_kernel_is_of_what_is_trained(split):
    curricula = sf.random_curricula(N_TRAIN, 3, 6, 3, subset=0.7)
    simulated = []
    for task in split:
        runs = sf.record(task, RECIPE.replace(dtype="float64", clip_norm=None), curricula)
        simulator = sf.TangentKernelSimulator(task).fit(runs[:1])
        simulated.append(simulator.simulate(runs[1:].curricula, runs[1:].initial_losses))
    assert np.allclose(*simulated, rtol=1e-5, atol=1e-6)


def test_interrupted_runs_go_on_bit_for_bit(tmp_path, monkeypatch):
    from simfluence.recording import session
    from simfluence.recording.engines.base import Training

    torch.manual_seed(0)
    task = task_of(frozen(plain(), "4"))
    whole = sf.record(task, RECIPE, CURRICULA, engine="loop")
    monkeypatch.setattr(session, "SECONDS_BETWEEN_SAVES", -1.0)
    advance, made = Training.advance, []

    def interrupted(self):
        made.append(1)
        if len(made) in (4, 9):
            raise KeyboardInterrupt
        advance(self)

    monkeypatch.setattr(Training, "advance", interrupted)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            sf.record(task, RECIPE, CURRICULA, tmp_path, engine="loop")
    assert np.array_equal(sf.record(task, RECIPE, CURRICULA, tmp_path, engine="loop").losses, whole.losses)


def hugging_face(kind):
    """A tiny model, its trained parameters, and its cached modules."""
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 20, "num_labels": 2, "pad_token_id": 0}
    if kind == "bert":
        config = transformers.BertConfig(
            **common, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16,
            max_position_embeddings=LENGTH, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
        )  # fmt: skip
        below = ["bert.embeddings", "bert.encoder.layer.0", "bert.encoder.layer.1"]
        trained = ["bert.encoder.layer.2", "bert.pooler", "classifier"]
        return transformers.BertForSequenceClassification(config), trained, below
    if kind == "gpt2":
        config = transformers.GPT2Config(
            **common, n_embd=8, n_layer=3, n_head=2, n_positions=LENGTH, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
        )
        below = ["transformer.wte", "transformer.drop", "transformer.h.0", "transformer.h.1"]
        trained = ["transformer.h.2", "transformer.ln_f", "score"]
        return transformers.GPT2ForSequenceClassification(config), trained, below
    config = transformers.T5Config(
        **common, d_model=8, d_kv=4, d_ff=16, num_layers=2, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config), ["decoder.block.1", "decoder.final"], None


class Outputs(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, **inputs):
        return self.model(**inputs).logits


def token_loss(logits, targets):
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none", ignore_index=-100)
    return losses.view_as(targets).sum(1)


@pytest.mark.parametrize("kind", ["bert", "gpt2", "t5"])
def test_language_models(kind):
    torch.manual_seed(0)
    model, trained, below = hugging_face(kind)
    base = texts(trimmed)
    model = Outputs(frozen(model, *trained))
    if kind == "t5":
        said = torch.randint(1, 20, (N_TRAIN + N_TEST, 4)).masked_fill(torch.rand(N_TRAIN + N_TEST, 4) < 0.4, -100)
        said[:, 0] = 3
        shifted = torch.cat([torch.zeros(len(said), 1), said[:, :-1].clamp(min=0)], 1).long()
        sides = [
            (base.train_data[0] | {"decoder_input_ids": shifted[:N_TRAIN]}, said[:N_TRAIN]),
            (base.test_data[0] | {"decoder_input_ids": shifted[N_TRAIN:]}, said[N_TRAIN:]),
        ]
        loss = token_loss
    else:
        sides, loss = [base.train_data, base.test_data], base.loss
    task = sf.Task(kind, model, *sides, loss, base.train, base.test, trim=trimmed)
    whole = sf.Task(kind, model, *sides, loss, base.train, base.test)
    cache = build_activation_cache(task, task.build_model(0), task.train_data)
    assert cache.in_training
    names = [name.removeprefix("model.") for name in cache.needed]
    if below:
        assert [name for name in names if name in below] == below
        assert [any(cache.needed[f"model.{name}"]) for name in below] == [False] * (len(below) - 1) + [True]
    else:
        assert "encoder" in names  # whole; a decoder's block also gives positions that all examples share
    kept = sf.record(task, RECIPE, CURRICULA[:1], engine="loop")
    each_time = sf.record(whole, RECIPE, CURRICULA[:1], engine="loop", activation_cache_bytes=0)
    assert relative(kept.losses, each_time.losses) < 1e-6
    assert np.ptp(kept.losses, axis=1).min() > 1e-3


class Texts(nn.Module):
    """A small encoder that masks its padding, with a mean over tokens and a head."""

    def __init__(self, layers=3):
        super().__init__()
        self.words, self.places = nn.Embedding(20, 8), nn.Embedding(LENGTH, 8)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True) for _ in range(layers))
        self.head = nn.Linear(8, 2)

    def forward(self, input_ids, attention_mask):
        states = self.words(input_ids) + self.places(torch.arange(input_ids.shape[1], device=input_ids.device))
        for layer in self.layers:
            states = layer(states, src_key_padding_mask=attention_mask == 0)
        mask = attention_mask[..., None]
        return self.head((states * mask).sum(1) / mask.sum(1))


def texts(trim=None, trained=("layers.2", "head")):
    """A task of texts of 2 to 9 tokens, in no order, padded to 9."""
    rng = torch.Generator().manual_seed(5)
    lengths = torch.randint(2, LENGTH + 1, (N_TRAIN + N_TEST,), generator=rng)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    ids = torch.randint(1, 20, mask.shape, generator=rng) * mask
    y = ids[:, 0] % 2
    torch.manual_seed(0)
    model = frozen(Texts(), *trained)
    sides = [({"input_ids": ids[s], "attention_mask": mask[s]}, y[s]) for s in (slice(N_TRAIN), slice(N_TRAIN, None))]
    examples = sf.Examples.numbered(N_TRAIN), sf.Examples.numbered(N_TEST)
    return sf.Task("texts", model, *sides, nn.CrossEntropyLoss(reduction="none"), *examples, trim=trim)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize(("trained", "room"), [(("head",), 2**30), (("layers.2", "head"), 2**30), (("",), 0)], ids=str)
def test_padding_trimmed_and_sorted(trained, room, monkeypatch):
    recipe = RECIPE.replace(dtype="float64")
    expected = sf.record(texts(trained=trained), recipe, CURRICULA, engine="loop", activation_cache_bytes=0)
    for numbers in (4096, 20, 1):  # one batch, several, one for each example
        monkeypatch.setattr("simfluence.recording.readings.BATCH_NUMBERS", numbers)
        runs = sf.record(texts(trimmed, trained), recipe, CURRICULA, engine="loop", activation_cache_bytes=room)
        assert relative(runs.losses, expected.losses) < 1e-6
        assert runs.ids == expected.ids  # trimming is no other task


def test_batches_are_of_alike_length(monkeypatch):
    monkeypatch.setattr("simfluence.recording.readings.BATCH_NUMBERS", 12)
    task = texts(trimmed)
    side = TrainingSetup.of(task, RECIPE).loss_reader
    widths = [data[0]["input_ids"].shape for data in side.batches]
    assert sum(count for count, _ in widths) == N_TEST
    assert [length for _, length in widths] == sorted(length for _, length in widths)
    assert all(count * length <= 12 or count == 1 for count, length in widths)
    lengths = task.test_data[0]["attention_mask"].sum(1)
    assert sum(count * length for count, length in widths) <= lengths.sum() + 8
    assert task.sizes(task.test_data) == lengths.tolist()


def test_measures_and_many_examples_without_trimming(task, recipe, curricula):
    X = torch.randn(2500, 3, generator=torch.Generator().manual_seed(0))
    y = (X[:, 0] > 0).long()
    wide = sf.Task(
        "wide", task.model, task.train_data, (X, y), task.loss, task.train, sf.Examples.numbered(2500),
        measures={"first": lambda outputs, targets: outputs[:, 0]},
    )  # fmt: skip
    run = sf.record(wide, recipe, curricula[:1], observe=sf.Observe(measures=("first",)))[0]
    model = wide.build_model(0)
    assert np.allclose(run.measures["first"][0], model(X)[:, 0].detach(), atol=1e-6)


def test_what_is_cut():
    ids = torch.arange(1, 13).reshape(2, 6)
    mask = torch.tensor([[1, 1, 0, 0, 0, 0], [1, 1, 1, 1, 0, 0]])
    inputs, targets = trimmed(({"input_ids": ids, "attention_mask": mask, "labels": ids}, torch.tensor([0, 1])))
    assert {name: tensor.shape for name, tensor in inputs.items()} == dict.fromkeys(inputs, (2, 4))
    assert targets.tolist() == [0, 1]
    said = torch.tensor([[5, -100, -100], [5, 6, -100]])
    both = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": said.clamp(min=0)}
    inputs, targets = trimmed((both, said))
    assert [inputs[n].shape[1] for n in both] == [4, 4, 2]
    assert targets.tolist() == [[5, -100], [5, 6]]
    choices = {"input_ids": ids.reshape(1, 2, 6), "attention_mask": mask.reshape(1, 2, 6)}
    assert trimmed((choices, torch.tensor([[0.1] * 6])))[0]["input_ids"].shape == (1, 2, 4)
    assert trimmed((choices, torch.tensor([[0.1] * 6])))[1].shape == (1, 6)  # probabilities are no tokens
    nothing = {"input_ids": ids, "attention_mask": mask * 0}
    assert trimmed((nothing, torch.tensor([0, 1])))[0]["input_ids"].shape == (2, 1)
