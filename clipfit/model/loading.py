"""Models from where they come from: pre-trained weights loaded, recorded ones rebuilt."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch.overrides import TorchFunctionMode

from clipfit.errors import ModelError, first_line
from clipfit.model import compat, hub, lora, sources, tokenizing, weights
from clipfit.model.clip import Clip
from clipfit.model.named import ADDED, Additions
from clipfit.model.sources import OFFLINE_HELP, Origin, Source, quiet


def load(model: str, pretrained: str | None = None, device: torch.device | str = "cpu") -> Clip:
    """Load a pre-trained CLIP by name: see sources.find and fetch for what is taken and raised."""
    return fetch(sources.find(model, pretrained), device)


def fetch(
    origin: Origin, device: torch.device | str = "cpu", additions: Additions | None = None, adapters: bool = False
) -> Clip:
    """Load a pre-trained CLIP, over a network where its weights are not on this machine.

    Args:
        additions: what the model is to have beyond open_clip's CLIP. adapters: whether LoRA is to train it.

    Raises:
        ModelError: the model cannot have that (said before anything is fetched), or its weights cannot be had, do not
            fit, are not finite, or are not those that clipfit exported.
        UsageError: the additions name a block that the model does not have, or words that cannot be learnt.
    """
    model = _built(origin)
    source = Source(
        model=origin.model,
        pretrained=origin.pretrained,
        sha256="",
        model_cfg=origin.model_cfg,
        preprocess_cfg={**origin.preprocess_cfg, "size": compat.recorded_size(model)},
        adapt_defaults=origin.adapt_defaults,
    )
    if additions not in (None, Additions()) or tokenizing.is_of_transformers(source):
        Clip(model, source, torch.device("cpu"), additions)  # raises now what it would raise after gigabytes
    if adapters:
        lora.require_attention(model)
    weights.fill(model, origin.file or _fetched(origin), origin.architecture)
    found = weights.state_sha256(model.state_dict())
    if origin.sha256 not in ("", found):
        raise ModelError(
            f"{origin.file} is not as clipfit exported it: expected SHA-256 {origin.sha256[:16]}…, "
            f"found {found[:16]}…; copy the export again."
        )
    return Clip(model, replace(source, sha256=found), torch.device(device), additions)


def rebuild(
    source: Source,
    state: Mapping[str, torch.Tensor],
    additions: Additions | None = None,
    device: torch.device | str = "cpu",
) -> Clip:
    """A CLIP from recorded facts and weights, without the pre-trained ones."""
    clip = Clip(_built(source), source, torch.device(device), additions)
    clip.load_state(state)
    return clip


def reload(source: Source, device: torch.device | str = "cpu", additions: Additions | None = None) -> Clip:
    """Load the recorded pre-trained weights again, into the recorded architecture with the recorded preprocessing.

    What a configuration says today (a file beside the weights, a tag of another open_clip) may differ from what the
    run was made with.

    Raises:
        ModelError: they cannot be had, or are not the recorded ones.
    """
    clip = fetch(sources.recorded(source), device, additions)
    _require_same(source, clip.source.sha256)
    return clip


def go_on(
    source: Source,
    state: Mapping[str, torch.Tensor],
    additions: Additions | None = None,
    adapters: bool = False,
    device: torch.device | str = "cpu",
) -> Clip:
    """A CLIP that is adapted on from a run: as `fetch`, but for weights that are here and may hold additions.

    Additions that the state has keep their values, and must be the ones named; others are attached without effect.

    Args:
        source: its sha256 is what the weights must have, or "" where they are met for the first time.

    Raises:
        ModelError: the model cannot have the additions or adapters, or the weights are not the recorded ones.
    """
    found = weights.state_sha256(state)
    if source.sha256:
        _require_same(source, found)
    attached = any(name.startswith(ADDED) for name in state)
    clip = rebuild(replace(source, sha256=found), state, additions if attached else None, device)
    if adapters:
        lora.require_attention(clip.model)
    return clip if attached or additions is None else clip.with_additions(additions)


def _require_same(source: Source, found: str) -> None:
    if found != source.sha256:
        raise ModelError(
            f"the weights of {source.model} changed since the run was made: expected SHA-256 {source.sha256[:16]}…, "
            f"found {found[:16]}…; restore them, or adapt again."
        )


class _Unfilled(TorchFunctionMode):
    """Tensors are not filled with random numbers, which for weights that are loaded then takes most of the time."""

    FILLING = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_",
               "xavier_normal_")  # fmt: skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """As torch's, but for these functions of a tensor, their first argument."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") in self.FILLING:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def _built(origin: Origin | Source) -> compat.Model:
    """The architecture, whose weights are still to be loaded. Raises ModelError where open_clip cannot build it."""
    with quiet(), _Unfilled():
        try:
            return compat.build(origin.model_cfg)
        except Exception as error:
            raise ModelError(_why_not_built(origin, first_line(error))) from error


def _why_not_built(origin: Origin | Source, said: str) -> str:
    """A text tower of the transformers library is built from its own configuration; all else stands in model_cfg."""
    name = origin.model_cfg["text_cfg"].get("hf_model_name")
    if not name:
        return f"open_clip cannot build {origin.model} as its model_cfg says ({said}): correct it."
    if importlib.util.find_spec("transformers") is None:
        return (
            f"the text tower of {origin.model} is one of the transformers library, which is not installed: "
            "pip install 'clipfit[transformers]'."
        )
    return (
        f"the text tower of {origin.model} is built from config.json of {name}, in the Hugging Face cache "
        f"({hub.cache()}), from a network, or in a folder of that name, and cannot be ({said})."
    )


def _fetched(origin: Origin) -> Path:
    """The file that open_clip downloads, or has in its cache."""
    with quiet():
        try:
            return Path(open_clip.download_pretrained(dict(origin.tag)))
        except Exception as error:
            where = f"the Hugging Face cache ({hub.cache()}) has not got them"
            raise ModelError(
                f"the weights of {origin.label} cannot be fetched ({first_line(error)}), and {where}; {OFFLINE_HELP}."
            ) from error
