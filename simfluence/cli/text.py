"""Text of files on a terminal, where control characters could move the cursor or fake other text."""

from __future__ import annotations

import sys
import unicodedata

__all__ = ["complain", "say", "visible"]

_HIDDEN = ("Cc", "Cf", "Cs")  # control characters, invisible marks of format, halves of characters


def visible(text: object, keep: str = "\n") -> str:
    r"""Return text with its control characters written out; those in ``keep`` stay.

    >>> visible("\x1b[2Jname")
    '\\x1b[2Jname'
    """
    return "".join(
        ascii(character)[1:-1] if character not in keep and unicodedata.category(character) in _HIDDEN else character
        for character in str(text)
    )


def say(text: object) -> None:
    """Print text that may come from a file."""
    print(visible(text))


def complain(text: object) -> None:
    """Print an error, a warning or a note to the standard error."""
    print(visible(text), file=sys.stderr)
