"""What a format of `export` is."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from clipfit.config.outputs import FormatOptions
from clipfit.formats.card import Usage
from clipfit.formats.proof import Pictures, Proof
from clipfit.formats.subject import Subject
from clipfit.model.named import Additions
from clipfit.runs.run import Run


class Format(Protocol):
    """A way to write a model for other tools."""

    @property
    def name(self) -> str:
        """As `--format` takes it, with a row in config.outputs.FORMATS."""

    @property
    def libraries(self) -> tuple[str, ...]:
        """What has to be importable beyond clipfit's own dependencies: the extra of the format's name installs it."""

    def holds(self, run: Run, additions: Additions, options: FormatOptions) -> str | None:
        """None, or what of the run the format cannot hold as asked, as in "cannot hold edits of patch tokens".

        It is asked before anything is computed, and of other formats than the chosen one too, with each of their parts.
        """

    def write(self, subject: Subject, folder: Path) -> None:
        """Write everything a consumer needs into an empty folder, ABOUT among it (`write_about`). Raises OutputError.

        proof.json and README.md are written by `export`, for every format alike.
        """

    def prove(self, subject: Subject, folder: Path, pictures: Pictures) -> Proof:
        """Read it back as a consumer does, in a process that knows nothing of clipfit, and compare.

        Raises:
            ClipfitError: what is read back is another model, or cannot be read.
        """

    def usage(self, subject: Subject, folder: Path) -> Usage:
        """How the consumer loads what `write` wrote: a part of the model card."""
