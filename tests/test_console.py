"""What people see: nothing that a user names is taken for markup, nor obeyed by a terminal."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import rich.console
import torch

from clipfit.config.outputs import FormatOptions
from clipfit.config.plan import Plan, Published, SetRow
from clipfit.data.findings import Finding
from clipfit.events import CountReport, StepReport
from clipfit.formats.proof import Agreement, Proof, SeenOtherwise
from clipfit.plans.cells import Cell, Result
from clipfit.plans.figures import Tables
from clipfit.report.console import Console
from clipfit.report.pace import words
from clipfit.verbs.adapt import AdaptResult
from clipfit.verbs.benchmark import Benchmarked
from clipfit.verbs.check import Checked
from clipfit.verbs.explain import Explained
from clipfit.verbs.export import ExportResult
from clipfit.verbs.on_shots import OnShots
from clipfit.verbs.predict import Counts, PredictResult
from clipfit.verbs.report import Reported

HOSTILE = {
    "markup": ("[red]loud[/]", "[red]loud[/]"),
    "closing tag": ("[/nothing]", "[/nothing]"),
    "ESC": ("\x1b[2Jgone", "\\x1b[2Jgone"),
    "newline": ("two\nlines", "two\\nlines"),
    "carriage return": ("over\rwritten", "over\\rwritten"),
    "C1": ("\x9b31mred", "\\x9b31mred"),
    "bidi": ("gpj\u202efdp", "gpj\\u202efdp"),
    "surrogate": ("no\udcffutf", "no\\udcffutf"),
}


def adapted(name: str) -> AdaptResult:
    facts: dict[str, Any] = {
        "run": Path(name), "method": name, "model": name, "classes": 2, "shots": 4, "steps": 1, "losses": {name: 1.0},
        "seconds": 1.0, "on_shots": OnShots(0.5, 1.0), "alpha": 0.5, "skipped": (name,),
    }  # fmt: skip
    return AdaptResult(**facts)


def checked(name: str) -> Checked:
    finding = Finding("duplicate", "hint", (name,), (name,), name, name)
    return Checked(name, name, 4, {name: {"train": 4}}, (finding,), (name,))


def benchmarked(name: str) -> Benchmarked:
    called = name if name.isprintable() else "row"  # others are no names of a plan, but may be those of its file
    told = Plan("fsl", methods={"zero-shot": {}, called: {}}, sets={called: SetRow(Path(name))},
                published={called: Published(called, {called: (50.0,)})})  # fmt: skip
    labels = {"accuracy": torch.zeros(4, dtype=torch.int32)}
    results = {Cell(called, "zero-shot", None, None): Result(0, labels, {0.0: labels}),
               Cell(called, called, None, 0): Result(4, labels, {0.5: labels})}  # fmt: skip
    return Benchmarked(Path(name), Path(name), 2, 2, 1, Tables(told, results))


def exported(name: str) -> ExportResult:
    row = Agreement(4, 1e-6, 4, 0.75, 4, 4)
    return ExportResult(
        Path(name), name, FormatOptions(), Path(name), 0.5,
        Proof(name, "shots", row, row, (SeenOtherwise(name, name, name),), further={name: row}),
    )  # fmt: skip


SHOWN = {
    "say": lambda console, name: console.say(f"reading {name}"),
    "step": lambda console, name: console.step(StepReport(1, 2, 1, 4, 1e-3, {name: 0.5}, 0.5)),
    "adapted": lambda console, name: console.adapted(adapted(name)),
    "checked": lambda console, name: console.checked(checked(name)),
    "benchmarked": lambda console, name: console.benchmarked(benchmarked(name)),
    "explained": lambda console, name: console.explained(
        Explained(Path(name), 0.5, (Path(name),), ({"image": name, "class": name, "probability": 0.5},))
    ),
    "predicted": lambda console, name: console.predicted(PredictResult(Path(name), name, Counts(2, 1, 1), left_out=1)),
    "exported": lambda console, name: console.exported(exported(name)),
    "reported": lambda console, name: console.reported(
        Reported(Path(name), Path(name), name, 0.5, (Path(name),), (name,))
    ),
}


def shown(method: str, name: str, terminal: bool) -> str:
    """What a console of 200 columns writes."""
    stream = io.StringIO(newline="")
    out = rich.console.Console(file=stream, highlight=False, width=200, force_terminal=terminal, color_system=None)
    with Console(out) as console:
        SHOWN[method](console, name)
    return stream.getvalue()


@pytest.mark.parametrize("terminal", [False, True], ids=["file", "terminal"])
@pytest.mark.parametrize("method", SHOWN)
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_a_user_names_is_shown_and_not_obeyed(kind, method, terminal):
    name, expected = HOSTILE[kind]
    text = shown(method, name, terminal)
    plain = shown(method, "abcdefgh", terminal)
    assert expected in text
    for char in ("\x9b", "\u202e", "\udcff", "\x1b[2J", "over\r"):
        assert char not in text
    if method != "step" or not terminal:  # a live bar writes as often as it has time to
        assert text.count("\n") == plain.count("\n")
        assert text.count("\x1b") == plain.count("\x1b")
        assert text.count("\r") == plain.count("\r")


def test_every_method_that_shows_something_is_tried():
    public = {name for name, value in vars(Console).items() if callable(value) and not name.startswith("_")}
    assert public == {*SHOWN, "evaluated", "count"}  # a table with tests of its own, and a line of numbers alone


def test_the_pace_of_a_stream():
    assert words(CountReport(1200, 20_000, 2), 620, 2.0) == "1200/20000 images, 2 unreadable, 310 images/s, 1:01 left"
    assert words(CountReport(64, None, 0), 0, 0.0) == "64 images"
    assert words(CountReport(10, 20_000, 0), 2, 1.0).endswith("2.0 images/s, 2:46:35 left")


def test_accuracy_on_the_shots_is_no_evidence():
    text = shown("adapted", "name", False)
    line = next(line for line in text.splitlines() if line.startswith("on the shots"))
    assert "50.0% → 100.0%" in line
    assert "no evidence of generalisation" in line
