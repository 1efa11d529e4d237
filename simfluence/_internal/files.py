"""Files that exist only whole: written aside, synced, renamed."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path

from simfluence.errors import StoreError


def write_whole(path: Path, content: bytes, aside: Path | None = None) -> None:
    """Write ``content`` to ``path`` so that a reader finds all of it or nothing, also after a crash.

    Args:
        aside: folder, on the same file system, for the unfinished file; by default the one of ``path``.

    Raises:
        StoreError: the disk is full, the folder read-only, …; nothing was changed.
    """
    with whole_file(path, aside) as file:
        file.write(content)


@contextlib.contextmanager
def whole_file(path: Path, aside: Path | None = None) -> Iterator[io.BufferedRandom]:
    """A file to write and read; it becomes ``path`` when the block ends without an error, and is gone otherwise.

    Arguments and errors as of ``write_whole``.
    """
    aside = aside or path.parent
    unfinished = aside / f".{path.name}.{os.getpid()}.unfinished"
    try:
        for folder in (path.parent, aside):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            with open(unfinished, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error
    _sync_folder(path.parent)


def size_of(count: int) -> str:
    """Bytes for people.

    >>> size_of(2_500_000)
    '2.5 MB'
    """
    units = ["B", "kB", "MB", "GB", "TB"]
    size = float(count)
    while size >= 1000 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g} {units[0]}"


def cannot_write(path: Path, error: OSError) -> StoreError:
    """What to say when the system refuses a write."""
    return StoreError(
        f"cannot write {path}: {error.strerror or error}. What is recorded is safe; "
        "mend that (free space, permissions) and start again"
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, where the system lets a folder be opened."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
