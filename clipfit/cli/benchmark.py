"""`clipfit benchmark`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipfit.cli.common import imports, keeping, print_json, showing
from clipfit.cli.options import Json
from clipfit.config.options import Declared, declared_by
from clipfit.config.plan import BenchmarkConfig


def options() -> list[Declared]:
    """benchmark's own."""
    return list(declared_by(BenchmarkConfig).values())


def command(values: Mapping[str, Any], *, as_json: Json = False) -> None:
    """Compare methods over sets, shots and seeds, as a plan file says; goes on where it stopped."""
    config = BenchmarkConfig(**values)

    with imports():
        from clipfit import benchmark, ranks
        from clipfit.report.console import Console

    kept = f"finished cells are kept in {config.place}; the same command goes on from there"
    with keeping(kept), ranks.joined(), Console() as console:
        result = benchmark(config, console)
        with showing():
            console.benchmarked(result)
    if as_json:
        print_json(result.as_json())
