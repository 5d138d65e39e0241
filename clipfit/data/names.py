"""What classes are called: by their folders or labels, by a class file, by a list of new classes.

Names of folders lose underscores and dashes; what is written in a file (labels, lists) loses underscores alone. Where
a class is listed, the list's spelling is its name, so that one command asks for it with one prompt.
"""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from clipfit.data.files import require_regular
from clipfit.data.objections import ObjectionError, Objections, object_to
from clipfit.errors import DataError, UsageError
from clipfit.prompts import key_of, name_of_folder, name_of_label

NameRule = Callable[[str], str]  # label → class name
LIST_SUFFIXES = (".csv", ".jsonl", ".json")  # of files that list images


def name_rule(place: Path) -> NameRule:
    """How labels become class names: dashes of folder names become spaces, those of labels in files stay."""
    return name_of_label if place.suffix.lower() in LIST_SUFFIXES and not place.is_dir() else name_of_folder


@dataclass(frozen=True)
class ClassNames:
    """Class names by label (folder name), in the order of the labels."""

    by_label: Mapping[str, str]

    @classmethod
    def of(
        cls,
        labels: Sequence[str],
        class_file: Path | None,
        rule: NameRule = name_of_folder,
        objections: Objections | None = None,
    ) -> ClassNames:
        """Names for the labels, from a class file or from the labels themselves.

        Args:
            objections: see `layout.read`.

        Raises:
            DataError: the file lacks a label (both sides are shown), a name that cannot be a prompt, or one name for
                two labels.
        """
        names = _named_by(class_file, labels) if class_file else {label: rule(label) for label in labels}
        _refuse_twins(names, objections)
        for label, name in names.items():
            if not any(char.isprintable() and not char.isspace() for char in name):
                raise DataError(f"class {label!r} has a name without any letter: rename it, or give --classes.")
            if name.encode("utf-8", "ignore").decode() != name:
                raise DataError(f"class folder {label!r} has a name that is no UTF-8: rename it, or give --classes.")
        return cls(names)


def read_new_classes(file: Path) -> tuple[str, ...]:
    """Names of classes, one a line; of a class file (`folder<TAB>name` lines or a JSON object) the names count.

    Raises:
        DataError: the file is missing, empty, or names a class twice.
    """
    names = _read_class_file(file)
    _refuse_twins(names)
    return tuple(names.values())


def given_classes(classes: Iterable[str]) -> tuple[str, ...]:
    """Names of classes as they are given in Python; what a class file may not hold is refused here too.

    Not so control characters: a folder's name may have them, and a model's own classes are given back to it.

    Raises:
        UsageError: there are none, it is one text and no list of names, a name is no text or empty, or stands there
            twice, under any spelling.
    """
    names = () if isinstance(classes, (str, bytes)) or not isinstance(classes, Iterable) else tuple(classes)
    if not names or not all(isinstance(name, str) for name in names):
        found = some(names) or repr(classes)
        raise UsageError(f"classes must be a list of names, as ['cat', 'dog']; found {found}.")
    [(most, count)] = Counter(names).most_common(1)
    if count > 1:
        raise UsageError(f"the list of classes names {most!r} twice: give each class once.")
    by_themselves = {name: name for name in names}
    try:
        _require_names(by_themselves, "the list of classes")
        _refuse_twins(by_themselves)
    except DataError as error:
        raise UsageError(str(error)) from None
    return names


def some(names: Sequence[str]) -> str:
    """Names, few enough for a sentence: "'a', 'b', 'c', 'd', 'e' and 494 more"."""
    return shortened([repr(name) for name in names])


def shortened(items: Sequence[str], most: int = 5) -> str:
    """The first items and how many more there are."""
    return ", ".join(items[:most]) + (f" and {len(items) - most} more" if len(items) > most else "")


def _named_by(class_file: Path, labels: Sequence[str]) -> dict[str, str]:
    """The file's names; its order is the order of the classes: CoOp's base and new halves follow it."""
    given = _read_class_file(class_file)
    by_key = {key_of(label): label for label in labels}
    exact = {label: label for label in labels}  # goes before another spelling of the same name
    matched = {line: label for line in given if (label := exact.get(line) or by_key.get(key_of(line)))}
    names = {label: given[line] for line, label in matched.items()}
    missing = [label for label in labels if label not in names]
    if missing:
        unused = [line for line in given if line not in matched]
        raise DataError(
            f"{class_file} does not match the folders: no name for {some(missing)}; "
            f"no folder for {some(unused) if unused else 'none of its lines'}."
        )
    return names


def _read_class_file(file: Path) -> dict[str, str]:
    """`folder<TAB>name` a line, a name alone a line (its folder is the same name), or a JSON object."""
    text = read_text(file, "class file")
    names = _from_json(file, text) if file.suffix.lower() == ".json" else _from_lines(file, text)
    if not names:
        raise DataError(f"{file} names no class: expected a line `class name` or `folder<TAB>class name` for each.")
    for label, name in names.items():
        if any(unicodedata.category(char) == "Cc" for char in name):
            raise DataError(f"class file {file} gives {label!r} a name with a control character: take it out.")
    _require_names(names, f"class file {file}")
    return names


def _require_names(names: Mapping[str, str], where: str) -> None:
    for label, name in names.items():
        if not name.strip():
            raise DataError(f"{where} gives {label!r} an empty name.")
        if name.encode("utf-8", "ignore").decode() != name:
            raise DataError(f"{where} gives {label!r} a name that is no UTF-8: write it anew.")


def _from_json(file: Path, text: str) -> dict[str, str]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"class file {file} is not JSON: {error}.") from error
    if not isinstance(record, dict) or not all(isinstance(name, str) for name in record.values()):
        raise DataError(f'class file {file} must be one JSON object {{"folder": "class name", …}}.')
    return record


def _from_lines(file: Path, text: str) -> dict[str, str]:
    names: dict[str, str] = {}
    for line in filter(str.strip, text.replace("\r\n", "\n").split("\n")):
        folder, tab, name = line.partition("\t")
        if folder.strip() in names:
            raise DataError(f"class file {file} names {folder.strip()!r} twice: one line a class.")
        names[folder.strip()] = name.strip() if tab else name_of_label(folder)
    return names


def read_text(file: Path, what: str) -> str:
    """The text of a file in UTF-8, with or without a mark at its start. Raises DataError, which calls it `what`."""
    require_regular(file, what)
    try:
        return file.read_text("utf-8-sig")
    except OSError as error:
        raise DataError(f"{what} {file} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{what} {file} is not UTF-8 text.") from error


def _refuse_twins(names: Mapping[str, str], objections: Objections | None = None) -> None:
    seen: dict[str, str] = {}
    for label, name in names.items():
        if key_of(name) in seen:
            twins = (seen[key_of(name)], label)
            message = f"{twins[0]!r} and {twins[1]!r} are both called {name!r}: a class name must be unique."
            object_to(ObjectionError("same-name", message, classes=twins), objections)
        seen[key_of(name)] = label
