"""Lists of image paths (CSV, JSON lines, Parquet), read row by row: memory does not grow with their length."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from clipfit.data.files import require_regular
from clipfit.errors import DataError, UsageError, first_line

SUFFIXES = (".csv", ".jsonl", ".parquet")
Row = tuple[str, str | None]  # a path as it is written; or what stands in for it, and why there is none


def is_list(place: Path) -> bool:
    """Whether a place is read as a list of paths."""
    return place.suffix.lower() in SUFFIXES and not place.is_dir()


def require_parquet(what: str) -> None:
    """Raises UsageError where pyarrow is not installed."""
    if find_spec("pyarrow") is None:
        raise UsageError(f"{what} is Parquet, which needs pyarrow: install clipfit[parquet], or use .csv or .jsonl.")


def require_column(file: Path, column: str) -> None:
    """Raises DataError for a list that cannot be read or has no such column, UsageError where pyarrow is lacking."""
    require_regular(file, "list")
    suffix = file.suffix.lower()
    if suffix == ".parquet":
        require_parquet(str(file))
    columns = {".csv": _csv_columns, ".jsonl": _jsonl_keys, ".parquet": _parquet_columns}[suffix](file)
    if columns is not None and column not in columns:
        found = ", ".join(map(repr, columns[:10])) or "none"
        raise DataError(f"{file} has no column {column!r}; its columns are {found}: name one of them with --column.")


def paths(file: Path, column: str) -> Iterator[Row]:
    """The rows of a list; a row that has no path stands as "list.csv:12" with an error."""
    reader = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".parquet": _parquet_rows}[file.suffix.lower()]
    for number, value in reader(file, column):
        if isinstance(value, DataError):
            yield f"{file}:{number}", str(value)
        elif isinstance(value, str) and value.strip():
            yield value, None
        else:
            yield f"{file}:{number}", f"line {number} of {file} has no path in {column!r}."


Found = Iterator[tuple[int, Any]]


def _csv_columns(file: Path) -> list[str] | None:
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        try:
            return list(csv.DictReader(text).fieldnames or ())
        except csv.Error as error:
            raise DataError(f"{file} cannot be read as csv: {first_line(error)}.") from error


def _csv_rows(file: Path, column: str) -> Found:
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        rows = csv.DictReader(text)
        try:
            for row in rows:
                yield rows.line_num, row.get(column)
        except csv.Error as error:
            reason = f"{file} cannot be read further than line {rows.line_num}: {first_line(error)}."
            yield rows.line_num, DataError(reason)


def _jsonl_keys(file: Path) -> list[str] | None:
    """Of the first row, if it is one; later rows may have others."""
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as text:
        try:
            first = json.loads(next(filter(str.strip, text), "{}"))
        except (ValueError, RecursionError):
            return None
    return list(first) if isinstance(first, dict) and first else None


def _jsonl_rows(file: Path, column: str) -> Found:
    with file.open(encoding="utf-8-sig", errors="surrogateescape") as text:
        for number, line in enumerate(text, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, DataError(f"line {number} of {file} is not JSON: {first_line(error)}.")
                continue
            yield number, record.get(column) if isinstance(record, dict) else None


def _parquet_columns(file: Path) -> list[str] | None:
    import pyarrow
    import pyarrow.parquet

    try:
        return list(pyarrow.parquet.read_schema(file).names)
    except (OSError, pyarrow.ArrowException) as error:
        raise DataError(f"{file} cannot be read as Parquet: {first_line(error)}.") from error


def _parquet_rows(file: Path, column: str) -> Found:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=1024, columns=[column]):
                for value in batch.column(0).to_pylist():
                    number += 1
                    yield number, value
    except (OSError, pyarrow.ArrowException) as error:
        yield number + 1, DataError(f"{file} cannot be read further than row {number}: {first_line(error)}.")
