"""What can go wrong, and the exit code that says so.

Every message says what was expected, what was found and what to do, in one sentence a person can act on.
"""

from typing import Any


class ClipfitError(Exception):
    """Base of every error that clipfit raises on purpose; `exit_code` is what the command line returns."""

    exit_code = 1
    found: Any = None
    """What there is all the same (an `Evaluation` that the guard stopped): shown, and its `as_json()` printed."""


class UsageError(ClipfitError):
    """A command or an option that cannot be carried out as given."""

    exit_code = 2


class DataError(ClipfitError):
    """Images, class names or folders that are not as they must be."""

    exit_code = 3


class ModelError(ClipfitError):
    """A model or its weights that cannot be had, or are not the expected ones."""

    exit_code = 4


class GuardError(ClipfitError):
    """What was measured is not what was required of it (`evaluate --fail-if-worse`, `--require`)."""

    exit_code = 5


class NonFiniteError(ClipfitError):
    """A loss or a weight that is not a finite number."""

    exit_code = 6


class OutputError(ClipfitError):
    """Something that could not be written: a folder that is read-only, a disk that is full, a stdout that is closed."""

    exit_code = 7


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough to stand inside a sentence of ours."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:;")[:300]
