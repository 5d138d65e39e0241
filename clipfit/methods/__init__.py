"""The table of methods: a new one is one file and one row."""

from __future__ import annotations

from clipfit.errors import UsageError
from clipfit.methods import atha, cite, cite_atha, finetune, flyp
from clipfit.methods.base import Embeddings, Group, Method, Objective, Seen, ShotCounts, Task, Term
from clipfit.text import did_you_mean

METHODS: dict[str, Method] = {
    m.name: m for m in (cite.METHOD, atha.METHOD, cite_atha.METHOD, finetune.METHOD, flyp.METHOD)
}

__all__ = ["METHODS", "Embeddings", "Group", "Method", "Objective", "Seen", "ShotCounts", "Task", "Term", "find"]


def find(name: str) -> Method:
    """The method of that name.

    Raises:
        UsageError: there is none; the nearest name is given.
    """
    if name in METHODS:
        return METHODS[name]
    hint = did_you_mean(name, METHODS, cutoff=0.3)
    raise UsageError(f"unknown method {name!r}{hint}; there are {', '.join(METHODS)}.")
