"""Which of the papers' statements hold on clipfit-tiny, from the finished cells of benchmarks/small.toml.

python benchmarks/digits.py
clipfit benchmark benchmarks/small.toml --output benchmarks/results/small      as often as there are cores
python benchmarks/statements.py                                                the tables of docs/results.md
"""

from __future__ import annotations

from pathlib import Path

from clipfit import BenchmarkConfig, benchmark
from clipfit.config.plan import MEAN
from clipfit.plans.figures import HM, Gain, Row, Tables
from clipfit.plans.pages import percent

HERE = Path(__file__).parent
CITE, FLYP, FINETUNE, ATHA, ZERO = "cite", "flyp", "finetune", "atha", ("zero-shot", 0.0)
# what is said (arXiv 2407.04003; the last two 2605.29776), the row that should be better, than which, in what
STATEMENTS: list[tuple[str, Row, Row, str]] = [
    ("CITE knows the trained classes better than zero-shot CLIP", (CITE, 0.5), ZERO, "base"),
    ("… and new ones", (CITE, 0.5), ZERO, "new"),
    ("… and both", (CITE, 0.5), ZERO, "HM"),
    ("The ensemble, α = 0.5, knows new classes better than α = 1", (CITE, 0.5), (CITE, 1.0), "new"),
    ("… and both", (CITE, 0.5), (CITE, 1.0), "HM"),
    ("α = 1 knows the trained classes better than the ensemble", (CITE, 1.0), (CITE, 0.5), "base"),
    ("CITE is better than plain fine-tuning", (CITE, 0.5), (FINETUNE, 0.5), "HM"),
    ("… and without the ensemble", (CITE, 1.0), (FINETUNE, 1.0), "HM"),
    ("CITE is better than FLYP", (CITE, 0.5), (FLYP, 0.5), "HM"),
    ("Each loss helps: DVA", (CITE, 0.5), ("cite without DVA", 0.5), "HM"),
    ("… SCL", (CITE, 0.5), ("cite without SCL", 0.5), "HM"),
    ("… VLD", (CITE, 0.5), ("cite without VLD", 0.5), "HM"),
    ("… VLD, without the ensemble", (CITE, 1.0), ("cite without VLD", 1.0), "HM"),
    ("Token edits are better than none, under full fine-tuning", (ATHA, 0.5), (FINETUNE, 0.5), "base"),
    ("… without the ensemble", (ATHA, 1.0), (FINETUNE, 1.0), "base"),
]
VERDICTS = {"better": "holds", "worse": "the opposite", "": "not shown"}


def statement(tables: Tables, said: str, row: Row, other: Row, figure: str) -> str:
    """A line of the table."""
    names = list(tables.plan.sets)
    of_sets = {name: tables.gain(row, other, [name], None, figure) for name in names}
    mean = tables.gain(row, other, names, None, figure)
    assert mean is not None
    better, worse = ([name for name, gain in of_sets.items() if gain and gain.verdict == verdict]
                     for verdict in ("better", "worse"))  # fmt: skip
    cells = [said, figure, shown(mean), VERDICTS[mean.verdict], ", ".join(better) or "–", ", ".join(worse) or "–"]
    return f"| {' | '.join(cells)} |"


def shown(gain: Gain) -> str:
    return f"{100 * gain.difference:+.1f} [{100 * gain.low:.1f}, {100 * gain.high:.1f}]"


def by_set(tables: Tables) -> None:
    """Base, new and HM of the mean, then the HM of each set: means over seeds, in percent."""
    names = [MEAN, *tables.plan.sets]
    found = {(f.set, f.method, f.alpha, f.figure): f for f in tables.figures()}
    print(f"| method | α | base | new | HM | {' | '.join(names[1:])} |")
    print("|---" * (5 + len(names[1:])) + "|")
    for row in tables.rows:
        cells = [percent(found[(MEAN, *row, figure)].found) for figure in ("base", "new", HM)]
        cells += [f"{100 * (found[(name, *row, HM)].found.mean or 0):.1f}" for name in names[1:]]
        print(f"| {row[0]} | {row[1]:g} | {' | '.join(cells)} |")


def main() -> None:
    tables = benchmark(BenchmarkConfig(HERE / "small.toml", output=HERE / "results/small", dry_run=True)).tables
    print(
        "| statement | in | points, mean of the sets | on the mean | better on | worse on |\n|---|---|---|---|---|---|"
    )
    for said in STATEMENTS:
        print(statement(tables, *said))
    print()
    by_set(tables)


if __name__ == "__main__":
    main()
