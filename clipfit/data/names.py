"""Class files: which class name belongs to which folder, and lists of new classes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipfit.errors import DataError
from clipfit.prompts import key_of, name_of_folder, name_of_label


@dataclass(frozen=True)
class ClassNames:
    """Class names by label (folder name), in the order of the labels."""

    by_label: Mapping[str, str]

    @classmethod
    def of(
        cls, labels: Sequence[str], class_file: Path | None, own: Callable[[str], str] = name_of_folder
    ) -> ClassNames:
        """Names for the labels, from a class file or from the labels themselves (`own`: label → name).

        Raises:
            DataError: the file lacks a label (both sides are shown), or two labels get the same name.
        """
        if class_file is None:
            names = {label: own(label) for label in labels}
        else:
            given = _read_class_file(class_file)
            by_key = {key_of(label): label for label in labels}
            # the file's order is the order of the classes: CoOp's base and new halves follow it
            names = {by_key[key_of(line)]: name for line, name in given.items() if key_of(line) in by_key}
            missing = [label for label in labels if label not in names]
            if missing:
                unused = [line for line in given if key_of(line) not in by_key]
                raise DataError(
                    f"{class_file} does not match the folders: no name for {_some(missing)}; "
                    f"no folder for {_some(unused) if unused else 'none of its lines'}."
                )
        _refuse_twins(names)
        for label, name in names.items():
            if name.encode("utf-8", "ignore").decode() != name:
                raise DataError(f"class folder {label!r} has a name that is no UTF-8: rename it, or give --classes.")
        return cls(names)


def _read_class_file(file: Path) -> dict[str, str]:
    """`folder<TAB>name` a line, a name alone a line (its folder is the same name), or a JSON object."""
    text = _read_text(file)
    if file.suffix.lower() == ".json":
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise DataError(f"class file {file} is not JSON: {error}.") from error
        if not isinstance(record, dict) or not all(isinstance(v, str) for v in record.values()):
            raise DataError(f'class file {file} must be one JSON object {{"folder": "class name", …}}.')
        _require_names(record, file)
        return record
    names: dict[str, str] = {}
    for line in text.splitlines():
        if not line.strip():
            continue
        folder, tab, name = line.partition("\t")
        if folder.strip() in names:
            raise DataError(f"class file {file} names {folder.strip()!r} twice: one line a folder.")
        names[folder.strip()] = name.strip() if tab else name_of_folder(folder)
    if not names:
        raise DataError(f"class file {file} is empty: expected a line `folder<TAB>class name` for each class.")
    _require_names(names, file)
    return names


def _require_names(names: Mapping[str, str], file: Path) -> None:
    for folder, name in names.items():
        if not name.strip():
            raise DataError(f"class file {file} gives {folder!r} an empty name.")


def read_new_classes(file: Path) -> tuple[str, ...]:
    """One class name a line; underscores become spaces, for a folder's name is often what is listed.

    Of a class file (`folder<TAB>name` lines or a JSON object) the names count.

    Raises:
        DataError: the file is missing, empty, or names a class twice.
    """
    text = _read_text(file)
    if file.suffix.lower() == ".json" or "\t" in text:
        names = list(_read_class_file(file).values())
    else:
        names = [name_of_label(line) for line in text.splitlines() if line.strip()]
    if not names:
        raise DataError(f"{file} names no class: expected one class name a line.")
    _refuse_twins({name: name for name in names})
    return tuple(names)


def _read_text(file: Path) -> str:
    try:
        return file.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"class file {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"class file {file} is not UTF-8 text.") from error


def _refuse_twins(names: Mapping[str, str]) -> None:
    seen: dict[str, str] = {}
    for label, name in names.items():
        if key_of(name) in seen:
            raise DataError(
                f"{seen[key_of(name)]!r} and {label!r} are both called {name!r}: a class name must be unique."
            )
        seen[key_of(name)] = label


def _some(labels: Sequence[str], most: int = 5) -> str:
    shown = ", ".join(repr(label) for label in labels[:most])
    return shown + (f" and {len(labels) - most} more" if len(labels) > most else "")
