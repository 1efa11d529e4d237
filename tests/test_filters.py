from __future__ import annotations

import contextlib
import datetime

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

import simfluence as sf
from simfluence.errors import FilterError
from simfluence.filters import Comparison, parse

TABLE = pd.DataFrame(
    {
        "label": [3, 1, 3, 2],
        "group": ["a", "b", None, "a b"],
        "score": [0.5, -1.0, np.nan, 2.0],
        "clean": [True, False, True, True],
        "two words": [1, 2, 3, 4],
    }
)


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        ("label == 3", [0, 2]),
        ("label != 3", [1, 3]),
        ("label >= 2 and label < 3", [3]),
        ("score > -2", [0, 1, 3]),  # NaN matches nothing
        ("score <= -1.0", [1]),
        ("score == 5e-1", [0]),
        ('group == "a"', [0]),
        ("group == 'a b'", [3]),
        ('group contains "a"', [0, 3]),
        ('group not contains "a"', [1, 2]),
        ('group in ["a", "b"]', [0, 1]),
        ("label not in [3, 1]", [3]),
        ("clean == true", [0, 2, 3]),
        ("clean == False", [1]),
        ("`two words` == 4", [3]),
        ("not label == 3", [1, 3]),
        ("label == 1 or label == 3 and clean == true", [0, 1, 2]),  # and binds closer than or
        ("(label == 1 or label == 3) and score < 1", [0, 1]),
        ('label == 3 and group in ["a", "b"]', [0]),
    ],
)
def test_matches(text, matches):
    assert np.flatnonzero(parse(text).mask(TABLE)).tolist() == matches


@pytest.mark.parametrize(
    "text",
    [
        "",
        "label",
        "label = 3",
        "label == 3 and",
        "label == 3 label == 4",
        "(label == 3",
        "label == other",
        "3 == label",
        "1 < label < 3",
        "group in []",
        "group in 'a'",
        # what a language would evaluate
        "label.max() == 3",
        "label.real == 3",
        "print(label) == 3",
        "__import__('os') == 3",
        "label == max(3)",
        "label[0] == 3",
        "@label == 3",
        "label == @x",
        "label == 3; label",
        "label == {3}",
        "label == lambda",
        "label == 1 + 2",
        "label == 'a' 'b'",
        "label == f'x'",
        "(" * 5000 + "label == 3" + ")" * 5000,
        "not " * 500 + "label == 3",
        "label == 3 or " * 5000 + "label == 3",
    ],
)
def test_refused(text):
    with pytest.raises(FilterError):
        parse(text)
    assert issubclass(FilterError, sf.SimfluenceError)


@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused(text):
    with contextlib.suppress(FilterError):
        parse(text)


@given(st.text(min_size=1), st.sampled_from(["==", "!=", "contains"]))
def test_any_string_can_be_quoted(value, symbol):
    quoted = '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'
    if "\n" not in value:
        assert parse(f"text {symbol} {quoted}") == Comparison("text", symbol, value)


def test_missing_values_match_only_what_they_differ_from():
    table = pd.DataFrame(
        {
            "none": [None, None, None],
            "flag": [True, None, False],
            "whole": pd.array([1, None, 2], dtype="Int64"),
            "kind": pd.Categorical(["a", None, "b"]),
            "number": pd.Categorical([1, 2, 1]),
            "day": pd.to_datetime(["2026-01-01", None, "2026-03-01"]),
        }
    )
    cases = {
        "none == 1": [], "none > 'a'": [], "none != 1": [0, 1, 2], "flag == true": [0], "flag != true": [1, 2],
        "whole != 1": [1, 2], "whole < 2": [0], "kind == 'a'": [0], "kind < 'b'": [0], "kind != 'a'": [1, 2],
        "number == 1": [0, 2], "day > '2026-02'": [2], "day contains '2026'": [0, 2],
    }  # fmt: skip
    for text, matches in cases.items():
        assert np.flatnonzero(parse(text).mask(table)).tolist() == matches, text
    assert not parse("whole == 99999999999999999999999").mask(table).any()


def test_errors_say_what_is_there():
    with pytest.raises(FilterError, match="did you mean 'label'"):
        parse("lable == 3").mask(TABLE)
    with pytest.raises(FilterError, match="cannot be compared with 'x'"):
        parse("label == 'x'").mask(TABLE)
    with pytest.raises(FilterError, match="cannot be compared with 3"):
        parse("group == 3").mask(TABLE)
    with pytest.raises(FilterError, match="text column"):
        parse("label contains '3'").mask(TABLE)
    with pytest.raises(FilterError, match=r"got '\(' at position 5"):
        parse("label(3)")


KINDS = {
    "single": np.array([0.1, 0.2, 0.5, 0.7], np.float32), "half": np.array([0.1, 0.2, 0.5, 0.7], np.float16),
    "double": [0.1, 0.2, 0.5, np.nan], "whole": [1, 2, 5, 7], "byte": np.array([1, 2, 5, 7], np.uint8),
    "holes": pd.array([1, None, 5, 7], "Int64"), "arrow": pd.array([1, None, 5, 7], "int64[pyarrow]"),
    "big": pd.array([2**62 + 1, None, 2**62, 3], "Int64"), "unsigned": np.array([2**63 + 1, 2**63, 1, 2], np.uint64),
    "categories": pd.Categorical([1, 2, None, 1]), "flags": pd.Categorical([True, False, None, True]),
    "text": ["a", "b", None, "c"], "arrow text": pd.array(["a", "b", None, "c"], "string[pyarrow]"),
    "size": pd.Categorical(["low", "high", None, "mid"], ["low", "mid", "high"], ordered=True),
    "date": [datetime.date(2024, month, 1) for month in (1, 6, 7, 12)],
    "stamp": pd.to_datetime(["2024-06-01 00:00", "2024-06-01 08:00", None, "2024-12-01 00:00"]),
    "zoned": pd.to_datetime(["2024-06-01 00:00", "2024-06-01 08:00", None, "2024-12-01 00:00"]).tz_localize("CET"),
    "arrow day": pd.array([datetime.date(2024, month, 1) for month in (1, 6, 7, 12)], pd.ArrowDtype(pa.date32())),
    "lasted": pd.to_timedelta(["1D", "2h", None, "30min"]), "bin": pd.cut([1, 2, 3, np.nan], 2),
    "month": pd.period_range("2024-01", periods=4, freq="M"), "sparse": pd.arrays.SparseArray([0, 0, 1, 2]),
}  # fmt: skip
QUESTIONS = {
    "single in [0.1, 0.5]": [0, 2], "single == 0.1 or single == 0.5": [0, 2], "not single in [0.1]": [1, 2, 3],
    "half in [0.5]": [2], "double not in [0.2]": [0, 2, 3], "whole in [1, 2.5, 7]": [0, 3], "byte > 255": [],
    "byte in [300, 5]": [2], "whole > 1.5": [1, 2, 3], "holes != 5": [0, 1, 3], "arrow in [1, 7]": [0, 3],
    f"big == {2**62 + 1}": [0], f"big in [{2**62}]": [2], f"big > {2**62}": [0], f"unsigned == {2**63 + 1}": [0],
    f"unsigned >= {2**63}": [0, 1], "categories == 1": [0, 3], "categories != 1": [1, 2], "categories in [2]": [1],
    "flags == true": [0, 3], 'text in ["a", "c"]': [0, 3], '`arrow text` != "a"': [1, 2, 3], 'size > "low"': [1, 3],
    'size == "mid"': [3], 'date >= "2024-06-01"': [1, 2, 3], 'date == "2024-6-1"': [1], 'stamp > "2024-06-01"': [1, 3],
    'stamp > "2024-1-5"': [0, 1, 3], 'zoned > "2024-06-01"': [1, 3], 'zoned == "2024-05-31 22:00Z"': [0],
    'stamp contains "2024-06"': [0, 1], '`arrow day` in ["2024-07-01"]': [2], 'lasted < "1 day"': [1, 3],
    'bin == "(2.0, 3.0]"': [2], 'month == "2024-02"': [1], "sparse > 0": [2, 3],
}  # fmt: skip


@pytest.fixture(scope="module", params=["memory", "store"])
def of_every_kind(request, tmp_path_factory):
    """Examples with a column of every kind, as they are made and as a store gives them back."""
    examples = sf.Examples(list("abcd"), pd.DataFrame(KINDS))
    if request.param == "memory":
        return examples
    store = sf.RunStore(tmp_path_factory.mktemp("kinds"))
    with store.recorder("one", train=examples, test=["t"]) as recorder:
        recorder.read([1.0])
        recorder.step([0], [0.5])
    return store.load().train


@pytest.mark.parametrize("text", QUESTIONS)
def test_columns_of_every_kind(of_every_kind, text):
    if QUESTIONS[text]:
        assert of_every_kind.select(text).tolist() == QUESTIONS[text]
    else:
        with pytest.raises(FilterError, match="matches none"):
            of_every_kind.select(text)


def test_what_cannot_be_compared():
    table = sf.Examples(
        list("abcd"), pd.DataFrame(KINDS | {"mixed": [1, "a", 2, "b"], "lists": [[1], [2], [], [3]]})
    ).table
    for text, message in {
        'date > "soon"': "write it as \"2024-06-01\"", "date > 3": "cannot be compared with 3",
        'lasted > "long"': "durations", 'stamp > "2024-06-01 00:00Z"': "without a time zone", "mixed == 1": "cannot be",
        'lists contains "1"': "text column", 'size > "huge"': "no category 'huge'",
        "whole == " + "9" * 200: "write it shorter",
    }.items():  # fmt: skip
        with pytest.raises(FilterError, match=message):
            parse(text).mask(table)


def test_long_chains():
    for word, matches in (("or", [0, 2]), ("and", [])):
        text = f" {word} ".join(["label == 3"] * 300 + ["label == 9"] * 300)
        assert np.flatnonzero(parse(text).mask(TABLE)).tolist() == matches
