"""COPA, RTE, Winogrande, SST-2 and BoolQ as prompts with two choices, from the hub or a local folder.

A local folder has one file per split, ``train`` and ``validation``, each ``.jsonl``, ``.csv`` or ``.parquet``, with the
data set's columns on the hub.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from simfluence._internal.checked import checked
from simfluence._internal.types import Seed
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.task import Task
from simfluence.tasks.text.pretrained import Pretrained, extra
from simfluence.tasks.text.tables import chosen, read_rows, sampled
from simfluence.tasks.text.tasks import multiple_choice

__all__ = ["DATA", "Prompted", "boolq", "copa", "prompted", "rte", "sst2", "winogrande"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Prompted:
    """A data set, and how to turn its rows into a prompt, choices and an answer.

    Args:
        hub: name on the hub, and the configuration if there are several.
        columns: required columns.
        label: column of the answer.
        labels: names of the answers, in the order of the choices; the label column has these names or their numbers.
        prompt: function from a row to its prompt.
        choices: function from a row to its choices.
    """

    hub: tuple[str, ...]
    columns: tuple[str, ...]
    label: str
    labels: tuple[str, ...]
    prompt: Callable[[Row], str]
    choices: Callable[[Row], list[str]]

    def rows(self, table: pd.DataFrame) -> pd.DataFrame:
        """Add the columns ``text`` (the prompt), ``choices``, ``answer`` (a number) and ``label`` (a name).

        Raises:
            InvalidInput: a column is missing, or a label is unknown.
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
        name = str(value).lower() if isinstance(value, bool) else str(value)
        if name in self.labels:
            return self.labels.index(name)
        if not isinstance(value, bool | str) and value in range(len(self.labels)):
            return int(value)
        raise InvalidInput(
            f"label {value!r} of row {row} is unknown, choose from: {', '.join(self.labels)} (or their numbers)"
        )


def _copa_prompt(row: Row) -> str:
    connectives = {"cause": "because", "effect": "so"}
    if row["question"] not in connectives:
        raise InvalidInput(f"a COPA question asks for a 'cause' or an 'effect', not {row['question']!r}")
    return f"{row['premise'].rstrip().rstrip('.')} {connectives[row['question']]}"


def _lowered(text: str) -> str:
    """Put the first letter in lower case, as within a sentence, except for "I"."""
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


@checked
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
    seed: Seed = 0,
) -> Task:
    """Build a task from one of ``DATA``, by rank classification of its choices.

    ``tasks.copa(…)``, ``tasks.rte(…)`` and so on are this function with ``data`` filled in.

    Args:
        data: name of the data set.
        model: folder or hub name of a causal or sequence-to-sequence language model.
        source: local folder with the same columns; by default the hub.
        n_train, n_test: sizes of random samples of the training and validation rows.
        tuning, tuning_args: same as in ``Pretrained``.
        max_length, truncate: same as in ``multiple_choice``.
        seed: seed of the samples.

    Raises:
        InvalidInput: a column is missing, a label is unknown, there are fewer rows than requested, or there is neither
            a network nor a local copy; or same as in ``multiple_choice``.
    """
    if data not in DATA:
        raise InvalidInput(f"unknown data {data!r}, {did_you_mean(data, DATA)}")
    dataset = DATA[data]
    train, test = (
        sampled(dataset.rows(_split(data, dataset.hub, source, split)), count, seed)
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
    existing = [path for path in files if path.is_file()]
    if not existing:
        raise InvalidInput(f"{source}: {data!r} needs a file {split}.jsonl, {split}.csv or {split}.parquet in it")
    return read_rows(existing[0])


def _from_hub(data: str, hub: tuple[str, ...], split: str) -> pd.DataFrame:
    datasets = extra("datasets")
    try:
        return read_rows(datasets.load_dataset(*hub, split=split))
    except (OSError, ValueError) as error:
        raise InvalidInput(
            f"{data!r} is not in the cache, and not available from the hub ({str(error).strip().splitlines()[0]}). On "
            f"a machine with a network run `hf download {hub[0]} --repo-type dataset --local-dir FOLDER`, put its "
            "splits into one folder as train.parquet and validation.parquet, and pass that folder as source="
        ) from error


copa, rte, winogrande, sst2, boolq = (partial(prompted, name) for name in DATA)
