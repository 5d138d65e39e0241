"""What `export` and `explain` are given."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from clipfit.config import shared
from clipfit.config.options import Checked, argument, option
from clipfit.config.parsing import parse_numbers

FORMATS = ("open_clip",)  # a test holds these names against the table in formats/, which needs torch


@dataclass(frozen=True)
class ExportConfig(Checked):
    """Everything `export` is given. `alpha` None: the run's own."""

    run: Path | None = shared.run_or_newest()
    _: KW_ONLY
    format: str = option("open_clip", "open_clip: a folder for open_clip's local-dir:.", choices=FORMATS)
    alpha: float | None = shared.alpha_of_run()
    output: Path | None = option(None, "Where it goes.", default_is="exports/<run>-<format>-<alpha>")
    overwrite: bool = option(False, "Replace what exists.")


@dataclass(frozen=True)
class ExplainConfig(Checked):
    """Everything `explain` is given. `alpha` None: the run's own. `blocks` None: the first, the head's and the last."""

    run: Path = argument("A run of adapt's.")
    images: tuple[Path, ...] = argument("Images to draw.")
    _: KW_ONLY
    new_classes: Path | None = option(None, "More candidate classes than the run's own, one name a line.")
    blocks: tuple[int, ...] | None = option(
        None, "Numbers from 0 (0,3,5).", low=0, parse=parse_numbers, default_is="first, the head's, last"
    )
    alpha: float | None = shared.alpha_of_run()
    output: Path | None = option(None, "Where the pictures go.", default_is="explanations/<run>-<alpha>")
