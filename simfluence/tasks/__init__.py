"""Ready-made tasks, one file each, and tasks made of a user's own arrays."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from simfluence.errors import InvalidInput, StoreError, did_you_mean
from simfluence.task import Task, TaskInfo
from simfluence.tasks.arrays import from_arrays
from simfluence.tasks.digits import digits

#: Tasks that a file may name.
READY_MADE: Mapping[str, Callable[..., Task]] = {"digits": digits}


def build(name: str, **arguments: object) -> Task:
    """The ready-made task called ``name``.

    Raises:
        InvalidInput: there is none of that name, or it does not take these arguments.
    """
    if name not in READY_MADE:
        raise InvalidInput(f"no ready-made task {name!r}, {did_you_mean(name, READY_MADE)}")
    try:
        return READY_MADE[name](**arguments)
    except TypeError as error:
        raise InvalidInput(f"task {name!r}: {error}") from None


def rebuild(info: TaskInfo) -> Task:
    """The ready-made task that a store was recorded from.

    Raises:
        StoreError: the task is a user's own, or is no longer what it was.
    """
    if info.name not in READY_MADE:
        raise StoreError(f"task {info.name!r} is not a ready-made one: give the task itself (task=…)")
    task = build(info.name, **info.arguments)
    if task.fingerprint != info.fingerprint:
        raise StoreError(f"task {info.name!r} as built here differs from the recorded one (other data or model)")
    return task


__all__ = ["READY_MADE", "build", "digits", "from_arrays", "rebuild"]
