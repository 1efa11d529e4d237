"""Files that exist only whole: written aside, synced, renamed."""

from __future__ import annotations

import os
from pathlib import Path

from simfluence.errors import StoreError


def write_whole(path: Path, content: bytes, aside: Path | None = None) -> None:
    """Write ``content`` to ``path`` so that a reader finds all of it or nothing, also after a crash.

    Args:
        aside: folder, on the same file system, for the unfinished file; by default the one of ``path``.

    Raises:
        StoreError: the disk is full, the folder read-only, …; nothing was changed.
    """
    aside = aside or path.parent
    unfinished = aside / f".{path.name}.{os.getpid()}.unfinished"
    try:
        for folder in (path.parent, aside):
            folder.mkdir(parents=True, exist_ok=True)
        try:
            _write_synced(unfinished, content)
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


def _write_synced(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


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
