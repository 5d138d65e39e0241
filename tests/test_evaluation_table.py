"""The table of `evaluate` on a terminal of 80 columns: whole lines, nothing that a name could steer."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
import rich.console

from clipfit.measure.figures import AlphaResult
from clipfit.measure.metrics import Accuracy, Difference
from clipfit.measure.reliability import Certainty, Covered
from clipfit.report.evaluation import show
from clipfit.verbs.evaluate import Evaluation

LONG = "a very long class name of the kind that museums give to things that they keep in glass cases"
NAMES = ("hat", "\x1b[2Jcleared", "red [/b]", LONG)


def accuracy(share: float, counts: tuple[int, ...]) -> Accuracy:
    per_class = {name: (round(share * n), n) for name, n in zip(NAMES, counts, strict=True)}
    return Accuracy(sum(right for right, _ in per_class.values()), sum(counts), per_class)


def evaluation(alphas: int = 11, counts: tuple[int, ...] = (1000, 1000, 1000, 1000), **other) -> Evaluation:
    """As wide as figures can become: shares from 0 to 100%, differences of two digits."""
    rows = []
    for k in range(alphas):
        share, moved = k / (alphas - 1), Difference(-0.181, -0.283, 0.122)
        against = {"base": moved, "new": moved, "union": Difference(-0.5, -0.583, -0.422)}
        figures = [accuracy(part, counts) for part in (1 - share, share, share)]
        rows.append(AlphaResult(share, *figures, 0.955, against))
    told = {"features": "fp32", "notes": ("a note of \x1b[31m red",), "skipped": ("a.png",), **other}
    return Evaluation(
        Path("runs/\x1b[1mbold"), "photos", "cite", True, told.pop("features"), NAMES, NAMES, tuple(rows), **told
    )


def shown(result: Evaluation, per_class: bool = False, width: int = 80) -> list[str]:
    out = io.StringIO()
    show(rich.console.Console(file=out, width=width, highlight=False), result, per_class)
    return out.getvalue().splitlines()


def between(lines: list[str], first: str, last: str) -> list[str]:
    start = next(i for i, line in enumerate(lines) if line.startswith(first))
    return lines[start : next(i for i, line in enumerate(lines) if i > start and line.startswith(last))]


def test_every_line_of_an_alpha_is_whole():
    lines = between(shown(evaluation()), "0 zero-shot", "note")
    assert max(map(len, lines)) <= 80
    assert len(lines) == 1 + 10 * 3
    assert lines[0].split() == ["0", "zero-shot", "100.0%", "[100–100]", "0.0%", "[0–0]", "0.0%", "[0–0]", "0.0%"]
    assert lines[-3].split()[0] == "1"
    assert lines[-2].split() == ["−", "zero-shot", "−18.1", "−18.1", "−50.0", "worse", "0.0"]
    assert lines[-1].split() == ["95%", "[−28.3", "+12.2]", "[−28.3", "+12.2]", "[−58.3", "−42.2]"]


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [
        (0.001, 0.2, ["+10.0", "better"]),
        (0.0, 0.2, ["+10.0"]),
        (-0.2, 0.0, ["+10.0"]),
        (-0.2, -0.001, ["+10.0", "worse"]),
    ],
)
def test_better_and_worse_are_said_only_where_the_interval_leaves_no_doubt(low, high, words):
    plain = evaluation(2)
    moved = replace(plain.rows[1], against_zero_shot={"base": Difference(0.1, low, high)})
    (line,) = (line for line in shown(replace(plain, rows=(plain.rows[0], moved))) if line.startswith("− zero"))
    assert line.split()[2:-1] == words


def test_accuracy_over_classes_stands_below_where_they_are_unbalanced():
    assert not any(line.startswith("macro") for line in shown(evaluation()))
    lines = [line for line in shown(evaluation(3, (1000, 100, 1000, 1000))) if line.startswith("macro")]
    assert [line.split() for line in lines] == [
        ["macro", "100.0%", "0.0%", "0.0%"],
        ["macro", "50.0%", "50.0%", "50.0%"],
        ["macro", "0.0%", "100.0%", "100.0%"],
    ]


def test_what_probabilities_are_worth_stands_below_within_80_columns():
    covered = tuple(Covered(share, 1000, 1.0, 0.5) for share in (1.0, 0.9, 0.75))
    certain = dict.fromkeys(("base", "new", "union"), Certainty(1.0, 2.5, True, 0.999, 0.1, covered))
    plain = evaluation()
    assert not any("90%  75%" in line for line in shown(plain))
    lines = shown(replace(plain, rows=tuple(replace(row, certainty=certain) for row in plain.rows)))
    assert max(len(line) for line in lines) <= 80
    table = between(lines, "α            90%", "*")
    assert len(table) == 2 + 11
    assert {tuple(line.split()[-12:]) for line in table[2:]} == {("100", "100", "100", "99.9*") * 3}
    assert "* at the temperature that adapt found" in lines


def test_names_are_read_and_never_obeyed():
    for width in (80, 200):
        text = "\n".join(shown(evaluation(), per_class=True, width=width))
        assert "\x1b" not in text
        for name in ("\\x1b[2Jcleared", "red [/b]", "runs/\\x1b[1mbold", "a note of \\x1b[31m red"):
            assert name in text


def test_a_long_class_name_goes_over_lines_and_leaves_the_figures_whole():
    lines = shown(evaluation(), per_class=True)
    table = between(lines, "class", "note")
    assert max(map(len, table)) <= 80
    rows = [line.split()[-12:] for line in table if line.startswith("a very long class  ")]
    falling = "100 90 80 70 60 50 40 30 20 10 0".split()
    assert rows == [[*falling, "1000"], [*reversed(falling), "1000"]]  # among the base classes, among the new ones
    assert f"{LONG} (new)" in " ".join(" ".join(line[:17].split()) for line in table)


@pytest.mark.parametrize("features", ["fp32", "bf16"])
def test_features_are_named_where_they_are_not_fp32(features):
    assert ("features in bf16" in shown(evaluation(features=features))[0]) == (features == "bf16")


def test_what_was_not_measured_has_no_column():
    row = AlphaResult(0.5, accuracy(0.5, (2, 2, 2, 2)), None, None, 1.0, {"base": Difference(0.0, -0.1, 0.1)})
    zero = AlphaResult(0.0, row.base, None, None, 1.0, {"base": Difference(0.0, 0.0, 0.0)})
    result = Evaluation(Path("run"), "photos", "cite", False, "fp32", NAMES, (), (zero, row))
    lines = shown(result)
    assert "on the shots themselves" in lines[0]
    assert lines[1].split() == ["base"]
    assert [line.split() for line in lines if line.startswith("0.5")] == [["0.5", "50.0%", "[22–78]", "100.0%"]]
    assert [line.split() for line in lines if line.startswith("− zero-shot")] == [["−", "zero-shot", "0.0"]]
