"""open_clip's tensors under the names of the transformers library: what CLIP and SigLIP have in common."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch


def named(name: str, names: Mapping[str, str]) -> str:
    """By the whole name, or by that of the module whose weight or bias it is. Raises KeyError."""
    if name in names:
        return names[name]
    module, _, kind = name.rpartition(".")
    return f"{names[module]}.{kind}"


def projections(block: str, kind: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights or biases of queries, keys and values at once (3·width, …), as the three that the library has."""
    for which, part in zip("qkv", tensor.chunk(3), strict=True):
        yield f"{block}self_attn.{which}_proj.{kind}", part
