"""A model in shares: of every block of its towers each process holds a part of the weights, their gradient and moments.

torch's FSDP2 (`fully_shard`): a block is put together while it computes, forward and backward, and its gradient is
summed over the processes on its way to the shares. What stands beside the blocks (embeddings, norms, heads) is small,
and whole in every process.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from clipfit import ranks
from clipfit.errors import ModelError, UsageError
from clipfit.model import attention, loading
from clipfit.model.clip import Clip, FrozenImageTower

Tensor = torch.Tensor


def require_shares(model: Any, tuning: str) -> None:
    """Raises UsageError or ModelError where weights cannot be shared out."""
    if ranks.here().count == 1:
        raise UsageError("--shard shares the weights out among processes: start them with torchrun, or leave it out.")
    if tuning != "full":
        raise UsageError("--shard shares out what --tuning full trains; adapters are small: leave it out.")
    if not all(attention.towers(model).values()):
        raise ModelError("--shard needs towers of transformer blocks, which this model has not: leave it out.")


@contextlib.contextmanager
def sharded(clip: Clip, teacher: Callable[[Tensor], Tensor] | None = None) -> Iterator[None]:
    """Within: each process holds its share of the blocks, those of a frozen tower too. The model is whole afterwards.

    Where it ends by an error the model is of no use.

    Raises:
        UsageError, ModelError: see require_shares.
    """
    require_shares(clip.model, "full" if clip.adapters is None else "lora")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard  # takes a while to import

    mesh = init_device_mesh(clip.device.type, (ranks.here().count,))
    for block in [*_blocks(clip.model), *(_blocks(teacher) if isinstance(teacher, FrozenImageTower) else ())]:
        # each stands alone, so that torch takes each for the whole and would keep it together after its forward pass
        fully_shard(block, mesh=mesh, reshard_after_forward=True)
        block.set_gradient_divide_factor(1.0)  # the sum, not the mean
        block.set_force_sum_reduction_for_comms(True)
    yield
    with ranks.noticing():
        state = {name: _whole(tensor) for name, tensor in clip.state().items()}
    clip.model = loading.rebuild(clip.source, state, clip.additions, clip.device).model
    clip.precision = clip.precision  # these layers, too, compute as suits it


def _blocks(model: Any) -> Sequence[Any]:
    if isinstance(model, FrozenImageTower):
        return attention.image_blocks(model.visual)
    return [block for blocks in attention.towers(model).values() for block in blocks]


def put_together(tensor: Tensor) -> Tensor:
    """The whole of a tensor in shares, in the first process's main memory, and nothing elsewhere; others as they are.

    All processes ask for it, in the same order.
    """
    if not ranks.in_shares(tensor):
        return tensor
    whole = _whole(tensor)
    return whole.cpu() if ranks.here().leads else whole.new_empty(0)


def share_of(whole: Tensor, like: Tensor) -> Tensor:
    """This process's share of what all have whole, where `like`, of that shape, is in shares; as it is where not."""
    if not ranks.in_shares(like) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole.to(like.device), like.device_mesh, like.placements)  # type: ignore[attr-defined]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if ranks.in_shares(tensor) else tensor  # type: ignore[attr-defined]
