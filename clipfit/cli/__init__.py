"""The command line: parse → config → one library call → show. One file a command; torch is not imported for --help."""

from __future__ import annotations

import warnings
from typing import Annotated

import typer

from clipfit.cli import adapt, evaluate, explain, export
from clipfit.cli.common import reporting

app = typer.Typer(
    name="clipfit",
    help="Adapt CLIP to a handful of labelled images without making it worse at everything else.",
    epilog="Exit codes: 0 done · 1 a fault of ours · 2 wrong usage · 3 the data · 4 the model or its weights · "
    "6 numbers not finite · 130 interrupted.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help: rich takes longer to draw it than everything else together
)
app.command("adapt")(reporting(adapt.command))
app.command("evaluate")(reporting(evaluate.command))
app.command("explain")(reporting(explain.command))
app.command("export")(reporting(export.command))


def _show_version(asked: bool) -> None:
    if asked:
        from clipfit.version import __version__

        typer.echo(f"clipfit {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    pass


def main() -> None:
    """The console script."""
    # Pillow warns of an image that `decode` refuses with a sentence of its own
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")
    app()
