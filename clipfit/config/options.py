"""An option is declared once, at its dataclass field: type, default, range and help.

The flag and its help line on the command line, the key in a plan file, the entry in config.json, the sentence that
refuses a wrong value and the table in docs/options.md are all read from there.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from clipfit.errors import UsageError
from clipfit.text import did_you_mean


@dataclass(frozen=True)
class Option:
    """What stands at an option's field beside its type and its default.

    default_is: where the default is found later, from what. key: the name in a plan file, where it is not the field's.
    flag: where it is not the key's. parse: what a text stands for ("0:1:0.1"), or a ValueError that
    says what is expected. unit: what the flag counts in.
    """

    help: str
    default_is: str | None = None
    low: float | None = None
    above: float | None = None
    high: float | None = None
    below: float | None = None
    choices: tuple[str, ...] = ()
    ordered: bool = False  # several values, none less than the one before
    key: str | None = None
    flag: str | None = None
    parse: Callable[[str], Any] | None = None
    unit: int | None = None
    positional: bool = False

    @property
    def range(self) -> str:
        """ "between 0 and 1", "at least 1", "above 0 and below 1"; empty where every value will do."""
        if self.low is not None and self.high is not None:
            return f"between {self.low} and {self.high}"
        bounds = {"at least": self.low, "above": self.above, "at most": self.high, "below": self.below}
        return " and ".join(f"{word} {bound}" for word, bound in bounds.items() if bound is not None)

    def allows(self, number: float) -> bool:
        """Whether a number lies within the range."""
        return (
            math.isfinite(number)
            and (self.low is None or number >= self.low)
            and (self.above is None or number > self.above)
            and (self.high is None or number <= self.high)
            and (self.below is None or number < self.below)
        )


def option(default: Any, help: str, **rules: Any) -> Any:
    """A dataclass field that is an option; `rules` are Option's."""
    return field(default=default, metadata={"option": Option(help, **rules)})


def argument(help: str, default: Any = MISSING, **rules: Any) -> Any:
    """An option that the command line takes by its place; without a default it must be given."""
    return option(default, help, positional=True, **rules)


@dataclass(frozen=True)
class Declared:
    """An option as it stands at its field."""

    field: str
    kind: Any  # its annotation
    default: Any  # MISSING: it must be given
    option: Option

    @property
    def key(self) -> str:
        """Its name in a plan file, and in config.json."""
        return self.option.key or self.field

    @property
    def flag(self) -> str:
        """Its name on the command line."""
        return self.option.flag or f"--{self.key.replace('_', '-')}"

    @property
    def default_text(self) -> str:
        """What stands where nothing is given; empty where that is nothing."""
        if self.option.default_is:
            return self.option.default_is
        if self.default is MISSING or self.default is None or self.default is False or self.default == ():
            return ""
        if isinstance(self.default, tuple):
            return ("," if self.option.parse else " ").join(map(str, self.default))
        return f"{self.default / self.option.unit:g}" if self.option.unit else str(self.default)

    def checked(self, value: object) -> Any:
        """The value as one of its type: a list as a tuple, a text as a path, a whole number as a float.

        Raises:
            UsageError: it is of another type, or out of range.
        """
        option = self.option
        if option.parse and isinstance(value, str):
            try:
                value = option.parse(value)
            except ValueError as expected:
                raise self._refused(f"be {expected}", value) from None
        try:
            value = _as_kind(self.kind, value)
        except (TypeError, ValueError, OverflowError):
            raise self._refused(f"be of type {type_text(self.kind)}", value) from None
        several = value if isinstance(value, tuple) else (value,)
        for one in several:
            if option.choices and one is not None and one not in option.choices:
                raise self._refused(f"be one of {', '.join(option.choices)}", one)
            if isinstance(one, (int, float)) and not option.allows(one):
                verb = "lie" if option.range.startswith("between") else "be"
                raise self._refused(f"{verb} {option.range or 'a finite number'}", one)
        if option.ordered and list(several) != sorted(several):
            raise self._refused("be in ascending order", value)
        return value

    def _refused(self, expectation: str, found: object) -> UsageError:
        named = self.key if not self.option.flag else f"{self.key} ({self.flag})"
        return UsageError(f"{named} must {expectation}; found {found!r}.")


class Checked:
    """Base of a frozen dataclass of options: each is checked once, when the object is made."""

    def __post_init__(self) -> None:
        owner: type = type(self)
        for declared in declared_by(owner).values():
            object.__setattr__(self, declared.field, declared.checked(getattr(self, declared.field)))


@functools.cache
def declared_by(owner: type) -> Mapping[str, Declared]:
    """The options of a dataclass by their keys, in its order."""
    kinds = get_type_hints(owner)
    found = [
        Declared(f.name, kinds[f.name], f.default, f.metadata["option"])
        for f in fields(owner)
        if "option" in f.metadata
    ]
    return {declared.key: declared for declared in found}


def require(holds: bool, expectation: str, found: object) -> None:
    """The one form of refusal, for what no declaration can say. Raises UsageError."""
    if not holds:
        raise UsageError(f"{expectation}; found {found!r}.")


def settings(owner: type, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What is given of a dataclass's fields (None: not given), each checked.

    Raises:
        UsageError: there is no such field, the value is of another type, or out of range.
    """
    known = {declared.field: declared for declared in declared_by(owner).values()}
    given = {key: value for key, value in values.items() if value is not None}
    for key in given:
        if key not in known:
            has = ", ".join(sorted(known)) or "none"
            raise UsageError(f"{name} has no option {key!r}{did_you_mean(str(key), known)}; its options: {has}.")
    return {key: known[key].checked(value) for key, value in given.items()}


def type_text(kind: Any) -> str:
    """An annotation as one writes it: "int | None", "tuple[float, float]", "Path"."""
    return (str(kind) if get_args(kind) else kind.__name__).replace("pathlib.", "")


def _as_kind(kind: Any, value: object) -> Any:
    """The value as one of an annotated type, a scalar of numpy's or torch's as Python's; no bool is a number.

    Raises:
        TypeError, ValueError or OverflowError: it is none.
    """
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        if not isinstance(value, (tuple, list)):
            raise TypeError
        kinds = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return tuple(_as_kind(k, v) for k, v in zip(kinds, value, strict=True))
    if parts:  # int | None
        [inner] = [part for part in parts if part is not NoneType]
        return None if value is None else _as_kind(inner, value)
    if getattr(value, "ndim", None) == 0:  # numpy's and torch's
        value = value.item()  # type: ignore[attr-defined]
    accepted = {float: (float, int), Path: (Path, str)}.get(kind, (kind,))
    if not isinstance(value, accepted) or (isinstance(value, bool) and kind is not bool):
        raise TypeError
    return kind(value) if kind in (float, Path) else value
