"""Parts of a model as programs of their own, of fixed inputs and outputs: what `onnx` and `torch` write.

classifier   pixels (n, 3, H, W) → logits (n, C), probabilities (n, C), over the base classes
image        pixels (n, 3, H, W) → embeddings (n, D), of unit norm
text         tokens (n, context length) → embeddings (n, D), of unit norm
"""

from __future__ import annotations

import copy
import io
import logging
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from clipfit.config.outputs import FormatOptions
from clipfit.formats import bpe
from clipfit.formats.subject import DTYPES, Subject, temperature_inside
from clipfit.measure import scoring
from clipfit.model import text_tower
from clipfit.model.clip import Clip
from clipfit.model.named import Additions
from clipfit.prompts import prompts
from clipfit.runs import files

PREPROCESS = "preprocess.py"
Tensor = torch.Tensor


@dataclass(frozen=True)
class Part:
    """A program, its inputs (of two rows the first), and what a consumer has to know of it, in JSON's types."""

    module: torch.nn.Module
    examples: tuple[Tensor, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    facts: dict[str, Any]


def unheld(additions: Additions, options: FormatOptions) -> str | None:
    """None, or what a part cannot hold.

    With edits an image's features depend on the class texts: those of the classifier are fixed. Context vectors change
    class texts, which the classifier has, and all texts alike, which the text tower can.
    """
    if additions.edits and options.part != "classifier":
        return "edits of patch tokens, by which an image looks different beside other class texts"
    return None


def part_of(subject: Subject) -> Part:
    """The part that is asked for; the subject stays as it is."""
    if subject.options.dtype != "fp32":
        subject = replace(subject, model=copy.deepcopy(subject.model))
    model, facts = subject.model, facts_of(subject)
    pixels = torch.zeros(2, 3, *model.image_size)
    if subject.options.part == "text":
        tokens = model.tokenize(prompts(subject.run.base[:2], subject.run.template))
        module: torch.nn.Module = Text(model)
        example = tokens
    elif subject.options.part == "image":
        module, example = Image(model), pixels
    else:
        module, example = Classifier(subject, facts["temperature"]), pixels
    rounded = _stored_as(module, DTYPES[subject.options.dtype]).eval()
    outputs = ("logits", "probabilities") if subject.options.part == "classifier" else ("embeddings",)
    return Part(rounded, (example,), ("tokens" if subject.options.part == "text" else "pixels",), outputs, facts)


def facts_of(subject: Subject) -> dict[str, Any]:
    """What stands in the metadata of the program: classes, constants of preprocessing, temperature, α."""
    run, model = subject.run, subject.model
    temperature = temperature_inside(subject)
    return {
        "part": subject.options.part, "alpha": subject.alpha, "classes": list(run.base), "template": run.template,
        "templates": list(run.templates),
        "logit_scale": model.scale.item(), "logit_bias": _bias(model),
        "temperature": temperature or 1.0,
        "calibrated": temperature is not None,
        "preprocess": {
            **{key: model.source.preprocess_cfg[key]
               for key in ("mean", "std", "interpolation", "resize_mode", "fill_color")},
            "size": list(model.image_size),
        },
    }  # fmt: skip


def traced(part: Part) -> torch.export.ExportedProgram:
    """The program, for any number of rows of its first input."""
    with _plain_attention():
        shapes = ({0: torch.export.Dim("batch")}, *({} for _ in part.examples[1:]))
        return torch.export.export(part.module, part.examples, dynamic_shapes=shapes)


def write_beside(subject: Subject, folder: Path) -> None:
    """What a consumer needs beside a program: how to preprocess pictures, or the tokenizer's file."""
    if subject.options.part != "text":
        shutil.copy(Path(__file__).with_name("_preprocess.py"), folder / PREPROCESS)
    elif bpe.is_plain(subject.model.source.model_cfg["text_cfg"]):
        bpe.write(folder, subject.model.source)


def bytes_of(part: Part) -> int:
    """What its tensors take on disk."""
    state = part.module.state_dict()
    return sum(t.numel() * t.element_size() for t in state.values())


class Image(torch.nn.Module):
    """Pixels (n, 3, H, W), and class tokens (C, V) where they are edited → embeddings (n, D)."""

    def __init__(self, clip: Clip):
        super().__init__()
        self.visual, self.edits = clip.model.visual, clip.edits  # the one tower that is written
        self.clip = clip  # no module

    def forward(self, pixels: Tensor, class_tokens: Tensor | None = None) -> Tensor:
        return self.clip.encode_image(pixels, class_tokens)


class Text(torch.nn.Module):
    """Token ids (n, context length) → embeddings (n, D); all columns are read, wherever the texts end."""

    def __init__(self, clip: Clip):
        super().__init__()
        self.tower = copy.deepcopy(clip.model, {id(clip.model.visual): None})
        self.context = clip.context

    def forward(self, tokens: Tensor) -> Tensor:
        [features] = text_tower.features(self.tower, tokens, self.context, None)
        return F.normalize(features.float(), dim=1)


class Classifier(torch.nn.Module):
    """Pixels (n, 3, H, W) → logits and probabilities (n, C); class texts, and the tokens that edits go by, inside."""

    def __init__(self, subject: Subject, temperature: float):
        super().__init__()
        clip = subject.model
        texts = scoring.texts(clip, subject.run.base, subject.run.templates)
        self.visual, self.edits = clip.model.visual, clip.edits
        self.clip, self.temperature = clip, temperature
        self.bias = _bias(clip)
        self.weights: Tensor
        self.class_tokens: Tensor | None
        self.register_buffer("weights", (clip.scale * texts.embeddings).T.contiguous())  # (D, C)
        self.register_buffer("class_tokens", texts.class_tokens)  # (C, V)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.clip.encode_image(pixels, self.class_tokens) @ self.weights + self.bias
        return logits, (logits / self.temperature).softmax(1)


def _bias(clip: Clip) -> float:
    return 0.0 if clip.bias is None else clip.bias.item()


class Rounded(torch.nn.Module):
    """A module whose weights are stored in another type, and computed with in float32."""

    def __init__(self, module: torch.nn.Module, dtype: torch.dtype):
        super().__init__()
        self.module = module
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(dtype)

    def forward(self, given: Tensor) -> Any:
        named = dict([*self.module.named_parameters(), *self.module.named_buffers()])
        whole = {name: t.float() if t.is_floating_point() else t for name, t in named.items()}
        return torch.func.functional_call(self.module, whole, (given,))


def _stored_as(module: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    return module if dtype == torch.float32 else Rounded(module, dtype)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Without the fused operator for inference, which no other library has."""
    usual = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(usual)


def json_facts(part: Part) -> dict[str, str]:
    """The facts, each as a text of JSON."""
    return {name: files.json_text(value).strip() for name, value in part.facts.items()}


@contextmanager
def quiet() -> Iterator[None]:
    """Without what exporter and quantiser say on their way: stdout belongs to data, and some print there."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir", "")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        try:
            for logger in loggers:
                logger.setLevel(logging.ERROR)
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
