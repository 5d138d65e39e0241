"""Every option of `adapt` under one flat name: its own, the recipe's, those of low-rank adapters and of all methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from clipfit.config import AdaptConfig, Recipe
from clipfit.config.lora import LoraSettings
from clipfit.config.options import Declared, declared_by, settings
from clipfit.errors import UsageError
from clipfit.methods import METHODS, find
from clipfit.text import did_you_mean

PARTS = {"adapt": AdaptConfig, "recipe": Recipe, "lora": LoraSettings}


@dataclass(frozen=True)
class AdaptOption:
    """An option of `adapt`, and where it belongs: "adapt", "recipe", "lora", or "method" with the methods' names."""

    declared: Declared
    part: str
    methods: tuple[str, ...] = ()

    @property
    def shown(self) -> Declared:
        """As it is declared, the help beginning with the methods that have it."""
        if not self.methods:
            return self.declared
        words = f"{', '.join(self.methods)}: {self.declared.option.help}"
        return replace(self.declared, option=replace(self.declared.option, help=words))


def adapt_options() -> dict[str, AdaptOption]:
    """All of them by key: a field's name, after `lora_` for an adapter's.

    Raises:
        TypeError: two methods declare one name differently, or a method one that `adapt` has.
    """
    found = {
        key: AdaptOption(declared, part)
        for part, owner in PARTS.items()
        for key, declared in declared_by(owner).items()
    }
    method = found["method"].declared
    named = replace(method, option=replace(method.option, choices=tuple(METHODS)))
    found["method"] = AdaptOption(named, "adapt")
    for name, row in METHODS.items():
        for key, declared in declared_by(row.options).items():
            other = found.get(key)
            if other and (other.part != "method" or other.declared != declared):
                raise TypeError(f"method {name} declares {key!r}, which {other.methods or other.part} has otherwise")
            found[key] = AdaptOption(declared, "method", (*(other.methods if other else ()), name))
    return found


def adapt_config(values: Mapping[str, Any]) -> AdaptConfig:
    """Options by their flat names (None: not given) → what `adapt` takes, all of it checked.

    Raises:
        UsageError: there is no such option, or not for this method; a value of another type or out of range.
    """
    known = adapt_options()
    sorted_in: dict[str, dict[str, Any]] = {"adapt": {}, "recipe": {}, "lora": {}, "method": {}}
    for key, value in values.items():
        if key not in known:
            raise UsageError(f"there is no option {key!r}{did_you_mean(key, known)}; docs/options.md lists all.")
        if value is not None:
            sorted_in[known[key].part][known[key].declared.field] = value
    if "shots" not in sorted_in["adapt"]:
        raise UsageError("shots must be given: a folder of class folders, a manifest, or a CoOp split.")
    method = find(sorted_in["adapt"].get("method", AdaptConfig.method))
    method.configure(sorted_in["method"])
    config = AdaptConfig(
        **sorted_in["adapt"],
        recipe=sorted_in["recipe"],
        method_options=sorted_in["method"],
        lora=sorted_in["lora"],
    )
    replace(method.lora.settings, **settings(LoraSettings, config.lora, "LoRA"))
    return config
