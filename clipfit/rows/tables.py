"""Rows of a spool as a file that other tools read: JSON lines, CSV or Parquet; written whole, then given its name."""

from __future__ import annotations

import csv
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clipfit.rows.spool import Spool
from clipfit.runs import files

COLUMNS = ("path", "label", "probability", "top", "abstained", "calibrated", "error")
ROWS_A_GROUP = 8192  # of Parquet: what is held in memory at once


def publish(spool: Spool, output: Path) -> None:
    """Give the rows their file. The rows of the spool are gone then. Raises OutputError."""
    if write := _WRITERS.get(output.suffix.lower()):
        files.atomically(output, lambda part: write(part, spool.rows()))
        spool.rows_file.unlink()
        return
    with files.writing(output):
        files.flush(spool.rows_file)
        os.replace(spool.rows_file, output)
        files.flush(output.parent)


def _write_csv(file: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """`top` is JSON in its cell; true and false as JSON has them; nothing for null."""
    with file.open("w", encoding="utf-8", newline="") as text:
        plain, quoted = (csv.writer(text, lineterminator="\n", quoting=q) for q in (csv.QUOTE_MINIMAL, csv.QUOTE_ALL))
        plain.writerow(COLUMNS)
        for row in rows:
            cells = [_cell(row[column]) for column in COLUMNS]
            # a carriage return ends a row to whoever reads it, but is no reason for quotes to some Pythons
            (quoted if any("\r" in cell for cell in cells) else plain).writerow(cells)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _write_parquet(file: Path, rows: Iterator[Mapping[str, Any]]) -> None:
    import pyarrow
    import pyarrow.parquet

    one = pyarrow.struct([("label", pyarrow.string()), ("probability", pyarrow.float64())])
    kinds = {
        "probability": pyarrow.float64(), "top": pyarrow.list_(one), "abstained": pyarrow.bool_(),
        "calibrated": pyarrow.bool_(),
    }  # fmt: skip
    schema = pyarrow.schema([(name, kinds.get(name, pyarrow.string())) for name in COLUMNS])
    with pyarrow.parquet.ParquetWriter(file, schema) as writer:
        while group := list(itertools.islice(rows, ROWS_A_GROUP)):
            writer.write_table(pyarrow.Table.from_pylist(group, schema))


_WRITERS: dict[str, Callable[[Path, Iterator[Mapping[str, Any]]], None]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
}
