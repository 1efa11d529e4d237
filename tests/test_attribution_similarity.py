"""Similarities against plain NumPy and scikit-learn; candidates and scores of chosen training examples."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import sklearn.base
import torch
from attribution_cases import Case, images, language, mlp, padded, relative, texts, tied
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.metrics.pairwise import cosine_similarity
from torch import nn

import simfluence as sf
from simfluence import attribution
from simfluence.attribution import HiddenSimilarity, NGrams, TfIdf, candidates
from simfluence.errors import InvalidInput, NotFittedError

TRAIN = ["the cat sat on the mat", "a dog sat on the log", "cats and dogs", "", "Stocks fell on Monday"]
TEST = ["the cat and the dog", "stocks rose", "xylophone"]


def hidden(case: Case, side) -> np.ndarray:
    """What goes into the last layer of ``mlp``."""
    return case.model[1](case.model[0](side[0])).detach().numpy()


@pytest.mark.parametrize("cosine", [True, False])
def test_hidden_similarity_is_that_of_the_last_layers_inputs(cosine):
    case = mlp()
    found = HiddenSimilarity(cosine=cosine).fit(case.model, case.train).scores(case.test)
    test, train = hidden(case, case.test), hidden(case, case.train)
    expected = cosine_similarity(test, train) if cosine else test @ train.T
    assert relative(found, expected) < 1e-12
    assert (found.shape, found.unit, found.method) == ((5, 13), "raw", "HiddenSimilarity")


def test_any_module_can_be_named():
    case = mlp()
    found = HiddenSimilarity(layer="0").fit(case.model, case.train).scores(case.test)
    assert relative(found, cosine_similarity(case.test[0], case.train[0])) < 1e-12
    pictures = images()
    found = HiddenSimilarity(layer="first", cosine=False).fit(pictures.model, pictures.train).scores(pictures.test)
    assert relative(found, pictures.test[0].flatten(1) @ pictures.train[0].flatten(1).T) < 1e-12


def test_padding_does_not_count():
    case = texts()
    found = HiddenSimilarity(layer="mix", cosine=False).fit(case.model, case.train).scores(case.test)

    def means(inputs):
        rows = [case.model.words(ids[mask.bool()]).mean(0) for ids, mask in zip(*inputs.values(), strict=True)]
        return torch.stack(rows).detach()

    assert relative(found, means(case.test[0]) @ means(case.train[0]).T) < 1e-12
    longer = padded(case.train[0], 2), case.train[1]
    again = HiddenSimilarity(layer="mix", cosine=False).fit(case.model, longer).scores(case.test)
    assert relative(again, found) < 1e-12


def test_calls_of_one_module_are_averaged():
    case = tied()
    found = HiddenSimilarity(layer="again", cosine=False).fit(case.model, case.train).scores(case.test)

    def means(inputs):
        calls = [inputs]
        for _ in range(2):
            calls.append(torch.tanh(case.model.again(calls[-1])))
        return torch.stack(calls).mean(0).detach()

    assert relative(found, means(case.test[0]) @ means(case.train[0]).T) < 1e-12


@pytest.mark.parametrize("make", [mlp, images, texts, language, tied])
def test_batch_size_does_not_count(make):
    case = make()
    expected = HiddenSimilarity().fit(case.model, case.train).scores(case.test)
    found = HiddenSimilarity(batch_size=2).fit(case.model, case.train).scores(case.test)
    assert relative(found, expected) < 1e-12


def test_a_zero_representation_has_no_cosine():
    model = nn.Linear(2, 1)
    X, y = torch.tensor([[0.0, 0.0], [1.0, 2.0]]), torch.zeros(2)
    assert HiddenSimilarity().fit(model, (X, y)).scores((X, y)).values.tolist() == [[0, 0], [0, pytest.approx(1)]]


@pytest.mark.parametrize("n", [1, 2, (1, 2)])
def test_ngrams_are_scikit_learns(n):
    vectorizer = CountVectorizer(ngram_range=n if isinstance(n, tuple) else (n, n))
    bags = vectorizer.fit_transform(TRAIN)
    found = NGrams(n=n).fit(TRAIN).scores(TEST)
    assert relative(found, cosine_similarity(vectorizer.transform(TEST), bags)) < 1e-12
    assert (found.values[:, 3] == 0).all()  # the empty text
    assert (found.values[2] == 0).all()  # no known word
    assert found.unit == "raw"


def test_ngrams_by_hand():
    found = NGrams().fit(["red red fox", "blue"]).scores(["red blue"])
    assert np.allclose(found, [[2 / np.sqrt(5 * 2), 1 / np.sqrt(2)]])


@pytest.mark.parametrize("n", [1, (1, 3)])
def test_tfidf_is_scikit_learns(n):
    vectorizer = TfidfVectorizer(ngram_range=n if isinstance(n, tuple) else (n, n))
    bags = vectorizer.fit_transform(TRAIN)
    assert relative(TfIdf(n=n).fit(TRAIN).scores(TEST), (vectorizer.transform(TEST) @ bags.T).toarray()) < 1e-12


@pytest.mark.parametrize("similarity", [NGrams(n=(1, 2)), TfIdf(column="words")])
def test_texts_may_be_a_column_of_examples(similarity):
    name = similarity.column
    train = sf.Examples(list("abcde"), pd.DataFrame({name: TRAIN}))
    test = sf.Examples.numbered(3, pd.DataFrame({name: TEST}))
    found = similarity.fit(train).scores(test)
    assert np.array_equal(found, sklearn.base.clone(similarity).fit(TRAIN).scores(TEST))
    assert list(found.to_frame().train[:5]) == list("abcde")


def test_a_task_brings_its_test_side_and_its_ids(task):
    model = task.build_model(0)
    found = HiddenSimilarity().fit(model, task).scores()
    assert np.array_equal(found, HiddenSimilarity().fit(model, task.train_data).scores(task.test_data))
    assert (found.train, found.test) == (task.train.ids, task.test.ids)
    words = sf.Task(
        "words", task.model, task.train_data, task.test_data, task.loss,
        sf.Examples.numbered(12, pd.DataFrame({"text": (TRAIN * 3)[:12]})),
        sf.Examples.numbered(5, pd.DataFrame({"text": (TEST * 2)[:5]})),
    )  # fmt: skip
    assert np.array_equal(TfIdf().fit(words).scores(), TfIdf().fit((TRAIN * 3)[:12]).scores((TEST * 2)[:5]))


SIMILARITIES = {
    "hidden": lambda: (HiddenSimilarity().fit(mlp().model, mlp().train), mlp().test),
    "n-grams": lambda: (NGrams().fit(TRAIN), TEST),
    "tf-idf": lambda: (TfIdf().fit(TRAIN), TEST),
}


@pytest.mark.parametrize("make", SIMILARITIES.values(), ids=SIMILARITIES)
def test_conventions(make):
    found, test = make()
    whole = found.scores(test)
    some = found.scores(test, train=[4, 1])
    assert relative(some, whole.values[:, [4, 1]]) < 1e-12
    assert list(some.to_frame().train[:2]) == [4, 1]
    with pytest.raises(InvalidInput, match="no unit 'loss'"):
        found.scores(test, unit="loss")
    with pytest.raises(InvalidInput, match="test data is required"):
        found.scores()
    with pytest.raises(InvalidInput, match="no example 99"):
        found.scores(test, train=[99])
    with pytest.raises(NotFittedError, match="call fit first"):
        sklearn.base.clone(found).scores(test)
    assert all(name.endswith("_") for name in vars(found) if name not in found.get_params())


def test_candidates_are_each_test_examples_best():
    scores = np.array([[0.1, 0.9, 0.5, 0.5], [3.0, 1.0, -1.0, 2.0]])
    assert candidates(scores, 1).tolist() == [0, 1]
    assert candidates(scores, 2).tolist() == [0, 1, 2, 3]
    assert candidates(scores[:1], 2).tolist() == [1, 2]  # of equals, the first
    assert candidates(TfIdf().fit(TRAIN).scores(TEST[1:2]), 1).tolist() == [4]
    for k in (0, 5):
        with pytest.raises(InvalidInput, match="k must be from 1 to the number of training examples, 4"):
            candidates(scores, k)
    with pytest.raises(InvalidInput, match=r"scores must be \[test, train\]"):
        candidates(scores[0], 1)


@pytest.mark.parametrize("case", [mlp(), texts()], ids=["mlp", "texts"])
@pytest.mark.parametrize(
    "attributor",
    [attribution.EKFAC(0.1), attribution.ConjugateGradients(0.1, tolerance=1e-2), attribution.GradientCosine()],
    ids=lambda each: type(each).__name__,
)
def test_candidates_alone_are_scored(attributor, case):
    found = sklearn.base.clone(attributor).set_params(batch_size=4).fit(case.model, case.train, case.loss)
    chosen = candidates(HiddenSimilarity().fit(case.model, case.train).scores(case.test), 2)
    assert 2 <= len(chosen) < len(case.train[1])
    whole, some = found.scores(case.test), found.scores(case.test, train=chosen)
    assert some.unit == whole.unit
    assert relative(some, whole.values[:, chosen]) < 1e-12
    assert some.to_frame().train[: len(chosen)].tolist() == chosen.tolist()
    by_layer = found.scores(case.test, by_layer=True, train=chosen)
    assert relative(by_layer, found.scores(case.test, by_layer=True).values[:, :, chosen]) < 1e-12
    with pytest.raises(InvalidInput, match="no example 99"):
        found.scores(case.test, train=[99])


def test_tracin_scores_candidates_alone():
    case = mlp()
    other = {name: 2 * value for name, value in case.model.state_dict().items()}
    found = attribution.TracInCP([(case.model.state_dict(), 0.1), (other, 0.2)])
    found.fit(case.model, case.train, case.loss)
    assert relative(found.scores(case.test, train=[5, 0]), found.scores(case.test).values[:, [5, 0]]) < 1e-12


def test_bad_models():
    case, words = mlp(), language()
    for layer, message in (("3", "no layer '3', choose from: 0, 1, 2"), ("frist", "no layer 'frist'")):
        with pytest.raises(InvalidInput, match=message):
            HiddenSimilarity(layer=layer).fit(case.model, case.train)
    with pytest.raises(InvalidInput, match="has no Linear layer: name a module"):
        HiddenSimilarity().fit(nn.Sequential(nn.Conv1d(1, 1, 1)), case.train)
    with pytest.raises(InvalidInput, match="layer 'words' are whole numbers, not representations"):
        HiddenSimilarity(layer="words").fit(words.model, words.train)
    with pytest.raises(InvalidInput, match="batch_size must be at least 1, got 0"):
        HiddenSimilarity(batch_size=0).fit(case.model, case.train)
    with pytest.raises(InvalidInput, match="equally many"):
        HiddenSimilarity().fit(case.model, (case.train[0], case.train[1][:3]))
    found = HiddenSimilarity().fit(case.model, case.train)
    with pytest.raises(InvalidInput, match="fails on test examples 0 to 4"):
        found.scores((case.test[0][:, :3], case.test[1]))
    holed = case.test[0].clone()
    holed[3, 1] = torch.nan
    with pytest.raises(InvalidInput, match="input of test example 3 in layer '2' is not finite"):
        found.scores((holed, case.test[1]))
    with torch.no_grad():
        case.model[0].weight += 1
    with pytest.raises(InvalidInput, match="weights changed since fit"):
        found.scores(case.test)


class Odd(nn.Module):
    """One layer is not called, another with two rows per example."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.twice = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, inputs):
        return self.twice(inputs.reshape(-1, 2)).reshape(len(inputs), -1)


def test_modules_without_one_row_per_example():
    case = mlp()
    odd = Odd().double()
    with pytest.raises(InvalidInput, match="the model never calls layer 'unused'"):
        HiddenSimilarity(layer="unused").fit(odd, case.train)
    with pytest.raises(InvalidInput, match="layer 'twice' was called with 26 rows for 13 examples"):
        HiddenSimilarity(layer="twice").fit(odd, case.train)


@pytest.mark.parametrize("similarity", [NGrams(), TfIdf()], ids=["n-grams", "tf-idf"])
def test_bad_texts(similarity, task):
    for given, message in (
        ([], "there are no training texts"),
        (["", "  "], "cannot learn a vocabulary from the training texts: empty vocabulary"),
        (sf.Examples.numbered(2, pd.DataFrame({"text": ["one", None]})), "training text 1 must be a string, got "),
        ("one text", "texts must be a sequence of strings or an Examples or a Task, got 'one text'"),
        (task, "no column 'text' in the examples' metadata"),
        (sf.Examples.numbered(2, pd.DataFrame({"texts": ["a", "b"]})), "did you mean 'texts'"),
    ):
        with pytest.raises(InvalidInput, match=message):
            sklearn.base.clone(similarity).fit(given)
    found = sklearn.base.clone(similarity).fit(TRAIN)
    with pytest.raises(InvalidInput, match="there are no test texts"):
        found.scores([])
    for n in (0, (2, 1), (0, 1)):
        with pytest.raises(InvalidInput, match="n must be a whole number from 1 up"):
            type(similarity)(n=n).fit(TRAIN)
