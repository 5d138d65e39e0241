"""`clipfit export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipfit.cli.common import print_json

ARG, OPT = typer.Argument, typer.Option


def command(
    run: Annotated[Path | None, ARG(help="A run of adapt's.  [default: the newest below runs/]")] = None,
    format: Annotated[str, OPT(help="open_clip: a folder for open_clip's local-dir:.")] = "open_clip",
    alpha: Annotated[float | None, OPT(help="Ensemble ratio.  [default: the run's]")] = None,
    output: Annotated[Path | None, OPT(help="Where it goes.  [default: inside the run]")] = None,
    overwrite: Annotated[bool, OPT("--overwrite", help="Replace what exists.")] = False,
    as_json: Annotated[bool, OPT("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Write the ensembled model for other tools, and check it by loading it again."""
    from clipfit import ExportConfig, export
    from clipfit.report.console import Console

    with Console() as console:
        result = export(ExportConfig(run, format, alpha, output, overwrite), console)
        console.exported(result)
    if as_json:
        print_json(result.as_json())
