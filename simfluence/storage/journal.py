"""The journal of a recording under way: a line of JSON for each event, behind its CRC-32.

The first line says what is recorded; a line with a batch is a step, a line with losses a reading of the present time.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from simfluence.errors import StoreError

JOURNAL_FILE = "journal.jsonl"


def journal_line(event: Mapping[str, Any]) -> bytes:
    """An event as a line of the journal."""
    content = json.dumps(event, separators=(",", ":")).encode()
    return b"%08x %s\n" % (zlib.crc32(content), content)


def journal_events(path: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The journal's events, each with the place where its line ends. A last line that is not whole is left out.

    Raises:
        StoreError: a line before the last is damaged.
    """
    if not path.is_file():
        return
    end = 0
    with open(path, "rb") as file:
        for line in file:
            checksum, content = line[:8], line[9:-1]
            if not line.endswith(b"\n") or checksum != b"%08x" % zlib.crc32(content):
                if file.read(1):
                    raise StoreError(f"{path} is damaged at byte {end}: move it elsewhere and record again")
                return
            end += len(line)
            yield json.loads(content), end


def events_by_time(events: Iterator[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """What is known of each time: of the step that led there, and of the reading."""
    present: dict[str, Any] = {}
    for event in events:
        if "batch" in event:
            yield present
            present = dict(event)
        else:
            present |= event
    yield present
