"""Class names and the sentences made of them."""

from __future__ import annotations

from collections.abc import Iterable


def name_of_folder(folder: str) -> str:
    """A folder name as a class name: underscores and dashes become spaces ("golden_retriever" → "golden retriever")."""
    return " ".join(folder.replace("_", " ").replace("-", " ").split())


def name_of_label(label: str) -> str:
    """A class name as split files and lists write it: underscores become spaces, dashes stay ("737-200")."""
    return " ".join(label.replace("_", " ").split())


def key_of(name: str) -> str:
    """What two spellings of one class name share: case, underscores, dashes and runs of spaces do not matter."""
    return name_of_folder(name).casefold()


def excluding(names: Iterable[str], known: Iterable[str]) -> list[str]:
    """The names that are none of the known ones, under any spelling; in order."""
    keys = {key_of(name) for name in known}
    return [name for name in names if key_of(name) not in keys]


Templates = tuple[str, ...]  # sentences in which {} stands for a class name; a class is the mean of their texts


def prompts(names: Iterable[str], template: str) -> list[str]:
    """One sentence a class, in order."""
    return [template.replace("{}", name) for name in names]
