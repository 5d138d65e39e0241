"""What an adaptation starts from: pre-trained weights, or a run at its α, which is adapted on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch

from clipfit.errors import UsageError
from clipfit.model import loading, sources
from clipfit.model.clip import Clip
from clipfit.model.named import Additions
from clipfit.model.sources import LOCAL_DIR, Origin, Source
from clipfit.runs import place
from clipfit.runs.record import MODEL, Parent
from clipfit.runs.run import Run, open_run


class Start(Protocol):
    """What is known of it before its weights are read, and reading them."""

    @property
    def adapt_defaults(self) -> Mapping[str, Any]:
        """Its own recipe: see config.Recipe.resolved."""

    @property
    def parent(self) -> Parent | None:
        """The run, where it is one."""

    @property
    def made_with(self) -> list[dict[str, Any]]:
        """The images that the run, and those it goes on from, were made with, as lines of shots.jsonl."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What one should know of it."""

    def load(self, method: str, additions: Additions, adapters: bool, device: torch.device) -> Clip:
        """The model that becomes α = 0 of the new run.

        Args:
            method: the name of the method that adapts. additions: what the model is to have beyond open_clip's CLIP.
            adapters: whether LoRA is to train it.

        Raises:
            UsageError: a run whose additions are in effect cannot be adapted on so.
            ModelError: the model cannot have that, or its weights cannot be had, are damaged or not finite.
        """


def find(model: str, pretrained: str | None = None) -> Start:
    """What `--model` and `--pretrained` name; nothing is fetched, and of a run only the small files are read.

    Raises:
        UsageError: no such model or tag, or other weights for a folder that has its own.
        DataError, ModelError: the folder is not finished, damaged, or none of a model.
    """
    place.recover(Path(model.removeprefix(LOCAL_DIR)).expanduser())
    folder = sources.folder_of(model)
    if folder is None or not sources.is_run(folder):
        return _Pretrained(sources.find(model, pretrained))
    if pretrained:
        raise UsageError(f"{model} has its own weights: leave --pretrained {pretrained} out.")
    return _AdaptedOn(open_run(folder), sources.recorded_name(model))


@dataclass(frozen=True)
class _Pretrained:
    origin: Origin
    parent: Parent | None = None
    notes: tuple[str, ...] = ()

    @property
    def made_with(self) -> list[dict[str, Any]]:
        return []

    @property
    def adapt_defaults(self) -> Mapping[str, Any]:
        return self.origin.adapt_defaults

    def load(self, method: str, additions: Additions, adapters: bool, device: torch.device) -> Clip:
        return loading.fetch(self.origin, device, additions, adapters)


@dataclass(frozen=True)
class _AdaptedOn:
    run: Run
    name: str  # as the new run records it

    @property
    def parent(self) -> Parent | None:
        return Parent(self.run.digest(MODEL), self.run.alpha)

    @property
    def made_with(self) -> list[dict[str, Any]]:
        return [*map(dict, self.run.shots), *self.run.val, *self.run.ancestors]

    @property
    def notes(self) -> tuple[str, ...]:
        return self.run.notes

    @property
    def adapt_defaults(self) -> Mapping[str, Any]:
        """Those of its model, with the run's template, and its list where it has one."""
        kept = {key: value for key, value in self.run.source.adapt_defaults.items() if key != "templates"}
        listed = {"templates": list(self.run.templates)} if self.run.record.templates else {}
        return {**kept, "recipe": {**kept.get("recipe", {}), "template": self.run.template}, **listed}

    def load(self, method: str, additions: Additions, adapters: bool, device: torch.device) -> Clip:
        held = self.run.additions
        if held != Additions():
            self._require_same(method, additions)
        source = Source(
            model=self.name,
            pretrained=None,
            sha256="",
            model_cfg=self.run.source.model_cfg,
            preprocess_cfg=self.run.source.preprocess_cfg,
            adapt_defaults=self.adapt_defaults,
        )
        wanted = additions if held == Additions() else held
        return loading.go_on(source, self.run.state(self.run.alpha), wanted, adapters, device)

    def _require_same(self, method: str, additions: Additions) -> None:
        """Raises UsageError where the run's additions would be lost or mean something else."""
        run, held = self.run, self.run.additions
        parts = {"edits of patch tokens": held.edits, "context vectors": held.context}
        has = " and ".join(name for name, part in parts.items() if part is not None)
        if method != run.method:
            raise UsageError(
                f"{run.path} has {has} of {run.method}, which only {run.method} can go on with, not {method}: take "
                f"--method {run.method}, or adapt {run.source.model} itself."
            )
        found, expected = _settings(additions, held), _settings(held, held)
        differ = [key for key in {**expected, **found} if found.get(key) != expected.get(key)]
        if differ:
            listed = ", ".join(f"{key} {expected.get(key)!r} (found {found.get(key)!r})" for key in differ)
            raise UsageError(
                f"{run.path} has {has}, which can only go on as they were made: give the same options; "
                f"expected {listed}."
            )


def _settings(additions: Additions, held: Additions) -> dict[str, Any]:
    """What additions are, as one row of values; a block that is not named is the one of those held."""
    edits = additions.edits
    if edits and held.edits:
        unnamed = [name for name in ("head_block", "text_block") if getattr(edits, name) is None]
        edits = replace(edits, **{name: getattr(held.edits, name) for name in unnamed})
    return {"context": additions.context, **(asdict(edits) if edits else {})}
