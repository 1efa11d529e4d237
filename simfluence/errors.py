"""The errors and warnings that simfluence raises on purpose: what happened, why, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import sklearn.exceptions


class SimfluenceError(Exception):
    """Base of every error raised on purpose."""


class InvalidInput(SimfluenceError, ValueError):
    """An argument, a specification or a file's content that cannot be used as it is."""


class FilterError(InvalidInput):
    """A filter that does not parse, or that speaks of columns or values that are not there."""


class StoreError(SimfluenceError):
    """A run store that is damaged, belongs to another task, or holds what does not belong there."""


class NotFittedError(SimfluenceError, sklearn.exceptions.NotFittedError):
    """A simulator was used before ``fit``."""


class DivergedWarning(UserWarning):
    """A run whose losses became NaN or infinite was left out."""


class UnseenWarning(UserWarning):
    """A simulated curriculum shows training examples that no fitting run has."""


class BeyondReferenceWarning(UserWarning):
    """A simulated curriculum is longer than every reference run."""


class EngineWarning(UserWarning):
    """An engine that was asked for cannot train these runs; another does."""


class PlainGradientsWarning(UserWarning):
    """Some parameters have no rule for per-example gradients; they are taken by slower means."""


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped before it reached its tolerance."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """The end of an error message about an unknown name: the nearest option, or all of them.

    >>> did_you_mean("adma", ["adam", "sgd"])
    "did you mean 'adam'?"
    >>> did_you_mean("xyz", ["adam", "sgd"])
    'known are: adam, sgd'
    """
    options = [str(option) for option in options]
    close = difflib.get_close_matches(str(name), options, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are: {', '.join(options)}"
