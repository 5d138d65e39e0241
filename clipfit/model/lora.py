"""Low-rank adapters on the queries, keys and values of every transformer block, merged into plain weights at the end.

LoRA: "Low-Rank Adaptation of Large Language Models", arXiv 2106.09685; on CLIP: CLIP-LoRA, arXiv 2405.18541, and ATHA,
arXiv 2605.29776. q, k and v share one matrix in the blocks of open_clip and timm, which keepers of LoRA libraries treat
as one matrix of one rank; the papers adapt each of the three, with a dropout of its own, hence these lines.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F

from clipfit import streams
from clipfit.config.lora import LoraSettings
from clipfit.errors import ModelError
from clipfit.model import attention, bf16
from clipfit.streams import Rows

if TYPE_CHECKING:
    from clipfit.model.clip import Clip

TOWERS = ("image", "text")


class Adapters:
    """What the adapters of all blocks share: their settings, and which random numbers they draw.

    A dropout mask follows from the seed, the step, the tower's block and the number of the image or class it is for,
    so that any part of a batch, or any process, can draw its own.
    """

    def __init__(self, settings: LoraSettings, seed: int, device: torch.device):
        self.settings, self._seed, self._device = settings, seed, device
        self.rows: Rows | None = None  # those at hand

    @contextlib.contextmanager
    def drawing(self, rows: Rows | None) -> Iterator[None]:
        """Within: masks are those of these rows."""
        before, self.rows = self.rows, rows
        try:
            yield
        finally:
            self.rows = before

    def mask(self, tower: str, block: int, length: int, width: int) -> torch.Tensor:
        """Which inputs of q, k, v are kept: (3, n, length, width) bool, for the n rows at hand."""
        if self.rows is None:
            raise ValueError("adapters with dropout need to know which images or classes they are trained on")
        step, numbers = self.rows
        # position by position: a text that is cut shorter draws the same numbers; on a GPU these depend on how many are
        # drawn in all, hence always so many that every text fits
        drawn_length = length if self._device.type == "cpu" else math.ceil(length / 128) * 128
        streams_of_rows = (self._stream(f"{tower} dropout", step, block, number) for number in numbers)
        drawn = [torch.rand(drawn_length, 3, width, generator=g, device=g.device)[:length] for g in streams_of_rows]
        return torch.stack(drawn).permute(2, 0, 1, 3) >= self.settings.dropout

    def started(self, tower: str, block: int, shape: tuple[int, ...]) -> torch.Tensor:
        """A at the start: uniform within 1/√width, as torch's own linear layers start, and A in both papers' code."""
        bound = 1 / math.sqrt(shape[-1])
        generator = self._stream("adapters", TOWERS.index(tower), block)
        return torch.empty(shape, device=self._device).uniform_(-bound, bound, generator=generator)

    def _stream(self, purpose: str, *index: int) -> torch.Generator:
        return streams.generator(self._seed, purpose, *index, device=self._device)


class Place(NamedTuple):
    """Where adapters are: the tower ("image" or "text"), the number of its block, and which of q, k, v they are for."""

    tower: str
    block: int
    parts: tuple[int, ...]


class LowRank(torch.nn.Module):
    """s·B_j·A_j for some of q, k, v (j = 0, 1, 2), beside frozen weights of (parts · out, width)."""

    def __init__(self, like: torch.Tensor, adapters: Adapters, place: Place):
        super().__init__()
        self.adapters, self.place, self.settings = adapters, place, adapters.settings
        rank, parts, width = self.settings.rank, list(place.parts), like.shape[1]
        started = adapters.started(place.tower, place.block, (3, rank, width))[parts]
        self.down = torch.nn.Parameter(started.to(like))  # A: (parts, rank, width)
        # B: (parts, out, rank), 0 so that the first step starts at CLIP
        self.up = torch.nn.Parameter(like.new_zeros(len(parts), len(like) // len(parts), rank))

    def added(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (n, L, width) → what is added to their projections: (n, L, parts, out)."""
        low = torch.einsum("jnld,jrd->nljr", self._dropped(x), self.down)
        return self.settings.scaling * torch.einsum("nljr,jdr->nljd", low, self.up)

    def _dropped(self, x: torch.Tensor) -> torch.Tensor:
        """The input of the adapters, (parts, n, L, width), with a dropout mask for each."""
        p, place = self.settings.dropout, self.place
        if p == 0 or not torch.is_grad_enabled():
            return x.expand(len(place.parts), *x.shape)
        kept = self.adapters.mask(place.tower, place.block, *x.shape[1:])[list(place.parts)]
        return x * kept.to(x) / (1 - p)

    @torch.no_grad()
    def merge_into(self, weight: torch.Tensor) -> None:
        """W_j + s·B_j·A_j."""
        weight.add_(self.settings.scaling * (self.up @ self.down).flatten(0, 1))


class LoraAttention(LowRank):
    """Self-attention with frozen weights W and adapters: (W_j + s·B_j·A_j)·x for j in q, k, v.

    Stands in for the attention in a block of open_clip's, torch's own or open_clip's: batch first, (n, L, width).
    """

    def __init__(self, frozen: Any, adapters: Adapters, place: Place):
        super().__init__(frozen.in_proj_weight, adapters, place)
        self.frozen = frozen

    def forward(self, x: torch.Tensor, *_same: Any, attn_mask: torch.Tensor | None = None, **_options: Any) -> Any:
        """Called as open_clip's blocks call their attention: key and value, where they are named, are x itself."""
        f = self.frozen
        qkv = F.linear(x, f.in_proj_weight, f.in_proj_bias).unflatten(2, (3, -1)) + self.added(x)  # (n, L, 3, width)
        out = bf16.self_attention(f, x, qkv, attn_mask)
        return (out, None) if isinstance(f, torch.nn.MultiheadAttention) else out

    def merged(self) -> Any:
        """The attention it stood in for, with the adapters in its weights."""
        self.merge_into(self.frozen.in_proj_weight)
        return self.frozen


class LoraLinear(LowRank):
    """The layer that makes q, k and v of tokens in timm's attention, or one of them, with its adapters."""

    def __init__(self, frozen: torch.nn.Linear, adapters: Adapters, place: Place):
        super().__init__(frozen.weight, adapters, place)
        self.frozen = frozen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Tokens (n, L, width) → (n, L, parts · out)."""
        out: torch.Tensor = self.frozen(x) + self.added(x).flatten(2)
        return out

    def merged(self) -> torch.nn.Linear:
        """The layer it stood in for, with the adapters in its weights."""
        self.merge_into(self.frozen.weight)
        return self.frozen


@contextlib.contextmanager
def adapted(clip: Clip, settings: LoraSettings, seed: int) -> Iterator[None]:
    """Within: a CLIP of which only adapters can be trained. Afterwards: a plain CLIP with the adapters merged."""
    trainable = [parameter for parameter in clip.model.parameters() if parameter.requires_grad]
    clip.adapters = attach(clip.model, Adapters(settings, seed, clip.device))
    try:
        yield
    finally:
        merge(clip.model)
        clip.adapters = None
        for parameter in trainable:
            parameter.requires_grad_(True)


def require_attention(model: Any) -> None:
    """Raises ModelError for a tower that is no transformer, or one whose attention is of another kind."""
    reason = lacks_attention(model)
    if reason:
        raise ModelError(
            f"--tuning lora needs two transformers with plain multi-head attention, but {reason}: use --tuning full "
            "or a model such as ViT-B-16 or ViT-B-16-SigLIP2."
        )


def lacks_attention(model: Any) -> str | None:
    """What of a model's towers has no place for adapters; None where both have."""
    for name, blocks in attention.towers(model).items():
        for block in blocks or [None]:
            if not attention.projections(block):
                kind = type(getattr(block, "attn", None) or attention.tower_of(model, name)).__name__
                return f"the {name} tower has {kind}"
    return None


def attach(model: Any, adapters: Adapters) -> Adapters:
    """Freeze a model of open_clip's, and put adapters on the attention of every block of both its towers.

    Raises:
        ModelError: a tower that is no transformer, or one whose attention is of another kind.
    """
    require_attention(model)
    model.requires_grad_(False)
    for tower, blocks in attention.towers(model).items():
        for number, block in enumerate(blocks):
            for owner, name, parts in attention.projections(block):
                frozen = getattr(owner, name)
                kind = LoraLinear if isinstance(frozen, torch.nn.Linear) else LoraAttention
                setattr(owner, name, kind(frozen, adapters, Place(tower, number, parts)))
    return adapters


def merge(model: Any) -> None:
    """Add the adapters to the weights they belong to: what is left is a plain model again, still frozen."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, (LoraAttention, LoraLinear)):
                setattr(module, name, child.merged())
