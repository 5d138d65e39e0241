"""Settings of an adaptation: frozen, validated once, with the paper's values as defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from clipfit.errors import UsageError

DEFAULT_TEMPLATE = "a photo of a {}"
PRECISIONS = ("auto", "fp32", "bf16")
TUNINGS = ("full", "lora")


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
        return replace(self, **settings(Recipe, values, "the recipe"))

    @classmethod
    def resolved(
        cls, own: Mapping[str, Any], method: str, given: Mapping[str, Any], lora: Mapping[str, Any] | None = None
    ) -> Recipe:
        """The paper's values, then a model's own (Source.adapt_defaults), its own for this method, then the given.

        `lora`: the method's settings under low-rank tuning, which stand in place of a model's own for full fine-tuning;
        its own template stays.
        """
        usual, key = own.get("recipe", {}), method
        if lora is not None:
            usual, key = {"template": usual.get("template"), **lora}, f"{method}+lora"
        return cls().changed(usual).changed(own.get("methods", {}).get(key, {})).changed(given)


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
    tuning: str = "full"
    context: bool = False  # learn vectors in place of the template's words before the class name
    lora: Mapping[str, Any] = field(default_factory=dict)  # rank, alpha, dropout where they differ from the method's

    def __post_init__(self) -> None:
        _require(0 <= self.alpha <= 1, "alpha must lie between 0 (pre-trained) and 1 (fine-tuned)", self.alpha)
        _require(self.shots_per_class is None or self.shots_per_class >= 1, "--shots must be at least 1",
                 self.shots_per_class)  # fmt: skip
        _require(self.cache_bytes >= 0, "the image cache cannot be negative", self.cache_bytes)
        _require(0 <= self.seed < 2**63, "the seed must be a non-negative 63-bit integer", self.seed)
        _require(self.precision in PRECISIONS, f"the precision must be one of {', '.join(PRECISIONS)}", self.precision)
        _require(self.tuning in TUNINGS, f"the tuning must be one of {', '.join(TUNINGS)}", self.tuning)
        if self.tuning == "full" and any(value is not None for value in self.lora.values()):
            raise UsageError("rank, alpha and dropout of LoRA belong to --tuning lora, but the tuning is full.")
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
class EpisodesConfig:
    """Everything `evaluate --episodes` is told.

    part: (k, n), this process takes every n-th episode from the k-th. most_shots: episodes are drawn with room for so
    many shots a class; None: the largest of `shots`.
    """

    data: Path
    output: Path
    contenders: tuple[str, ...]
    model: str = "ViT-B-16"
    pretrained: str | None = None
    episodes: int = 100
    way: int = 5
    shots: tuple[int, ...] = (1, 5)
    most_shots: int | None = None
    query: int = 15
    alphas: tuple[float, ...] = (0.5, 1.0)
    seed: int = 0
    part: tuple[int, int] = (1, 1)
    classes: Path | None = None
    image_root: Path | None = None
    skip_bad_images: bool = False
    batch_size: int = 128
    cache_bytes: int = 2 * 2**30
    device: str = "auto"
    precision: str = "auto"

    def __post_init__(self) -> None:
        _require(self.episodes >= 1, "there must be at least 1 episode", self.episodes)
        _require(self.way >= 2, "an episode needs at least 2 classes", self.way)
        _require(bool(self.shots) and min(self.shots) >= 1, "--shots must be at least 1", self.shots)
        _require(self.room >= max(self.shots), "most_shots must not be less than the shots", self.most_shots)
        _require(self.query >= 1, "--query must be at least 1", self.query)
        _require(1 <= self.part[0] <= self.part[1], "--part is k/n with 1 ≤ k ≤ n", self.part)
        _require(0 <= self.seed < 2**40, "the seed must be a non-negative 40-bit integer", self.seed)
        _require(self.precision in PRECISIONS, f"the precision must be one of {', '.join(PRECISIONS)}", self.precision)
        for alpha in self.alphas:
            _require(0 <= alpha <= 1, "alpha must lie between 0 (pre-trained) and 1 (fine-tuned)", alpha)

    @property
    def room(self) -> int:
        """Shots a class that an episode is drawn with room for."""
        return max(self.shots) if self.most_shots is None else self.most_shots


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


@dataclass(frozen=True)
class ExplainConfig:
    """Everything `explain` is told. `alpha` None: the run's own. `blocks` None: the first, the head's and the last."""

    run: Path
    images: tuple[Path, ...]
    new_classes: Path | None = None
    blocks: tuple[int, ...] | None = None
    alpha: float | None = None
    output: Path | None = None

    def __post_init__(self) -> None:
        _require(self.alpha is None or 0 <= self.alpha <= 1,
                 "alpha must lie between 0 (pre-trained) and 1 (fine-tuned)", self.alpha)  # fmt: skip


def settings(owner: type, values: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What is given of a dataclass's fields (None: not given), lists as tuples.

    Raises:
        UsageError: there is no such field, or the value is of another type.
    """
    kinds = get_type_hints(owner)
    given = {key: tuple(v) if isinstance(v, list) else v for key, v in values.items() if v is not None}
    for key, value in given.items():
        if key not in kinds:
            has = ", ".join(sorted(kinds)) or "none"
            raise UsageError(f"{name} has no option {key!r}; its options: {has}.")
        if not _fits(kinds[key], value):
            kind = kinds[key] if get_args(kinds[key]) else kinds[key].__name__
            raise UsageError(f"{key} must be of type {kind}; found {value!r}.")
    return given


def _fits(kind: Any, value: object) -> bool:
    """Whether a value is of an annotated type; a whole number is a float too, but no bool is a number."""
    parts = get_args(kind)
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and len(value) == len(parts) and all(map(_fits, parts, value))
    if parts:  # int | None
        return any(_fits(part, value) for part in parts)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    return isinstance(value, kind)


def parse_alphas(text: str) -> tuple[float, ...]:
    """ "0:1:0.1" (first:last:step, the last included where a step meets it) or "0,0.5,1" → the ratios.

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


def parse_numbers(option: str, text: str) -> tuple[int, ...]:
    """ "1,5" → (1, 5). Raises UsageError, which names the option."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{option} takes numbers (5, or 1,5), not {text!r}.") from None


def parse_part(text: str) -> tuple[int, int]:
    """ "2/3" → (2, 3). Raises UsageError."""
    try:
        part, parts = (int(number) for number in text.split("/"))
        return part, parts
    except ValueError:
        raise UsageError(f"--part takes k/n (1/2 and 2/2 for two processes), not {text!r}.") from None


def _require(holds: bool, expectation: str, *found: object) -> None:
    if not holds:
        raise UsageError(f"{expectation}; found {', '.join(map(repr, found))}.")
