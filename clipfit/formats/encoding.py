"""What a fine-tuning changed, in few bytes: low precision with a scale a tensor, or the low rank where it has one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from clipfit.ensemble import State
from clipfit.errors import ModelError

FACTORS = (".up", ".down")  # behind the name of a tensor that is stored as a product
DTYPES = {"int8": torch.int8, "fp16": torch.float16, "fp32": torch.float32}
NO_RANK = 1e-3  # of the largest singular value: what is left beyond the rank is more than rounding


@dataclass(frozen=True)
class Encoding:
    """A way to store a difference. low_rank: as factors, where a tensor has the rank of the adapters."""

    dtype: str
    low_rank: bool = False

    @property
    def name(self) -> str:
        """What people call it."""
        return f"low rank, {self.dtype}" if self.low_rank else self.dtype


@dataclass(frozen=True)
class Encoded:
    """A difference as it is stored. scales: by the names of the tensors that changed; a product has one scale."""

    tensors: Mapping[str, torch.Tensor]
    scales: Mapping[str, float]

    @property
    def bytes(self) -> int:
        """What the tensors take."""
        return sum(t.numel() * t.element_size() for t in self.tensors.values())

    def to(self, device: torch.device | str) -> Encoded:
        """The same on a device."""
        return replace(self, tensors={name: t.to(device) for name, t in self.tensors.items()})


Factors = Mapping[str, tuple[torch.Tensor, torch.Tensor]]


def changes(before: State, after: State) -> dict[str, torch.Tensor]:
    """What was added to the tensors that changed, in float32, by name.

    Raises:
        ModelError: the two have not the same tensors.
    """
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise ModelError(f"the two models are not the same architecture: only one of them has {odd[0]}.")
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    return {name: after[name].float() - before[name].float() for name in before if name in changed}


def factors(changed: State, rank: int) -> Factors:
    """up (…, m, r), down (…, r, n) of each tensor that is their product, but for rounding.

    The queries, keys and values of an attention lie in one matrix, and have adapters of their own: three products.
    """
    return {name: found for name, t in changed.items() if t.ndim == 2 and (found := _factored(t, rank))}


def _factored(tensor: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor] | None:
    rows, columns = tensor.shape
    parts = tensor.unflatten(0, (3, -1)) if rows == 3 * columns else tensor[None]
    more = min(rank + 8, *parts.shape[1:])  # to see what is beyond the rank, and for exactness
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        u, s, v = torch.svd_lowrank(parts.double(), q=more, niter=4)  # (k, m, q), (k, q), (k, n, q)
    if more > rank and bool((s[:, rank] > NO_RANK * s[:, 0]).any()):
        return None
    root = s[:, None, :rank].sqrt()
    up, down = (u[..., :rank] * root).float(), (v[..., :rank] * root).mT.float()
    return (up, down) if up.numel() + down.numel() < tensor.numel() else None


def encode(changed: State, found: Factors, encoding: Encoding) -> Encoded:
    """A difference as an encoding stores it."""
    tensors: dict[str, torch.Tensor] = {}
    scales: dict[str, float] = {}
    for name, tensor in changed.items():
        scales[name] = 1.0
        parts = dict(zip(FACTORS, found[name], strict=True)) if encoding.low_rank and name in found else {"": tensor}
        for ending, part in parts.items():
            tensors[name + ending], scale = _scaled(part, DTYPES[encoding.dtype])
            scales[name] *= scale
    return Encoded(tensors, scales)


def _scaled(tensor: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
    """Numbers in a type, and by what they are to be multiplied."""
    if dtype == torch.float32:
        return tensor, 1.0
    largest = float(tensor.abs().max()) or 1.0
    if dtype == torch.int8:
        return (tensor / (largest / 127)).round().to(dtype), largest / 127
    return (tensor / largest).to(dtype), largest  # small numbers would lose digits in fp16


def add(before: State, encoded: Encoded, alpha: float) -> dict[str, torch.Tensor]:
    """The weights at α: what is stored, α times, added to the pre-trained weights; at 0 these themselves."""
    if alpha == 0:
        return dict(before)
    return {
        name: tensor if name not in encoded.scales else _added(name, tensor, encoded, alpha)
        for name, tensor in before.items()
    }


def _added(name: str, before: torch.Tensor, encoded: Encoded, alpha: float) -> torch.Tensor:
    up, down = (encoded.tensors.get(name + ending) for ending in FACTORS)
    stored = encoded.tensors[name].float() if up is None or down is None else up.float() @ down.float()
    times = alpha * encoded.scales[name]
    return (before.float() + times * stored.reshape(before.shape)).to(before.dtype)


def encodings(low_rank: bool) -> list[Encoding]:
    """All that are tried."""
    plain = [Encoding(dtype) for dtype in DTYPES]
    return [*(Encoding(dtype, True) for dtype in DTYPES), *plain] if low_rank else plain
