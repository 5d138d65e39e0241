"""How the weights move."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from clipfit.config.options import Checked, option, require, settings

DEFAULT_TEMPLATE = "a photo of a {}"


@dataclass(frozen=True)
class Recipe(Checked):
    """How the weights move. Defaults: CLIP-CITE (arXiv 2407.04003, implementation details).

    The paper gives no weight decay and no range for the random resized crop: 0.1 is that of FLYP and WiSE-FT, the
    range is torchvision's default.
    """

    learning_rate: float = option(
        5e-6, "AdamW's, in the first step; it falls to 0 along a cosine.", above=0, below=1,
        default_is="the model's own, else the paper's 5e-6; lora: 2e-4",
    )  # fmt: skip
    weight_decay: float = option(
        0.1,
        "AdamW's, which shrinks the weights in every step.",
        low=0,
        below=1,
        default_is="the model's own, else 0.1; lora: the method's",
    )
    epochs: int = option(
        20, "Times that every shot is seen.", low=1,
        default_is="the model's own, else the paper's 20; lora: the method's",
    )  # fmt: skip
    batch_size: int = option(
        32, "Shots an optimiser step.", low=1, default_is="the model's own, else the paper's 32; lora: the method's"
    )
    crop_scale: tuple[float, float] = option(
        (0.08, 1.0), "Share of the area that a random crop shows: least and most.", above=0, high=1, ordered=True,
        default_is="the model's own, else 0.08 1.0; lora: the method's",
    )  # fmt: skip
    crop_ratio: tuple[float, float] = option(
        (3 / 4, 4 / 3), "Width by height of a random crop: least and most.", above=0, ordered=True,
        default_is="the model's own, else 0.75 1.3333; lora: the method's",
    )  # fmt: skip
    micro_batch: int | None = option(
        None, "Images at once in the towers, where a batch does not fit the memory: the same gradient, more time.",
        low=1, default_is="the whole batch, or as many as fit",
    )  # fmt: skip
    gradient_checkpointing: bool = option(
        False, "Compute each block of the towers again in the backward pass: the same gradient, less memory, more time."
    )
    shard: bool = option(
        False,
        "Under torchrun, where one GPU cannot hold all: each process holds a share of the weights; same gradient.",
    )
    template: str = option(
        DEFAULT_TEMPLATE, "The text of a class; {} stands for its name.",
        default_is=f'the model\'s own, else "{DEFAULT_TEMPLATE}"',
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.template.count("{}") == 1, "template must contain {} exactly once", self.template)

    def changed(self, values: Mapping[str, Any]) -> Recipe:
        """A copy with the given fields replaced; None means: leave it."""
        return replace(self, **settings(Recipe, values, "the recipe"))

    @classmethod
    def resolved(
        cls,
        model_defaults: Mapping[str, Any],
        method: str,
        given: Mapping[str, Any],
        lora: Mapping[str, Any] | None = None,
    ) -> Recipe:
        """The paper's values, then the model's own, then its own for this method, then those given.

        model_defaults: Source.adapt_defaults. lora: the method's settings under low-rank tuning, which stand in place
        of the model's own for full fine-tuning; its own template stays.
        """
        general, key = model_defaults.get("recipe", {}), method
        if lora is not None:
            general, key = {"template": general.get("template"), **lora}, f"{method}+lora"
        special = model_defaults.get("methods", {}).get(key, {})
        return cls().changed(general).changed(special).changed(given)
