"""Weight ensembling: the ratio α between the pre-trained model (0) and the fine-tuned one (1)."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from clipfit.errors import ModelError

State = Mapping[str, torch.Tensor]


def interpolate(pretrained: State, finetuned: State, alpha: float) -> dict[str, torch.Tensor]:
    """θ̂ = α·θ_finetuned + (1 − α)·θ_zeroshot, both towers (CLIP-CITE, arXiv 2407.04003, eq. 7).

    α = 0 and α = 1 return the given tensors themselves. In between, floating-point tensors that differ are
    interpolated in float32 (or wider); tensors that are equal, such as the frozen logit scale and batch-norm
    statistics, are passed on: (1 − α)·x + α·x is not x for a tenth of all floats.

    Raises:
        ModelError: names or shapes differ, or a tensor that training must not touch (an integer) does.
    """
    if pretrained.keys() != finetuned.keys():
        odd = sorted(pretrained.keys() ^ finetuned.keys())
        raise ModelError(f"the two models are not the same architecture: only one of them has {odd[0]}.")
    if alpha == 0:
        return dict(pretrained)
    if alpha == 1:
        return dict(finetuned)
    return {name: _lerp(name, before, finetuned[name], alpha) for name, before in pretrained.items()}


def _lerp(name: str, before: torch.Tensor, after: torch.Tensor, alpha: float) -> torch.Tensor:
    if before.shape != after.shape:
        raise ModelError(f"{name} has shape {list(before.shape)} before and {list(after.shape)} after fine-tuning.")
    if torch.equal(before, after):
        return before
    if not before.is_floating_point() or "running_" in name:
        raise ModelError(f"{name} is a statistic that fine-tuning must leave alone, but it changed.")
    wide = torch.promote_types(before.dtype, torch.float32)
    return torch.lerp(before.to(wide), after.to(wide), alpha).to(before.dtype)
