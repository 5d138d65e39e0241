"""Towers whose products are in bf16: autocast, and on processors what it leaves slow.

With autocast alone a step of ViT-B-32 on an AMX processor spent most of its time beside the products: where no gradient
goes through torch's attention it copies the projection's weight once for every token, attention itself is three times
as slow backward as in float32, and the gradient of a patch embedding seven times.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[object]:
    """The towers' products in bf16 where asked for."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()


def prepare(model: nn.Module, device: torch.device, precision: str) -> None:
    """Have a model's layers compute in the way that suits products in bf16 on a processor, or in their own again."""
    suits = precision == "bf16" and device.type == "cpu"
    for part in model.modules():
        if suits and type(part) in _INSTEAD and getattr(part, "in_proj_weight", part) is not None:
            part.__class__ = _INSTEAD[type(part)]
        elif not suits and type(part) in _USUAL:
            part.__class__ = _USUAL[type(part)]


@contextlib.contextmanager
def usual(model: nn.Module) -> Iterator[None]:
    """Within: the layers compute in their own way."""
    prepared = [(part, type(part)) for part in model.modules() if type(part) in _USUAL]
    for part, kind in prepared:
        part.__class__ = _USUAL[kind]
    try:
        yield
    finally:
        for part, kind in prepared:
            part.__class__ = kind


def round_products(tower: nn.Module) -> None:
    """Keep in bf16 the weights that autocast would round to it in every forward pass: the same bits, in less memory.

    For a tower that is not trained, and whose weights nobody reads. What is added, normalised or scaled by stays as it
    is, for autocast leaves it so; the first weights of torch's own attention too, unless it is prepared: torch's is
    another, fused one, of other bits, where they have the type of what comes in.
    """
    for part in tower.modules():
        if isinstance(part, _Attention):
            part.in_proj_weight.data = part.in_proj_weight.data.bfloat16()
        elif isinstance(part, (nn.Linear, nn.Conv2d)) and not (isinstance(part, _Convolution) and part.embeds_patches):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """Scaled dot-product attention of (n, heads, L, width); what is in bf16 on a processor is computed in float32."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.autocast("cpu", enabled=False):
        seen = F.scaled_dot_product_attention(
            q.float(), k.float(), v.float(), attn_mask=None if mask is None else mask.float()
        )
    return seen.to(q.dtype)


def self_attention(attn: Any, x: torch.Tensor, qkv: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """What an attention of torch's or open_clip's makes of x (n, L, width), given its qkv (n, L, 3, width)."""
    q, k, v = qkv.unflatten(3, (attn.num_heads, -1)).permute(2, 0, 3, 1, 4)  # each (n, heads, L, head width)
    mask = None if mask is None else mask.to(q)
    if mask is not None and mask.ndim == 3:  # (n · heads, L, L), of texts whose padding is masked
        mask = mask.unflatten(0, (len(x), attn.num_heads))
    seen: torch.Tensor = attn.out_proj(attention(q, k, v, mask).transpose(1, 2).flatten(2))
    return seen


class _Attention(nn.MultiheadAttention):
    """torch's, where it is called as open_clip's blocks call it."""

    def forward(  # type: ignore[override]
        self, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        mask = options.get("attn_mask")
        plain = options.keys() <= {"need_weights", "attn_mask"} and not options.get("need_weights", True)
        same = key is x and value is x and self.batch_first and not self.dropout and self.bias_k is None
        if not (_casting() and plain and same) or (mask is not None and not mask.is_floating_point()):
            return super().forward(x, key, value, **options)
        qkv = F.linear(x, self.in_proj_weight, self.in_proj_bias).unflatten(2, (3, -1))
        return self_attention(self, x, qkv, mask), None


class _Convolution(nn.Conv2d):
    """A patch embedding is computed in float32, and rounded; any other is as it was."""

    @property
    def embeds_patches(self) -> bool:
        return self.kernel_size == self.stride and max(self.kernel_size) > 1

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not (_casting() and self.embeds_patches):
            return super().forward(x)
        with torch.autocast("cpu", enabled=False):
            return super().forward(x.float()).to(torch.bfloat16)


def _casting() -> bool:
    return torch.is_autocast_enabled("cpu")


_INSTEAD: dict[type, type] = {nn.MultiheadAttention: _Attention, nn.Conv2d: _Convolution}
_USUAL = {own: usual for usual, own in _INSTEAD.items()}
