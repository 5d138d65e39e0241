"""The command line: parse → config → one library call → show. One file a command; torch is not imported for --help."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from clipfit.cli import adapt, benchmark, check, evaluate, explain, export, models, predict, report
from clipfit.cli.common import Commands
from clipfit.cli.options import with_options
from clipfit.stdio import fill_closed_streams

COMMANDS = {
    "adapt": adapt,
    "evaluate": evaluate,
    "predict": predict,
    "explain": explain,
    "export": export,
    "check": check,
    "report": report,
    "benchmark": benchmark,
    "models": models,
}
TOGETHER = {"adapt", "evaluate", "predict", "benchmark"}  # whose work several processes share
EXIT_CODES = (
    "Exit codes: 0 done · 1 a fault of ours · 2 wrong usage · 3 the data · 4 the model or its weights · "
    "5 the guard stopped it · 6 numbers not finite · 7 output could not be written · 129 hung up · "
    "130 interrupted · 143 terminated."
)


def application() -> typer.Typer:
    """The commands, with the options of all methods that there are."""
    app = typer.Typer(
        name="clipfit",
        cls=Commands,
        help="Adapt CLIP to a handful of labelled images without making it worse at everything else.",
        epilog=EXIT_CODES,
        invoke_without_command=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # plain help: rich takes longer to draw it than everything else together
    )
    app.callback()(_root)
    for name, verb in COMMANDS.items():
        app.command(name, epilog=EXIT_CODES)(with_options(verb.command, verb.options(), name in TOGETHER))
    return app


def _show_version(asked: bool) -> None:
    if asked:
        from clipfit.version import __version__

        typer.echo(f"clipfit {__version__}")
        raise typer.Exit


def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app = application()


def main() -> None:
    """The console script."""
    fill_closed_streams()
    # Pillow warns of an image that `decode` refuses with a sentence of its own
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    app()
