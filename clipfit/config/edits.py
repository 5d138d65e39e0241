"""Settings of ATHA's token edits (arXiv 2605.29776); the edits themselves are in model/edits.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

from clipfit.config.options import Checked, option, require
from clipfit.errors import UsageError

INVERSES = ("least-squares", "transpose")


@dataclass(frozen=True)
class EditSettings(Checked):
    """ρ, γ, where and how strongly the edits start. Defaults: the paper's text (the authors' code differs).

    None for a block: the paper's place in a model of another depth, see `placed`.
    """

    head_ratio: float = option(0.1, "ρ, share of the patches moved towards a text.", low=0, high=1)
    tail_ratio: float = option(0.1, "γ, share of the patches moved away from one.", low=0, high=1)
    head_strength: float = option(0.8, "a starts so at the head block, and at 0 elsewhere.")
    head_block: int | None = option(None, "That block, from 0.", low=0, default_is="7/12 of the depth")
    tail_strength: float = option(0.01, "b starts so at every block.")
    text_block: int | None = option(
        None, "The text tower's block, from 0, that gives the class tokens.", low=0, default_is="the last but one"
    )
    class_token_inverse: str = option("least-squares", "How class tokens reach the width of patches.", choices=INVERSES)
    soft_edits: bool = option(False, "Softmax weights over the classes, not the best and the worst one alone.")

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.head_ratio + self.tail_ratio <= 1 + 1e-9, "head_ratio and tail_ratio must not exceed 1 together",
            (self.head_ratio, self.tail_ratio),
        )  # fmt: skip

    def placed(self, vision_blocks: int, text_blocks: int) -> EditSettings:
        """With both blocks filled in: ⌊7n/12⌋ of n vision blocks, n − 2 of n text blocks, counted from 0.

        Raises:
            UsageError: a block that the model does not have.
        """
        filled = replace(
            self,
            head_block=7 * vision_blocks // 12 if self.head_block is None else self.head_block,
            text_block=max(text_blocks - 2, 0) if self.text_block is None else self.text_block,
        )
        for name, block, count in (
            ("head_block", filled.head_block, vision_blocks),
            ("text_block", filled.text_block, text_blocks),
        ):
            if block is None or not 0 <= block < count:
                raise UsageError(f"{name} must lie between 0 and {count - 1} for this model; found {block}.")
        return filled
