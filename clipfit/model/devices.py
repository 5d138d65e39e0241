"""Where a model runs, and how precisely."""

from __future__ import annotations

import os

import torch

from clipfit.errors import UsageError, first_line


def resolve_device(device: str) -> torch.device:
    """`auto` → CUDA if there is one, else the CPU.

    Raises:
        UsageError: the named device does not exist.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic matrix products on CUDA need
    try:
        torch.zeros((), device=device).item()
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device {device!r} cannot be used here ({first_line(error)}); try --device cpu.") from error


def resolve_precision(precision: str, device: torch.device) -> str:
    """What is asked for; `auto` → bf16 on a CUDA device that computes in it, fp32 elsewhere.

    A device that emulates bf16 is slower with it than without, a CPU hundreds of times.
    """
    if precision != "auto":
        return precision
    native = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return "bf16" if native else "fp32"
