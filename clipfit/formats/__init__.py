"""The table of formats: one is a file and a row. What can hold a run is decided before anything is computed."""

from __future__ import annotations

from clipfit.errors import UsageError
from clipfit.formats.base import Format
from clipfit.formats.open_clip import OpenClipFolder
from clipfit.model.named import Additions
from clipfit.runs.run import Run

FORMATS: dict[str, Format] = {made.name: made for made in (OpenClipFolder(),)}


def require_held(chosen: Format, run: Run, additions: Additions) -> None:
    """Raises UsageError where the format cannot hold the run, naming the formats that can."""
    reason = chosen.holds(run, additions)
    if reason is None:
        return
    others = [name for name, other in FORMATS.items() if other.holds(run, additions) is None]
    instead = f"--format {' or '.join(others)} can hold it" if others else "use the run itself, or --alpha 0"
    raise UsageError(
        f"the format {chosen.name} cannot hold {reason}, and without it this would be another model: {instead}."
    )
