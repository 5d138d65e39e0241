"""Progress, tables and summaries on stderr; stdout belongs to data."""

from __future__ import annotations

import shlex
import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, TextIO, cast

import rich.box
import rich.console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from clipfit import ranks
from clipfit.events import CountReport, StepReport
from clipfit.report import check, evaluation, forgetting
from clipfit.report.pace import Pace
from clipfit.stdio import Forgiving
from clipfit.text import printable

if TYPE_CHECKING:  # a command imports its own verb alone
    from clipfit.formats.proof import Agreement, Proof
    from clipfit.measure.forecast import Forecast
    from clipfit.verbs.adapt import AdaptResult
    from clipfit.verbs.benchmark import Benchmarked
    from clipfit.verbs.check import Checked
    from clipfit.verbs.evaluate import Evaluation
    from clipfit.verbs.explain import Explained
    from clipfit.verbs.export import ExportResult
    from clipfit.verbs.predict import PredictResult
    from clipfit.verbs.report import Reported


class Console:
    """Shows what the library reports: a live bar on a terminal, a line an epoch elsewhere.

    Of several processes that torchrun started, the first one's alone shows.
    """

    def __init__(self, out: rich.console.Console | None = None) -> None:
        self._out = out or _stderr()
        self._bar = Progress(
            TextColumn("epoch {task.fields[epoch]}"),
            BarColumn(),
            TextColumn("{task.fields[losses]}", markup=False),
            TextColumn("{task.fields[pace]:.0f} images/s"),
            TimeRemainingColumn(),
            console=self._out,
            transient=True,
        )
        self._task = self._bar.add_task("adapt", total=None, visible=False, epoch=0, losses="", pace=0.0)
        self._live = self._out.is_terminal
        self._pace = Pace(self._out, self._line)
        self._images = 0
        self._started = 0.0

    def __enter__(self) -> Console:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        self._pace.stop()
        if self._bar.live.is_started:
            self._bar.stop()

    def say(self, text: str) -> None:
        """One dim line."""
        self._stop()
        self._line(text, style="dim")

    def _line(self, text: str, style: str | None = None) -> None:
        """A line as long as it is; nothing in it is taken for markup, nor obeyed by the terminal."""
        self._out.print(printable(text), style=style, markup=False, soft_wrap=True)

    def step(self, report: StepReport) -> None:
        """Advance the bar, or print a line at the end of an epoch where there is no terminal."""
        if report.step == 1 or not self._started:  # the first, or the first after a saved state
            self._started = time.monotonic()
            self._images = 0
            if self._live:
                self._bar.start()
        else:
            self._images += report.images
        pace = self._images / max(time.monotonic() - self._started, 1e-9)
        losses = "  ".join(f"{name} {value:.3f}" for name, value in report.losses.items())
        self._bar.update(
            self._task, total=report.steps, completed=report.step, visible=True,
            epoch=f"{report.epoch}", losses=printable(losses), pace=pace,
        )  # fmt: skip
        if not self._live and report.step * 10 // report.steps > (report.step - 1) * 10 // report.steps:
            measured = f"  {pace:.0f} images/s" if self._images else ""  # the first step only starts the clock
            self._line(f"step {report.step}/{report.steps}  epoch {report.epoch}  {losses}{measured}")

    def count(self, report: CountReport) -> None:
        """How far a stream of images is."""
        self._pace.show(report)

    def adapted(self, result: AdaptResult) -> None:
        """The summary of `adapt`."""
        self._stop()
        on_shots = result.on_shots
        rows = {
            "method": f"{result.method} on {result.model}",
            "shots": f"{result.shots} of {result.classes} classes" + _skipped(result.skipped),
            "on the shots": f"zero-shot {on_shots.zero_shot_accuracy:.1%} → {on_shots.adapted_accuracy:.1%} at "
            f"α = {result.alpha:g} (no evidence of generalisation)",
            "files": f"{result.run}/model.safetensors (α = {result.alpha:g}), finetuned.safetensors (α = 1)",
            "time": f"{result.seconds:.0f} s",
            "next": f"clipfit evaluate {shlex.quote(str(result.run))}",
        }
        for name, text in rows.items():
            self._line(f"{name:<14}{text}")
        for k, text in enumerate(_expected(result.forecast) if result.forecast else []):
            self._line(f"{'' if k else 'expect':<14}{text}")

    def evaluated(self, result: Evaluation, per_class: bool) -> None:
        """The table of `evaluate`: a row an α."""
        evaluation.show(self._out, result, per_class)
        forgetting.show(self._out, result)

    def checked(self, result: Checked) -> None:
        """The report of `check`."""
        self._stop()
        check.show(self._out, result)

    def benchmarked(self, result: Benchmarked) -> None:
        """The table of `benchmark`, and how far the plan is."""
        from clipfit.report import benchmark  # takes a while to import

        self._stop()
        benchmark.show(self._out, result)

    def explained(self, result: Explained) -> None:
        """A line a picture."""
        for path, found in zip(result.pictures, result.predictions, strict=True):
            self._line(f"{path}: {found['class']} {found['probability']:.0%}")

    def predicted(self, result: PredictResult) -> None:
        """How many rows there are, and what was not named or not looked at."""
        self._stop()
        counts = result.counts
        if counts.rows is None:
            return
        parts = [f"{counts.rows} rows" + (f" in {result.output}" if result.output else "")]
        parts += [f"{counts.errors} with errors"] if counts.errors else []
        parts += [f"{counts.abstained} without a label"] if counts.abstained else []
        parts += [f"{result.left_out} files that are no images left out"] if result.left_out else []
        self._line("; ".join(parts))

    def reported(self, result: Reported) -> None:
        """Where the page is, what it is of, and what is not on it."""
        measured = (
            f"the evaluation {result.evaluation} at α = {result.alpha:g}" if result.evaluation else "no evaluation"
        )
        self._line(f"{result.output}: {result.run}, {measured}")
        for path in result.pictures:
            self._line(f"{path}")
        for note in result.notes:
            self._line(f"note: {note}")
        if result.evaluation is None:
            self._line(f"nothing was measured yet: clipfit evaluate {shlex.quote(str(result.run))}")

    def exported(self, result: ExportResult) -> None:
        """Where the export is, and the rows of its proof."""
        proof = result.proof
        where = f"{result.output}: {result.format}, α = {result.alpha:g}"
        self._line(f"{where}; read back by {proof.consumer} in a process of its own")
        for text in _proved(proof):
            self._line(text)


def _stderr() -> rich.console.Console:
    """Whoever stops reading it, or fills its disk, does not end hours of work."""
    stream = cast(TextIO, Forgiving(sys.stderr)) if sys.stderr else None
    return rich.console.Console(file=stream, stderr=True, highlight=False, quiet=not ranks.started().leads)


def _expected(forecast: Forecast) -> list[str]:
    """What is foretold, a line a part."""
    parts = [("new images of the {} classes", forecast.base), ("{} classes not trained on", forecast.new)]
    lines = [
        f"{found.accuracy:.0%} [{100 * found.low:.0f}–{100 * found.high:.0f}] on {what.format(found.classes)} "
        f"(zero-shot {found.zero_shot:.0%})"
        for what, found in parts
        if found
    ]
    return [*lines, "in brackets 90% intervals; all from the shots"] if lines else []


def _proved(proof: Proof) -> list[str]:
    """A line a row of the proof, then a note on each kind of file that the consumer sees otherwise."""
    shown = "shots" if proof.pictures == "shots" else "random pictures, for no shot is where it was"
    texts = [f"  same pixels   {_agreeing(proof.identical_pixels, shown)}"]
    if proof.files:
        texts.append(f"  same files    {_agreeing(proof.files, f'shots as {proof.consumer} opens them')}")
    texts += [f"  {what}: {_agreeing(row, shown)}" for what, row in proof.further.items()]
    texts += [f"  {what}: pixels of noise within {far:.1e}" for what, far in proof.further_pixels.items()]
    texts += [f"note: {text.path!r} {text.reason}: {text.advice}" for text in proof.read_otherwise]
    alike: dict[tuple[str, str], list[str]] = {}
    for file in proof.seen_otherwise:
        alike.setdefault((file.reason, file.advice), []).append(file.path)
    for (reason, advice), paths in alike.items():
        which = f"{paths[0]} and {len(paths) - 1} more: each" if len(paths) > 1 else paths[0]
        texts.append(f"note: {which} {reason}, so that {proof.consumer} sees another picture: {advice}")
    return texts


def _agreeing(row: Agreement, what: str) -> str:
    found = f"{row.images} {what}: logits within {row.largest_difference:.1e}, {row.same_labels} best labels the same"
    return found if row.accuracy is None else f"{found}, {row.accuracy:.1%} right"


def _skipped(sources: tuple[str, ...]) -> str:
    if not sources:
        return ""
    return f"; {len(sources)} unreadable skipped ({', '.join(sources[:3])}{' …' if len(sources) > 3 else ''})"
