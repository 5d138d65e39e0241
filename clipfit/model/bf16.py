"""Towers whose products are in bf16: autocast, and on processors what it leaves slow.

With autocast alone a step of ViT-B-32 on an AMX processor spent most of its time beside the products: where no gradient
goes through torch's attention it copies the projection's weight once for every token, attention itself is three times
as slow backward as in float32, and the gradient of a patch embedding seven times.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
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
        own = _INSTEAD.get(type(part))
        if own and suits:
            part.forward = functools.partial(own, part)
        elif own and "forward" in vars(part):
            del part.forward  # that of its class again


def round_products(tower: nn.Module) -> None:
    """Keep in bf16 the weights that autocast would round to it in every forward pass: the same bits, in less memory.

    For a tower that is not trained, and whose weights nobody reads. What is added, normalised or scaled by stays as it
    is, for autocast leaves it so; the first weights of torch's own attention too, where it is not `attend` that takes
    them: torch's is another, fused one, of other bits, where they have the type of what comes in.
    """
    for part in tower.modules():
        if isinstance(part, (nn.Linear, nn.Conv2d)):
            for parameter in part.parameters(recurse=False):
                parameter.data = parameter.data.bfloat16()
        elif isinstance(part, nn.MultiheadAttention) and "forward" in vars(part):
            part.in_proj_weight.data = part.in_proj_weight.data.bfloat16()


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


def _attend(
    attn: nn.MultiheadAttention, x: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """In place of torch's forward, where it is called as open_clip's blocks call it."""
    plain = attn.batch_first and attn.in_proj_weight is not None and options.keys() <= {"need_weights", "attn_mask"}
    if not plain or options.get("need_weights", True) or key is not x or value is not x or attn.dropout:
        return type(attn).forward(attn, x, key, value, **options)
    qkv = F.linear(x, attn.in_proj_weight, attn.in_proj_bias).unflatten(2, (3, -1))
    return self_attention(attn, x, qkv, options.get("attn_mask")), None


def _embed_patches(layer: nn.Conv2d, x: torch.Tensor) -> torch.Tensor:
    """A patch embedding that is trained, in float32; any other convolution as it is."""
    patches = layer.kernel_size == layer.stride and max(layer.kernel_size) > 1
    if not (patches and torch.is_grad_enabled() and layer.weight.requires_grad):
        return type(layer).forward(layer, x)
    with torch.autocast("cpu", enabled=False):
        return type(layer).forward(layer, x.float())


_INSTEAD: dict[type, Callable[..., Any]] = {nn.MultiheadAttention: _attend, nn.Conv2d: _embed_patches}
