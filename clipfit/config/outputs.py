"""What `export` and `explain` are given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from clipfit.config import shared
from clipfit.config.options import Checked, argument, option
from clipfit.config.parsing import parse_numbers
from clipfit.errors import UsageError

PARTS = ("classifier", "image", "text")
DTYPES = ("fp32", "bf16", "fp16")
QUANTIZE = ("int8",)


@dataclass(frozen=True)
class FormatOptions:
    """What is asked of a format. `part` None: the whole model."""

    part: str | None = None
    dtype: str = "fp32"
    quantize: str | None = None


@dataclass(frozen=True)
class Takes:
    """Which values of `export`'s options a format takes; of parts and dtypes the first is its default.

    Without parts it holds the whole model.
    """

    help: str
    part: tuple[str, ...] = ()
    dtype: tuple[str, ...] = ("fp32",)
    quantize: tuple[str, ...] = ()

    @property
    def default(self) -> FormatOptions:
        """What is meant where nothing is given."""
        return FormatOptions(self.part[0] if self.part else None, self.dtype[0])


# a test holds these names against the table in formats/, which needs torch
FORMATS: Mapping[str, Takes] = {
    "open_clip": Takes("a folder for open_clip's local-dir:"),
    "transformers": Takes("a folder for CLIPModel and CLIPProcessor, or SigLIP's", dtype=DTYPES),
    "safetensors": Takes("one self-describing file of weights", dtype=DTYPES),
    "difference": Takes("what changed against the pre-trained weights, for every α"),
    "onnx": Takes("a graph of a part", PARTS, ("fp32", "fp16"), QUANTIZE),
    "torch": Takes("a program of torch.export of a part", PARTS, ("fp32", "fp16")),
}


@dataclass(frozen=True)
class ExportConfig(Checked):
    """Everything `export` is given. `alpha` None: the run's own; `part`, `dtype` None: the format's default."""

    run: Path | None = shared.run_or_newest()
    _: KW_ONLY
    format: str = option(
        "open_clip", "; ".join(f"{name}: {takes.help}" for name, takes in FORMATS.items()) + ".",
        choices=tuple(FORMATS),
    )  # fmt: skip
    alpha: float | None = shared.alpha_of_run()
    part: str | None = option(None, "What of the model, where a format writes parts.", choices=PARTS)
    dtype: str | None = option(None, "The weights' type, where a format has several.", choices=DTYPES)
    quantize: str | None = option(None, "To whole numbers, where a format can.", choices=QUANTIZE)
    output: Path | None = option(None, "Where it goes.", default_is="exports/<run>-<format>-<alpha>")
    overwrite: bool = option(False, "Replace what exists.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("part", "dtype", "quantize"):
            self._require_taken(name, getattr(self, name))

    def _require_taken(self, name: str, value: str | None) -> None:
        taken = getattr(FORMATS[self.format], name)
        if value is None or value in taken:
            return
        others = [format for format, takes in FORMATS.items() if value in getattr(takes, name)]
        raise UsageError(
            f"the format {self.format} does not take --{name} {value}: "
            + (f"it takes {', '.join(taken)}" if taken else f"leave --{name} out")
            + (f", or choose --format {' or '.join(others)}." if others else ".")
        )

    @property
    def format_options(self) -> FormatOptions:
        """What is asked of the format, its defaults filled in."""
        default = FORMATS[self.format].default
        return FormatOptions(self.part or default.part, self.dtype or default.dtype, self.quantize)

    @property
    def suffix(self) -> str:
        """What tells the folder of this export from that of the format's defaults: "-image-fp16"."""
        asked, default = self.format_options, FORMATS[self.format].default
        values = [getattr(asked, name) for name in ("part", "dtype", "quantize")]
        usual = [getattr(default, name) for name in ("part", "dtype", "quantize")]
        return "".join(f"-{value}" for value, other in zip(values, usual, strict=True) if value != other)


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
