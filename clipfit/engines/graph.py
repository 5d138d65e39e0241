"""An export in the format onnx as a model: pixels to logits among the classes that it was exported with."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clipfit import engines
from clipfit.engines import sessions
from clipfit.errors import UsageError
from clipfit.formats.onnx import MODEL
from clipfit.formats.subject import ABOUT
from clipfit.model import devices, preprocess
from clipfit.model.clip import Texts
from clipfit.model.sources import CONFIG, Source
from clipfit.prompts import Templates
from clipfit.runs import files, manifest
from clipfit.runs.record import typed

USUAL = "onnxruntime"  # the library that proved it
ELSE = "give the run, or an export in the format open_clip, safetensors or difference"
BYTES = {"fp32": 4, "fp16": 2}  # of a stored weight


def is_graph(folder: Path) -> bool:
    """Whether a folder is such an export, by its files."""
    return (folder / ABOUT).is_file() and (folder / MODEL).is_file() and not (folder / CONFIG).is_file()


class Graph:
    """A graph whose classes, templates and α are fixed, opened by a library that computes it on the processor."""

    device = torch.device("cpu")

    def __init__(self, folder: Path, runtime: str | None, precision: str, device: str = "auto"):
        """Raises ModelError: it is damaged, or the library cannot compute it. UsageError: not so, or not this part."""
        self.runtime = runtime or USUAL
        if self.runtime == engines.TORCH:
            raise UsageError(f"{folder} is a graph, which torch does not compute: leave out --runtime torch.")
        engines.require_installed(self.runtime, written=False)
        engines.device_of(self.runtime, device)
        self._folder, self._lock = folder, threading.Lock()
        digests = manifest.verify(
            folder, [name for name in (ABOUT, MODEL, f"{MODEL}.data") if (folder / name).exists()]
        )
        self.digest, self.about = digests[MODEL], files.read_json(folder / ABOUT)
        if (part := self.about["export"]["part"]) != "classifier":
            raise UsageError(
                f"{folder} is an export in the format onnx of the {part} tower alone: give one with --part classifier, "
                "the run, or an export in the format open_clip, safetensors or difference."
            )
        self.precision = self._precision_of(folder, precision)
        session = sessions.opened(folder / MODEL, self.runtime, self.precision)
        self._compute, self.facts = session.compute, {name: json.loads(text) for name, text in session.facts.items()}
        self.classes: tuple[str, ...] = tuple(self.facts["classes"])  # the names that logits are of
        self._columns = {name: column for column, name in enumerate(self.classes)}
        source = typed(self.about["pretrained"], Source, folder / ABOUT)
        self._geometry = preprocess.geometry(source.preprocess_cfg)
        self._scale = preprocess.Scale(source.preprocess_cfg, self.device)
        self.image_size: tuple[int, int] = tuple(self.facts["preprocess"]["size"])

    def _precision_of(self, folder: Path, asked: str) -> str:
        export: Mapping[str, Any] = self.about["export"]
        if export["quantize"]:
            if asked not in ("auto", export["quantize"]):
                raise UsageError(f"{folder} has its products in {export['quantize']}: leave --precision out.")
            return str(export["quantize"])
        size = sum(file.stat().st_size for file in folder.glob(f"{MODEL}*"))
        large = size >= devices.LARGE * BYTES[export["dtype"]]
        return engines.precision_of(self.runtime, asked, self.device, large, bool(self.about["edits"]))

    @property
    def templates(self) -> Templates:
        """The sentences that the names were put in."""
        return tuple(self.facts["templates"])

    def read(self, names: Sequence[str], templates: Templates) -> tuple[Texts, float | None]:
        """Nothing of the class texts (C, 0), for they are inside; what logits among just these are divided by.

        Where patch tokens are edited, an image looks different beside fewer classes: then all of them are needed.

        Raises:
            UsageError: there are no such classes inside, or other templates.
        """
        others, all_of_them = [name for name in names if name not in self._columns], set(names) == set(self.classes)
        reason = f"has no text of {others[0]!r}" if others else None
        if templates != self.templates:
            reason = "has them by other templates"
        elif self.about["edits"] and not all_of_them:
            reason = reason or "sees images by the light of all of them"
        if reason:
            raise UsageError(f"{self._folder} is a graph with its class texts inside, and {reason}: {ELSE}.")
        holds = self.facts["calibrated"] and all_of_them
        return Texts(torch.empty(len(names), 0), None), float(self.facts["temperature"]) if holds else None

    @property
    def features(self) -> str:
        """In what it is computed: "fp32 by onnxruntime"."""
        return f"{self.precision} by {self.runtime}"

    def geometry(self, picture: Image.Image) -> torch.Tensor:
        """An RGB picture resized and cropped as the model wants it: (3, H, W) uint8."""
        return self._geometry(picture)

    def logits(self, views: torch.Tensor, names: Sequence[str]) -> torch.Tensor:
        """Views (B, 3, H, W) uint8 → logits (B, C) of some of the classes, before any temperature."""
        pixels = self._scale(views)
        with self._lock:
            found = torch.from_numpy(self._compute([pixels.contiguous().numpy()])[0])
        return found[:, [self._columns[name] for name in names]]
