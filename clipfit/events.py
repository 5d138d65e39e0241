"""How the library tells a caller what it is doing, without knowing any terminal."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class StepReport:
    """One optimiser step: losses by name (unweighted), their weighted sum, and where in the run it was.

    micro_batch: images at once in the towers from there on, where memory ran out and they are fewer than was asked for.
    """

    step: int  # from 1
    steps: int
    epoch: int  # from 1
    images: int
    learning_rate: float
    losses: dict[str, float]
    total: float
    micro_batch: int | None = None

    def as_json(self) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        return {key: value for key, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class CountReport:
    """How far a stream of images is. total: None where it is not known. errors: those that could not be read.

    before: those of an earlier process, which are done and were not counted in this one's time.
    """

    done: int
    total: int | None
    errors: int
    before: int = 0


class Progress(Protocol):
    """What the caller may show."""

    def say(self, text: str) -> None:
        """One short line on what happens now, or what one should know."""

    def step(self, report: StepReport) -> None:
        """An optimiser step is done."""


class Counter(Progress, Protocol):
    """What the caller may show of a stream."""

    def count(self, report: CountReport) -> None:
        """A batch of images is done."""


class Silent:
    """Shows nothing."""

    def say(self, text: str) -> None:
        pass

    def step(self, report: StepReport) -> None:
        pass

    def count(self, report: CountReport) -> None:
        pass
