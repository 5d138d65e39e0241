"""`models`: which models there are, what each can do, and which are on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfit.config import TUNINGS
from clipfit.config.models import ModelsConfig
from clipfit.errors import UsageError
from clipfit.methods import METHODS
from clipfit.model import catalogue, hub
from clipfit.model.catalogue import Architecture
from clipfit.text import did_you_mean


@dataclass(frozen=True)
class Listed:
    """An architecture, and what of clipfit's works on it."""

    architecture: Architecture
    methods: tuple[str, ...]
    tunings: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """An entry of `models --json`."""
        a = self.architecture
        facts = a.facts
        tags = [{"tag": tag.name, "default": tag.default, "cached": tag.cached} for tag in a.tags]
        return {
            "name": a.name, "default": a.default, "tags": tags,
            "image_size": list(facts.image_size) if facts else None,
            "parameters": facts.parameters if facts else None,
            "methods": list(self.methods), "tunings": list(self.tunings),
            "missing": {"atha": facts.atha, "lora": facts.lora} if facts else None,
            "refused": a.refused,
        }  # fmt: skip


@dataclass(frozen=True)
class ModelList:
    """What was found. `whole`: every tag is to be shown, for a word was looked for. `cache`: the hub's, here."""

    models: tuple[Listed, ...]
    whole: bool
    cache: Path

    def as_json(self) -> dict[str, Any]:
        """The document of `models --json`."""
        return {"models": [model.as_json() for model in self.models], "cache": str(self.cache)}


def models(config: ModelsConfig | None = None) -> ModelList:
    """Models by name, tag, size and what works on them; nothing is fetched.

    Raises:
        UsageError: the word is in no name and no tag.
    """
    word = config.word if config else None
    found = catalogue.names(word)
    if not found:
        hint = did_you_mean(str(word), catalogue.names(""))
        raise UsageError(f"{word!r} is part of no model's name and no tag{hint}.")
    return ModelList(tuple(_listed(catalogue.architecture(name)) for name in found), word is not None, hub.cache())


def _listed(architecture: Architecture) -> Listed:
    """Methods that edit patch tokens need what `facts.atha` says to be missing, adapters what `facts.lora` does."""
    facts = architecture.facts
    if facts is None:
        return Listed(architecture, (), ())
    edit = {name for name, method in METHODS.items() if method.edits(method.configure({}))}
    methods = tuple(name for name in METHODS if facts.atha is None or name not in edit)
    tunings = tuple(tuning for tuning in TUNINGS if facts.lora is None or tuning != "lora")
    return Listed(architecture, methods, tunings)
