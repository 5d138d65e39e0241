"""clipfit-tiny's two towers as open_clip builds them, and the forward passes that training needs."""

import json
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch import nn

from loop import half

CONFIG = Path(__file__).parents[2] / "clipfit/assets/clipfit-tiny/open_clip_config.json"
TEMPLATES = (
    "{}", "a {}", "a photo of a {}", "a photo of the {}", "an icon of a {}", "a drawing of a {}", "a picture of a {}",
    "a symbol of a {}", "a sketch of a {}", "an emoji of a {}", "an image of one {}",
)  # fmt: skip


def build() -> open_clip.CLIP:
    return open_clip.CLIP(**json.loads(CONFIG.read_text())["model_cfg"])


def blocks(transformer: nn.Module, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """open_clip's residual blocks, (n, L, width) → the same shape.

    Attention as two plain products: for a few dozen tokens torch's fused kernel takes longer on a CPU.
    """
    with half():
        for block in transformer.resblocks:
            attn = block.attn
            qkv = F.linear(block.ln_1(x), attn.in_proj_weight, attn.in_proj_bias)
            q, k, v = qkv.float().unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # (n, heads, L, 64)
            with torch.autocast("cpu", enabled=False):
                scores = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
                seen = (scores if mask is None else scores + mask).softmax(-1) @ v
            x = x + attn.out_proj(seen.transpose(1, 2).flatten(2))
            x = x + block.mlp(block.ln_2(x))
    return x.float()


class TextPart(nn.Module):
    """The text tower: captions → unit-norm embeddings (n, D)."""

    def __init__(self, clip: open_clip.CLIP):
        super().__init__()
        for name in ("token_embedding", "positional_embedding", "transformer", "ln_final", "text_projection"):
            setattr(self, name, getattr(clip, name))
        self.register_buffer("attn_mask", clip.attn_mask, persistent=False)
        self.tokenizer = open_clip.SimpleTokenizer(context_length=clip.context_length)

    def forward(self, captions: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(captions)
        ends = tokens.argmax(1)
        length = int(ends.max()) + 1
        x = self.token_embedding(tokens[:, :length]) + self.positional_embedding[:length]
        x = blocks(self.transformer, x, self.attn_mask[:length, :length])
        x = self.ln_final(x[torch.arange(len(x)), ends])
        return F.normalize(x @ self.text_projection, dim=1)


def positions(grid: int, width: int) -> torch.Tensor:
    """Where a patch is, as sines and cosines of both coordinates: (1 + grid², width), the class token's row is 0.

    As strong as the patches themselves from the first step: with open_clip's small random start the tower sees a bag
    of patches for thousands of steps. Coordinates count 1/8 of the picture, so 32 px and 64 px agree.
    """
    at = (torch.arange(grid) + 0.5) * 8 / grid
    waves = at[:, None] * 2 ** (1 - torch.arange(width // 4) * 6 / (width // 4))  # (grid, width / 4)
    waves = torch.cat([waves.sin(), waves.cos()], 1)
    y, x = waves[:, None].expand(-1, grid, -1), waves[None].expand(grid, -1, -1)
    return torch.cat([torch.zeros(1, width), torch.cat([y, x], 2).reshape(grid * grid, width)])


class VisionPart(nn.Module):
    """The vision tower at 64 px, or at 32 px with position embeddings of its own."""

    def __init__(self, clip: open_clip.CLIP, side: int):
        super().__init__()
        self.visual = clip.visual
        self.visual.positional_embedding = nn.Parameter(positions(side // 8, self.visual.positional_embedding.shape[1]))
        preprocess = json.loads(CONFIG.read_text())["preprocess_cfg"]
        self.mean, self.std = preprocess["mean"][0], preprocess["std"][0]

    def forward(self, x: torch.Tensor, keep: int) -> torch.Tensor:
        """(B, 3, side, side) in 0…1 → (B, D), unit norm; only the `keep` patches of greatest variance are looked at."""
        v = self.visual
        patches = v.conv1((x - self.mean) / self.std).flatten(2).transpose(1, 2)  # (B, L, V)
        patches = patches + v.positional_embedding[1:]
        if keep < patches.shape[1]:
            detail = F.unfold(x, 8, stride=8).var(1)  # (B, L)
            chosen = detail.topk(keep, dim=1).indices
            patches = patches.gather(1, chosen[..., None].expand(-1, -1, patches.shape[2]))
        first = (v.class_embedding + v.positional_embedding[0]).expand(len(x), 1, -1)
        tokens = blocks(v.transformer, v.ln_pre(torch.cat([first, patches], 1)))
        return F.normalize(v.ln_post(tokens[:, 0]) @ v.proj, dim=1)

    def grow_from(self, weights: dict[str, torch.Tensor]) -> None:
        """Start from weights trained at 32 px: positions are interpolated, a patch sees the same share of pixels."""
        positions = weights["visual.positional_embedding"]
        grid = positions[1:].T.reshape(1, -1, 4, 4)
        grid = F.interpolate(grid, size=(8, 8), mode="bicubic", align_corners=False).flatten(2)[0].T
        weights["visual.positional_embedding"] = torch.cat([positions[:1], grid])
        self.load_state_dict(weights)
