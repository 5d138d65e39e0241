"""What a run says of itself: one typed record for config.json, and the files that stand beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from clipfit.config import Recipe
from clipfit.config.edits import EditSettings
from clipfit.config.lora import LoraSettings
from clipfit.ensemble import State
from clipfit.errors import ClipfitError, ModelError
from clipfit.model.named import Additions
from clipfit.model.sources import Source
from clipfit.prompts import Templates
from clipfit.runs import files

T = TypeVar("T")
FORMAT = 2  # 1: without files.json
CONFIG, CLASSES, SHOTS, METRICS, TIMING = "config.json", "classes.json", "shots.jsonl", "metrics.jsonl", "timing.json"
FOLDS = "folds.json"  # of --alpha auto and --forecast
ANCESTORS = "ancestors.jsonl"  # of a run that was adapted on from another
ASKED = ("micro_batch", "gradient_checkpointing", "shard")  # of the recipe, written where they were asked for
FINETUNED, MODEL = "finetuned.safetensors", "model.safetensors"


@dataclass(frozen=True)
class Versions:
    """What a run was made with."""

    python: str
    torch: str
    torchvision: str
    open_clip: str


@dataclass(frozen=True)
class Parent:
    """The run that a run was adapted on from, wherever it lies: the digest of its model.safetensors, and its α."""

    sha256: str
    alpha: float


@dataclass(frozen=True)
class RunRecord:
    """What config.json holds: everything needed to repeat the run, nothing that differs when it is.

    A field with a default may be lacking in config.json: runs of before had it not.
    """

    clipfit: str
    versions: Versions
    shots: str  # as given, like classes and image_root; where they were then is in timing.json
    method: str
    method_options: Mapping[str, Any]
    recipe: Recipe
    alpha: float
    seed: int
    device: str
    precision: str
    threads: int
    pretrained: Source
    skipped: tuple[str, ...] = ()
    shots_per_class: int | None = None
    classes: str | None = None
    image_root: str | None = None
    tuning: str = "full"
    lora: LoraSettings | None = None
    edits: EditSettings | None = None
    context: str | None = None
    grey_bits: int | None = None  # of 16-bit greys, as found on the shots
    balance: bool = False
    goal: str | None = None  # what α was chosen for; None: it was given
    forecast: bool = False  # whether folds.json was asked for
    parent: Parent | None = None
    processes: int = 1  # that shared the work of each step; written where there were several
    templates: Templates | None = None  # of evaluation and prediction; None: the recipe's, which training takes
    format: int = field(default=FORMAT)

    @property
    def additions(self) -> Additions:
        """What the run's models have beyond open_clip's CLIP."""
        return Additions(self.edits, self.context)

    @property
    def all_templates(self) -> Templates:
        """Those whose mean text a class is, in evaluation and prediction."""
        return self.templates or (self.recipe.template,)

    def to_json(self) -> dict[str, Any]:
        """The document of config.json, in JSON's types."""
        document = dict(msgspec.to_builtins(self))
        recipe = document["recipe"]
        if self.processes == 1:
            document.pop("processes", None)  # read from a document without it, it is not there either
        return {**document, "recipe": {key: recipe[key] for key in recipe if key not in ASKED or recipe[key]}}

    @classmethod
    def from_json(cls, document: Any, path: Path) -> RunRecord:
        """The record of a document read from `path`.

        Raises:
            ModelError: it is of a format that this clipfit does not know, or something in it is not as it must be.
        """
        found = document.get("format") if isinstance(document, dict) else None
        if found not in (1, FORMAT):
            raise ModelError(f"{path} has run format {found!r}; this clipfit reads 1 and {FORMAT}.")
        return typed(document, cls, path)


@dataclass(frozen=True)
class ClassRecord:
    """What classes.json holds: the base classes in order, and folder → class name."""

    base: tuple[str, ...]
    names: Mapping[str, str]
    template: str
    templates: Templates | None = None


def typed(document: Any, kind: type[T], path: Path) -> T:
    """A document of JSON's types, read from `path`, as one of `kind`. Raises ModelError where it is none."""
    try:
        return msgspec.convert(document, kind)
    except (msgspec.ValidationError, ClipfitError) as error:
        raise ModelError(f"{path} is not as clipfit wrote it: {str(error).rstrip('.')}.") from error


@dataclass(frozen=True)
class RunFacts:
    """What a run folder says beside its weights. ancestors: see Run.ancestors."""

    record: RunRecord
    base: Sequence[str]
    names: Mapping[str, str]
    shots: Sequence[Mapping[str, Any]]
    steps: Sequence[Mapping[str, Any]]
    scale: float  # τ⁻¹
    ancestors: Sequence[Mapping[str, Any]] = ()


def write_run(folder: Path, facts: RunFacts, finetuned: State, ensemble: State) -> None:
    """Write every file of a run but timing.json; the same facts and weights give the same bytes.

    Raises:
        OutputError: the disk is full or the place cannot be written.
    """
    record = facts.record
    classes = ClassRecord(tuple(facts.base), facts.names, record.recipe.template, record.templates)
    files.write_json(folder / CONFIG, record.to_json())
    files.write_json(folder / CLASSES, msgspec.to_builtins(classes))
    files.write_lines(folder / SHOTS, facts.shots)
    files.write_lines(folder / METRICS, facts.steps)
    if facts.ancestors:
        files.write_lines(folder / ANCESTORS, facts.ancestors)
    for name, state, alpha in ((FINETUNED, finetuned, 1.0), (MODEL, ensemble, record.alpha)):
        files.write_tensors(folder / name, state, describe(record, facts.base, facts.scale, alpha))


def describe(record: RunRecord, base: Sequence[str], scale: float, alpha: float) -> dict[str, Any]:
    """The metadata that makes a weight file self-describing."""
    document = record.to_json()
    return {
        "format": record.format,
        "alpha": alpha,
        "classes": list(base),
        "template": record.recipe.template,
        "templates": list(record.all_templates),
        "logit_scale_exp": scale,
        **{key: document[key] for key in ("clipfit", "method", "edits", "context", "pretrained")},
    }
