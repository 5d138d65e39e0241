"""Exports of all weights that clipfit reads again itself, for `predict` and `clipfit.load`.

Everything is taken from the one file of weights, for which files.json vouches. (An open_clip export is a model's folder
like any other: model/sources.py.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clipfit.errors import UsageError
from clipfit.formats import difference
from clipfit.formats.difference import DIFFERENCE
from clipfit.formats.safetensors import TOKENIZER, WEIGHTS
from clipfit.formats.subject import ABOUT
from clipfit.model import loading
from clipfit.model.clip import Clip
from clipfit.model.sources import CONFIG, Source
from clipfit.runs import files, manifest
from clipfit.runs.record import typed

OTHERS = {"model.pt2": "torch", "config.json": "transformers"}


@dataclass(frozen=True)
class Again:
    """An export, read again: its model, what it says of itself (see subject.about), and the digest of its file.

    every_alpha: whether the same folder gives any other ratio too.
    """

    clip: Clip
    about: Mapping[str, Any]
    digest: str
    every_alpha: bool


def read(folder: Path, alpha: float | None = None, device: torch.device | str = "cpu") -> Again | None:
    """An export in the format safetensors or difference; None for any other folder.

    Args:
        alpha: of a difference, where not the one that it was exported at.

    Raises:
        ModelError: it is damaged; or the pre-trained weights, which a difference needs, cannot be had or are not those
            that it was taken from. UsageError: it is an export in a format that clipfit does not read; α is not from 0
            to 1.
    """
    if (folder / CONFIG).is_file() or not (folder / ABOUT).is_file():
        return None
    if (folder / DIFFERENCE).is_file():
        digest = manifest.listed(folder, DIFFERENCE)
        clip = difference.restore(folder, alpha, device=device)
        about = files.read_metadata(folder / DIFFERENCE)
        return Again(clip, about if alpha is None else {**about, "alpha": alpha}, digest, True)
    if format := next((format for name, format in OTHERS.items() if (folder / name).is_file()), None):
        raise UsageError(
            f"{folder} is an export in the format {format}, which clipfit does not read: give the run, or an export "
            "in the format open_clip, safetensors or difference, or onnx with --part classifier."
        )
    return _whole(folder, device) if (folder / WEIGHTS).is_file() else None


def _whole(folder: Path, device: torch.device | str) -> Again:
    state, about = files.read_tensors(folder / WEIGHTS, manifest.checking(folder, WEIGHTS))
    source = typed(about.get("pretrained"), Source, folder / WEIGHTS)
    if (folder / TOKENIZER).is_dir():
        text = {**source.model_cfg["text_cfg"], "hf_tokenizer_name": str(folder / TOKENIZER)}
        source = replace(source, model_cfg={**source.model_cfg, "text_cfg": text})
    return Again(loading.rebuild(source, state, device=device), about, manifest.listed(folder, WEIGHTS), False)
