"""How the library tells a caller what it is doing, without knowing any terminal."""

from __future__ import annotations

from typing import Protocol

from clipfit.training import StepReport


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
