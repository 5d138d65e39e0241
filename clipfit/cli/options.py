"""Flags from declared options: a command's parameters are those of its config."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import MISSING
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer

from clipfit import ranks
from clipfit.config.options import Declared
from clipfit.errors import UsageError

Command = Callable[..., None]
METAVARS = {str: "TEXT", int: "INT", float: "FLOAT", Path: "PATH"}
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", show_default=False)]


def with_options(command: Command, options: Iterable[Declared], together: bool) -> Command:
    """The command with a parameter an option; what is given of them is its first argument, a mapping by key.

    The command's own keyword-only parameters come last, as they are.

    Args:
        together: whether several processes that torchrun started share its work; else the first one does it all.
    """
    declared = {option.key: option for option in options}
    others = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.kind is p.KEYWORD_ONLY]
    parameters = [*map(_parameter, declared.values()), *others]

    @functools.wraps(command)
    def called(**given: Any) -> None:
        if not (together or ranks.started().leads):
            return
        values = {key: _value(option, given.pop(key)) for key, option in declared.items()}
        command({key: value for key, value in values.items() if value is not None}, **given)

    del called.__wrapped__  # whose annotations typer would read
    called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    called.__annotations__ = {p.name: p.annotation for p in parameters}
    return called


def flag_text(declared: Declared) -> str:
    """How the flag is written on a command line."""
    if declared.default is True:
        return f"{declared.flag}/--no-{declared.flag.removeprefix('--')}"
    return declared.flag


def help_text(declared: Declared) -> str:
    """The help line, the default at its end."""
    default = declared.default_text
    return declared.option.help + (f"  [default: {default}]" if default else "")


def _parameter(declared: Declared) -> inspect.Parameter:
    """Nothing given is None throughout: the default stands in the config alone."""
    help, metavar, positional = help_text(declared), _metavar(declared), declared.option.positional
    required = positional and declared.default is MISSING
    if positional:
        info = typer.Argument(help=help, metavar=metavar, show_default=False)
    else:
        info = typer.Option(flag_text(declared), help=help, metavar=metavar, show_default=False)
    kind = _flag_kind(declared)
    return inspect.Parameter(
        declared.key,
        inspect.Parameter.KEYWORD_ONLY,
        default=inspect.Parameter.empty if required else None,
        annotation=Annotated[kind if required else kind | None, info],
    )


def _metavar(declared: Declared) -> str | None:
    """What stands for the value in the help, whatever typer's own form is; None for a switch."""
    kind = _flag_kind(declared)
    if declared.option.choices:
        return f"[{'|'.join(declared.option.choices)}]"
    if declared.option.positional:
        return declared.key.upper() + ("..." if get_origin(kind) is list else "")
    if kind is bool:
        return None
    if get_origin(kind) is tuple:
        return " ".join(METAVARS[part] for part in get_args(kind))
    return METAVARS[get_args(kind)[0] if get_origin(kind) is list else kind]


def _flag_kind(declared: Declared) -> Any:
    """What the command line reads: int | None → int, tuple[Path, ...] → list[Path], a text where one is parsed."""
    if declared.option.parse:
        return str
    if declared.option.unit:
        return float
    kind = declared.kind
    if get_args(kind) and get_origin(kind) is not tuple:  # int | None
        [kind] = [part for part in get_args(kind) if part is not NoneType]
    if get_origin(kind) is tuple and get_args(kind)[1:] == (...,):
        return list[get_args(kind)[0]]  # type: ignore[misc]
    return kind


def _value(declared: Declared, given: Any) -> Any:
    """What was given in the config's terms; None: nothing."""
    if given is None or given in ([], ()) or (given is False and declared.default is not True):
        return None
    if declared.option.unit:
        if not math.isfinite(given):
            raise UsageError(f"{declared.flag} must be a finite number; found {given!r}.")
        return int(given * declared.option.unit)
    return given
