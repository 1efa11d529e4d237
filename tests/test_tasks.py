from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from comparing import relative
from sklearn.datasets import load_digits
from torch import nn

import simfluence as sf
from simfluence import tasks
from simfluence.errors import InvalidInput, StoreError

X, Y = np.arange(24, dtype=np.float32).reshape(8, 3), np.arange(8) % 2


def linear() -> nn.Module:
    return nn.Linear(3, 2)


def test_digits_are_scikit_learns():
    task = tasks.digits(n_train=30, n_test=10, seed=1)
    images, labels = load_digits(return_X_y=True)
    rows = [int(name.removeprefix("digits-")) for name in task.train.ids + task.test.ids]
    assert len(set(rows)) == 40
    assert np.array_equal(torch.cat([task.train_data[0], task.test_data[0]]), (images[rows] / 16).astype(np.float32))
    assert [*task.train.table["label"], *task.test.table["label"]] == labels[rows].tolist()
    assert task.train_data[1].tolist() == task.train.table["label"].tolist()


@pytest.mark.parametrize(("model", "parameters"), [("mlp", 64 * 128 + 128 + 1290), ("cnn", 1898)])
def test_digits_models(model, parameters):
    task = tasks.digits(n_train=5, n_test=3, model=model)
    built = task.build_model(0)
    assert sum(parameter.numel() for parameter in built.parameters()) == parameters
    assert task.evaluate(built, task.test_data)["loss"].shape == (3,)


def test_initial_weights_follow_the_seed_and_leave_torch_alone(task):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same, other = (task.build_model(seed)[0].weight for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_a_given_module_is_where_every_run_starts():
    module = linear()
    task = tasks.from_arrays(module, X, Y, "cross_entropy")
    assert torch.equal(task.build_model(1).weight, module.weight)
    assert task.build_model(1).weight is not module.weight


def test_from_arrays_holds_examples_out():
    task = tasks.from_arrays(
        linear, X, Y, "cross_entropy", test=0.25, metadata=pd.DataFrame({"name": list("abcdefgh")})
    )
    assert (len(task.train), len(task.test)) == (6, 2)
    rows = [int(name) for name in task.train.ids + task.test.ids]
    assert sorted(rows) == list(range(8))
    assert torch.equal(torch.cat([task.train_data[0], task.test_data[0]]), torch.tensor(X[rows]))
    assert [*task.train.table["name"], *task.test.table["name"]] == ["abcdefgh"[row] for row in rows]


def test_inputs_may_be_mappings():
    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = linear()

        def forward(self, left, right):
            return self.layer(left + right)

    task = tasks.from_arrays(Sum, {"left": X, "right": -X}, Y, "cross_entropy", test=2)
    model = task.build_model(0)
    expected = nn.functional.cross_entropy(model.layer.bias.expand(2, 2), task.test_data[1], reduction="none")
    assert relative(task.evaluate(model, task.test_data)["loss"], expected) < 1e-6
    curriculum = sf.Curriculum([[0, 1], [2]], n_train=6)
    assert sf.record(task, sf.Recipe(), [curriculum]).losses.shape == (1, 3, 2)


def test_squared_error():
    outputs, targets = torch.tensor([[1.0], [3.0]]), torch.tensor([0.0, 1.0])
    assert tasks.losses.squared_error(outputs, targets).tolist() == [1, 4]
    assert tasks.losses.squared_error(torch.ones(2, 2), torch.tensor([[1.0, 3], [1, 1]])).tolist() == [2, 0]


def test_evaluation_does_not_depend_on_its_batches(task, monkeypatch):
    model = task.build_model(0)
    whole = task.evaluate(model, task.train_data)["loss"]
    monkeypatch.setattr("simfluence.task.EVALUATION_BATCH", 5)
    assert relative(task.evaluate(model, task.train_data)["loss"], whole) < 1e-6


def test_fingerprint_sees_data_ids_loss_and_model():
    def made(X=X, Y=Y, model=linear, loss="cross_entropy", name="arrays", seed=0):
        return tasks.from_arrays(model, X, Y, loss, seed=seed, name=name).fingerprint

    changed = X.copy()
    changed[0, 0] += 1e-6
    others = [
        made(X=changed), made(seed=1), made(name="b"), made(Y=1 - Y),
        made(model=lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh())), made(model=lambda: nn.Linear(3, 2, bias=False)),
        made(model=lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.1))),
        made(model=lambda: nn.Sequential(nn.Linear(3, 2), nn.Dropout(0.2))),
        made(loss=lambda outputs, targets: outputs[:, 0]),
    ]  # fmt: skip
    assert made() == made()
    assert len({made(), *others}) == 10
    assert made(model=linear()) != made(model=linear())  # other initial weights of a given module


def test_a_ready_made_task_is_rebuilt_from_its_name():
    task = tasks.digits(n_train=9, n_test=4, model="cnn", seed=3)
    assert tasks.rebuild(task.info).fingerprint == task.fingerprint
    with pytest.raises(StoreError, match="differs from the recorded one"):
        tasks.rebuild(tasks.digits(n_train=9, n_test=4, seed=3).info.__class__(
            "digits", task.arguments, "other", 9, 4
        ))  # fmt: skip
    with pytest.raises(StoreError, match="not a ready-made one"):
        tasks.rebuild(tasks.from_arrays(linear, X, Y, "cross_entropy").info)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: tasks.digits(n_train=1800), "1797 images"),
        (lambda: tasks.digits(n_test=0), "1797 images"),
        (lambda: tasks.digits(model="mpl"), "did you mean 'mlp'"),
        (lambda: tasks.build("digit"), "did you mean 'digits'"),
        (lambda: tasks.build("digits", n=3), "unexpected keyword"),
        (lambda: tasks.from_arrays(linear, X, Y[:5], "cross_entropy"), "equally many"),
        (lambda: tasks.from_arrays(linear, X, Y, "cross_entropi"), "did you mean 'cross_entropy'"),
        (lambda: tasks.from_arrays(linear, X, Y, "cross_entropy", test=8), "leave at least one each"),
        (lambda: tasks.from_arrays(lambda: 3, X, Y, "cross_entropy").build_model(0), "not a torch module"),
    ],
)
def test_bad_tasks(call, said):
    with pytest.raises(InvalidInput, match=said):
        call()


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (nn.functional.cross_entropy, "one number per example"),
        (lambda outputs, targets: outputs.sum(1, keepdim=True), "one number per example"),
        (lambda outputs, targets: 0.5, "returned float: return a tensor"),
        (nn.CrossEntropyLoss(), r"pass CrossEntropyLoss\(reduction='none'\)"),
        (nn.MSELoss(reduction="sum"), r"reduction='sum'\): pass MSELoss\(reduction='none'\)"),
        (nn.CrossEntropyLoss, "is the class CrossEntropyLoss"),
        ("mse", "unknown loss 'mse', did you mean 'squared_error'"),
        ("MSELoss", "did you mean 'squared_error'"),
        ("CrossEntropyLoss()", "did you mean 'cross_entropy'"),
        ("bce", "choose from: cross_entropy, squared_error, token_cross_entropy"),
        ("cross-entropy", "did you mean 'cross_entropy'"),
        (3, "loss must be a string or a function"),
    ],
)
def test_losses_that_are_none(loss, said):
    with pytest.raises(InvalidInput, match=said):
        tasks.from_arrays(linear, X, Y, loss)


@pytest.mark.parametrize(
    ("task", "parameters"),
    [
        (tasks.breast_cancer(), 62),
        (tasks.breast_cancer(model="mlp"), 30 * 64 + 64 + 130),
        (tasks.diabetes(), 10 * 64 + 64 + 65),
        (tasks.synthetic(), 5),
    ],
)
def test_small_tables(task, parameters):
    assert sum(parameter.numel() for parameter in task.build_model(0).parameters()) == parameters
    assert tasks.rebuild(task.info).fingerprint == task.fingerprint
    assert not set(task.train.ids) & set(task.test.ids) or task.name == "synthetic"
    if task.name != "synthetic":
        inputs = task.train_data[0]
        assert torch.allclose(inputs.mean(0), torch.zeros(inputs.shape[1]), atol=1e-5)
        assert torch.allclose(inputs.std(0, unbiased=False), torch.ones(inputs.shape[1]), atol=1e-5)


def test_breast_cancer_and_diabetes_are_scikit_learns():
    from sklearn.datasets import load_breast_cancer, load_diabetes

    cancer, table = tasks.breast_cancer(), load_breast_cancer()
    rows = [int(name.removeprefix("case-")) for name in cancer.test.ids]
    assert cancer.test_data[1].tolist() == table.target[rows].tolist()
    assert cancer.test.table["label"].tolist() == table.target_names[table.target[rows]].tolist()
    diabetes, (_, y) = tasks.diabetes(), load_diabetes(return_X_y=True)
    rows = [int(name.removeprefix("patient-")) for name in diabetes.train.ids]
    assert np.allclose(diabetes.train_data[1], (y[rows] - y[rows].mean()) / y[rows].std(), atol=1e-5)
    assert cancer.l2 == 0.01
    assert tasks.breast_cancer(model="mlp").l2 == 0


def test_training_on_synthetic_reaches_the_closed_form():
    task = tasks.synthetic(n_train=30, n_test=10, l2=0.1)
    everything = sf.Curriculum([list(range(30))] * 400, 30)
    losses = sf.record(task, sf.Recipe(lr=0.1, dtype="float64"), [everything])[0].losses
    X, y = (tensor.numpy() for tensor in task.test_data)
    assert relative(losses[-1], (X @ tasks.synthetic_optimum(task) - y) ** 2) < 1e-9


def test_one_step_on_synthetic_is_that_of_the_formula():
    task = tasks.synthetic(l2=0.3)
    weights = task.build_model(0).weight.detach().double().numpy()[0]
    X, y = (tensor.numpy() for tensor in task.train_data)
    rows = [3, 5, 8]
    gradient = 2 * (X[rows] @ weights - y[rows]) @ X[rows] / 3 + 0.3 * weights
    X_test, y_test = (tensor.numpy() for tensor in task.test_data)
    expected = (X_test @ (weights - 0.05 * gradient) - y_test) ** 2
    run = sf.record(task, sf.Recipe(lr=0.05, dtype="float64"), [sf.Curriculum([rows], 40)])[0]
    assert relative(run.losses[1], expected) < 1e-12


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    (tmp_path / "mine_for_test.py").write_text(
        "import simfluence as sf\ndef make():\n    return sf.tasks.synthetic(n_train=12, n_test=3)\nnumber = 3\n"
        "def wrong():\n    return 3\n"
    )
    monkeypatch.chdir(tmp_path)


def test_a_users_own_task(own_module):
    assert tasks.imported("mine_for_test:make").fingerprint == tasks.synthetic(n_train=12, n_test=3).fingerprint


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("mine_for_test", "write package.module:name"),
        ("mine_for_test:make()", "write package.module:name"),
        ("os; import sys:f", "write package.module:name"),
        ("nowhere_at_all:make", "No module named"),
        ("mine_for_test:maker", "did you mean 'make'"),
        ("mine_for_test:number", "no callable 'number'"),
        ("mine_for_test:wrong", "returned int, not a simfluence.Task"),
    ],
)
def test_references_that_are_no_tasks(own_module, reference, said):
    with pytest.raises(InvalidInput, match=said):
        tasks.imported(reference)


def test_labels_of_any_number_type_are_classes():
    for labels in (Y.astype(np.int32), Y.astype(np.float64), Y[:, None], Y.tolist(), Y.astype(bool)):
        task = tasks.from_arrays(linear, X, labels, "cross_entropy", test=[X, labels])
        assert task.train_data[1].dtype == torch.int64
        assert task.train_data[1].tolist() == Y.tolist()


def test_a_list_of_arrays_is_several_inputs():
    class Sum(nn.Linear):
        def forward(self, both):
            return super().forward(both[0] + both[1])

    task = tasks.from_arrays(lambda: Sum(3, 2), [X, -X], Y, "cross_entropy", test=2)
    assert sf.record(task, sf.Recipe(), [sf.Curriculum([[0]], 6)] * 2).losses.shape == (2, 2, 2)


def test_a_factory_may_return_the_same_module():
    module = linear()
    task = tasks.from_arrays(lambda: module, X, Y, "cross_entropy", test=2)
    losses = sf.record(task, sf.Recipe(lr=0.5), sf.random_curricula(6, 3, 4, 2), engine="loop").losses
    assert np.ptp(losses[:, 0], axis=0).max() == 0


def test_a_given_module_with_counters():
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
    task = tasks.from_arrays(module, X, Y, "cross_entropy", test=2)
    assert len(task.fingerprint) == 64
    assert sf.record(task, sf.Recipe(), [sf.Curriculum([[0, 1]], 6)]).losses.shape == (1, 2, 2)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: tasks.from_arrays(linear, X, list("abcdefgh"), "cross_entropy"), "model has 2 outputs"),
        (lambda: tasks.from_arrays(linear, X, list("abcdefgh"), "squared_error"), "encode text first"),
        (
            lambda: record(tasks.from_arrays(linear, X.astype(int), Y, "cross_entropy", test=2)),
            "does not run on its data",
        ),
        (lambda: record(tasks.from_arrays(lambda: nn.Linear(4, 2), X, Y, "cross_entropy", test=2)), "does not run"),
        (lambda: record(tasks.from_arrays(linear, X, X[:, 0], "squared_error", test=2)), "squared error of outputs"),
        (lambda: record(tasks.from_arrays(linear, X, Y, "cross_entropy", test=2), device="cudaa"), "device 'cudaa'"),
        (lambda: sf.record(tasks.synthetic(), sf.Recipe(), sf.Curriculum([[0]], 40)), "a list of Curriculum"),
    ],
)
def test_plausible_mistakes_are_explained(call, said):
    with pytest.raises(InvalidInput, match=said):
        call()


def record(task, **more):
    return sf.record(task, sf.Recipe(), [sf.Curriculum([[0]], len(task.train))], **more)
