"""Settings of low-rank adapters."""

from __future__ import annotations

import math
from dataclasses import dataclass

from clipfit.errors import UsageError


@dataclass(frozen=True)
class LoraSettings:
    """Rank r, α, and the dropout of the adapters' input. Defaults: ATHA's."""

    rank: int = 16
    alpha: float = 8.0
    dropout: float = 0.25

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not 0 <= self.dropout < 1:
            raise UsageError(
                "LoRA needs a rank of at least 1, a positive alpha and a dropout from 0 to below 1; "
                f"found {self.rank}, {self.alpha} and {self.dropout}."
            )

    @property
    def scaling(self) -> float:
        """α / √r, as in the code of both papers and in rsLoRA (arXiv 2312.03732); LoRA's own paper has α / r."""
        return self.alpha / math.sqrt(self.rank)
