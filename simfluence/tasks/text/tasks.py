"""Tasks of language models: classification, multiple choice by rank, causal and sequence-to-sequence modelling.

Texts are tokenised once; a task's inputs are padded tensors with a mask, so everything that works on tensors works on
text. Losses do not depend on padding: an example has the same loss alone and in any batch.
"""

from __future__ import annotations

import numbers
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from simfluence._internal.checked import checked, shown
from simfluence.errors import InvalidInput, did_you_mean
from simfluence.examples import Examples
from simfluence.task import Data, Task
from simfluence.tasks.losses import CLASSIFICATION, LANGUAGE, cross_entropy, token_cross_entropy, token_losses
from simfluence.tasks.text.encoding import continuations, padded_alike, texts
from simfluence.tasks.text.padding import trimmed
from simfluence.tasks.text.pretrained import Factory, Pretrained
from simfluence.tasks.text.tables import Rows, chosen, described, read_rows

__all__ = [
    "Model",
    "RankedChoices",
    "classification",
    "language_modelling",
    "losses_by_token",
    "multiple_choice",
]

Model = Pretrained | str | Path

#: Outputs and targets → ``[batch]``.
_Measure = Callable[[Any, Tensor], Tensor]


@checked
def classification(
    model: Model,
    train: Rows,
    test: Rows,
    *,
    text: str | tuple[str, str] = "text",
    label: str = "label",
    classes: Sequence[Any] | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    keep_text: bool = True,
    features: bool = True,
    name: str = "classification",
    arguments: Mapping[str, Any] | None = None,
) -> Task:
    """Build a task that classifies texts or pairs of texts: a language model with a classification head; cross-entropy.

    Args:
        model: a ``Pretrained``, or the folder or hub name of a model to tune in full.
        train, test: rows of text, same as in ``read_rows``.
        text: column of the text, or the two columns of a pair.
        label: column of the class.
        classes: the classes in order; by default those of the model's own head if it knows all labels, else the sorted
            labels of the training rows.
        max_length: maximum number of tokens per text; by default only the model's own limit.
        truncate: cut longer texts instead of raising an error.
        keep_text: keep the text in the metadata, and so in a store.
        features: compute features of the examples: the pretrained model's last hidden states, averaged over tokens.
        name: name of the task.
        arguments: arguments that rebuild a ready-made task.

    Raises:
        InvalidInput: a column is missing, a label is unknown, or a text is longer than allowed; or same as in
            ``Pretrained``.
    """
    pretrained = _pretrained(model)
    columns = [text] if isinstance(text, str) else list(text)
    tables = [chosen(read_rows(rows), [*columns, label]) for rows in (train, test)]
    names = _classes(pretrained, tables, label, classes)
    encoded = [texts(pretrained, table[columns], max_length, truncate) for table in tables]
    targets = [torch.tensor([names.index(value) for value in table[label]]) for table in tables]
    inputs = padded_alike(pretrained, encoded)
    left_out = () if keep_text else columns
    examples = _examples(pretrained, tables, inputs, left_out, features)
    config = {
        "id2label": {number: str(label) for number, label in enumerate(names)},
        "label2id": {str(label): number for number, label in enumerate(names)},
    }
    factory = Factory(pretrained, "AutoModelForSequenceClassification", config)
    return _text_task(name, factory, inputs, targets, cross_entropy, examples, CLASSIFICATION, arguments)


@checked
def multiple_choice(
    model: Model,
    train: Rows,
    test: Rows,
    *,
    prompt: str = "prompt",
    choices: str | Sequence[str] = "choices",
    answer: str = "answer",
    max_length: int | None = None,
    truncate: bool = False,
    features: bool = True,
    name: str = "multiple_choice",
    arguments: Mapping[str, Any] | None = None,
) -> Task:
    """Build a task that ranks choices after a prompt with a causal or sequence-to-sequence language model.

    A choice's score is the mean log-likelihood of its tokens after the prompt; outputs are the scores ``[batch,
    choices]``, and the loss is the cross-entropy of their softmax.

    Args:
        model: a ``Pretrained``, or the folder or hub name of a model to tune in full.
        train, test: rows of text, same as in ``read_rows``.
        prompt: column of the prompt.
        choices: column with a list of choices, or columns with one choice each; all examples have the same number.
        answer: column of the right choice's number, from 0.
        max_length, truncate: limit on prompt plus choice (on each alone, for sequence to sequence), in tokens; a causal
            model's prompt is cut at its beginning. See ``classification``.
        features, name, arguments: same as in ``classification``.

    Raises:
        InvalidInput: a column is missing, numbers of choices differ, a choice is empty, an answer is not the number of
            a choice, or a text is longer than allowed; or same as in ``Pretrained``.
    """
    pretrained = _pretrained(model)
    listed = [choices] if isinstance(choices, str) else list(choices)
    tables = [chosen(read_rows(rows), [prompt, *listed, answer]) for rows in (train, test)]
    options = [_choices(table, choices) for table in tables]
    counts = sorted({len(row) for rows in options for row in rows})
    if len(counts) > 1 or counts[0] < 2:
        raise InvalidInput(f"every example must have the same number of choices, two or more; got {counts}")
    targets = [_numbers(table[answer], len(options[0][0])) for table in tables]
    pairs = [
        [(text, choice) for text, row in zip(table[prompt], rows, strict=True) for choice in row]
        for table, rows in zip(tables, options, strict=True)
    ]
    inputs = [
        {name: torch.unflatten(tensor, 0, (-1, counts[0])) for name, tensor in part.items()}
        for part in continuations(pretrained, pairs, max_length, truncate)
    ]
    if pretrained.config.is_encoder_decoder:  # the prompt is the same for all choices
        inputs = [
            {name: tensor[:, 0] if name in _ENCODED else tensor for name, tensor in part.items()} for part in inputs
        ]
    examples = _examples(pretrained, tables, inputs, (), features)
    factory = Factory(pretrained, _language_model(pretrained), wrap=RankedChoices)
    return _text_task(name, factory, inputs, targets, cross_entropy, examples, CLASSIFICATION, arguments)


@checked
def language_modelling(
    model: Model,
    train: Rows,
    test: Rows,
    *,
    target: str = "text",
    prompt: str | None = None,
    max_length: int | None = None,
    truncate: bool = False,
    keep_text: bool = True,
    features: bool = True,
    name: str = "language_modelling",
    arguments: Mapping[str, Any] | None = None,
) -> Task:
    """Build a language-modelling task: a causal or sequence-to-sequence model; mean cross-entropy over target tokens.

    Args:
        model: a ``Pretrained``, or the folder or hub name of a model to tune in full. Its configuration tells whether
            it is causal or sequence-to-sequence.
        train, test: rows of text, same as in ``read_rows``.
        target: column of the text to predict.
        prompt: column of the text before it; required for sequence to sequence.
        max_length, truncate: same as in ``multiple_choice``.
        keep_text, features, name, arguments: same as in ``classification``.

    Raises:
        InvalidInput: a column is missing, a target is empty, or a text is longer than allowed; or same as in
            ``Pretrained``.
    """
    pretrained = _pretrained(model)
    if prompt is None and pretrained.config.is_encoder_decoder:
        raise InvalidInput("a sequence-to-sequence model needs a prompt: pass prompt=, the name of its column")
    columns = [target] if prompt is None else [prompt, target]
    tables = [chosen(read_rows(rows), columns) for rows in (train, test)]
    pairs = [[(row[0] if prompt else "", row[-1]) for row in table[columns].to_numpy().tolist()] for table in tables]
    inputs = continuations(pretrained, pairs, max_length, truncate)
    targets = [part.pop("labels") for part in inputs]
    left_out = () if keep_text else columns
    examples = _examples(pretrained, tables, inputs, left_out, features)
    factory = Factory(pretrained, _language_model(pretrained))
    return _text_task(name, factory, inputs, targets, token_cross_entropy, examples, LANGUAGE, arguments)


class RankedChoices(nn.Module):
    """A module that scores choices after a prompt, ``[batch, choices]``: mean log-likelihood of each choice's tokens.

    Args:
        outputs: a causal or sequence-to-sequence language model.
    """

    def __init__(self, outputs: nn.Module) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **decoder: Tensor) -> Tensor:
        """Compute the scores from ``labels [batch, choices, tokens]``; a causal model's inputs have the same shape, an
        encoder's have no axis of choices."""
        flat = labels.flatten(0, 1)
        if decoder:
            logits = self._decoded(input_ids, attention_mask, **decoder)
        else:
            logits = self.outputs(input_ids=input_ids.flatten(0, 1), attention_mask=attention_mask.flatten(0, 1))
        scores: Tensor = torch.unflatten(-token_cross_entropy(logits, flat), 0, labels.shape[:2])
        return scores

    def _decoded(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor
    ) -> Tensor:
        """Compute logits for all choices, encoding the prompt only once."""
        count = decoder_input_ids.shape[1]
        encoder: Any = self.outputs.model.get_encoder()  # type: ignore[operator, union-attr]
        states = encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        logits: Tensor = self.outputs(
            encoder_outputs=(states.repeat_interleave(count, 0),),
            attention_mask=attention_mask.repeat_interleave(count, 0),
            decoder_input_ids=decoder_input_ids.flatten(0, 1),
            decoder_attention_mask=decoder_attention_mask.flatten(0, 1),
        )
        return logits


def losses_by_token(task: Task, model: nn.Module, data: Data) -> Tensor:
    """Compute the loss of each target token of a language-modelling task, ``[batch, tokens]``; 0 without a target."""
    with torch.no_grad():
        return token_losses(model(**data[0]), data[1])


#: Inputs of an encoder, which have no axis of choices.
_ENCODED = ("input_ids", "attention_mask")


def _pretrained(model: Model) -> Pretrained:
    return model if isinstance(model, Pretrained) else Pretrained(model)


def _language_model(pretrained: Pretrained) -> str:
    return "AutoModelForSeq2SeqLM" if pretrained.config.is_encoder_decoder else "AutoModelForCausalLM"


def _classes(
    pretrained: Pretrained, tables: Sequence[pd.DataFrame], label: str, classes: Sequence[Any] | None
) -> list[Any]:
    """Return the names of the classes, in order.

    Raises:
        InvalidInput: a label is unknown, or there is only one class.
    """
    own = [pretrained.config.id2label[number] for number in sorted(pretrained.config.id2label)]
    if classes is not None:
        names = list(classes)
    else:
        found, _ = (_distinct(label, table[label]) for table in tables)
        names = own if set(found) <= set(own) else found
    for table, part in zip(tables, ("training", "test"), strict=True):
        for row, value in enumerate(table[label]):
            if value not in names:
                raise InvalidInput(
                    f"label {value!r} of {part} row {row} is unknown to the model, "
                    f"{did_you_mean(str(value), map(str, names))}"
                )
    if len(names) < 2:
        raise InvalidInput(f"all training labels are {names[0]!r}: a classifier needs two classes or more")
    return names


def _distinct(column: str, labels: pd.Series) -> list[Any]:
    """Return the distinct labels in ascending order.

    Raises:
        InvalidInput: the labels have no order.
    """
    try:
        return sorted(set(labels))
    except TypeError:
        raise InvalidInput(f"the labels in column {column!r} must be all texts or all numbers") from None


def _choices(table: pd.DataFrame, choices: str | Sequence[str]) -> list[list[str]]:
    rows = table[choices] if isinstance(choices, str) else table[list(choices)].to_numpy().tolist()
    for number, row in enumerate(rows):
        if not isinstance(row, list | tuple | np.ndarray):
            raise InvalidInput(f"column {choices!r} must have a list of choices in row {number}, got {shown(row)}")
    return [[str(choice) for choice in row] for row in rows]


def _numbers(labels: pd.Series, count: int) -> Tensor:
    for row, value in enumerate(labels):
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not is_number or not float(value).is_integer() or not 0 <= value < count:
            raise InvalidInput(f"answer {value!r} of row {row} is not the number of a choice, 0 to {count - 1}")
    return torch.tensor(labels.astype(int).to_numpy())


def _text_task(
    name: str,
    factory: Factory,
    inputs: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Tensor],
    loss: _Measure,
    examples: tuple[Examples, Examples],
    measures: Mapping[str, _Measure],
    arguments: Mapping[str, Any] | None,
) -> Task:
    train, test = zip(inputs, targets, strict=True)
    return Task(name, factory, train, test, loss, *examples, arguments or {}, measures, trim=trimmed)


def _examples(
    pretrained: Pretrained,
    tables: Sequence[pd.DataFrame],
    inputs: Sequence[Mapping[str, Tensor]],
    left_out: Sequence[str],
    features: bool,
) -> tuple[Examples, Examples]:
    """Return training and test examples with metadata and features; with several choices, of the first choice."""
    tokens, masks = ([part[name][:, 0] if part[name].ndim == 3 else part[name] for part in inputs] for name in _ENCODED)
    vectors: list[Any] = [None, None]
    if features:
        embeddings = pretrained.embedded(torch.cat(tokens), torch.cat(masks)).numpy()
        vectors = [embeddings[: len(tokens[0])], embeddings[len(tokens[0]) :]]
    train, test = (
        described(table, part, mask.sum(1).tolist(), left_out, vector)
        for table, part, mask, vector in zip(tables, ("train", "test"), masks, vectors, strict=True)
    )
    return train, test
