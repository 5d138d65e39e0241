"""`clipfit models`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

from clipfit.cli.common import imports, print_json
from clipfit.cli.options import Json
from clipfit.config.models import ModelsConfig
from clipfit.config.options import Declared, declared_by


def options() -> list[Declared]:
    """models' own."""
    return list(declared_by(ModelsConfig).values())


def command(values: Mapping[str, Any], *, as_json: Json = False) -> None:
    """List models: names, tags, image size, parameters, what works on each, and what is on this machine."""
    config = ModelsConfig(**values)

    with imports():
        from clipfit import models
        from clipfit.report.models import text

    found = models(config)
    if as_json:
        print_json(found.as_json())
    else:
        typer.echo(text(found))
