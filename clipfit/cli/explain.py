"""`clipfit explain`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipfit.cli.common import imports, print_json
from clipfit.cli.options import Json
from clipfit.config import ExplainConfig
from clipfit.config.options import Declared, declared_by


def options() -> list[Declared]:
    """explain's own."""
    return list(declared_by(ExplainConfig).values())


def command(values: Mapping[str, Any], *, as_json: Json = False) -> None:
    """Draw what the model takes pictures for, and which parts of each look like that; for atha, what its edits do."""
    config = ExplainConfig(**values)

    with imports():
        from clipfit import explain
        from clipfit.report.console import Console
        from clipfit.report.picture import picture

    with Console() as console:
        result = explain(config, picture, console)
        console.explained(result)
    if as_json:
        print_json(result.as_json())
