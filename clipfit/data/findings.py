"""What is wrong, or may be, with labelled images: one fault each, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

ERROR, HINT = "error", "hint"


@dataclass(frozen=True)
class Finding:
    """One fault. images, classes: those that it is about. advice: what to do.

    severity: "error" for what `adapt` refuses or what surely spoils a measurement, "hint" for what to look at.
    """

    kind: str
    severity: str
    images: tuple[str, ...]
    classes: tuple[str, ...]
    message: str
    advice: str

    def as_json(self) -> dict[str, Any]:
        """An entry of `check --json`."""
        return {**asdict(self), "images": list(self.images), "classes": list(self.classes)}


def error(kind: str, message: str, advice: str, images: tuple[str, ...] = (), classes: tuple[str, ...] = ()) -> Finding:
    """What must be changed."""
    return Finding(kind, ERROR, images, classes, message, advice)


def hint(kind: str, message: str, advice: str, images: tuple[str, ...] = (), classes: tuple[str, ...] = ()) -> Finding:
    """What is worth a look."""
    return Finding(kind, HINT, images, classes, message, advice)
