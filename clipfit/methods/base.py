"""What a method is: a name, options of its own, and an objective in two steps, `embed` and `terms`.

Nothing here imports torch when it is imported: the command line reads the methods' options.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from clipfit.config import settings
from clipfit.config.edits import EditSettings
from clipfit.config.lora import LoraSettings
from clipfit.config.options import Checked

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter

    from clipfit.methods.batch import Batch
    from clipfit.model.clip import Clip


@dataclass(frozen=True)
class Task:
    """What a method is given: the model in training, the texts of all C base classes, and how the weights move."""

    clip: Clip
    tokens: Tensor  # (C, context length) int64
    tuning: str = "full"  # or "lora"
    shots_per_class: int = 16  # of the class that has most
    pretrained: Mapping[str, Tensor] | None = None  # the pre-trained weights, where they are kept anyway


class Embeddings(NamedTuple):
    """What the towers make of a batch. Everything is unit norm, float32, and row by row a function of its own input.

    u: (B, D) of the images. t: (C, D) of all classes' texts, or (U, D) of those in the batch, as the method says.
    teacher_u: (B, D) of the same images by the pre-trained model. dva_u: (B, D), u for L_DVA where it differs.
    """

    u: Tensor
    t: Tensor
    teacher_u: Tensor | None = None
    dva_u: Tensor | None = None


class Term(NamedTuple):
    """One named part of an objective; what is minimised is the sum of weight · value."""

    weight: float
    value: Tensor  # scalar


@dataclass(frozen=True)
class Group:
    """Parameters, by name, that are trained beside the CLIP's own, and how.

    learning_rate None: the recipe's. momentum: that of SGD; None: AdamW.
    """

    parameters: Mapping[str, Parameter]
    learning_rate: float | None = None
    weight_decay: float = 0.0
    momentum: float | None = None


class Objective(Protocol):
    """Losses of a batch, and what is trained beside the CLIP."""

    @property
    def groups(self) -> tuple[Group, ...]: ...

    def embed(self, batch: Batch) -> Embeddings:
        """All that needs the towers, the teacher's included."""

    def terms(self, e: Embeddings, batch: Batch) -> dict[str, Term]:
        """The losses, by name: functions of embeddings, labels and the method's own parameters."""


@dataclass(frozen=True)
class LoraDefaults:
    """A method's settings under low-rank tuning.

    recipe: (shots of the class that has most, shots in all, batch size if one is given) → what differs in Recipe.
    """

    settings: LoraSettings = field(default_factory=LoraSettings)
    recipe: Callable[[ShotCounts], Mapping[str, Any]] = lambda counts: {"learning_rate": 2e-4}


@dataclass(frozen=True)
class ShotCounts:
    """What a recipe may depend on. `batch_size`: None where none is asked for."""

    of_largest_class: int
    in_all: int
    batch_size: int | None


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
class NoOptions(Checked):
    """For methods without options."""
