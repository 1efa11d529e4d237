"""Atomic file writes: write to a temporary file, sync, rename."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simfluence.errors import StoreError


def write_whole(path: Path, content: bytes, aside: Path | None = None) -> None:
    """Write ``content`` to ``path`` atomically: a reader gets all of it or nothing, even after a crash.

    Args:
        aside: folder for the temporary file, on the same file system; by default the folder of ``path``.

    Raises:
        StoreError: the file cannot be written (disk full, folder read-only, …); nothing was changed.
    """
    with whole_file(path, aside) as file:
        file.write(content)


@contextlib.contextmanager
def whole_file(path: Path, aside: Path | None = None) -> Iterator[io.BufferedRandom]:
    """Open a file that becomes ``path`` if the block ends without an error, and is deleted otherwise.

    For arguments and errors see ``write_whole``.
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
    """Format a number of bytes.

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
    """Build the error for a failed write."""
    return StoreError(
        f"cannot write {path}: {error.strerror or error}. What is recorded is safe; "
        "free some space or fix the permissions, then run the same command again"
    )


def _sync_folder(folder: Path) -> None:
    """Make a rename durable, if the system can open folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_format(version: Any, newest: int, path: str | Path, oldest: int = 0) -> None:
    """Check that this version can read a file's format.

    Raises:
        StoreError: the format is newer or invalid.
    """
    if isinstance(version, bool) or not isinstance(version, int) or version < oldest:
        raise StoreError(f"{path} is damaged: its format is {version!r}")
    if version > newest:
        raise StoreError(
            f"{path} has format {version}, which a newer version of simfluence wrote; this one reads up to {newest}: "
            "upgrade simfluence to read it"
        )
