"""`clipfit report`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipfit.cli.common import imports, print_json
from clipfit.cli.options import Json
from clipfit.config.options import Declared, declared_by
from clipfit.config.report import ReportConfig


def options() -> list[Declared]:
    """report's own."""
    return list(declared_by(ReportConfig).values())


def command(values: Mapping[str, Any], *, as_json: Json = False) -> None:
    """Write one page on a run: forecast, measurement, curves, classes, worst mistakes, and how to make it again."""
    config = ReportConfig(**values)

    with imports():
        from clipfit import report_on
        from clipfit.report.console import Console
        from clipfit.report.run_page import drawing

    with Console() as console:
        result = report_on(config, drawing(), console)
        console.reported(result)
    if as_json:
        print_json(result.as_json())
