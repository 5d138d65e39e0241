"""How the library tells a caller what it is doing, without knowing any terminal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class StepReport:
    """One optimiser step: losses by name (unweighted), their weighted sum, and where in the run it was."""

    step: int  # from 1
    steps: int
    epoch: int  # from 1
    images: int
    learning_rate: float
    losses: dict[str, float]
    total: float


class Progress(Protocol):
    """What the caller may show."""

    def say(self, text: str) -> None:
        """One short line on what happens now, or what one should know."""

    def step(self, report: StepReport) -> None:
        """An optimiser step is done."""


class Silent:
    """Shows nothing."""

    def say(self, text: str) -> None:
        pass

    def step(self, report: StepReport) -> None:
        pass
