"""`clipfit export`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipfit.cli.common import imports, print_json, showing
from clipfit.cli.options import Json
from clipfit.config import ExportConfig
from clipfit.config.options import Declared, declared_by


def options() -> list[Declared]:
    """export's own."""
    return list(declared_by(ExportConfig).values())


def command(values: Mapping[str, Any], *, as_json: Json = False) -> None:
    """Write the ensembled model for other tools, and have them load it: what they read must be the run's model."""
    config = ExportConfig(**values)

    with imports():
        from clipfit import export
        from clipfit.report.console import Console

    with Console() as console:
        result = export(config, console)
        with showing():
            console.exported(result)
    if as_json:
        print_json(result.as_json())
