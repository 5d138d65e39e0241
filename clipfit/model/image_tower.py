"""Image towers as a sequence of patch tokens: open_clip's own vision transformers, and those of timm.

Token editing (ATHA) needs three things of an image tower: blocks that pass on patch tokens of one width; a norm with an
affine part behind them, `ln_post` in the paper; and a linear head, `proj`. They are

| tower | ln_post | proj |
|---|---|---|
| open_clip's VisionTransformer | `ln_post` | `proj`, (V, D) |
| timm, pooled at the class token (MobileCLIP-B, EVA-02) | `norm` | `head`, a Linear with a bias |
| timm, mean of the patches (ViTamin) | `fc_norm`, behind the mean | the adapter's Linear, or `head` |

Attentional pooling (SigLIP, PE-Core) has neither: between its norm and the embedding stand values, a projection and an
MLP, which no linear system inverts. What is said of a mean holds for a patch that stands alone in it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import VisionTransformer
from torch import nn

from clipfit.errors import ModelError

Tensor = torch.Tensor
EXAMPLES = "ViT-B-16, MobileCLIP-B, EVA02-B-16 or ViTamin-B"


class Head(NamedTuple):
    """What a patch tower ends with: x ↦ proj(weight ⊙ x + bias), of a normalised token x."""

    proj: Tensor | None  # (V, D); None: V = D, and the norm comes last
    offset: Tensor | None  # (D,), added behind proj
    weight: Tensor  # (V,)
    bias: Tensor  # (V,)


@dataclass(frozen=True)
class PatchTower:
    """A vision transformer: `blocks` are called with tokens (B, prefix + L, V), patches row by row.

    prefix: class and register tokens before the patches. grid: rows and columns of patches; L is their product.
    """

    blocks: Sequence[nn.Module]
    prefix: int
    grid: tuple[int, int]
    norm: nn.LayerNorm
    linear: nn.Linear | Tensor | None

    @property
    def head(self) -> Head:
        """The tensors of norm and projection."""
        if isinstance(self.linear, nn.Linear):
            return Head(self.linear.weight.T, self.linear.bias, self.norm.weight, self.norm.bias)
        return Head(self.linear, None, self.norm.weight, self.norm.bias)

    def project(self, tokens: Tensor) -> Tensor:
        """Tokens as the last block leaves them (…, V) → what they would be as the image's features (…, D)."""
        proj, offset, *_ = self.head
        x: Tensor = self.norm(tokens)
        x = x if proj is None else x @ proj
        return x if offset is None else x + offset


def patch_tower(model: Any, name: str, what: str = "token editing") -> PatchTower:
    """The image tower of a model as one of patch tokens. Raises ModelError where it is none, with what is missing."""
    found = _tower_or_lack(model.visual)
    if isinstance(found, PatchTower):
        return found
    raise ModelError(
        f"{what} needs an image tower of patch tokens with a norm and a linear head behind them, but that of {name} "
        f"{found}: take a model such as {EXAMPLES}."
    )


def lacks_patches(model: Any) -> str | None:
    """What a model's image tower lacks for token editing, as in "pools by attention"; None where it has all."""
    found = _tower_or_lack(model.visual)
    return None if isinstance(found, PatchTower) else found


def _tower_or_lack(visual: Any) -> PatchTower | str:
    return _of_open_clip(visual) if isinstance(visual, VisionTransformer) else _of_timm(visual)


_BY_ATTENTION = "pools its patches by attention, in place of a linear head that can be inverted"


def _of_open_clip(visual: VisionTransformer) -> PatchTower | str:
    if visual.attn_pool is not None:
        return _BY_ATTENTION
    rows, columns = visual.grid_size
    return PatchTower(visual.transformer.resblocks, 1, (int(rows), int(columns)), visual.ln_post, visual.proj)


def _of_timm(visual: Any) -> PatchTower | str:
    trunk = getattr(visual, "trunk", visual)
    blocks, grid = getattr(trunk, "blocks", ()), getattr(getattr(trunk, "patch_embed", None), "grid_size", None)
    if not isinstance(visual, TimmModel) or not _one_width(blocks) or grid is None:
        return f"is a {type(trunk).__name__}, which has no sequence of patch tokens of one width"
    if getattr(trunk, "attn_pool", None) is not None:
        return _BY_ATTENTION
    norms = _acting([getattr(trunk, "norm", None), getattr(trunk, "fc_norm", None)])
    heads = _acting([getattr(trunk, "head", None), *visual.head])
    if len(norms) != 1 or not isinstance(norms[0], nn.LayerNorm) or norms[0].bias is None:
        return f"ends in {_names(norms)} in place of one LayerNorm with an affine part"
    linear = heads[0] if heads else None
    if len(heads) > 1 or not isinstance(linear, (nn.Linear, type(None))):
        return f"has {_names(heads)} for a head in place of one linear layer"
    return PatchTower(blocks, int(trunk.num_prefix_tokens), (int(grid[0]), int(grid[1])), norms[0], linear)


def _one_width(blocks: Any) -> bool:
    """Whether these are blocks of a transformer that pass on tokens of one width."""
    widths = {getattr(getattr(block, "norm1", None), "normalized_shape", None) for block in blocks}
    return len(widths) == 1 and None not in widths


def _acting(modules: Sequence[nn.Module | None]) -> list[nn.Module]:
    """Those that are there and change anything in evaluation mode."""
    return [m for m in modules if m is not None and not isinstance(m, (nn.Identity, nn.Dropout))]


def _names(modules: Sequence[nn.Module]) -> str:
    return " and ".join(f"a {type(module).__name__}" for module in modules) or "nothing"
