"""`export`: a run at a ratio α as a model that other tools load."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from clipfit.config import ExportConfig
from clipfit.config.outputs import FormatOptions
from clipfit.errors import UsageError
from clipfit.events import Progress, Silent
from clipfit.formats import FORMATS, card, require_held, require_installed
from clipfit.formats.base import Format
from clipfit.formats.proof import Proof, pictures_of
from clipfit.formats.subject import ABOUT, Subject, in_effect, subject_of
from clipfit.runs import files
from clipfit.runs.place import building, recover
from clipfit.runs.run import open_run

# not inside the run: replacing it would leave stale ones, or delete what is in use
EXPORTS = Path("exports")
PROOF = "proof.json"


@dataclass(frozen=True)
class ExportResult:
    """Where the exported model is, and the proof that its consumer reads the run's model."""

    output: Path
    format: str
    options: FormatOptions
    run: Path
    alpha: float
    proof: Proof

    def as_json(self) -> dict[str, Any]:
        """The document of `export --json`."""
        return {
            "output": str(self.output), "format": self.format, **asdict(self.options),
            "run": str(self.run), "alpha": self.alpha,
            "largest_difference": self.proof.identical_pixels.largest_difference, "proof": self.proof.as_json(),
        }  # fmt: skip


def export(config: ExportConfig, progress: Progress | None = None) -> ExportResult:
    """Write a run in another format, and have it read by that format's own library before saying so.

    Raises:
        UsageError: no such format, what it needs is not installed, it cannot hold the run, or the output exists.
            ModelError: α needs weights that are
            missing. OutputError: the place cannot be written. ClipfitError: what is read back is another model.
    """
    progress = progress or Silent()
    chosen, options = FORMATS[config.format], config.format_options
    require_installed(chosen)
    run = open_run(config.run)
    alpha = run.alpha if config.alpha is None else config.alpha
    output = config.output or EXPORTS / f"{run.path.resolve().name}-{chosen.name}-{alpha:g}{config.suffix}"
    recover(output)
    _require_free(output, config.overwrite)
    files.require_kept(output, run.needed)
    additions = in_effect(run, alpha)
    require_held(chosen, run, additions, options)
    progress.say(f"{run.path} at α = {alpha:g} → {output}")
    subject = subject_of(run, alpha, additions, chosen.name, options)
    pictures = pictures_of(run, subject.model)
    with building(output, config.overwrite, progress.say) as folder:
        chosen.write(subject, folder)
        proof = chosen.prove(subject, folder, pictures)
        _write_beside(chosen, subject, proof, folder)
    return ExportResult(output, chosen.name, options, run.path, alpha, proof)


def _write_beside(chosen: Format, subject: Subject, proof: Proof, folder: Path) -> None:
    """What every export carries, whatever its format."""
    files.write_json(folder / PROOF, proof.as_json())
    files.write_text(folder / card.NAME, card.card(subject, chosen.usage(subject, folder), proof))


def _require_free(output: Path, overwrite: bool) -> None:
    if output.exists() and not overwrite:
        raise UsageError(f"{output} exists already: pass --overwrite to replace it or --output for another place.")
    if output.exists() and not (output / ABOUT).exists() and (output.is_file() or any(output.iterdir())):
        raise UsageError(f"{output} is no export of clipfit's; --overwrite will not delete it: choose another place.")
