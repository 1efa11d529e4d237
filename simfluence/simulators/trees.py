"""Boosted regression trees as plain arrays: read from LightGBM's text, checked, and evaluated with NumPy.

LightGBM's own reader trusts its text, and a wrong number in it ends the process. So no file reaches that reader.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Trees"]

_CHUNK_ENTRIES = 1_000_000  # of [splits, rows] evaluated at a time


@dataclass(frozen=True, eq=False)
class Trees:
    """The sum of regression trees. The splits of all trees are laid end to end, and so are their leaves.

    A tree of n leaves has n − 1 splits, of which the first is the root. Split k sends a row to its first child where
    the row's feature is at most the threshold, and to the second one elsewhere. A child c ≥ 0 is split c of the same
    tree, c > k; a child c < 0 is leaf −c − 1.

    Args:
        leaves: number of leaves of each tree, ``[trees]``.
        features: feature that each split compares, ``[splits]``.
        thresholds: what the feature is compared with, ``[splits]``.
        children: first and second child of each split, ``[splits, 2]``.
        values: value of each leaf, ``[leaves]``.

    Raises:
        ValueError: these arrays are no trees.

    >>> trees = Trees(np.array([2]), np.array([0]), np.array([0.5]), np.array([[-1, -2]]), np.array([10.0, 20.0]))
    >>> trees.predict(np.array([[0.5], [0.6]]))
    array([10., 20.])
    """

    leaves: np.ndarray
    features: np.ndarray
    thresholds: np.ndarray
    children: np.ndarray
    values: np.ndarray

    @classmethod
    def from_lightgbm(cls, text: str) -> Trees:
        """Read LightGBM's text of a regression by trees that compare numbers.

        Raises:
            ValueError: the text is not of that form.
        """
        head, *parts = text.split("end of trees", 1)[0].split("\nTree=")
        lines = _fields(head)
        if (not parts and "end of trees" not in text) or lines.get("num_class") != "1" or "average_output" in head:
            raise ValueError("its trees are no text of a LightGBM regression")
        trees = [_fields(part.partition("\n")[2]) for part in parts]
        for tree in trees:
            unusual = {"num_cat": "0", "is_linear": "0"}
            if any(tree.get(name, value) != value for name, value in unusual.items()):
                raise ValueError("its trees have categories or linear leaves, which boosted simulators do not use")
            # 2 is a comparison of numbers without missing values; 0 the same with the other default side.
            if not set(tree.get("decision_type", "").split()) <= {"0", "2"}:
                raise ValueError("its trees compare in a way that boosted simulators do not use")
        values = [_numbers(tree, "leaf_value", float) for tree in trees]
        children = [
            np.stack([_numbers(tree, f"{side}_child", int) for side in ("left", "right")], axis=1) for tree in trees
        ]
        return cls(
            leaves=np.array([len(leaves) for leaves in values], np.int64),
            features=_joined([_numbers(tree, "split_feature", int) for tree in trees], np.empty(0, np.int64)),
            thresholds=_joined([_numbers(tree, "threshold", float) for tree in trees], np.empty(0)),
            children=_joined(children, np.empty((0, 2), np.int64)),
            values=_joined(values, np.empty(0)),
        )

    @classmethod
    def none(cls) -> Trees:
        """Return a sum of no trees, which is 0."""
        whole = np.empty(0, np.int64)
        return cls(whole, whole, np.empty(0), np.empty((0, 2), np.int64), np.empty(0))

    def __post_init__(self) -> None:
        splits, leaves = len(self.features), len(self.values)
        shapes = {
            "leaves": (len(self.leaves),), "features": (splits,), "thresholds": (splits,), "children": (splits, 2),
            "values": (leaves,),
        }  # fmt: skip
        for name, shape in shapes.items():
            array, kind = getattr(self, name), np.float64 if name in ("thresholds", "values") else np.int64
            if array.shape != shape or array.dtype != kind:
                raise ValueError(f"{name} of its trees are {array.dtype} {list(array.shape)}, not {list(shape)}")
        # Each is bounded before they are added up, so that the sum cannot overflow.
        bounded = ((self.leaves >= 1) & (self.leaves <= leaves)).all() and len(self.leaves) <= leaves
        if not bounded or self.leaves.sum() != leaves or leaves - len(self.leaves) != splits:
            raise ValueError(f"its trees have {splits} splits and {leaves} leaves, which do not fit together")
        if splits and self.features.min() < 0:
            raise ValueError("a tree compares a negative feature")
        self._check_children()

    def _check_children(self) -> None:
        """Check that every leaf, and every split but the roots, is the child of one earlier split of its tree."""
        own = np.arange(len(self.features)) - self._start(self.leaves - 1)  # each split's number in its tree
        size = np.repeat(self.leaves, self.leaves - 1)
        is_leaf = self.children < 0
        exists = np.where(is_leaf, self.children >= -size[:, None], self.children < size[:, None] - 1)
        if not (exists & (is_leaf | (self.children > own[:, None]))).all():
            raise ValueError("a tree has a child that does not exist or is not below its split")
        leaf, split = self._leaf_children[is_leaf], self._split_children[~is_leaf]
        if len(np.unique(leaf)) != len(leaf) or len(np.unique(split)) != len(split):
            raise ValueError("two splits of a tree have the same child")

    def _start(self, counts: np.ndarray) -> np.ndarray:
        """Return where each split's tree starts, if the trees have ``counts`` entries, ``[splits]``."""
        return np.repeat(np.cumsum(counts) - counts, self.leaves - 1)

    @property
    def _split_children(self) -> np.ndarray:
        """The position of each child among all splits, where it is one, ``[splits, 2]``."""
        return np.asarray(self.children + self._start(self.leaves - 1)[:, None])

    @property
    def _leaf_children(self) -> np.ndarray:
        """The position of each child among all leaves, where it is one, ``[splits, 2]``."""
        return np.asarray(self._start(self.leaves)[:, None] - self.children - 1)

    def predict(self, rows: np.ndarray) -> np.ndarray:
        """Return the sum of the trees' values for rows ``[rows, features]``, added in the order of the trees."""
        if len(self.leaves) == 0:
            return np.zeros(len(rows))
        chunk = max(1, _CHUNK_ENTRIES // len(self.values))
        sums = [self._predict(rows[start : start + chunk]) for start in range(0, len(rows), chunk)]
        return np.concatenate([*sums, np.empty(0)])

    def _predict(self, rows: np.ndarray) -> np.ndarray:
        """Decide all splits, then find the leaf that each row reaches from each split, from the lowest splits up.

        Only the rank of a value among a feature's thresholds matters, and ranks and numbers of leaves are bytes in
        usual trees, of which a processor handles many at once.
        """
        plan = self._plan
        ranks = np.zeros((len(plan.thresholds), len(rows)), plan.limits.dtype)  # [features, rows]
        for feature, thresholds in enumerate(plan.thresholds):
            ranks[feature] = np.searchsorted(thresholds, rows[:, feature])
        to_first = np.negative((ranks[plan.features] <= plan.limits[:, None]).astype(plan.numbers.dtype))  # all bits
        # reached: for each split and then each leaf the number of the leaf, [splits + leaves of the largest, rows]
        reached = np.empty((len(to_first) + len(plan.numbers), len(rows)), plan.numbers.dtype)
        reached[len(to_first) :] = plan.numbers[:, None]
        for start, stop in itertools.pairwise(plan.ends):
            first, second = (reached.take(plan.children[start:stop, side], axis=0) for side in (0, 1))
            reached[start:stop] = second ^ ((first ^ second) & to_first[start:stop])
        starts = np.cumsum(self.leaves) - self.leaves
        total = np.zeros(len(rows))
        for start, root in zip(starts.tolist(), plan.roots.tolist(), strict=True):
            total += self.values[start:].take(reached[root])
        return total

    @functools.cached_property
    def _plan(self) -> _Plan:
        splits = len(self.features)
        below = np.where(self.children < 0, -1, self._split_children)
        heights = [0] * (splits + 1)  # the last one is that of a leaf, at −1
        for split, (first, second) in reversed(list(enumerate(below.tolist()))):
            heights[split] = 1 + max(heights[first], heights[second])
        height = np.array(heights[:-1], np.int64)
        order = np.argsort(height, kind="stable")
        place = np.empty(splits, np.int64)
        place[order] = np.arange(splits)
        children = np.where(self.children < 0, splits - self.children - 1, np.append(place, 0)[below])
        root = np.cumsum(self.leaves - 1) - (self.leaves - 1)
        thresholds = [np.unique(self.thresholds[self.features == k]) for k in range(self.features.max(initial=-1) + 1)]
        limits = np.zeros(splits, np.int64)
        for feature, values in enumerate(thresholds):
            limits[self.features == feature] = np.searchsorted(values, self.thresholds[self.features == feature])
        largest = int(self.leaves.max())
        return _Plan(
            features=self.features[order],
            limits=limits[order].astype(np.min_scalar_type(max(map(len, thresholds), default=0))),
            thresholds=thresholds,
            children=children[order],
            ends=[0, *np.cumsum(np.bincount(height)[1:]).tolist()],
            roots=np.where(self.leaves > 1, np.append(place, splits)[root], splits),
            numbers=np.arange(largest).astype(np.min_scalar_type(largest)),
        )


@dataclass(frozen=True, eq=False)
class _Plan:
    """Trees in the order of evaluation: splits by their height above the leaves, those of all trees together.

    Args:
        features, limits: feature of each split, and its threshold's rank among those of the feature, ``[splits]``.
        thresholds: sorted thresholds of each feature.
        children: positions of the children among the splits, or after them the numbers of leaves, ``[splits, 2]``.
        ends: where the splits of each height end.
        roots: position of each tree's root, or of leaf 0 if it is the only one, ``[trees]``.
        numbers: 0, 1, 2, … for the leaves of the largest tree.
    """

    features: np.ndarray
    limits: np.ndarray
    thresholds: Sequence[np.ndarray]
    children: np.ndarray
    ends: Sequence[int]
    roots: np.ndarray
    numbers: np.ndarray


def _fields(text: str) -> dict[str, str]:
    """Return the lines ``name=value``."""
    return {name: value for name, equals, value in (line.partition("=") for line in text.splitlines()) if equals}


def _numbers(tree: dict[str, str], name: str, kind: type[Any]) -> np.ndarray:
    """Return a line of numbers; a tree of one leaf may lack those of its splits."""
    texts = tree.get(name, "").split()
    return np.array([kind(text) for text in texts], np.int64 if kind is int else np.float64)


def _joined(arrays: list[np.ndarray], empty: np.ndarray) -> np.ndarray:
    return np.concatenate([*arrays, empty])
