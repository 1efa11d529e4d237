"""Files of text rows: every field as it is written, and damaged files refused with their line."""

from __future__ import annotations

import json

import pandas as pd
import pytest

from simfluence.errors import InvalidInput
from simfluence.tasks.text.tables import described, read_rows


def written(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_fields_of_a_csv_file_stay_as_they_are_written(tmp_path):
    table = read_rows(
        written(tmp_path, "a.csv", '\ufeffid,text,zip,n,x,m\n01,NA,007,1,1.5,3\n2,null,12,2,2e3,\n3,"a\nb",1,-3,0,5\n')
    )
    assert table["id"].tolist() == ["01", "2", "3"]
    assert table["text"].tolist() == ["NA", "null", "a\nb"]
    assert table["zip"].tolist() == ["007", "12", "1"]
    assert table["n"].tolist() == [1, 2, -3]
    assert table["x"].tolist() == [1.5, 2000.0, 0.0]
    assert table["m"].dtype == "Int64"
    assert described(table, "train", [1, 1, 1]).ids == ["01", "2", "3"]


def test_json_lines_keep_types_and_need_no_order(tmp_path):
    rows = [{"id": "01", "text": "NA\u2028x"}, {"text": "1", "id": "1"}]
    content = "\ufeff" + "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n\n"
    table = read_rows(written(tmp_path, "a.jsonl", content))
    assert table.to_dict("records") == rows


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "text,label\nfine,1\nbad\n", "a.csv, line 3: there are 1 fields for 2 columns"),
        ("a.csv", "text,label\nfine,1\na,b,c\n", "line 3: there are 3 fields"),
        ("a.csv", 'text,label\n"fine,1\n', "line 2: unexpected end of data"),
        ("a.csv", b"text\n\xff\xfe\n", "is no text in UTF-8"),
        ("a.csv", "text\n" + "x" * 200_000, "line 2: field larger than field limit"),
        ("a.csv", "", "is empty"),
        ("a.csv", "text,label\n", "no row of text"),
        ("a.csv", "text,text\na,b\n", "several columns called 'text'"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "a.jsonl, line 2: Expecting value"),
        ("a.jsonl", '{"text": "a"}\n[1]\n', "line 2: a line must be a JSON object"),
        ("a.jsonl", "3\n", "line 1: a line must be a JSON object"),
        ("a.jsonl", "[" * 100_000, "line 1: "),
        ("a.jsonl", b'{"text": "\xff"}', "is no text in UTF-8"),
        ("a.jsonl", '{"n": ' + "1" * 5000 + "}", "line 1: Exceeds the limit"),
        ("a.parquet", b"PAR1 no", "cannot be read"),
        ("a.txt", "a", "unknown type"),
    ],
)
def test_damaged_files_are_refused_with_their_line(tmp_path, name, content, said):
    with pytest.raises(InvalidInput, match=said):
        read_rows(written(tmp_path, name, content))


@pytest.mark.parametrize("rows", [3, None, {"text": "a"}, ["a"], [1, 2], b"x", [{"text": "a"}, "b"]])
def test_rows_that_are_none(rows):
    with pytest.raises(InvalidInput, match="must be a"):
        read_rows(rows)


def test_repeated_ids_are_named():
    with pytest.raises(InvalidInput, match=r"train rows \[0, 2\] have the same id 'a'"):
        described(pd.DataFrame({"id": ["a", "b", "a"]}), "train", [1, 1, 1])
