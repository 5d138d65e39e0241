"""What `adapt` is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from clipfit.config import shared
from clipfit.config.lora import LoraSettings
from clipfit.config.options import Checked, argument, option, settings
from clipfit.config.parsing import parse_alpha
from clipfit.config.recipe import Recipe
from clipfit.errors import UsageError

TUNINGS = ("full", "lora")
GOALS = ("base", "new", "both")


@dataclass(frozen=True)
class AdaptConfig(Checked):
    """Everything `adapt` is given.

    recipe, method_options, lora: mappings of what differs from the defaults, which the model and the method may have
    of their own: {"epochs": 1}. No whole Recipe is taken, for it would not say which of its values were asked for.

    alpha: None: chosen by the shots ("auto").
    """

    shots: Path = argument("Folder of class folders (or {train,test}/<class>), manifest, or CoOp split.")
    method: str = option("cite", "What is optimised.")
    model: str = shared.model()
    _: KW_ONLY
    pretrained: str | None = shared.pretrained()
    alpha: float | None = option(
        0.5, "Ensemble ratio: 0 = pre-trained, 1 = fine-tuned, auto = chosen on the val part or on folds of the shots.",
        low=0, high=1, parse=parse_alpha,
    )  # fmt: skip
    goal: str | None = option(
        None, "auto alpha: what counts, accuracy on the shots' classes, on others, or both (their harmonic mean).",
        choices=GOALS, default_is="both, or base where there are fewer than 4 classes",
    )  # fmt: skip
    forecast: bool = option(
        False,
        "Say what accuracy to expect on images and classes not seen, from folds, as auto alpha does: 3 times the time.",
    )
    output: Path | None = option(None, "Where the run goes.", default_is="runs/<folder>-<method>")
    overwrite: bool = option(False, "Replace a run that exists; with --resume, another one.")
    save_every: int | None = option(
        None, "Optimiser steps between saved states, from which --resume goes on.", low=1, default_is="nothing is saved"
    )
    resume: bool = option(False, "Go on from the saved state of the same command, or start anew where there is none.")
    shots_per_class: int | None = option(
        None, "Draw so many images a class; the others are held out.", low=1, flag="--shots", default_is="all"
    )
    balance: bool = option(
        False, "Each epoch draws as many images of every class as the largest class has, with repetition."
    )
    classes: Path | None = shared.class_names()
    templates: Path | None = shared.templates("--template alone, which is what training takes; of a list, its first")
    image_root: Path | None = shared.image_root()
    skip_bad_images: bool = shared.skip_bad_images()
    cache_bytes: int = shared.cache_bytes("shots")
    device: str = shared.device()
    precision: str = shared.precision()
    seed: int = option(0, "Of the draw, the order and the crops.", low=0, high=2**63 - 1)
    tuning: str = option("full", "Which weights move: all, or adapters, merged at the end.", choices=TUNINGS)
    context: bool = option(False, "Also learn vectors in place of the template's first words (CoOp's way).")
    recipe: Mapping[str, Any] = field(default_factory=dict)
    method_options: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, example in (("recipe", {"epochs": 1}), ("method_options", {"option": 1}), ("lora", {"rank": 4})):
            if not isinstance(found := getattr(self, name), Mapping):
                raise UsageError(
                    f"{name} must be a mapping of what differs from the defaults, as {example}; "
                    f"found {type(found).__name__}."
                )
        if self.goal and self.alpha is not None:
            raise UsageError(f"--goal {self.goal} belongs to --alpha auto: leave it out, or let α be chosen.")
        if self.tuning == "full" and any(value is not None for value in self.lora.values()):
            raise UsageError("rank, alpha and dropout of LoRA belong to --tuning lora, but the tuning is full.")
        Recipe().changed(self.recipe)  # so that a wrong setting is reported before a model is loaded
        settings(LoraSettings, self.lora, "LoRA")
