"""`clipfit evaluate`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

import typer

from clipfit.cli.common import imports, print_json, showing
from clipfit.cli.options import Json
from clipfit.config import EvaluateConfig
from clipfit.config.options import Declared, declared_by
from clipfit.errors import ClipfitError, UsageError

Alpha = Annotated[float | None, typer.Option(help="One ratio, in place of --alphas.", show_default=False)]
PerClass = Annotated[bool, typer.Option("--per-class", help="Show every class.", show_default=False)]


def options() -> list[Declared]:
    """evaluate's own."""
    return list(declared_by(EvaluateConfig).values())


def command(
    values: Mapping[str, Any], *, alpha: Alpha = None, per_class: PerClass = False, as_json: Json = False
) -> None:
    """Measure base, new and union accuracy on held-out images, with zero-shot beside."""
    if alpha is not None:
        if "alphas" in values:
            raise UsageError("--alpha and --alphas exclude each other: give one of them.")
        values = {**values, "alphas": (alpha,)}
    config = EvaluateConfig(**values)

    with imports():
        from clipfit import evaluate, ranks
        from clipfit.report.console import Console

    with ranks.joined(), Console() as console:
        try:
            result = evaluate(config, console)
        except ClipfitError as error:
            if error.found is not None:
                console.evaluated(error.found, per_class)
            raise
        with showing():
            console.evaluated(result, per_class)
    if as_json:
        print_json(result.as_json())
