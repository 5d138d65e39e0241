"""ATHA's token editing: head patches are moved towards their class text, tail patches away from it.

"Improving CLIP Adaptation by Breaking Tail Alignment for Source-Free Cross-Domain Few-Shot Learning" (ATHA, arXiv
2605.29776). Pure tensor functions and the settings they need; `editing` hooks them into the vision transformer.

Letters: B images, L patch tokens, C classes, D width of the joint embedding, V width of the vision transformer.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from clipfit.config.edits import EditSettings
from clipfit.model.image_tower import Head, PatchTower


class TokenEdits(torch.nn.Module):
    """The strengths a_l, b_l of every block, at 0 until `start`: attached, they change nothing."""

    def __init__(self, settings: EditSettings, blocks: int):
        super().__init__()
        self.settings = settings
        self.head = torch.nn.Parameter(torch.zeros(blocks))  # a
        self.tail = torch.nn.Parameter(torch.zeros(blocks))  # b

    @property
    def without_effect(self) -> bool:
        """Whether all strengths are 0."""
        return not (bool(self.head.any()) or bool(self.tail.any()))  # a CPU–GPU sync

    @torch.no_grad()
    def start(self) -> None:
        """The initial strengths of training; those of a run that is adapted on stay as they are."""
        assert self.settings.head_block is not None
        if self.head.any() or self.tail.any():
            return
        self.head[self.settings.head_block] = self.settings.head_strength
        self.tail.fill_(self.settings.tail_strength)

    def forward(
        self, patches: torch.Tensor, class_tokens: torch.Tensor, block: int, scale: torch.Tensor
    ) -> torch.Tensor:
        """Patch tokens (B, L, V) as they come to a block, class tokens (C, V) → edited patch tokens."""
        s = self.settings
        return edit_tokens(
            patches, class_tokens, self.head[block], self.tail[block], s.head_ratio, s.tail_ratio,
            soft_scale=scale if s.soft_edits else None,
        )  # fmt: skip


@contextlib.contextmanager
def editing(
    tower: PatchTower,
    edits: TokenEdits,
    class_tokens: torch.Tensor,
    scale: torch.Tensor,
    seen: list[Look] | None = None,
) -> Iterator[None]:
    """Within: patch tokens are edited before every block of a vision transformer; what is before them stays as it is.

    Args:
        class_tokens: (C, V). scale: τ⁻¹. seen: takes what every block's edit goes by, as its tokens come to it.
    """

    def edited(block: int, _module: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *rest = args  # (B, prefix + L, V)
        patches = x[:, tower.prefix :]
        if seen is not None:
            seen.append(look(patches, class_tokens, edits.settings.head_ratio, edits.settings.tail_ratio))
        with torch.autocast(x.device.type, enabled=False):  # a ranking in bf16 would be one of ties
            patches = edits(patches, class_tokens, block, scale)
        # float32 from here on: open_clip's blocks add their bf16 products to it, and its norms keep the type they get
        return (torch.cat([x[:, : tower.prefix].float(), patches], 1), *rest)

    handles = [b.register_forward_pre_hook(functools.partial(edited, number)) for number, b in enumerate(tower.blocks)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def edit_tokens(
    x: torch.Tensor,
    z: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    head_ratio: float,
    tail_ratio: float,
    soft_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """One block's edit (ATHA, arXiv 2605.29776).

        s_ic = cos(x_i, z_c),  m_i = max_c s_ic
        head (the ⌊L·ρ⌋ patches of highest m):  x_i + a · z_{argmax_c s_ic}
        tail (the ⌊L·γ⌋ patches of lowest m):   x_i − b · z_{argmin_c s_ic}

    The selection is hard: gradients flow through the added tokens and the strengths, not through the ranking. Of equal
    patches the earlier ranks higher, so that head and tail never overlap. Both edits together are one product of
    (B, L, C) weights with z: memory is O(B·L·(V + C)). The result is float32 whatever x is: beside a patch token the
    edit is so small that bf16 would round away 16 to 45% of its coordinates (b = 0.01).

    Args:
        x: (B, L, V) patch tokens, without the class token. z: (C, V). a, b: scalars.
        soft_scale: weights softmax(±soft_scale·s) over the classes in place of the best and the worst one.
    """
    with torch.no_grad():
        similarity = similarities(x.detach(), z.detach())  # (B, L, C)
        head, tail = ends(similarity.amax(2), head_ratio, tail_ratio)
        if soft_scale is None:
            classes = torch.arange(len(z), device=z.device)
            towards = (similarity.argmax(2)[..., None] == classes).to(similarity)  # (B, L, C)
            away = (similarity.argmin(2)[..., None] == classes).to(similarity)
        else:
            towards = (soft_scale * similarity).softmax(2)
            away = (-soft_scale * similarity).softmax(2)
        towards, away = towards * head[..., None], away * tail[..., None]
    return x.float() + (a * towards - b * away) @ z.float()


def similarities(x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """s_ic = cos(x_i, z_c): patch tokens (B, L, V), class tokens (C, V) → (B, L, C) float32."""
    return F.normalize(x.float(), dim=2) @ F.normalize(z.float(), dim=1).T


class Look(NamedTuple):
    """What a block's edit goes by: of every patch m_i, its class, and whether it is head or tail; each (B, L)."""

    similarity: torch.Tensor
    best: torch.Tensor
    head: torch.Tensor
    tail: torch.Tensor


def look(x: torch.Tensor, z: torch.Tensor, head_ratio: float, tail_ratio: float) -> Look:
    """The ranking of patch tokens (B, L, V) beside class tokens (C, V)."""
    m, best = similarities(x, z).max(2)
    return Look(m, best, *ends(m, head_ratio, tail_ratio))


def ends(m: torch.Tensor, head_ratio: float, tail_ratio: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Which patches are head and which are tail: m (B, L) → two masks (B, L), disjoint."""
    count = m.shape[1]
    rank = m.argsort(dim=1, descending=True, stable=True).argsort(1)  # (B, L), 0 is the most text-like
    return rank < share(count, head_ratio), rank >= count - share(count, tail_ratio)


def share(count: int, ratio: float) -> int:
    """⌊L·ρ⌋, without the rounding that makes 100·0.29 less than 29."""
    return math.floor(count * ratio + 1e-9)


def invert_head(f: torch.Tensor, head: Head, inverse: str = "least-squares") -> torch.Tensor:
    """Class tokens: text features brought into the vision width by inverting the vision head, f (C, D) → z (C, V).

    The head maps a normalised token through `ln_post`'s affine part and projᵀ; z = (y − bias) / weight, where y is the
    solution of projᵀ·y = f: for D ≤ V the one of least norm (proj = QR, y = Q·R⁻ᵀ·f), else the least squares. The
    paper writes LayerNorm(T)·W_projᵀ, which is `transpose`: y = proj·f; the authors' code solves. A head that adds an
    offset (timm's have one) is inverted with it: f less the offset stands in place of f.

    Gradients flow to f alone.

    Args:
        f: (C, D) float32.
    """
    proj, offset, weight, bias = (None if part is None else part.detach().float() for part in head)
    assert weight is not None
    assert bias is not None
    f = f if offset is None else f - offset
    if proj is None:
        y = f
    elif inverse == "transpose":
        y = f @ proj.T
    elif proj.shape[1] <= proj.shape[0]:
        q, r = torch.linalg.qr(proj)  # (V, D), (D, D)
        y = (q @ torch.linalg.solve_triangular(r.T, f.T, upper=False)).T
    else:
        q, r = torch.linalg.qr(proj.T)  # (D, V), (V, V)
        y = torch.linalg.solve_triangular(r, q.T @ f.T, upper=True).T
    return (y - bias) / weight
