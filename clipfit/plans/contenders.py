"""What a plan compares: zero-shot CLIP, or an adaptation with its settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from clipfit import methods
from clipfit.adaptation import Adaptation
from clipfit.config import Recipe
from clipfit.config.plan import ZERO_SHOT
from clipfit.errors import UsageError
from clipfit.methods.declared import adapt_config, adapt_options
from clipfit.prompts import Templates

OWN = ("method", "tuning", "context", "balance")  # of adapt's own options those that a row may have


@dataclass(frozen=True)
class Contender:
    """A row of the tables. `values`: options of `adapt` by their flat keys; None: zero-shot CLIP."""

    name: str
    values: Mapping[str, Any] | None

    @classmethod
    def of(cls, name: str, table: Mapping[str, Any]) -> Contender:
        """Raises UsageError for a method, an option or a value that there is not."""
        method = table.get("method", name)
        if method == ZERO_SHOT:
            if set(table) - {"method"}:
                raise UsageError(f"[methods.{name}]: zero-shot CLIP has no settings.")
            return cls(name, None)
        found = cls(name, {**table, "method": method})
        try:
            require_settings(found.values or {})
            found.resolved({}, {}, (), [1], 0)
        except UsageError as error:
            raise UsageError(f"[methods.{name}]: {error}") from None
        return found

    def templates(self, model_defaults: Mapping[str, Any], of_set: Templates) -> Templates:
        """Those whose mean text a class is: the row's own, else the set's, else the model's."""
        if self.values is None:
            return of_set or (Recipe.resolved(model_defaults, "", {}).template,)
        return self.resolved(model_defaults, {}, of_set, [1], 0).templates

    def resolved(
        self,
        model_defaults: Mapping[str, Any],
        of_set: Mapping[str, Any],
        templates: Templates,
        counts: Sequence[int],
        seed: int,
    ) -> Adaptation:
        """The adaptation: its own settings before those of the set, the paper's and the model's (see Adaptation).

        Args:
            templates: the set's, for a row without a template of its own; training takes the first.
            counts: shots of each class.

        Raises:
            UsageError: a setting does not fit the method.
        """
        values = {**of_set, **(self.values or {})}
        listed = () if "template" in values else templates
        if len(listed) > 1 and values.get("context"):
            raise UsageError(f"{self.name}: context learns vectors in place of one template's words, not of several.")
        given = {"template": listed[0]} if listed else {}
        config = replace(adapt_config({"shots": Path(), **values, **given}), seed=seed)
        method = methods.find(config.method)
        options = method.configure(config.method_options)
        found = Adaptation.resolve(method, options, config, model_defaults, counts)
        return replace(found, listed=listed) if len(listed) > 1 else found


def require_settings(values: Mapping[str, Any]) -> None:
    """Raises UsageError for an option of `adapt` that is the same for all rows, or that there is not."""
    options = adapt_options()
    for key in values:
        if key in options and options[key].part == "adapt" and key not in OWN:
            raise UsageError(f"{key} is no setting of a method: the plan says it for all of them.")
