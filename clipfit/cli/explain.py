"""`clipfit explain`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipfit.cli.common import keeping, print_json
from clipfit.config import ExplainConfig, parse_numbers

ARG, OPT = typer.Argument, typer.Option


def command(
    run: Annotated[Path, ARG(help="A run of adapt's.")],
    images: Annotated[list[Path], ARG(help="Images to draw.")],
    new_classes: Annotated[Path | None, OPT(help="More candidate classes than the run's own, one name a line.")] = None,
    blocks: Annotated[str | None, OPT(help="Numbers from 0 (0,3,5).  [default: first, the head's, last]")] = None,
    alpha: Annotated[float | None, OPT(help="Ensemble ratio.  [default: the run's]")] = None,
    output: Annotated[Path | None, OPT(help="Where the pictures go.  [default: inside the run]")] = None,
    as_json: Annotated[bool, OPT("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Draw what each block of the image tower goes by: patches tinted by likeness to the class texts."""
    from clipfit import explain
    from clipfit.report.console import Console
    from clipfit.report.picture import picture

    chosen = None if blocks is None else parse_numbers("--blocks", blocks)
    with keeping("the pictures drawn so far are kept"), Console() as console:
        result = explain(ExplainConfig(run, tuple(images), new_classes, chosen, alpha, output), picture, console)
        console.explained(result)
    if as_json:
        print_json(result.as_json())
