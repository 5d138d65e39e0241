"""`clipfit predict`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from clipfit.cli.common import imports, keeping, print_json, showing
from clipfit.cli.options import Json
from clipfit.config.options import Declared, declared_by
from clipfit.config.predict import PredictConfig
from clipfit.errors import OutputError, UsageError


def options() -> list[Declared]:
    """predict's own."""
    return list(declared_by(PredictConfig).values())


def command(values: Mapping[str, Any], *, as_json: Json = False) -> None:
    """Name images, one JSON line each, in their order; what cannot be read is a row with an error."""
    config = PredictConfig(**values)
    if as_json and config.output is None:
        raise UsageError("--json sums up, but the rows themselves go to stdout: give --output beside it.")
    if config.output is None and sys.stdout is None:
        raise OutputError("standard output is closed, but rows go to it: leave it open, or give --output.")

    with imports():
        from clipfit import predict, ranks
        from clipfit.report.console import Console
        from clipfit.report.html import Thumbnails

    kept = f"the rows so far are kept beside {config.output}; the same command with --resume goes on"
    with keeping(kept if config.output else "the rows so far are on stdout"), ranks.joined(), Console() as console:
        result = predict(config, sys.stdout, console, Thumbnails() if config.html else None)
        with showing():
            console.predicted(result)
    if as_json:
        print_json(result.as_json())
