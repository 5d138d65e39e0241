"""Settings of low-rank adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clipfit.config.options import Checked, option


@dataclass(frozen=True)
class LoraSettings(Checked):
    """Rank r, α, and the dropout of the adapters' input. Defaults: ATHA's."""

    rank: int = option(
        16, "Of the adapters.", low=1, key="lora_rank", default_is="the method's paper: atha 16, finetune 2"
    )
    alpha: float = option(
        8.0, "The adapters count α/√rank times.", above=0, key="lora_alpha",
        default_is="the method's paper: atha 8, finetune 1",
    )  # fmt: skip
    dropout: float = option(
        0.25, "Of the adapters' input.", low=0, below=1, key="lora_dropout", default_is="0.25, as in both papers"
    )

    @property
    def scaling(self) -> float:
        """α / √r, as in the code of both papers and in rsLoRA (arXiv 2312.03732); LoRA's own paper has α / r."""
        return self.alpha / math.sqrt(self.rank)
