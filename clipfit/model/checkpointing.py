"""Gradient checkpointing: the blocks of both towers keep their input alone, and are computed again backward.

"Training Deep Nets with Sublinear Memory Cost", arXiv 1604.06174. open_clip's own switch does nothing for a ResNet or a
text tower of the transformers library (which only heeds it in training mode), and would compute a block again without
the adapters' rows, which are known while a batch is encoded and not afterwards: hence these lines.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from clipfit.errors import ModelError
from clipfit.model import attention
from clipfit.model.clip import Clip


def require_blocks(model: Any) -> None:
    """Raises ModelError for a tower that is no transformer of open_clip's or timm's."""
    for name, blocks in attention.towers(model).items():
        if not blocks:
            kind = type(attention.tower_of(model, name)).__name__
            raise ModelError(
                f"--gradient-checkpointing needs towers of transformer blocks, but the {name} tower is a {kind}: leave "
                "it out, and give --micro-batch."
            )


@contextlib.contextmanager
def checkpointed(clip: Clip) -> Iterator[None]:
    """Within: what a block computes is forgotten, and what an edit before it does. Features and gradients stay.

    Raises:
        ModelError: a tower has no blocks.
    """
    require_blocks(clip.model)
    modules = [block for blocks in attention.towers(clip.model).values() for block in blocks]
    modules += [clip.edits] if clip.edits else []
    for module in modules:
        module.forward = functools.partial(_forward, module.forward, clip)
    try:
        yield
    finally:
        for module in modules:
            del module.forward  # that of its class again


def _forward(own: Callable[..., Any], clip: Clip, *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return own(*args, **kwargs)
    rows = clip.adapters.rows if clip.adapters else None
    # every random number has a stream of its own: there is no state of generators to put back
    return checkpoint(
        own, *args, use_reentrant=False, preserve_rng_state=False,
        context_fn=lambda: (contextlib.nullcontext(), clip.drawing(rows)), **kwargs,
    )  # fmt: skip
