"""What computes a model's image tower in torch's place, where the user asks: onnxruntime or OpenVINO, on the processor.

Class texts are read by torch whatever is chosen. Of a model in memory the tower is written as an ONNX graph once.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

import torch

from clipfit.config.shared import RUNTIMES, TORCH
from clipfit.engines import sessions
from clipfit.errors import UsageError
from clipfit.model import bf16, devices
from clipfit.model.clip import Clip
from clipfit.model.named import ImageEngine

EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino"}
WRITING = ("onnx", "onnxscript")  # to have a model in memory as a graph


@dataclass(frozen=True)
class Engine:
    """What computes image embeddings, and in which number type."""

    runtime: str
    precision: str

    def __str__(self) -> str:
        return self.precision if self.runtime == TORCH else f"{self.precision} by {self.runtime}"

    def attach(self, clip: Clip) -> None:
        """Have it compute the image embeddings of a CLIP, by the weights that it has now; these are for that alone."""
        clip.precision = self.precision
        if self.precision == "bf16" and self.runtime == TORCH and not clip.edits:  # edits invert the head as it is
            bf16.round_products(clip.model.visual)
        clip.tower = None if self.runtime == TORCH else _tower(clip, self.runtime)


def _tower(clip: Clip, runtime: str) -> ImageEngine:
    from clipfit.engines.tower import Tower  # and with it how graphs are written, which takes a while to import

    return Tower(clip, runtime)


def require_installed(runtime: str, written: bool = True) -> None:
    """Raises UsageError where a library is missing that a runtime needs.

    Args:
        written: whether the graph has to be written first.
    """
    if runtime == TORCH:
        return
    needed = (runtime, *(WRITING if written else ()))  # a runtime is imported as it is called
    if missing := [library for library in needed if importlib.util.find_spec(library) is None]:
        raise UsageError(
            f"--runtime {runtime} needs {', '.join(missing)}, which cannot be imported here: "
            f"pip install 'clipfit[{EXTRAS[runtime]}]'."
        )


def device_of(runtime: str, device: str) -> torch.device:
    """Where a model is computed. Raises UsageError for a device that does not exist, or that a runtime is not for."""
    if runtime == TORCH:
        return devices.resolve_device(device)
    found = devices.resolve_device("cpu" if device == "auto" else device)
    if found.type != "cpu":
        raise UsageError(f"--runtime {runtime} computes on the processor: leave out --device {device} or --runtime.")
    return found


def engine_of(runtime: str, precision: str, clip: Clip) -> Engine:
    """The engine that is asked for; `auto` → bf16 where it is fast and OpenVINO has it, else fp32.

    Raises:
        UsageError: it does not compute in that type here, or not this model.
    """
    if runtime == TORCH:
        return Engine(TORCH, devices.resolve_precision(precision, clip.device, clip.model))
    large = devices.is_large(clip.model)
    return Engine(runtime, precision_of(runtime, precision, clip.device, large, clip.edits is not None))


def precision_of(runtime: str, asked: str, device: torch.device, large: bool, edits: bool) -> str:
    """The number type of a runtime that is not torch. Raises UsageError where it does not compute in that type here.

    Args:
        large: whether the tower is worth bf16. edits: whether patch tokens are ranked and edited inside the graph.
    """
    reason = without_bf16(runtime, edits)
    if asked == "bf16" and reason:
        raise UsageError(f"--runtime {runtime} does not compute in bf16 here, for {reason}: leave --precision out.")
    if asked != "auto":
        return asked
    return devices.resolve_precision("auto", device) if large and not reason else "fp32"


def without_bf16(runtime: str, edits: bool) -> str | None:
    """None, or why a runtime does not compute in bf16."""
    if runtime == "onnxruntime":
        return "it has no products in bf16 on processors"
    if edits:
        return "it would rank patch tokens in bf16 too, where most are ties"
    return None if sessions.openvino_has_bf16() else "the processor has none"


__all__ = ["RUNTIMES", "TORCH", "Engine", "device_of", "engine_of", "require_installed", "without_bf16"]
