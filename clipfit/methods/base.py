"""What a method is: a name, options of its own, and a function that builds its objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple, Protocol

import torch

from clipfit.backbone import Backbone
from clipfit.errors import UsageError


@dataclass(frozen=True)
class Task:
    """What a method is given: the model in training, and the texts of all C base classes."""

    backbone: Backbone
    tokens: torch.Tensor  # (C, context length) int64


class Term(NamedTuple):
    """One named part of an objective; what is minimised is the sum of weight · value."""

    weight: float
    value: torch.Tensor  # scalar


class Objective(Protocol):
    """Losses of a batch. `extra` are parameters beyond the model's: trained without decay, dropped at the end."""

    extra: Sequence[torch.nn.Parameter]

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Term]:
        """Normalised images (B, 3, H, W), labels (B,) int64 → terms by name."""


@dataclass(frozen=True)
class Method:
    """A row of the table of methods."""

    name: str
    summary: str
    citation: str
    options: type
    build: Callable[[Task, Any], Objective]

    def configure(self, given: Mapping[str, Any]) -> Any:
        """The method's options with the given values (None: leave the default).

        Raises:
            UsageError: an option that this method does not have.
        """
        values = {name: value for name, value in given.items() if value is not None}
        known = {f.name for f in fields(self.options)}
        for name in values:
            if name not in known:
                has = ", ".join(sorted(known)) or "none"
                raise UsageError(f"method {self.name} has no option {name!r}; its options: {has}.")
        return self.options(**values)


@dataclass(frozen=True)
class NoOptions:
    """For methods without options."""
