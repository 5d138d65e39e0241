"""The table of formats: one is a file and a row. What can hold a run is decided before anything is computed.

A row has its name, and what it takes of `export`'s options, in `config.outputs.FORMATS`, which needs no torch.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

from clipfit.config import outputs
from clipfit.config.outputs import FormatOptions
from clipfit.errors import UsageError
from clipfit.formats.base import Format
from clipfit.formats.difference import Difference
from clipfit.formats.onnx import Onnx
from clipfit.formats.open_clip import OpenClipFolder
from clipfit.formats.safetensors import SafetensorsFile
from clipfit.formats.torch import TorchProgram
from clipfit.formats.transformers import TransformersFolder
from clipfit.model.named import Additions
from clipfit.runs.run import Run

_MADE: tuple[Format, ...] = (
    OpenClipFolder(), TransformersFolder(), SafetensorsFile(), Difference(), Onnx(), TorchProgram()
)  # fmt: skip
FORMATS: dict[str, Format] = {made.name: made for made in _MADE}


def require_installed(chosen: Format) -> None:
    """Raises UsageError where a library is missing that the format, or the proof of it, needs."""
    missing = [library for library in chosen.libraries if importlib.util.find_spec(library) is None]
    if missing:
        raise UsageError(
            f"the format {chosen.name} needs {', '.join(missing)}, which cannot be imported here: "
            f"pip install 'clipfit[{chosen.name}]'."
        )


def require_held(chosen: Format, run: Run, additions: Additions, options: FormatOptions) -> None:
    """Raises UsageError where the format cannot hold the run as asked, naming the formats, parts and α that can."""
    reason = chosen.holds(run, additions, options)
    if reason is None:
        return
    others = [told for told, other, asked in _choices() if other.holds(run, additions, asked) is None]
    can = f"{' or '.join(others)} can hold it; else " if others else ""
    part = f" with --part {options.part}" if options.part else ""
    # α = 0 has nothing beyond plain CLIP, but of a run that was adapted on from another one
    at_0 = not run.record.parent and chosen.holds(run, Additions(), options) is None
    raise UsageError(
        f"the format {chosen.name}{part} cannot hold {reason}, and without it this would be another model: "
        f"{can}use the run itself{', or --alpha 0' if at_0 else ''}."
    )


def _choices() -> Iterator[tuple[str, Format, FormatOptions]]:
    """Every format with each of its parts, and how one asks for it."""
    for name, format in FORMATS.items():
        for part in outputs.FORMATS[name].part or (None,):
            yield f"--format {name}" + (f" --part {part}" if part else ""), format, FormatOptions(part)
