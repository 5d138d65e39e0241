"""What a method is: a name, options of its own, and an objective in two steps, `embed` and `terms`.

What they are given and return lets a batch be encoded in parts, and the losses be those of the whole batch: see
training/step.py.

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
    from clipfit.model.clip import Clip, Texts
    from clipfit.streams import Rows


@dataclass(frozen=True)
class Task:
    """What a method is given: the model in training, the texts of all C base classes, and how the weights move."""

    clip: Clip
    tokens: Tensor  # (C, context length) int64
    tuning: str = "full"  # or "lora"
    shots_per_class: int = 16  # of the class that has most
    pretrained: Mapping[str, Tensor] | None = None  # the pre-trained weights, where they are kept anyway


class Seen(NamedTuple):
    """What the image tower makes of images: unit norm, float32, and row by row a function of its own image.

    u: (B, D). dva_u: (B, D), u for L_DVA where it differs.
    """

    u: Tensor
    dva_u: Tensor | None = None


class Embeddings(NamedTuple):
    """What the towers make of a batch; every tensor unit norm, float32.

    t: (n, D) of the texts that `classes` names. teacher_u: (B, D), the same images by the pre-trained model.
    """

    seen: Seen
    t: Tensor
    teacher_u: Tensor | None = None


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
    """Losses of a batch, and what is trained beside the CLIP.

    tokens: (C, context length), the texts of all classes. teacher: normalised images (B, 3, H, W) → (B, D), by frozen
    weights; None where a method has none.
    """

    @property
    def clip(self) -> Clip: ...

    @property
    def tokens(self) -> Tensor: ...

    @property
    def teacher(self) -> Callable[[Tensor], Tensor] | None: ...

    @property
    def groups(self) -> tuple[Group, ...]: ...

    def classes(self, batch: Batch) -> Rows:
        """Those whose texts the batch's images are compared with."""

    def embed(self, batch: Batch, texts: Texts) -> Seen:
        """All that needs the image tower: of a batch or a part of one, beside the texts of `classes`."""

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
