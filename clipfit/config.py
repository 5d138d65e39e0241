"""Settings of an adaptation: frozen, validated once, with the paper's values as defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from clipfit.errors import UsageError

DEFAULT_TEMPLATE = "a photo of a {}"
PRECISIONS = ("auto", "fp32", "bf16")


@dataclass(frozen=True)
class Recipe:
    """How the weights move. Defaults: CLIP-CITE (arXiv 2407.04003, implementation details).

    The paper gives no weight decay and no range for the random resized crop: 0.1 is that of FLYP and WiSE-FT, the
    range is torchvision's default.
    """

    learning_rate: float = 5e-6
    weight_decay: float = 0.1
    epochs: int = 20
    batch_size: int = 32
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    template: str = DEFAULT_TEMPLATE

    def __post_init__(self) -> None:
        _require(0 < self.learning_rate < 1, "the learning rate must lie between 0 and 1", self.learning_rate)
        _require(0 <= self.weight_decay < 1, "the weight decay must lie between 0 and 1", self.weight_decay)
        _require(self.epochs >= 1, "the number of epochs must be at least 1", self.epochs)
        _require(self.batch_size >= 1, "the batch size must be at least 1", self.batch_size)
        low, high = self.crop_scale
        _require(0 < low <= high <= 1, "the crop scale must be two shares of the area, 0 < low ≤ high ≤ 1", low, high)
        low, high = self.crop_ratio
        _require(0 < low <= high, "the crop ratio must be width/height, 0 < low ≤ high", low, high)
        _require(self.template.count("{}") == 1, "the template must contain {} exactly once", self.template)

    def changed(self, values: Mapping[str, Any]) -> Recipe:
        """A copy with the given fields replaced; None means: leave it."""
        given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items() if v is not None}
        unknown = sorted(set(given) - set(asdict(self)))
        if unknown:
            raise UsageError(f"unknown recipe settings {unknown}; there are {sorted(asdict(self))}.")
        return replace(self, **given)

    @classmethod
    def resolved(cls, own: Mapping[str, Any], method: str, given: Mapping[str, Any]) -> Recipe:
        """The paper's values, then a model's own (Source.adapt_defaults), its own for this method, then the given."""
        return cls().changed(own.get("recipe", {})).changed(own.get("methods", {}).get(method, {})).changed(given)


@dataclass(frozen=True)
class AdaptConfig:
    """Everything `adapt` is told. `recipe` and `method_options` hold only what differs from the defaults."""

    shots: Path
    method: str = "cite"
    model: str = "ViT-B-16"
    pretrained: str | None = None
    alpha: float = 0.5
    shots_per_class: int | None = None
    classes: Path | None = None
    image_root: Path | None = None
    skip_bad_images: bool = False
    cache_bytes: int = 2 * 2**30
    seed: int = 0
    device: str = "auto"
    precision: str = "auto"
    output: Path | None = None
    overwrite: bool = False
    recipe: Mapping[str, Any] = field(default_factory=dict)
    method_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _require(0 <= self.alpha <= 1, "alpha must lie between 0 (pre-trained) and 1 (fine-tuned)", self.alpha)
        _require(self.shots_per_class is None or self.shots_per_class >= 1, "--shots must be at least 1",
                 self.shots_per_class)  # fmt: skip
        _require(self.cache_bytes >= 0, "the image cache cannot be negative", self.cache_bytes)
        _require(0 <= self.seed < 2**63, "the seed must be a non-negative 63-bit integer", self.seed)
        _require(self.precision in PRECISIONS, f"the precision must be one of {', '.join(PRECISIONS)}", self.precision)
        Recipe().changed(self.recipe)  # so that a wrong setting is reported before a model is loaded


@dataclass(frozen=True)
class EvaluateConfig:
    """Everything `evaluate` is told. `run` None: the newest below runs/. `alphas` None: the run's own."""

    run: Path | None = None
    data: Path | None = None
    new_classes: Path | None = None
    classes: Path | None = None
    image_root: Path | None = None
    alphas: tuple[float, ...] | None = None
    skip_bad_images: bool = False
    batch_size: int = 128
    cache_bytes: int = 2 * 2**30
    device: str = "auto"

    def __post_init__(self) -> None:
        for alpha in self.alphas or ():
            _require(0 <= alpha <= 1, "alpha must lie between 0 (pre-trained) and 1 (fine-tuned)", alpha)
        _require(self.batch_size >= 1, "the batch size must be at least 1", self.batch_size)


@dataclass(frozen=True)
class ExportConfig:
    """Everything `export` is told. `alpha` None: the run's own."""

    run: Path | None = None
    format: str = "open_clip"
    alpha: float | None = None
    output: Path | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        _require(self.alpha is None or 0 <= self.alpha <= 1,
                 "alpha must lie between 0 (pre-trained) and 1 (fine-tuned)", self.alpha)  # fmt: skip


def parse_alphas(text: str) -> tuple[float, ...]:
    """ "0:1:0.1" (first:last:step, both ends included) or "0,0.5,1" → the ratios.

    Raises:
        UsageError: the text is neither.
    """
    try:
        if ":" not in text:
            return tuple(float(part) for part in text.split(","))
        first, last, step = (float(part) for part in text.split(":"))
        if step <= 0 or last < first:
            raise ValueError
        count = round((last - first) / step)
        return tuple(round(first + k * step, 10) for k in range(count + 1) if first + k * step <= last + 1e-9)
    except (ValueError, OverflowError):
        raise UsageError(f"--alphas takes first:last:step (0:1:0.1) or a list (0,0.5,1), not {text!r}.") from None


def _require(holds: bool, expectation: str, *found: object) -> None:
    if not holds:
        raise UsageError(f"{expectation}; found {', '.join(map(repr, found))}.")
