"""What every command shares: errors become one sentence and an exit code."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import traceback
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec

import typer

from clipfit.errors import ClipfitError, first_line

P = ParamSpec("P")


def reporting(command: Callable[P, None]) -> Callable[P, None]:
    """Run a command; a ClipfitError ends with its exit code, Ctrl-C with 130, anything else with 1."""

    @functools.wraps(command)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except ClipfitError as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as interrupt:
            typer.echo(f"interrupted: {str(interrupt) or 'nothing was written'}", err=True)
            raise typer.Exit(130) from None
        except (typer.Exit, typer.Abort, typer.BadParameter):
            raise
        except Exception as error:
            if type(error).__name__ == "OutOfMemoryError":  # torch's, which is not imported for --help
                typer.echo(
                    f"error: {first_line(error)}; make batches smaller (see --batch-size), or pass --device cpu.",
                    err=True,
                )
                raise typer.Exit(2) from None
            if os.environ.get("CLIPFIT_DEBUG"):
                traceback.print_exc()
            typer.echo(
                f"error: a fault of clipfit's own ({type(error).__name__}: {error}); "
                "please report it with the output of the same command under CLIPFIT_DEBUG=1.",
                err=True,
            )
            raise typer.Exit(1) from None

    return wrapped


@contextlib.contextmanager
def keeping(what: str) -> Iterator[None]:
    """For a command that Ctrl-C leaves something of: say what is kept."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt(what) from None


def print_json(document: Mapping[str, Any]) -> None:
    """Exactly one JSON document on stdout, in ASCII: whatever the terminal's encoding, it can be printed."""
    typer.echo(json.dumps(document))
