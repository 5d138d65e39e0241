"""What `check` found: classes with their images, then errors and hints by kind, within 80 columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

import rich.console
from rich.text import Text

from clipfit.data.findings import Finding
from clipfit.report.evaluation import empty_table, line
from clipfit.text import printable

if TYPE_CHECKING:
    from clipfit.verbs.check import Checked

MOST_CLASSES = 40  # with a row each; of more, a sum
MOST = 5  # findings of a kind that are shown; all are in the document


def show(out: rich.console.Console, result: Checked) -> None:
    """The report."""
    line(out, f"{result.shots}: {result.images} images of {len(result.counts)} classes, as {result.model} sees them")
    _show_counts(out, result)
    for note in result.notes:
        line(out, f"note: {note}")
    for heading, findings in (("errors", result.errors), ("hints", result.hints)):
        kinds: dict[str, list[Finding]] = {}
        for finding in findings:
            kinds.setdefault(finding.kind, []).append(finding)
        if kinds:
            line(out, heading)
        for kind, them in kinds.items():
            _show_kind(out, kind, them)
    line(out, f"{_several(len(result.errors), 'error')}, {_several(len(result.hints), 'hint')}")


def _show_counts(out: rich.console.Console, result: Checked) -> None:
    parts = list(next(iter(result.counts.values()), {}))
    if len(result.counts) > MOST_CLASSES:
        for part in parts:
            found = [counts[part] for counts in result.counts.values() if counts[part]] or [0]
            line(out, f"{part}: {sum(found)} images of {len(found)} classes, {min(found)} to {max(found)} of each")
        return
    table = empty_table()
    table.add_column("class", overflow="fold", min_width=16)
    for part in parts:
        table.add_column(part, justify="right", no_wrap=True)
    for name, counts in result.counts.items():
        table.add_row(Text(printable(name)), *(str(counts[part]) for part in parts))
    out.print(table)


def _show_kind(out: rich.console.Console, kind: str, findings: list[Finding]) -> None:
    """The kind and what to do, then a paragraph a finding."""
    _paragraph(out, f"{kind} ({len(findings)}): {findings[0].advice}", indent=2)
    for finding in findings[:MOST]:
        _paragraph(out, finding.message, indent=4)
    if len(findings) > MOST:
        _paragraph(out, f"and {len(findings) - MOST} more: --json has all", indent=4)


def _paragraph(out: rich.console.Console, text: str, indent: int) -> None:
    for piece in Text(printable(text)).wrap(out, out.width - indent, overflow="fold"):
        line(out, " " * indent + piece.plain.rstrip())


def _several(count: int, what: str) -> str:
    return f"1 {what}" if count == 1 else f"{count or 'no'} {what}s"
