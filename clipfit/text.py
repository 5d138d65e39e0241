"""Text from outside (names of files and classes, words of other libraries) on its way to a terminal."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

JOINERS = "\u200c\u200d"  # invisible too, but words of some languages and many emoji need them
RAW = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # control, format (direction overrides among them), surrogate, line separators


def printable(text: str) -> str:
    r"""The text on one line, with what would steer a terminal shown instead of obeyed: ESC as \x1b, a newline as \n."""
    if text.isprintable():
        return text
    return "".join(_shown(char) for char in text)


def _shown(char: str) -> str:
    if unicodedata.category(char) not in RAW or char in JOINERS:
        return char
    return char.encode("unicode_escape").decode("ascii")


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """ " (did you mean cite?)": the known name that is nearest; empty where none is as near as `cutoff`, at most 1."""
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f" (did you mean {close[0]}?)" if close else ""


def valid(text: str) -> str:
    r"""Text that every reader of UTF-8 takes: bytes of a name that are none are shown, as in caf\xe9.jpg."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    except UnicodeEncodeError:  # half of a character, as JSON may hold
        return text.encode("utf-8", "backslashreplace").decode("utf-8")
