"""The errors and warnings that simfluence raises on purpose; messages say what happened, why, and what to do."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

__all__ = [
    "BeyondReferenceWarning",
    "ConvergenceWarning",
    "DivergedWarning",
    "EngineWarning",
    "FilterError",
    "InvalidInput",
    "NotFittedError",
    "PlainGradientsWarning",
    "RunawayWarning",
    "SimfluenceError",
    "StoreError",
    "UnseenWarning",
    "did_you_mean",
]


class SimfluenceError(Exception):
    """Base of every error raised on purpose."""


class InvalidInput(SimfluenceError, ValueError):
    """An argument, a specification or a file's content that cannot be used as it is."""


class FilterError(InvalidInput):
    """A filter that does not parse, names unknown columns, or matches nothing."""


class StoreError(SimfluenceError):
    """A run store that is damaged, belongs to another task, or has files that are not part of it."""


if TYPE_CHECKING:
    import sklearn.exceptions

    class NotFittedError(SimfluenceError, sklearn.exceptions.NotFittedError):  # type: ignore[misc]  # it is untyped
        """A simulator or an attributor was used before ``fit``."""


class DivergedWarning(UserWarning):
    """A run whose losses became NaN or infinite was left out."""


class UnseenWarning(UserWarning):
    """A simulated curriculum shows training examples that no fitting run shows."""


class BeyondReferenceWarning(UserWarning):
    """A simulated curriculum is longer than every run that the simulator was fitted on."""


class RunawayWarning(UserWarning):
    """Forecasts grew far beyond every recorded loss, and were stopped at a bound."""


class EngineWarning(UserWarning):
    """The requested engine cannot train these runs, so another engine does."""


class PlainGradientsWarning(UserWarning):
    """Some parameters have no rule for per-example gradients; a slower method computes them."""


class ConvergenceWarning(UserWarning):
    """An iterative solver stopped before it reached its tolerance."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """Return the end of an error message about an unknown name: the nearest option, or all options.

    >>> did_you_mean("adma", ["adam", "sgd"])
    "did you mean 'adam'?"
    >>> did_you_mean("xyz", ["adam", "sgd"])
    'choose from: adam, sgd'
    """
    options = [str(option) for option in options]
    close = difflib.get_close_matches(str(name), options, n=1)
    return f"did you mean {close[0]!r}?" if close else f"choose from: {', '.join(options)}"


def __getattr__(name: str) -> Any:
    """Make ``NotFittedError`` when it is first used: scikit-learn, whose error it is too, takes a second to import."""
    if name == "NotFittedError":
        return _not_fitted_error()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@functools.cache
def _not_fitted_error() -> type[Exception]:
    import sklearn.exceptions

    bases = (SimfluenceError, sklearn.exceptions.NotFittedError)
    content = {"__doc__": "A simulator or an attributor was used before ``fit``.", "__module__": __name__}
    return type("NotFittedError", bases, content)
