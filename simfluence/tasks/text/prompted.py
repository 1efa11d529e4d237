"""COPA, RTE, Winogrande, SST-2 and BoolQ as prompts with two choices, from the hub or a local folder.

A local folder holds a file per split, ``train`` and ``validation``, each ``.jsonl``, ``.csv`` or ``.parquet``, with the
columns that the data set has on the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from simfluence.errors import InvalidInput, did_you_mean
from simfluence.task import Task
from simfluence.tasks.text.pretrained import Pretrained, extra
from simfluence.tasks.text.tables import chosen, read_rows, sampled
from simfluence.tasks.text.tasks import multiple_choice

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Prompted:
    """A data set, and how its rows become a prompt, choices and an answer.

    Args:
        hub: its name on the hub and, if it is one of several, which.
        columns: that its rows have.
        label: the column of the answer.
        labels: what the answers are called, in the order of the choices; the values of the label column, or their
            numbers.
        prompt, choices: of a row.
    """

    hub: tuple[str, ...]
    columns: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    prompt: Callable[[Row], str]
    choices: Callable[[Row], list[str]]

    def rows(self, table: pd.DataFrame) -> pd.DataFrame:
        """``table`` with the columns ``text`` (the prompt), ``choices``, ``answer`` (a number) and ``label`` (a name).

        Raises:
            InvalidInput: a column is not there, or a label is none of the known ones.
        """
        rows: list[dict[Any, Any]] = chosen(table, [*self.columns, self.label]).to_dict("records")
        answers = [self._answer(row[self.label], number) for number, row in enumerate(rows)]
        return table.assign(
            text=[self.prompt(row) for row in rows],
            choices=pd.Series([self.choices(row) for row in rows], dtype=object),
            answer=answers,
            label=[self.labels[answer] for answer in answers],
        )

    def _answer(self, value: Any, row: int) -> int:
        named = str(value).lower() if isinstance(value, bool) else str(value)
        if named in self.labels:
            return self.labels.index(named)
        if not isinstance(value, bool | str) and value in range(len(self.labels)):
            return int(value)
        raise InvalidInput(f"label {value!r} of row {row} is none of {', '.join(self.labels)}, nor a number of one")


def _copa_prompt(row: Row) -> str:
    known = {"cause": "because", "effect": "so"}
    if row["question"] not in known:
        raise InvalidInput(f"a COPA question asks for a 'cause' or an 'effect', not {row['question']!r}")
    return f"{row['premise'].rstrip().rstrip('.')} {known[row['question']]}"


def _lowered(text: str) -> str:
    """Within a sentence: the first letter small, but for "I"."""
    return text if text[:2] in ("I ", "I'") else text[:1].lower() + text[1:]


DATA: Mapping[str, Prompted] = {
    "copa": Prompted(
        ("aps/super_glue", "copa"), ("premise", "choice1", "choice2", "question"), "label", ("choice1", "choice2"),
        _copa_prompt, lambda row: [_lowered(row["choice1"]), _lowered(row["choice2"])],
    ),
    "rte": Prompted(
        ("aps/super_glue", "rte"), ("premise", "hypothesis"), "label", ("entailment", "not_entailment"),
        lambda row: f"{row['premise']}\nDoes it follow that {_lowered(row['hypothesis']).rstrip('.')}? Yes or no?",
        lambda row: ["yes", "no"],
    ),
    "winogrande": Prompted(
        ("allenai/winogrande", "winogrande_xl"), ("sentence", "option1", "option2"), "answer", ("1", "2"),
        lambda row: f"{row['sentence']}\nWho or what is meant by the underscore, {row['option1']} or {row['option2']}?",
        lambda row: [row["option1"], row["option2"]],
    ),
    "sst2": Prompted(
        ("stanfordnlp/sst2",), ("sentence",), "label", ("negative", "positive"),
        lambda row: f"{row['sentence'].strip()}\nIs this said of a film negative or positive?",
        lambda row: ["negative", "positive"],
    ),
    "boolq": Prompted(
        ("aps/super_glue", "boolq"), ("question", "passage"), "label", ("false", "true"),
        lambda row: f"{row['passage']}\nQuestion: {row['question'].strip().rstrip('?')}? Yes or no?",
        lambda row: ["no", "yes"],
    ),
}  # fmt: skip


def prompted(
    data: str,
    model: str,
    source: str | Path | None = None,
    n_train: int = 200,
    n_test: int = 100,
    tuning: str = "full",
    tuning_args: Mapping[str, Any] | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    seed: int = 0,
) -> Task:
    """One of ``DATA`` by rank classification of its choices.

    ``tasks.copa(…)``, ``tasks.rte(…)`` and so on are this function with ``data`` given.

    Args:
        data: which.
        model: folder or hub name of a causal or sequence-to-sequence language model.
        source: a local folder of the same schema; the hub by default.
        n_train, n_test: sizes of random samples of the training and the validation rows.
        tuning, tuning_args: as of ``Pretrained``.
        max_length, truncate: as of ``multiple_choice``.
        seed: of the samples.

    Raises:
        InvalidInput: rows without the data set's columns or with unknown labels, fewer rows than are asked for, no
            network and no local copy; as of ``multiple_choice``.
    """
    if data not in DATA:
        raise InvalidInput(f"unknown data {data!r}, {did_you_mean(data, DATA)}")
    form = DATA[data]
    train, test = (
        sampled(form.rows(_split(data, form.hub, source, split)), count, seed)
        for split, count in (("train", n_train), ("validation", n_test))
    )
    arguments = {
        "model": str(model), "source": None if source is None else str(source), "n_train": n_train, "n_test": n_test,
        "tuning": tuning, "tuning_args": dict(tuning_args or {}), "max_length": max_length, "truncate": truncate,
        "seed": seed,
    }  # fmt: skip
    return multiple_choice(
        Pretrained(model, tuning, tuning_args or {}), train, test, prompt="text", max_length=max_length,
        truncate=truncate, name=data, arguments=arguments,
    )  # fmt: skip


def _split(data: str, hub: tuple[str, ...], source: str | Path | None, split: str) -> pd.DataFrame:
    if source is None:
        return _from_hub(data, hub, split)
    files = [path for kind in ("jsonl", "json", "csv", "parquet") for path in [Path(source) / f"{split}.{kind}"]]
    there = [path for path in files if path.is_file()]
    if not there:
        raise InvalidInput(f"{source}: no file {split}.jsonl, {split}.csv or {split}.parquet of {data!r} there")
    return read_rows(there[0])


def _from_hub(data: str, hub: tuple[str, ...], split: str) -> pd.DataFrame:
    datasets = extra("datasets")
    try:
        return read_rows(datasets.load_dataset(*hub, split=split))
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{data!r} is not in the cache, and the hub did not give it ({str(error).strip().splitlines()[0]}). On a "
            f"machine with a network run `hf download {hub[0]} --repo-type dataset --local-dir FOLDER`, put its splits "
            "into one folder as train.parquet and validation.parquet, and give that as source="
        ) from error


copa, rte, winogrande, sst2, boolq = (partial(prompted, name) for name in DATA)
