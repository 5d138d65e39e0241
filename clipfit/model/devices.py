"""Where a model runs, and how precisely."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch

from clipfit import ranks
from clipfit.errors import UsageError, first_line


def resolve_device(device: str) -> torch.device:
    """`auto` → CUDA if there is one, else the CPU; of several processes of torchrun each has a GPU of its own.

    Raises:
        UsageError: the named device does not exist, or has a number where there are several processes.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.started().count > 1 and device.startswith("cuda"):
        if device != "cuda":
            raise UsageError(f"each of several processes takes a GPU of its own: give --device cuda, not {device}.")
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products on CUDA need
    try:
        if device.startswith("cuda"):
            torch.backends.cudnn.allow_tf32 = False  # else its convolutions in fp32 are of 10 bits, not 23
        torch.zeros((), device=device).item()
        if ranks.started().count > 1 and device.startswith("cuda"):
            torch.cuda.set_device(device)  # what names no GPU would take memory on the first one
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {device!r} cannot be used here ({first_line(error)}); try --device cpu.") from error


LARGE = 20_000_000  # parameters of an image tower: a ViT-S has 22 million, ViT-B 86


def resolve_precision(precision: str, device: torch.device, model: Any = None) -> str:
    """What is asked for; `auto` → bf16 where the processor's products in it are fast and the model is large.

    By what the processor can, never by timing, so that one machine always decides alike. A model whose image tower has
    fewer than LARGE parameters stays in fp32: its products are so small that changing types costs what they gain.

    Args:
        model: of open_clip's; None: one that is large.
    """
    if precision != "auto":
        return precision
    return "bf16" if (model is None or is_large(model)) and multiplies_bf16(device) else "fp32"


def is_large(model: Any) -> bool:
    """Whether the image tower of a model of open_clip's gains by products in bf16."""
    return sum(p.numel() for p in model.visual.parameters()) >= LARGE


def multiplies_bf16(device: torch.device) -> bool:
    """Whether a device has instructions for products in bf16 that torch uses.

    A device that emulates bf16 is slower with it than without, a CPU hundreds of times. On x86 they are AVX-512 BF16
    and AMX, by way of oneDNN; oneDNN's own answer is not enough, for it takes every AVX-512 for an answer, nor is the
    processor's, for oneDNN may be off or told to keep to less. Of other processors nothing was measured: no.
    """
    if device.type == "cuda":
        with current(device):  # which the probe is of
            return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
        return False
    fast = _probed(torch.cpu, "_is_avx512_bf16_supported") or _probed(torch.cpu, "_is_amx_tile_supported")
    return fast and _probed(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") and not _kept_to_less()


def current(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within: a GPU with a number is the current one."""
    numbered = device.type == "cuda" and device.index is not None
    return torch.cuda.device(device) if numbered else contextlib.nullcontext()


def _probed(owner: Any, name: str) -> bool:
    """What a probe of torch's says; these are private, and one that is gone says no."""
    try:
        return bool(getattr(owner, name)())
    except (AttributeError, RuntimeError):
        return False


def _kept_to_less() -> bool:
    """Whether oneDNN is told by its environment to leave these instructions alone."""
    told = os.environ.get("ONEDNN_MAX_CPU_ISA", os.environ.get("DNNL_MAX_CPU_ISA", "")).upper()
    return bool(told) and not any(word in told for word in ("BF16", "AMX", "DEFAULT", "ALL", "AVX10", "FP16"))
