"""The journal of an unfinished recording: one line per event, a running CRC-32 followed by the event as JSON.

The first line is the header. An event with a batch is a step; an event with losses is a reading after the latest step.
Each line's checksum covers all lines up to it, so a line that is changed, missing, repeated or moved is noticed.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from simfluence.errors import StoreError

__all__ = ["JOURNAL_FILE", "Entry", "damaged_at", "events_by_time", "journal_entries", "journal_line"]

JOURNAL_FILE = "journal.jsonl"


@dataclass(frozen=True)
class Entry:
    """An event that was read from a journal.

    Args:
        event: content of the line.
        checksum: running checksum of all lines up to this one.
        end: byte offset where the line ends.
    """

    event: dict[str, Any]
    checksum: int
    end: int


def journal_line(event: Mapping[str, Any], checksum: int = 0) -> tuple[bytes, int]:
    """Return an event as a line behind lines of a running checksum, and the checksum with this line.

    >>> journal_line({"batch": [3, 1]})
    (b'b4dd25e0 {"batch":[3,1]}\\n', 3034392032)
    """
    content = json.dumps(event, separators=(",", ":")).encode()
    checksum = zlib.crc32(content, checksum)
    return b"%08x %s\n" % (checksum, content), checksum


def journal_entries(path: Path) -> Iterator[Entry]:
    """Yield each entry of a journal. Skip a last line that is incomplete or damaged.

    Raises:
        StoreError: a line before the last is damaged.
    """
    if not path.is_file():
        return
    end = checksum = 0
    with open(path, "rb") as file:
        for line in file:
            content = line[9:-1]
            running = zlib.crc32(content, checksum)
            if line != b"%08x %s\n" % (running, content):
                if file.read(1):
                    raise damaged_at(path, end)
                return
            event = _parsed(content)
            if event is None:
                raise damaged_at(path, end)
            end, checksum = end + len(line), running
            yield Entry(event, checksum, end)


def damaged_at(path: Path, offset: int) -> StoreError:
    """Build the error for a journal that cannot be used from a byte offset on."""
    return StoreError(
        f"{path} is damaged at byte {offset}, so this recording cannot be continued: start over with resume=0"
    )


def _parsed(content: bytes) -> dict[str, Any] | None:
    """Return a JSON object, or None if the content is something else."""
    try:
        event = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def events_by_time(events: Iterator[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """Merge each step with its reading: yield one event per time, from time 0 on."""
    merged: dict[str, Any] = {}
    for event in events:
        if "batch" in event:
            yield merged
            merged = dict(event)
        else:
            merged |= event
    yield merged
