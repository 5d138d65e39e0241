"""`clipfit evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from clipfit.cli.common import print_json
from clipfit.config import EvaluateConfig, parse_alphas
from clipfit.errors import UsageError

ARG, OPT = typer.Argument, typer.Option


def command(
    run: Annotated[Path | None, ARG(help="A run of adapt's.  [default: the newest below runs/]")] = None,
    data: Annotated[Path | None, OPT(help="Other labelled images than the run's own held-out ones.")] = None,
    new_classes: Annotated[Path | None, OPT(help="Names of classes that were not trained on, one a line.")] = None,
    classes: Annotated[Path | None, OPT(help="Class names for --data: folder<TAB>name a line, or JSON.")] = None,
    image_root: Annotated[Path | None, OPT(help="Where paths in a manifest or split file start.")] = None,
    alpha: Annotated[float | None, OPT(help="One ratio.  [default: the run's]")] = None,
    alphas: Annotated[str | None, OPT(help="Several: first:last:step (0:1:0.1) or a list (0,0.5,1).")] = None,
    per_class: Annotated[bool, OPT("--per-class", help="Show every class.")] = False,
    skip_bad_images: Annotated[bool, OPT("--skip-bad-images", help="Leave out what cannot be read.")] = False,
    batch_size: Annotated[int, OPT(help="Images a forward pass.")] = 128,
    device: Annotated[str, OPT(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    as_json: Annotated[bool, OPT("--json", help="One JSON document on stdout.")] = False,
) -> None:
    """Measure base, new and union accuracy on held-out images, with zero-shot beside."""
    from clipfit import evaluate
    from clipfit.report.console import Console

    if alpha is not None and alphas is not None:
        raise UsageError("--alpha and --alphas exclude each other: give one of them.")
    ratios = parse_alphas(alphas) if alphas is not None else None if alpha is None else (alpha,)
    config = EvaluateConfig(
        run, data, new_classes, classes, image_root, ratios, skip_bad_images, batch_size, device=device
    )
    with Console() as console:
        result = evaluate(config, console)
        console.evaluated(result, per_class)
    if as_json:
        print_json(result.as_json())
