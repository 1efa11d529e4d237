"""Atomic file writes (write to a temporary file, sync, rename), and checks of files and their names."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import reprlib
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from simfluence.errors import InvalidInput, StoreError

if sys.platform != "win32":
    import fcntl

__all__ = [
    "cannot_write",
    "check_file_name",
    "check_format",
    "check_no_links",
    "regular_content",
    "size_of",
    "whole_file",
    "write_whole",
]

_UNFINISHED = ".unfinished"  # ending of temporary files
_LONGEST_BEGIN = 40  # characters of a file's name that its temporary file repeats
_LONGEST_NAME = 128  # bytes
_TRIES = 100
_SPECIAL = '/\\:*?"<>|'  # not allowed in file names on some system


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
    if "\0" in str(path):
        raise InvalidInput(f"{str(path)!r} cannot be the path of a file, because it contains a null character")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished, file = _open_unfinished(aside or path.parent, path.name)
        try:
            with file:
                yield file
                file.flush()
                os.fsync(file.fileno())
                if sys.platform == "win32":
                    file.close()  # an open file cannot be renamed there; elsewhere it stays locked until it is renamed
                os.replace(unfinished, path)
        finally:
            unfinished.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        raise cannot_write(path, error) from error


def _open_unfinished(folder: Path, name: str) -> tuple[Path, io.BufferedRandom]:
    """Open a temporary file whose name no other process or thread uses, and lock it while it is written."""
    begin = f".{name[:_LONGEST_BEGIN]}."
    _remove_leftovers(folder, begin)
    for _ in range(_TRIES):
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{begin}{uuid.uuid4().hex}{_UNFINISHED}"
        with contextlib.suppress(FileNotFoundError):  # another process has just removed the empty folder
            file = open(path, "x+b")  # noqa: SIM115 (the caller closes it)
            _lock(file)
            if os.fstat(file.fileno()).st_nlink:
                return path, file
            file.close()  # another process took it for a leftover before it was locked
    raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))


def _remove_leftovers(folder: Path, begin: str) -> None:
    """Delete the temporary files of processes that died while they wrote: nobody holds the locks of those."""
    try:
        with os.scandir(folder) as entries:
            found = [entry.path for entry in entries if entry.name.startswith(begin) and _is_unfinished(entry)]
    except OSError:
        return
    for path in found:
        with contextlib.suppress(OSError):  # it is being written, or another process was faster
            if sys.platform == "win32":
                os.unlink(path)
            else:
                with open(path, "rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    os.unlink(path)


def _is_unfinished(entry: os.DirEntry[str]) -> bool:
    return entry.name.endswith(_UNFINISHED) and entry.is_file(follow_symlinks=False)


def _lock(file: io.BufferedRandom) -> None:
    """Lock an open file, which the system unlocks when the process dies. On Windows every open file is locked."""
    if sys.platform != "win32":
        with contextlib.suppress(OSError):  # a file system without locks: its leftovers stay
            fcntl.flock(file, fcntl.LOCK_EX)


def check_file_name(what: str, name: str) -> str:
    """Return ``name``, checked to be the plain name of a file on every system, not a path.

    Args:
        what: what is named, for the error message.

    Raises:
        InvalidInput: the name is empty or too long, has a slash or another special character, or begins with a dot.

    >>> check_file_name("the run id", "mine-1")
    'mine-1'
    """
    odd = sorted({character for character in name if not character.isprintable() or character in _SPECIAL})
    if odd or not name or name != name.strip() or name.startswith(".") or name.endswith((".", ".lock")):
        because = f"it contains {odd[0]!r}" if odd else "it is empty, or begins or ends with a dot, a space or '.lock'"
    elif len(name.encode()) > _LONGEST_NAME:
        because = f"it is longer than {_LONGEST_NAME} bytes"
    else:
        return name
    raise InvalidInput(
        f"{what} {reprlib.repr(name)} cannot be used as the name of a file, because {because}: "
        "use letters, digits, '.', '_' and '-'"
    )


def check_no_links(path: Path, inside: Path) -> Path:
    """Return ``path``, checked to be no symbolic link, nor in a folder below ``inside`` that is one.

    What is written to or copied from such a path would be a file elsewhere. ``inside`` itself may be a link.

    Raises:
        StoreError: there is a link.
    """
    for part in (path, *path.parents):
        if part == inside:
            break
        if part.is_symlink():
            raise StoreError(
                f"{part} is a symbolic link, which could lead to files outside {inside}: "
                "replace it by the file or folder that it points to"
            )
    return path


def regular_content(path: Path, most: int | None = None) -> bytes:
    """Return the bytes of a file.

    Args:
        most: greatest number of bytes.

    Raises:
        StoreError: it is not a regular file, is larger than ``most``, or cannot be read.
    """
    try:
        if path.exists() and not path.is_file():
            raise StoreError(f"{path} is not a regular file: move it elsewhere")
        if most is not None and path.stat().st_size > most:
            raise StoreError(
                f"{path} has {size_of(path.stat().st_size)}, but such a file has at most {size_of(most)}: "
                "move it elsewhere"
            )
        return path.read_bytes()
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}") from error


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
    """Make a rename durable, if the system can open and sync folders."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network drives cannot sync a folder
            raise
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
