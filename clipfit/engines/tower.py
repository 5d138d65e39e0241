"""The image tower of a model in memory as a graph, for a library that computes it in torch's place."""

from __future__ import annotations

import copy
import tempfile
import threading
from pathlib import Path

import torch

from clipfit.engines.sessions import Session, opened
from clipfit.errors import ModelError, first_line
from clipfit.formats import onnx, parts
from clipfit.formats.parts import Part
from clipfit.model import bf16
from clipfit.model.clip import Clip
from clipfit.runs import files

EXAMPLES = 2  # with one, the exporter takes the number of images for fixed


class Tower:
    """Normalised images (B, 3, H, W), and class tokens (C, V) where they are edited → unit-norm embeddings (B, D).

    The graph is written when it is first asked for, and once again for another number of class tokens.
    """

    def __init__(self, clip: Clip, runtime: str):
        self._clip = copy.copy(clip)  # the same weights; what is traced is torch's own tower, in float32
        self._runtime, self._precision = runtime, clip.precision
        self._clip.tower, self._clip.precision = None, "fp32"
        clip.precision = self._precision  # its layers, which are the same, read the texts
        self._sessions: dict[int | None, Session] = {}
        self._lock = threading.Lock()

    @property
    def runtime(self) -> str:
        """The library."""
        return self._runtime

    def __call__(self, images: torch.Tensor, class_tokens: torch.Tensor | None) -> torch.Tensor:
        """Raises ModelError where the tower cannot be written as a graph, or the library cannot compute it."""
        given = [images] if class_tokens is None else [images, class_tokens]
        with self._lock:
            session = self._session(class_tokens)
            [embeddings] = session.compute([tensor.contiguous().numpy() for tensor in given])
        return torch.from_numpy(embeddings)

    def _session(self, class_tokens: torch.Tensor | None) -> Session:
        count = None if class_tokens is None else len(class_tokens)
        if count not in self._sessions:
            self._sessions.clear()  # each holds the weights
            self._sessions[count] = self._opened(class_tokens)
        return self._sessions[count]

    def _opened(self, class_tokens: torch.Tensor | None) -> Session:
        pixels = torch.zeros(EXAMPLES, 3, *self._clip.image_size)
        examples = (pixels,) if class_tokens is None else (pixels, class_tokens)
        inputs = ("pixels", "class_tokens")[: len(examples)]
        part = Part(parts.Image(self._clip).eval(), examples, inputs, ("embeddings",), {})
        with tempfile.TemporaryDirectory(prefix="clipfit-", ignore_cleanup_errors=True) as folder:
            file = Path(folder) / onnx.MODEL
            files.require_room(file.parent, parts.bytes_of(part))
            self._write(part, file)
            return opened(file, self._runtime, self._precision)

    def _write(self, part: Part, file: Path) -> None:
        try:
            with (
                files.writing(file.parent), parts.quiet(), bf16.usual(self._clip.model),
                torch.enable_grad(),  # else edits ask their strengths
            ):  # fmt: skip
                onnx.write_graph(part, file)
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"the image tower of {self._clip.source.model} cannot be written as an ONNX graph "
                f"({first_line(error)}): leave --runtime out."
            ) from error
