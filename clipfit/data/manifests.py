"""Labelled images listed in a file: a manifest (.csv, .jsonl) or a CoOp split (.json)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clipfit.data.files import require_regular
from clipfit.data.folders import PART_NAMES, PARTS, Found, Row
from clipfit.errors import DataError

COLUMNS = ("path", "label")


def read_file(file: Path, root: Path) -> Found:
    """Rows by part.

    Args:
        root: what relative paths start from.

    Raises:
        DataError: it is no such file, or one of its rows is not as it must be; the line is named.
    """
    suffix = file.suffix.lower()
    readers = {".csv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_coop}
    if suffix not in readers:
        raise DataError(f"{file} is no folder and no .csv, .jsonl or CoOp .json file.")
    require_regular(file, "file")
    try:
        text = file.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{file} cannot be read as {suffix[1:]}: it is not UTF-8 text.") from error
    return readers[suffix](file, text, root)


def _read_csv(file: Path, text: str, root: Path) -> Found:
    try:
        rows = csv.DictReader(io.StringIO(text, newline=""))
        columns = rows.fieldnames or ()
        if not columns:
            raise DataError(f"{file} is empty: expected a first line `path,label`, then a line for each image.")
        lacking = [name for name in COLUMNS if name not in columns]
        if twice := next((name for name in (*COLUMNS, "split") if list(columns).count(name) > 1), None):
            raise DataError(f"{file} has two columns `{twice}` in its first line: take one of them out.")
        if lacking:
            found = ", ".join(map(str, columns[:10]))
            raise DataError(f"{file} needs the columns `path` and `label` in its first line; it has {found}.")
        records = [(rows.line_num, record) for record in rows]
    except csv.Error as error:
        raise DataError(f"line {rows.line_num} of {file} cannot be read as csv: {error}.") from error
    return _read_records(file, records, root)


def _read_jsonl(file: Path, text: str, root: Path) -> Found:
    def records() -> Iterator[tuple[int, Mapping[str, Any]]]:
        for number, line in enumerate(text.split("\n"), 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                detail = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else error
                raise DataError(f"line {number} of {file} is not JSON: {detail}.") from error
            if not isinstance(record, dict):
                raise DataError(f'line {number} of {file} is no object {{"path": …, "label": …}}.')
            yield number, record

    return _read_records(file, list(records()), root)


def _read_records(file: Path, records: Sequence[tuple[int, Mapping[str, Any]]], root: Path) -> Found:
    """path, label and perhaps split; where no split is given a row is a training image. Records with line numbers."""
    parts: dict[str, list[Row]] = {}
    for line, record in records:
        path, label, split = (_text(record.get(key)) for key in (*COLUMNS, "split"))
        lacking = next((column for column, value in zip(COLUMNS, (path, label), strict=True) if not value.strip()), "")
        if lacking:
            what = "a blank" if record.get(lacking) not in (None, "") else "no"
            raise DataError(f"line {line} of {file} has {what} `{lacking}`: every image needs `path` and `label`.")
        part = PART_NAMES.get(split.strip().lower() or "train")
        if part is None or (not split and record.get("split") not in (None, "")):
            raise DataError(f"line {line} of {file} has split {record['split']!r}: expected train, val or test.")
        parts.setdefault(part, []).append(Row(root / path, path, label))
    if not parts:
        raise DataError(f"{file} lists no images: expected `path` and `label` of each.")
    return Found(parts)


def _text(value: Any) -> str:
    """A field as text; empty for what is no text and no number."""
    return str(value) if isinstance(value, str | int | float) else ""


def _read_coop(file: Path, text: str, root: Path) -> Found:
    """{"train": [[path, number, class name], …], "val": …, "test": …}: the format of the eleven benchmark sets.

    The order of the classes is that of their numbers, not of first appearance: base and new halves of the papers
    follow it.
    """
    try:
        split = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file} cannot be read as json: {error}.") from error
    lists = split if isinstance(split, dict) else {}
    if not all(isinstance(lists.get(part), list) for part in ("train", "test")):
        raise DataError(f"{file} is no CoOp split: expected `train` and `test`, lists of [path, 0, name].")
    numbers: dict[str, int] = {}  # by class name
    parts: dict[str, list[Row]] = {}
    for part in PARTS:
        if part not in lists:
            continue
        parts[part] = []
        for entry in lists[part]:
            path, number, name = _coop_entry(file, part, entry)
            if numbers.setdefault(name, number) != number:
                raise DataError(f"{file} numbers the class {name!r} both {numbers[name]} and {number}.")
            parts[part].append(Row(root / path, path, name))
    names: dict[int, str] = {}
    for name, number in numbers.items():
        if names.setdefault(number, name) != name:
            raise DataError(f"{file} calls class {number} both {names[number]!r} and {name!r}.")
    return Found(parts, order=[names[number] for number in sorted(names)])


def _coop_entry(file: Path, part: str, entry: Any) -> tuple[str, int, str]:
    match entry:
        case [str(path), int(number), str(name)] if name.strip() and not isinstance(number, bool):
            return path, number, name
    raise DataError(f"{file} has {str(entry)[:100]} in `{part}`: expected [path, class number, class name].")
