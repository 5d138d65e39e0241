"""`clipfit adapt`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clipfit.cli.common import imports, print_json, showing
from clipfit.cli.options import Json
from clipfit.config.options import Declared
from clipfit.methods.declared import adapt_options


def options() -> list[Declared]:
    """adapt's own, the recipe's, those of low-rank adapters, and of all methods."""
    return [option.shown for option in adapt_options().values()]


def command(values: Mapping[str, Any], *, as_json: Json = False) -> None:
    """Fine-tune CLIP on labelled images and write a run: fine-tuned weights, and the ensemble at alpha."""
    from clipfit import adapt_config

    config = adapt_config(values)  # before torch is imported: a wrong option answers at once

    with imports():
        from clipfit import adapt, ranks
        from clipfit.report.console import Console

    with ranks.joined(), Console() as console:
        result = adapt(config, console)
        with showing():
            console.adapted(result)
    if as_json:
        print_json(result.as_json())
