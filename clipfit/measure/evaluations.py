"""`evaluations/<name>/` in a run: the tables of one evaluation and the figures that follow from them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clipfit.measure.figures import Tables
from clipfit.measure.predictions import Predictions
from clipfit.runs import files, manifest, place
from clipfit.runs.run import Run

FOLDER = "evaluations"
DOCUMENT = "evaluation.json"
HELD_OUT, ON_SHOTS = "held-out", "shots"
OTHER_TEMPLATES = "-templates"  # behind the name


def name_of(data: Path | None, held_out: bool, own_templates: bool = True) -> str:
    """`held-out` for the run's own images (`shots` where those were measured on), else the data's, safe as a file's.

    With other templates than the run's it has a place beside that, and does not replace what is true of the run.
    """
    beside = "" if own_templates else OTHER_TEMPLATES
    if data is None:
        return (HELD_OUT if held_out else ON_SHOTS) + beside
    data = data.resolve()
    name = re.sub(r"[^\w.+-]+", "-", data.stem if data.is_file() else data.name).strip("-.")[:60]
    return (f"{name or 'data'}-data" if name in ("", HELD_OUT, ON_SHOTS) else name) + beside


def write(
    target: Path,
    document: Mapping[str, Any],
    tables: Mapping[float, Tables],
    retained: Sequence[Mapping[float, Predictions]] = (),
) -> None:
    """Write an evaluation, in place of one that is there; complete or not at all.

    Args:
        document: what `evaluate --json` says; each row is given `tables`, the files that its figures follow from.
        tables: by α. retained: by α too, those of each place that the document has under `retain`.

    Raises:
        OutputError: the place cannot be written. UsageError: another process writes it.
    """
    with place.building(target, overwrite=True) as folder:
        rows = []
        for row in document["alphas"]:
            stored = tables[row["alpha"]]
            names = {part: _file_of(row["alpha"], part) for part in stored}
            for part, table in stored.items():
                table.save(folder / names[part])
            rows.append({**row, "tables": names})
        others = [_retained(folder, k, entry, retained[k - 1]) for k, entry in enumerate(document.get("retain", ()), 1)]
        files.write_json(folder / DOCUMENT, {**document, "alphas": rows, "retain": others})


def _retained(
    folder: Path, number: int, entry: Mapping[str, Any], tables: Mapping[float, Predictions]
) -> dict[str, Any]:
    rows = []
    for row in entry["alphas"]:
        name = f"retain-{number}-{_file_of(row['alpha'], 'union')}"
        tables[row["alpha"]].save(folder / name)
        rows.append({**row, "tables": {"union": name}})
    return {**entry, "alphas": rows}


def _file_of(alpha: float, part: str) -> str:
    """The shortest digits that give α again: no two share a file."""
    return f"predictions-{repr(alpha).removesuffix('.0')}{'' if part == 'union' else f'-{part}'}.safetensors"


@dataclass(frozen=True)
class StoredEvaluation:
    """An evaluation as it lies on disk; tables are read when asked for."""

    folder: Path
    document: Mapping[str, Any]

    @property
    def alphas(self) -> list[float]:
        return [row["alpha"] for row in self.document["alphas"]]

    def tables(self, alpha: float) -> Tables:
        """The tables of one α.

        Raises:
            KeyError: this α was not measured. ModelError: a file is missing or not as it was written.
        """
        return self._tables(self.document["alphas"], alpha)

    def retained(self, number: int, alpha: float) -> Predictions:
        """The table of one α of a place under `retain`, the first of which is 0. Raises as `tables`."""
        return self._tables(self.document["retain"][number]["alphas"], alpha)["union"]

    def _tables(self, rows: Sequence[Mapping[str, Any]], alpha: float) -> Tables:
        names = {row["alpha"]: row["tables"] for row in rows}[alpha]
        return {part: Predictions.load(_proven(self.folder / name)) for part, name in names.items()}


def read(folder: Path) -> StoredEvaluation:
    """An evaluation that `write` wrote.

    Raises:
        ModelError: its document is missing or not as it was written.
    """
    return StoredEvaluation(folder, files.read_json(_proven(folder / DOCUMENT)))


def stored(run: Run) -> list[Path]:
    """The documents of a run's evaluations; not those that are being written, or whose writing was killed."""
    return sorted(run.evaluations.glob(f"[!.]*/{DOCUMENT}"))


def newest(run: Run) -> StoredEvaluation | None:
    """The evaluation of a run that says most: on held-out images before others, with its own templates before others,
    of those the newest. None where nothing was kept.

    Raises:
        ModelError: one is damaged.
    """
    found = [(read(file.parent), file.stat().st_mtime_ns) for file in stored(run)]
    own = list(run.templates)

    def rank(one: tuple[StoredEvaluation, int]) -> tuple[bool, bool, int]:
        document = one[0].document
        return bool(document["held_out"]), document.get("templates", [run.template]) == own, one[1]

    return max(found, key=rank)[0] if found else None


def _proven(path: Path) -> Path:
    manifest.verify(path.parent, [path.name])
    return path
