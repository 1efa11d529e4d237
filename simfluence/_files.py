"""Files that exist only whole: written aside, synced, renamed."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes, aside: Path | None = None) -> None:
    """Write ``content`` to ``path`` so that a reader finds all of it or nothing, also after a crash.

    Args:
        aside: folder, on the same file system, for the unfinished file; by default the one of ``path``.
    """
    aside = aside or path.parent
    for folder in (path.parent, aside):
        folder.mkdir(parents=True, exist_ok=True)
    unfinished = aside / f".{path.name}.{os.getpid()}.unfinished"
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    _sync_folder(path.parent)


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
