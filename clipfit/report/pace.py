"""How far a stream of images is: a live bar on a terminal, now and then a line elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable

import rich.console
from rich.progress import BarColumn, Progress, TextColumn

from clipfit.events import CountReport

SECONDS_A_LINE = 10


class Pace:
    """Images a second, and the time that the rest takes at that rate, where their number is known."""

    def __init__(self, out: rich.console.Console, line: Callable[[str], None]):
        self._line = line
        self._bar = Progress(BarColumn(), TextColumn("{task.fields[text]}", markup=False), console=out, transient=True)
        self._task = self._bar.add_task("images", total=None, text="")
        self._live = out.is_terminal
        self._started: float | None = None
        self._first = 0  # done when the clock started
        self._said = 0.0

    def show(self, report: CountReport) -> None:
        """A batch is done. The first one starts the clock: what it took is mostly other work."""
        now = time.monotonic()
        if self._started is None:
            self._started = self._said = now
            self._first = report.done
        text = words(report, report.done - self._first, now - self._started)
        if self._live:
            self._bar.start()
            self._bar.update(self._task, total=report.total, completed=report.done, text=text)
        elif now - self._said >= SECONDS_A_LINE:
            self._said = now
            self._line(text)

    def stop(self) -> None:
        """Nothing more is shown."""
        if self._bar.live.is_started:
            self._bar.stop()


def words(report: CountReport, counted: int, seconds: float) -> str:
    """ "1200/20000 images, 2 unreadable, 310 images/s, 1:01 left": `counted` of them within these seconds."""
    parts = [f"{report.done}{'' if report.total is None else f'/{report.total}'} images"]
    if report.errors:
        parts.append(f"{report.errors} unreadable")
    if counted and seconds > 0:
        rate = counted / seconds
        parts.append(f"{rate:.0f} images/s" if rate >= 10 else f"{rate:.1f} images/s")
        if report.total is not None:
            minutes, rest = divmod(round(max(report.total - report.done, 0) / rate), 60)
            hours, minutes = divmod(minutes, 60)
            parts.append(f"{hours}:{minutes:02d}:{rest:02d} left" if hours else f"{minutes}:{rest:02d} left")
    return ", ".join(parts)
