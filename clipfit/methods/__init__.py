"""The table of methods: a new one is one file and one row."""

from __future__ import annotations

import difflib

from clipfit.errors import UsageError
from clipfit.methods import atha, cite, cite_atha, finetune, flyp
from clipfit.methods.base import Embeddings, Group, Method, Objective, ShotCounts, Task, Term

METHODS: dict[str, Method] = {
    m.name: m for m in (cite.METHOD, atha.METHOD, cite_atha.METHOD, finetune.METHOD, flyp.METHOD)
}

__all__ = ["METHODS", "Embeddings", "Group", "Method", "Objective", "ShotCounts", "Task", "Term", "find"]


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none; the nearest name is given.
    """
    if name in METHODS:
        return METHODS[name]
    close = difflib.get_close_matches(name, METHODS, n=1, cutoff=0.3)
    hint = f" (did you mean {close[0]}?)" if close else ""
    raise UsageError(f"unknown method {name!r}{hint}; there are {', '.join(METHODS)}.")
