"""Ready-made tasks, and tasks from a user's own arrays and texts."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping

from simfluence._internal.checked import checked
from simfluence._internal.imports import imported_object
from simfluence.errors import InvalidInput, StoreError, did_you_mean
from simfluence.task import Task, TaskInfo
from simfluence.tasks import recipes
from simfluence.tasks.arrays import from_arrays
from simfluence.tasks.digits import digits
from simfluence.tasks.synthetic import synthetic, synthetic_optimum
from simfluence.tasks.tabular import breast_cancer, diabetes
from simfluence.tasks.text.docstrings import docstrings
from simfluence.tasks.text.pretrained import Pretrained
from simfluence.tasks.text.prompted import boolq, copa, rte, sst2, winogrande
from simfluence.tasks.text.tasks import classification, language_modelling, multiple_choice
from simfluence.tasks.text.topics import topics

#: Ready-made tasks by name, as in specification files and on the command line.
READY_MADE: Mapping[str, Callable[..., Task]] = {
    "digits": digits,
    "breast_cancer": breast_cancer,
    "diabetes": diabetes,
    "synthetic": synthetic,
    "docstrings": docstrings,
    "topics": topics,
    "copa": copa,
    "rte": rte,
    "winogrande": winogrande,
    "sst2": sst2,
    "boolq": boolq,
}


@checked
def build(name: str, **arguments: object) -> Task:
    """Build the ready-made task called ``name``.

    Raises:
        InvalidInput: no ready-made task has that name, or it does not take these arguments.

    >>> build("digits", n_train=20, n_test=5)
    Task('digits', train=20, test=5)
    """
    if name not in READY_MADE:
        raise InvalidInput(f"no ready-made task {name!r}, {did_you_mean(name, READY_MADE)}")
    try:
        return READY_MADE[name](**arguments)
    except TypeError as error:
        raise InvalidInput(f"task {name!r}: {error}") from None


def rebuild(info: TaskInfo) -> Task:
    """Build the ready-made task that a store was recorded with.

    Raises:
        StoreError: the task is a user's own, or differs from the recorded one.

    >>> task = build("digits", n_train=20, n_test=5)
    >>> rebuild(task.info).fingerprint == task.fingerprint
    True
    """
    if info.name not in READY_MADE:
        raise StoreError(f"task {info.name!r} is not a ready-made one: pass it (task=…, or --task module:function)")
    python = info.arguments.get("python")
    versions = (
        "" if python is None else f"; its texts are those of Python {python}, and this is {platform.python_version()}"
    )
    try:
        task = build(info.name, **info.arguments)
    except InvalidInput as error:
        raise StoreError(f"task {info.name!r} cannot be built here{versions}: {error}") from error
    if task.fingerprint != info.fingerprint:
        raise StoreError(
            f"task {info.name!r} as built here differs from the recorded one (other data or model){versions}. Fits and "
            "what-ifs need only the store; to train or attribute again, rebuild the recorded task"
        )
    return task


def imported(reference: str) -> Task:
    """Import a user's own task: call the function that ``package.module:function`` names.

    This runs the user's code, so use it only for names from the command line, never for names from a file.

    Raises:
        InvalidInput: the module or function does not exist, or does not return a task.

    >>> imported("simfluence.tasks:breast_cancer").name
    'breast_cancer'
    """
    function = imported_object(reference, "task")
    task = function()
    if not isinstance(task, Task):
        raise InvalidInput(f"task {reference!r}: the function returned {type(task).__name__}, not a simfluence.Task")
    return task


__all__ = [
    "READY_MADE",
    "Pretrained",
    "boolq",
    "breast_cancer",
    "build",
    "classification",
    "copa",
    "diabetes",
    "digits",
    "docstrings",
    "from_arrays",
    "imported",
    "language_modelling",
    "multiple_choice",
    "rebuild",
    "recipes",
    "rte",
    "sst2",
    "synthetic",
    "synthetic_optimum",
    "topics",
    "winogrande",
]
