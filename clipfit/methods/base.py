"""What a method is: a name, options of its own, and a function that builds its objective."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch

from clipfit.config import settings
from clipfit.config.edits import EditSettings
from clipfit.config.lora import LoraSettings
from clipfit.model.clip import Clip


@dataclass(frozen=True)
class Task:
    """What a method is given: the model in training, the texts of all C base classes, and how the weights move."""

    backbone: Clip
    tokens: torch.Tensor  # (C, context length) int64
    tuning: str = "full"  # or "lora"
    shots_per_class: int = 16  # of the class that has most


class Term(NamedTuple):
    """One named part of an objective; what is minimised is the sum of weight · value."""

    weight: float
    value: torch.Tensor  # scalar


@dataclass(frozen=True)
class Extra:
    """Parameters beyond the CLIP's own; learning_rate None: the recipe's; momentum: SGD's, None: AdamW."""

    parameters: Sequence[torch.nn.Parameter]
    learning_rate: float | None = None
    weight_decay: float = 0.0
    momentum: float | None = None

    def rate(self, usual: float) -> float:
        """Its learning rate, where the recipe's is `usual`."""
        return usual if self.learning_rate is None else self.learning_rate


class Objective(Protocol):
    """Losses of a batch, and what is trained beside the CLIP."""

    extra: Sequence[Extra]

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Term]:
        """Normalised images (B, 3, H, W), labels (B,) int64 → terms by name."""


@dataclass(frozen=True)
class LoraDefaults:
    """A method's settings under low-rank tuning.

    recipe: (shots of the class that has most, shots in all, batch size if one is given) → what differs in Recipe.
    """

    settings: LoraSettings = field(default_factory=LoraSettings)
    recipe: Callable[[int, int, int | None], Mapping[str, Any]] = lambda most, total, batch: {"learning_rate": 2e-4}


@dataclass(frozen=True)
class Method:
    """A row of the table of methods."""

    name: str
    summary: str
    citation: str
    options: type
    build: Callable[[Task, Any], Objective]
    lora: LoraDefaults = field(default_factory=LoraDefaults)
    edits: Callable[[Any], EditSettings | None] = lambda options: None  # of patch tokens, in training and at inference

    def configure(self, given: Mapping[str, Any]) -> Any:
        """The method's options with the given values (None: leave the default).

        Raises:
            UsageError: an option that this method does not have, or a value of another type.
        """
        return self.options(**settings(self.options, given, f"method {self.name}"))


@dataclass(frozen=True)
class NoOptions:
    """For methods without options."""
