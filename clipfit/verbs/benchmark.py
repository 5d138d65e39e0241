"""`benchmark`: a plan's sets × methods × shots × seeds × α, a cell at a time, and the tables of what is finished."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clipfit import ranks
from clipfit.config.plan import BenchmarkConfig, Plan, read_plan
from clipfit.events import Progress, Silent
from clipfit.model import devices, loading
from clipfit.plans import pages
from clipfit.plans.cells import FOLDER, Cell, Result, alone, cells_of, claimed
from clipfit.plans.contenders import Contender
from clipfit.plans.figures import Tables
from clipfit.plans.running import Bench
from clipfit.plans.sets import LabelledSet
from clipfit.ranks import Ranks
from clipfit.runs import files

LINES, MARKDOWN, CSV = "results.jsonl", "table.md", "table.csv"


@dataclass(frozen=True)
class Benchmarked:
    """What `benchmark` found. cells: of the plan; finished: by this process and others; done: by this one
    and those that it was started with."""

    plan: Path
    output: Path
    cells: int
    finished: int
    done: int
    tables: Tables

    def as_json(self) -> dict[str, Any]:
        """The document of `benchmark --json`."""
        return {"plan": str(self.plan), "output": str(self.output), "cells": self.cells, "finished": self.finished,
                "done": self.done, "rows": [figure.as_json() for figure in self.tables.figures()]}  # fmt: skip


def benchmark(config: BenchmarkConfig, progress: Progress | None = None) -> Benchmarked:
    """Carry out a plan. A cell that is finished is never done again; several processes may share the work.

    Each takes the next cell that none has finished or is at, until none is left, and writes the tables of what is
    finished then. Those that torchrun started (within `ranks.joined()`) wait for one another; the first writes tables.

    Raises:
        ClipfitError: see errors; cells that are finished are kept.
    """
    here = ranks.here()
    progress = progress if progress and here.leads else Silent()
    plan = _plan(config)
    output = config.place
    contenders = {name: Contender.of(name, table) for name, table in plan.methods.items()}
    root = config.data or config.plan.parent
    sets = {name: LabelledSet.read(name, row.placed(root)) for name, row in plan.sets.items()}
    targets = {name: LabelledSet.read(name, row.placed(root)) for name, row in plan.targets.items()}
    for row in (*sets.values(), *targets.values()):
        files.require_outside(output / FOLDER, row.row.data)
    device = devices.resolve_device(config.device)
    progress.say(f"loading {plan.model} on {device}")
    clip = loading.load(plan.model, plan.pretrained, device)
    clip.precision = devices.resolve_precision(config.precision, device, clip.model)
    bench = Bench(plan, contenders, sets, targets, clip, config, progress)
    zero_shot = frozenset(name for name, found in contenders.items() if found.values is None)
    cells = {cell: cell.file(output, bench.identity(cell)) for cell in cells_of(plan, zero_shot)}
    _try_all(bench, [cell for cell, file in cells.items() if not file.exists()])
    with ranks.among(Ranks()):  # a cell is one process's
        done = 0 if config.dry_run else _carry_out(bench, cells, output, progress)
    done = int(here.complete(torch.tensor([done])))  # by now all have ended
    return _told(config, plan, output, cells, done)


def _plan(config: BenchmarkConfig) -> Plan:
    plan = read_plan(config.plan)
    if config.reference is not None:
        plan = replace(plan, reference=config.reference)
    plan = plan.only(config.sets, config.methods)
    if config.model is not None:
        plan = replace(plan, model=config.model, pretrained=config.pretrained)
    elif config.pretrained is not None:
        plan = replace(plan, pretrained=config.pretrained)
    return plan


def _carry_out(bench: Bench, cells: dict[Cell, Path], output: Path, progress: Progress) -> int:
    """Every cell that is not finished and that no other process is at; how many these were."""
    done = 0
    files.make_folder(output / FOLDER)
    for number, (cell, file) in enumerate(cells.items(), 1):
        if file.exists():
            continue
        with claimed(file) as mine:
            if mine:
                progress.say(f"cell {number} of {len(cells)}: {cell.text}")
                bench.run(cell).write(file, {"cell": cell.text})
                done += 1
    return done


def _try_all(bench: Bench, cells: Iterable[Cell]) -> None:
    """Before the first of them is done, whatever the plan names is there: the images of every cell are found."""
    for cell in cells:
        bench.work(cell)


def _told(config: BenchmarkConfig, plan: Plan, output: Path, cells: dict[Cell, Path], done: int) -> Benchmarked:
    results = {cell: Result.read(file) for cell, file in cells.items() if file.exists()}
    tables = Tables(plan, results)
    if results and not config.dry_run and ranks.here().leads:
        with alone(output):
            files.write_lines(output / LINES, tables.lines())
            files.write_text(output / MARKDOWN, pages.markdown(tables, config.plan.stem, len(cells), len(results)))
            files.write_text(output / CSV, pages.csv_of(tables))
    return Benchmarked(config.plan, output, len(cells), len(results), done, tables)
