"""Data and models of any kind in ``from_arrays``: the right task, or a refusal that names what is wrong."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import torch
from torch import nn

import simfluence as sf
from simfluence.errors import InvalidInput
from simfluence.tasks import from_arrays

X = np.random.default_rng(0).normal(size=(12, 3)).astype(np.float32)
Y = np.arange(12) % 3


def linear() -> nn.Module:
    return nn.Linear(3, 3)


def spoiled(value=np.nan):
    changed = X.copy()
    changed[2, 1] = changed[5, 0] = value
    return changed


@pytest.mark.parametrize(
    "data",
    [
        X[::-1][::-1], X.astype(">f4"), X.astype(np.longdouble), np.asfortranarray(X), X.tolist(),
        pd.DataFrame(X, index=range(100, 112)), pd.DataFrame(X).convert_dtypes(),
        pd.DataFrame(X).astype(pd.SparseDtype("float32", 0.0)), scipy.sparse.csr_matrix(X), scipy.sparse.coo_array(X),
        torch.tensor(X, requires_grad=True), torch.tensor(X).to_sparse(), torch.tensor(X.T).T, np.ma.MaskedArray(X),
    ],
)  # fmt: skip
def test_the_same_numbers_in_other_containers(data):
    task = from_arrays(linear, data, Y, "cross_entropy", test=3)
    expected = from_arrays(linear, X, Y, "cross_entropy", test=3)
    assert torch.equal(task.train_data[0].float(), expected.train_data[0])
    assert not task.train_data[0].requires_grad
    curricula = [sf.Curriculum([[0, 1], [2]], 9)]
    assert np.array_equal(
        sf.record(task, sf.Recipe(), curricula).losses, sf.record(expected, sf.Recipe(), curricula).losses
    )


def test_reversed_rows_are_reversed():
    task = from_arrays(linear, X[::-1], Y[::-1], "cross_entropy", test=(X[::-2], Y[::-2]))
    assert np.array_equal(task.train_data[0], X[::-1])
    assert task.test_data[1].tolist() == Y[::-2].tolist()


def test_dummies_beside_numbers():
    colours = pd.Series(list("abab" * 3))
    table = pd.concat([pd.DataFrame({"age": X[:, 0]}), pd.get_dummies(colours)], axis=1)
    task = from_arrays(linear, table, Y, "cross_entropy", test=(table, Y))
    assert np.array_equal(task.train_data[0], np.stack([X[:, 0], colours == "a", colours == "b"], 1).astype(np.float32))


@pytest.mark.parametrize("data", [X.copy(), torch.tensor(X)])
def test_later_changes_of_the_arrays_do_not_change_the_task(data):
    task = from_arrays(linear, data, Y, "cross_entropy", test=(data, Y))
    data[:] = 0
    assert np.array_equal(task.train_data[0], X)
    assert np.array_equal(task.test_data[0], X)


@pytest.mark.parametrize(
    "labels",
    [
        list("cab" * 4), np.array(list("cab" * 4)), np.array(list("cab" * 4), object), pd.Series(list("cab" * 4)),
        pd.Categorical(list("cab" * 4)), pd.Series(list("cab" * 4), dtype="string"), np.array(list("cab" * 4))[:, None],
    ],
)  # fmt: skip
def test_text_labels_are_numbered_and_keep_their_names(labels):
    task = from_arrays(linear, X, labels, "cross_entropy", test=4)
    names = [*task.train.table["label"], *task.test.table["label"]]
    numbers = torch.cat([task.train_data[1], task.test_data[1]]).tolist()
    assert [numbers[names.index(name)] for name in "abc"] == [0, 1, 2]
    assert sorted(names) == sorted("cab" * 4)
    assert task.train.select("label == 'a'").tolist() == torch.nonzero(task.train_data[1] == 0).flatten().tolist()


def test_text_labels_of_test_examples_and_beside_metadata():
    labels, metadata = list("cab" * 4), pd.DataFrame({"size": range(12)})
    task = from_arrays(linear, X, labels, "cross_entropy", test=(X[:2], ["b", "c"]), metadata=metadata)
    assert task.test_data[1].tolist() == [1, 2]
    assert task.train.table.columns.tolist() == ["id", "size", "label"]
    ordered = pd.Categorical(labels, ["c", "b", "a"], ordered=True)
    assert from_arrays(linear, X, ordered, "cross_entropy", test=(X, ordered)).train_data[1].tolist() == [0, 2, 1] * 4
    with pytest.raises(InvalidInput, match="are 'a', 'b', 'c', but test y has 'd' in row 1"):
        from_arrays(linear, X, labels, "cross_entropy", test=(X[:2], ["b", "d"]))


class NeedsSizes(nn.Module):
    def __init__(self, size):
        super().__init__()


class Complex(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.randn(3, 3, dtype=torch.complex64))


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.tensor(1.0))

    def forward(self, x):
        return self.layer(x) * self.scale


def failing():
    raise KeyError("a")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"X": spoiled()}, "X has NaN, infinite or missing values .rows 2, 5, columns 0, 1"),
        ({"X": pd.DataFrame(spoiled(np.inf), columns=list("abc"))}, "rows 2, 5, columns 'a', 'b'"),
        ({"X": pd.DataFrame(spoiled(), columns=list("abc")).convert_dtypes()}, "rows 2, 5, columns 'a', 'b'"),
        ({"X": np.ma.masked_equal(X, X[3, 2])}, "row 3, column 2"),
        ({"test": (spoiled(), Y)}, "test X has NaN"),
        ({"y": np.where(Y == 1, np.nan, Y)}, "y has NaN, infinite or missing values .rows 1, 4, 7, 10"),
        ({"y": pd.Series(Y).astype("Int64").mask(Y == 2)}, "y has NaN, infinite or missing values .rows 2, 5"),
        ({"y": Y + 0.5}, "y must be class numbers .* row 0 has 0.5"),
        ({"y": np.where(Y == 2, 3, Y), "test": (X, Y)}, "training example 2 .id '2'.* has label 3, .* 3 outputs"),
        ({"test": (X, Y - 1)}, "test example 0 .* has label -1"),
        ({"y": ["a", "b", None] * 4}, "row 2 has .* beside text"),
        ({"y": ["a", "b", 1] * 4}, "row 2 has 1 beside text"),
        ({"y": list("abc" * 4), "loss": "squared_error"}, "y must hold numbers"),
        ({"y": [torch.tensor(1)] * 12}, "one row per example"),
        ({"X": X.astype(int)}, "Inputs are int64"),
        ({"X": (X * 9).astype(np.uint8)}, "Inputs are uint8"),
        ({"X": [[1, 2], [1]]}, "X is no array"),
        ({"X": None}, "X must hold numbers, got None"),
        ({"X": 3.0}, "equally many|single number"),
        ({"X": X * 1j}, "complex numbers"),
        ({"X": [torch.tensor(row) for row in X]}, "np.stack joins"),
        ({"X": pd.DataFrame({"a": list("ab" * 6)})}, "column 'a' of X has str values"),
        ({"X": scipy.sparse.csr_matrix((12, 10**9))}, "too many to be made dense"),
        ({"X": torch.zeros(12, 3, device="meta")}, "meta"),
        ({"X": {1: X}}, "key 1"),
        ({"X": np.full((12, 3), 2**63, np.uint64)}, "beyond torch's int64"),
        ({"X": pd.DataFrame(X), "y": pd.Series(Y)[::-1]}, "same index in another order"),
        ({"metadata": pd.DataFrame({"a": range(5)})}, "metadata has 5 rows for 12 examples"),
        ({"metadata": pd.DataFrame({"id": range(12)})}, "column 'id'"),
        ({"metadata": {"a": range(12)}}, "metadata must be"),
        ({"test_metadata": pd.DataFrame({"a": range(12)})}, "test_metadata= is for"),
        ({"test": (X, Y, Y)}, "test must be"),
        ({"test": float("nan")}, "test must be"),
        ({"test": True}, "test must be"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"name": 3}, "name must be a string"),
        ({"model": NeedsSizes}, "lambda: NeedsSizes"),
        ({"model": nn.Linear}, "lambda: Linear"),
        ({"model": Complex}, "complex weights .'w'"),
        ({"model": Complex()}, "complex weights .'w'"),
        ({"model": lambda: nn.LazyLinear(3)}, "no weights yet"),
        ({"model": nn.LazyLinear(3)}, "no weights yet"),
        ({"model": failing}, "cannot be built: KeyError"),
        ({"model": None}, "model must be"),
        ({"model": lambda: nn.Linear(4, 3)}, "does not run on its data"),
    ],
)
def test_data_and_models_that_cannot_work(change, said):
    with pytest.raises(InvalidInput, match=said):
        from_arrays(**({"model": linear, "X": X, "y": Y, "loss": "cross_entropy"} | change))


@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_old_weight_norm_is_refused_and_the_new_one_works():
    def normed(norm):
        return lambda: nn.Sequential(norm(nn.Linear(3, 4)), nn.Linear(4, 3))

    with pytest.raises(InvalidInput, match=r"layer '0' .* use torch.nn.utils.parametrizations.weight_norm"):
        from_arrays(normed(nn.utils.weight_norm), X, Y, "cross_entropy")
    with pytest.raises(InvalidInput, match="weight_norm"):
        from_arrays(normed(nn.utils.weight_norm)(), X, Y, "cross_entropy")
    assert len(from_arrays(normed(nn.utils.parametrizations.weight_norm), X, Y, "cross_entropy").train) == 9


@pytest.mark.parametrize(
    "model",
    [lambda: linear().bfloat16(), linear().half(), lambda: linear().double(), Scaled, Scaled()],
)
def test_models_of_any_precision_and_with_single_numbers(model):
    task = from_arrays(model, X, Y, "cross_entropy", test=3)
    for engine in ("loop", "batched"):
        losses = sf.record(task, sf.Recipe(lr=0.1), [sf.Curriculum([[0, 1], [2]], 9)] * 2, engine=engine).losses
        assert np.isfinite(losses).all()


def test_token_targets_that_are_all_ignored():
    tokens = np.zeros((4, 5), np.int64)
    model = nn.Embedding(7, 7)
    tokens[1] = -100
    with pytest.raises(InvalidInput, match="y has no target token in row 1"):
        from_arrays(model, np.zeros((4, 5), np.int64), tokens, "token_cross_entropy")
    tokens[1, 0] = 7
    with pytest.raises(InvalidInput, match="has label 7, but the model has 7 outputs"):
        from_arrays(model, np.zeros((4, 5), np.int64), tokens, "token_cross_entropy")


def test_missing_targets_are_the_business_of_an_own_loss():
    def masked(outputs, targets):
        return torch.where(targets.isnan(), 0, (outputs[:, 0] - targets.nan_to_num()) ** 2)

    task = from_arrays(linear, X, np.where(Y == 1, np.nan, Y), masked, test=(X, Y.astype(float)))
    assert int(task.train_data[1].isnan().sum()) == 4
