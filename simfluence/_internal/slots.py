"""Slots of a curriculum, the building blocks of edits: find the slots of a target, insert slots, re-batch them."""

from __future__ import annotations

import numpy as np

from simfluence._internal.targets import Selection, as_target
from simfluence._internal.types import Indices, Target
from simfluence.curriculum import Curriculum
from simfluence.errors import InvalidInput
from simfluence.examples import Examples


def selected(target: Target, curriculum: Curriculum, examples: Examples | None) -> Indices:
    """Return the training indices that ``target`` selects."""
    if examples is not None:
        if len(examples) != curriculum.n_train:
            raise InvalidInput(
                f"the curriculum has {curriculum.n_train} training examples, but the metadata has {len(examples)}"
            )
        return examples.select(target)
    chosen = as_target("target", target)
    by_row = isinstance(chosen, Selection) and chosen.kind == "rows"
    if not by_row and (isinstance(chosen, str | Selection) or any(isinstance(name, str) for name in chosen)):
        raise InvalidInput(f"{target!r} needs metadata or ids: give the training examples (task=… or task.train)")
    return Examples.numbered(curriculum.n_train).select(chosen)


def marked_slots(target: Target, curriculum: Curriculum, examples: Examples | None) -> np.ndarray:
    """Mark the slots of the curriculum that show an example of ``target``."""
    chosen = np.zeros(curriculum.n_train, bool)
    chosen[selected(target, curriculum, examples)] = True
    marked: np.ndarray = chosen[curriculum.indices]
    return marked


def insert_slots(
    added: np.ndarray, at: int, fill: str, indices: np.ndarray, sizes: np.ndarray, original: Curriculum
) -> Curriculum:
    """Insert ``added`` in front of the slots of batch ``at``."""
    start = int(sizes[:at].sum())
    grown = sizes + len(added) * (np.arange(len(sizes)) == at)
    return rebatched(fill, np.concatenate([indices[:start], added, indices[start:]]), grown, original)


def rebatched(fill: str, indices: np.ndarray, sizes: np.ndarray, original: Curriculum) -> Curriculum:
    """Cut the slots into batches of ``sizes`` ("shrink"), or of the original's sizes."""
    return Curriculum.from_flat(
        indices, sizes if fill == "shrink" else _recut(len(indices), original), original.n_train
    )


def _recut(count: int, original: Curriculum) -> np.ndarray:
    """Return batch sizes for ``count`` slots: the original's sizes, continued by its most frequent size."""
    ends = original.offsets[1:]
    if count == ends[-1]:
        return original.sizes
    usual = int(np.bincount(original.sizes[original.sizes > 0]).argmax())
    if count > ends[-1]:
        ends = np.append(ends, np.arange(ends[-1] + usual, count + usual, usual))
    needed = int(np.searchsorted(ends, count)) + 1
    return np.diff(np.minimum(ends[:needed], count), prepend=0)


def sizes_of(curriculum: Curriculum, remains: np.ndarray) -> np.ndarray:
    """Count the slots that ``remains`` marks in each batch."""
    sizes: np.ndarray = np.diff(np.concatenate([[0], np.cumsum(remains)])[curriculum.offsets])
    return sizes
