"""What `report` is given."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from clipfit.config import shared
from clipfit.config.options import Checked, option


@dataclass(frozen=True)
class ReportConfig(Checked):
    """Everything `report` is given. `run` None: the newest below runs/. `data` None: the run's own folder."""

    run: Path | None = shared.run_or_newest()
    _: KW_ONLY
    output: Path | None = option(None, "Where the page goes.", default_is="reports/<run>.html")
    png: Path | None = option(None, "Also write the curves there, a picture each.")
    data: Path | None = option(
        None, "Where the images of the evaluation are, for thumbnails.", default_is="the run's own place"
    )
    mistakes: int = option(24, "Worst mistakes to show, 0 for none.", low=0, high=500)
    device: str = shared.device()
