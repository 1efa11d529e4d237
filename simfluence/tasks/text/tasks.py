"""Tasks of language models: classification, multiple choice by rank, causal and sequence-to-sequence modelling.

Texts are tokenised once; a task's inputs are padded tensors with a mask, so everything that works on tensors works on
text. Padding has no part in any loss: an example's loss is the same alone and in any batch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from simfluence.errors import InvalidInput, did_you_mean
from simfluence.examples import Examples
from simfluence.task import Data, Task
from simfluence.tasks.losses import CLASSIFICATION, LANGUAGE, cross_entropy, token_cross_entropy, token_losses
from simfluence.tasks.text.encoding import continuations, padded_alike, texts
from simfluence.tasks.text.padding import trimmed
from simfluence.tasks.text.pretrained import Factory, Pretrained
from simfluence.tasks.text.tables import Rows, chosen, described, read_rows

Model = Pretrained | str | Path

#: Outputs and targets → ``[batch]``.
_Measure = Callable[[Any, Tensor], Tensor]


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
    """Which class is a text, or a pair of texts, of? A language model with a classification head; cross-entropy.

    Args:
        model: a ``Pretrained``, or the folder or name of one that is tuned in full.
        train, test: rows of text, as of ``read_rows``.
        text: the column of the text, or the two columns of a pair.
        label: the column of the class.
        classes: the classes in their order; by default those that the model's own head has names for, if the labels
            are such, else those of the training rows, sorted.
        max_length: tokens that a text may have; by default as many as the longest one has.
        truncate: cut longer texts there; without it they are an error.
        keep_text: whether the metadata, and so a store, has the text.
        features: what makes examples alike: the untouched model's mean last hidden states over an example's tokens.
        name: of the task.
        arguments: what rebuilds a ready-made task from its name.

    Raises:
        InvalidInput: missing columns, unknown labels, texts longer than the model allows; as of ``Pretrained``.
    """
    pretrained = _pretrained(model)
    columns = [text] if isinstance(text, str) else list(text)
    sides = [chosen(read_rows(rows), [*columns, label]) for rows in (train, test)]
    names = _classes(pretrained, sides, label, classes)
    encoded = [texts(pretrained, side[columns], max_length, truncate) for side in sides]
    targets = [torch.tensor([names.index(value) for value in side[label]]) for side in sides]
    inputs = padded_alike(pretrained, encoded)
    left_out = () if keep_text else columns
    both = _both_described(pretrained, sides, inputs, left_out, features)
    numbered = {
        "id2label": {k: str(v) for k, v in enumerate(names)},
        "label2id": {str(v): k for k, v in enumerate(names)},
    }
    factory = Factory(pretrained, "AutoModelForSequenceClassification", numbered)
    return _of_text(name, factory, inputs, targets, cross_entropy, both, CLASSIFICATION, arguments)


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
    """Which choice follows a prompt? Rank classification by a causal or sequence-to-sequence language model.

    A choice's score is the mean log-likelihood of its tokens after the prompt; outputs are the scores ``[batch,
    choices]``, and the loss is the cross-entropy of their softmax.

    Args:
        model: a ``Pretrained``, or the folder or name of one that is tuned in full.
        train, test: rows of text, as of ``read_rows``.
        prompt: the column of the prompt.
        choices: the column with a list of choices, or the columns with one each; as many for every example.
        answer: the column of the right choice's number, from 0.
        max_length, truncate: of the prompt with each choice (of each of them, for sequence to sequence), in tokens; a
            prompt is cut at its beginning.
        features, name, arguments: as of ``classification``.

    Raises:
        InvalidInput: missing columns, unequal numbers of choices, an empty choice, an answer that is no choice's
            number, texts longer than the model allows; as of ``Pretrained``.
    """
    pretrained = _pretrained(model)
    listed = [choices] if isinstance(choices, str) else list(choices)
    sides = [chosen(read_rows(rows), [prompt, *listed, answer]) for rows in (train, test)]
    options = [_choices(side, choices) for side in sides]
    counts = sorted({len(each) for side in options for each in side})
    if len(counts) > 1 or counts[0] < 2:
        raise InvalidInput(f"every example must have as many choices, two or more; found {counts}")
    targets = [_numbers(side[answer], len(options[0][0])) for side in sides]
    continued = [
        [(text, choice) for text, each in zip(side[prompt], several, strict=True) for choice in each]
        for side, several in zip(sides, options, strict=True)
    ]
    inputs = [
        {name: tensor.unflatten(0, (-1, counts[0])) for name, tensor in each.items()}
        for each in continuations(pretrained, continued, max_length, truncate)
    ]
    if pretrained.config.is_encoder_decoder:  # the prompt is the same for all choices
        inputs = [{n: t[:, 0] if n in _ENCODED else t for n, t in each.items()} for each in inputs]
    both = _both_described(pretrained, sides, inputs, (), features)
    factory = Factory(pretrained, _language_model(pretrained), wrap=RankedChoices)
    return _of_text(name, factory, inputs, targets, cross_entropy, both, CLASSIFICATION, arguments)


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
    """What text follows? A causal or sequence-to-sequence language model; mean cross-entropy over an example's targets.

    Args:
        model: a ``Pretrained``, or the folder or name of one that is tuned in full. Its configuration says which kind.
        train, test: rows of text, as of ``read_rows``.
        target: the column of the text to be said.
        prompt: the column of what comes before it; needed for sequence to sequence.
        max_length, truncate: as of ``multiple_choice``.
        keep_text, features, name, arguments: as of ``classification``.

    Raises:
        InvalidInput: missing columns, an empty target, texts longer than the model allows; as of ``Pretrained``.
    """
    pretrained = _pretrained(model)
    if prompt is None and pretrained.config.is_encoder_decoder:
        raise InvalidInput("a sequence-to-sequence model needs something to read: give prompt= a column")
    columns = [target] if prompt is None else [prompt, target]
    sides = [chosen(read_rows(rows), columns) for rows in (train, test)]
    pairs = [[(row[0] if prompt else "", row[-1]) for row in side[columns].to_numpy().tolist()] for side in sides]
    inputs = continuations(pretrained, pairs, max_length, truncate)
    targets = [each.pop("labels") for each in inputs]
    left_out = () if keep_text else columns
    both = _both_described(pretrained, sides, inputs, left_out, features)
    factory = Factory(pretrained, _language_model(pretrained))
    return _of_text(name, factory, inputs, targets, token_cross_entropy, both, LANGUAGE, arguments)


class RankedChoices(nn.Module):
    """Scores ``[batch, choices]`` of what may follow a prompt: mean log-likelihoods of each choice's tokens.

    Args:
        outputs: a causal or sequence-to-sequence language model.
    """

    def __init__(self, outputs: nn.Module) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, **decoder: Tensor) -> Tensor:
        """``labels [batch, choices, tokens]``; a causal model's inputs are of the same shape, an encoder's have no
        axis of choices."""
        flat = labels.flatten(0, 1)
        if decoder:
            logits = self._decoded(input_ids, attention_mask, **decoder)
        else:
            logits = self.outputs(input_ids=input_ids.flatten(0, 1), attention_mask=attention_mask.flatten(0, 1))
        return -token_cross_entropy(logits, flat).unflatten(0, labels.shape[:2])

    def _decoded(
        self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor, decoder_attention_mask: Tensor
    ) -> Tensor:
        """The prompt is read once, whatever the number of choices."""
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
    """The loss of each target token of a language-modelling task, ``[batch, tokens]``; 0 where there is no target."""
    with torch.no_grad():
        return token_losses(model(**data[0]), data[1])


#: Inputs of an encoder, which have no axis of choices.
_ENCODED = ("input_ids", "attention_mask")


def _pretrained(model: Model) -> Pretrained:
    return model if isinstance(model, Pretrained) else Pretrained(model)


def _language_model(pretrained: Pretrained) -> str:
    return "AutoModelForSeq2SeqLM" if pretrained.config.is_encoder_decoder else "AutoModelForCausalLM"


def _classes(
    pretrained: Pretrained, sides: Sequence[pd.DataFrame], label: str, classes: Sequence[Any] | None
) -> list[Any]:
    """The names of the classes, in order.

    Raises:
        InvalidInput: a label that is none of them.
    """
    own = [pretrained.config.id2label[number] for number in sorted(pretrained.config.id2label)]
    if classes is not None:
        names = list(classes)
    elif set(sides[0][label]) <= set(own):
        names = own
    else:
        names = sorted(set(sides[0][label]))
    for side, where in zip(sides, ("training", "test"), strict=True):
        for row, value in enumerate(side[label]):
            if value not in names:
                raise InvalidInput(
                    f"label {value!r} of {where} row {row} is unknown to the model, {did_you_mean(value, names)}"
                )
    if len(names) < 2:
        raise InvalidInput(f"all training labels are {names[0]!r}: a classifier needs two classes or more")
    return names


def _choices(side: pd.DataFrame, choices: str | Sequence[str]) -> list[list[str]]:
    if isinstance(choices, str):
        return [[str(choice) for choice in each] for each in side[choices]]
    return [[str(choice) for choice in row] for row in side[list(choices)].to_numpy().tolist()]


def _numbers(labels: pd.Series, count: int) -> Tensor:
    for row, value in enumerate(labels):
        if isinstance(value, bool | str) or value != int(value) or not 0 <= value < count:
            raise InvalidInput(f"answer {value!r} of row {row} is not the number of a choice, 0 to {count - 1}")
    return torch.tensor(labels.astype(int).to_numpy())


def _of_text(
    name: str,
    factory: Factory,
    inputs: Sequence[Mapping[str, Tensor]],
    targets: Sequence[Tensor],
    loss: _Measure,
    both: tuple[Examples, Examples],
    measures: Mapping[str, _Measure],
    arguments: Mapping[str, Any] | None,
) -> Task:
    train, test = zip(inputs, targets, strict=True)
    return Task(name, factory, train, test, loss, *both, arguments or {}, measures, trim=trimmed)


def _both_described(
    pretrained: Pretrained,
    tables: Sequence[pd.DataFrame],
    inputs: Sequence[Mapping[str, Tensor]],
    left_out: Sequence[str],
    features: bool,
) -> tuple[Examples, Examples]:
    """Metadata and features of both sides; of several choices, those of the first."""
    tokens, masks = ([each[name][:, 0] if each[name].ndim == 3 else each[name] for each in inputs] for name in _ENCODED)
    vectors: list[Any] = [None, None]
    if features:
        found = pretrained.embedded(torch.cat(tokens), torch.cat(masks)).numpy()
        vectors = [found[: len(tokens[0])], found[len(tokens[0]) :]]
    train, test = (
        described(table, side, mask.sum(1).tolist(), left_out, vector)
        for table, side, mask, vector in zip(tables, ("train", "test"), masks, vectors, strict=True)
    )
    return train, test
