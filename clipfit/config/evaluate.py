"""What `evaluate` is given, of a run or of few-shot episodes."""

from __future__ import annotations

from dataclasses import KW_ONLY, MISSING, dataclass
from pathlib import Path

from clipfit.config import shared
from clipfit.config.options import Checked, option, require
from clipfit.config.parsing import parse_alphas, parse_bounds, parse_numbers, parse_part
from clipfit.errors import UsageError

RATIOS = "Several ratios: first:last:step (0:1:0.1) or a list (0,0.5,1)."


@dataclass(frozen=True)
class EvaluateConfig(Checked):
    """Everything `evaluate` is given. `run` None: the newest below runs/. `alphas` None: the run's own."""

    run: Path | None = shared.run_or_newest()
    _: KW_ONLY
    data: Path | None = option(None, "Other labelled images than the run's own held-out ones.")
    new_classes: Path | None = option(None, "Names of classes that were not trained on, one a line.")
    classes: Path | None = shared.class_names(" for --data")
    templates: Path | None = shared.templates("the run's own")
    image_root: Path | None = shared.image_root()
    alphas: tuple[float, ...] | None = option(
        None, RATIOS, low=0, high=1, parse=parse_alphas, default_is="0 and the run's own; episodes: 0.5,1"
    )
    fail_if_worse: bool = option(False, "Exit code 5 where an α asked for is credibly worse than zero-shot.")
    require: tuple[str, ...] = option(
        (), "PART:LEAST: exit code 5 where the accuracy of base, new, union or hm is less (base:0.85,new:0.6)."
    )
    retain: tuple[Path, ...] = option(
        (), "Other labelled images: before and after, each within its own classes; may be repeated."
    )
    drift: Path | None = option(None, "Unlabelled images, a folder or a list: how far their similarities moved.")
    skip_bad_images: bool = shared.skip_bad_images()
    batch_size: int = option(128, "Images a forward pass.", low=1)
    cache_bytes: int = shared.cache_bytes("images")
    device: str = shared.device()
    model: str | None = option(
        None, "Without a run: zero-shot CLIP, measured on --data before anything is adapted; or what episodes adapt.",
        default_is="none; episodes: ViT-B-16",
    )  # fmt: skip
    pretrained: str | None = shared.pretrained()

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.bounds
        if self.model is None:
            if self.pretrained is not None:
                raise UsageError("--pretrained belongs to --model, but the weights are a run's: leave it out.")
            return
        for name, given in (("the run", self.run), ("--alphas", self.alphas)):
            if given is not None:
                raise UsageError(f"--model measures zero-shot CLIP, without a run or its ratios: leave {name} out.")
        if self.retain or self.drift is not None:
            raise UsageError("--retain and --drift compare with zero-shot CLIP, which --model is: leave them out.")
        if self.fail_if_worse:
            raise UsageError("--fail-if-worse compares a run with zero-shot CLIP, which --model is: leave it out.")
        if self.data is None:
            raise UsageError("--model measures zero-shot CLIP on images of yours: give --data DIR.")

    @property
    def bounds(self) -> dict[str, float]:
        """The least accuracy by part. Raises UsageError for what `require` cannot mean."""
        try:
            return parse_bounds(self.require)
        except ValueError as expected:
            raise UsageError(f"require must be {expected}; found {','.join(self.require)!r}.") from None


@dataclass(frozen=True)
class EpisodesConfig(Checked):
    """Everything `evaluate --episodes` is given."""

    data: Path = option(MISSING, "Labelled images, from which the episodes are drawn.")
    output: Path = option(MISSING, "Where finished ones are kept.", default_is="episodes/<folder>")
    contenders: tuple[str, ...] = option(
        MISSING, "zero-shot, cite, atha+lora, atha:tail_ratio=0, …; may be repeated.", flag="--method",
        default_is="zero-shot, finetune, cite and atha",
    )  # fmt: skip
    model: str = shared.model()
    _: KW_ONLY
    pretrained: str | None = shared.pretrained()
    episodes: int = option(100, "Few-shot episodes of --data instead of a run: adapt in each, compare --method.", low=1)
    way: int = option(5, "Classes of each.", low=2)
    shots: tuple[int, ...] = option((1, 5), "Shots a class, one number or several.", low=1, parse=parse_numbers)
    most_shots: int | None = option(
        None, "Draw with room for so many shots a class.", low=1, default_is="the most of --shots"
    )
    query: int = option(15, "Images a class to measure on.", low=1)
    alphas: tuple[float, ...] = option((0.5, 1.0), RATIOS, low=0, high=1, parse=parse_alphas)
    seed: int = option(0, "Of their draw.", low=0, high=2**40 - 1)
    part: tuple[int, int] = option(
        (1, 1), "k/n, this process does every n-th from the k-th.", parse=parse_part, default_is="1/1, all"
    )
    classes: Path | None = shared.class_names(" for --data")
    image_root: Path | None = shared.image_root()
    skip_bad_images: bool = shared.skip_bad_images()
    batch_size: int = option(128, "Images a forward pass; training has the method's own.", low=1)
    cache_bytes: int = shared.cache_bytes("images")
    device: str = shared.device()
    precision: str = shared.precision()

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.shots), "shots must be at least one number", self.shots)
        require(self.room >= max(self.shots), "most_shots must not be less than the shots", self.most_shots)
        require(1 <= self.part[0] <= self.part[1], "part must be k/n with 1 ≤ k ≤ n", self.part)

    @property
    def room(self) -> int:
        """Shots a class that an episode is drawn with room for."""
        return max(self.shots) if self.most_shots is None else self.most_shots
