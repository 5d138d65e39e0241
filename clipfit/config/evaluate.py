"""What `evaluate` is given."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path

from clipfit.config import shared
from clipfit.config.options import Checked, option
from clipfit.config.parsing import parse_alphas, parse_bounds
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
        None, RATIOS, low=0, high=1, parse=parse_alphas, default_is="0 and the run's own"
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
    precision: str = shared.precision()
    runtime: str = shared.runtime()
    model: str | None = option(None, "Without a run: zero-shot CLIP, measured on --data before anything is adapted.")
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
