"""What is wrong with one class or image of a place: refused at once, or collected where the rest is to be read."""

from __future__ import annotations

from clipfit.errors import DataError


class ObjectionError(DataError):
    """A fault that leaves the other classes and images readable. `kind`, `images` and `classes` are for findings."""

    def __init__(self, kind: str, message: str, images: tuple[str, ...] = (), classes: tuple[str, ...] = ()):
        super().__init__(message)
        self.kind, self.images, self.classes = kind, images, classes


Objections = list[ObjectionError]


def object_to(fault: ObjectionError, collected: Objections | None) -> None:
    """Raises it where nobody collects them."""
    if collected is None:
        raise fault
    collected.append(fault)
