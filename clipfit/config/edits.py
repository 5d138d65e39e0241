"""Settings of ATHA's token edits (arXiv 2605.29776); the edits themselves are in model/edits.py."""

from __future__ import annotations

from dataclasses import dataclass, replace

from clipfit.errors import UsageError

INVERSES = ("least-squares", "transpose")


@dataclass(frozen=True)
class EditSettings:
    """ρ, γ, where and how strongly the edits start. Defaults: the paper's text (the authors' code differs).

    None for a block: the paper's place in a model of another depth, see `placed`.
    """

    head_ratio: float = 0.1  # ρ
    tail_ratio: float = 0.1  # γ
    head_strength: float = 0.8  # a_l starts so at head_block, and at 0 elsewhere
    head_block: int | None = None
    tail_strength: float = 0.01  # b_l starts so everywhere
    text_block: int | None = None  # whose output gives the class tokens
    class_token_inverse: str = "least-squares"
    soft_edits: bool = False  # softmax weights over the classes in place of the best and the worst one

    def __post_init__(self) -> None:
        if min(self.head_ratio, self.tail_ratio) < 0 or self.head_ratio + self.tail_ratio > 1 + 1e-9:
            raise UsageError(
                "head and tail ratio must not be negative, nor exceed 1 together; "
                f"found {self.head_ratio} and {self.tail_ratio}."
            )
        if self.class_token_inverse not in INVERSES:
            raise UsageError(
                f"the class tokens' inverse must be one of {', '.join(INVERSES)}; found {self.class_token_inverse!r}."
            )

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
