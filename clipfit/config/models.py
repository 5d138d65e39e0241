"""What `models` is given."""

from __future__ import annotations

from dataclasses import dataclass

from clipfit.config.options import Checked, argument


@dataclass(frozen=True)
class ModelsConfig(Checked):
    """Everything `models` is given. `word` None: every architecture with pre-trained weights."""

    word: str | None = argument("Part of a name or tag: every architecture that has it, each with all its tags.", None)
