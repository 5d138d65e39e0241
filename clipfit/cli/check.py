"""`clipfit check`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipfit.cli.common import imports, print_json
from clipfit.cli.options import Json
from clipfit.config.check import CheckConfig
from clipfit.config.options import Declared, declared_by


def options() -> list[Declared]:
    """check's own."""
    return list(declared_by(CheckConfig).values())


def command(values: Mapping[str, Any], *, as_json: Json = False) -> None:
    """Look at labelled images and class names before adapting: copies, leaks, doubtful labels, names that are mixed."""
    config = CheckConfig(**values)

    with imports():
        from clipfit import check
        from clipfit.report.console import Console

    with Console() as console:
        result = check(config, console)
        console.checked(result)
    result.require_no_errors()
    if as_json:
        print_json(result.as_json())
