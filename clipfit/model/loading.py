"""Models from where they come from: pre-trained weights loaded, recorded ones rebuilt."""

from __future__ import annotations

import copy
from collections.abc import Mapping

import open_clip
import torch

from clipfit.errors import ModelError, first_line
from clipfit.model.clip import Additions, Clip
from clipfit.model.sources import OFFLINE_HELP, Source, find, plain, quiet, state_sha256


def load(model: str, pretrained: str | None = None, device: torch.device | str = "cpu") -> Clip:
    """Load a pre-trained CLIP.

    Args:
        model: `clipfit-tiny`, `local-dir:FOLDER`, or a name of open_clip (`ViT-B-16`).
        pretrained: for open_clip's names: one of its tags (default `openai`) or a local weight file.

    Raises:
        UsageError: no such model or tag; the nearest names are given.
        ModelError: the weights cannot be had or do not fit, or the model is not of open_clip's CLIP class.
    """
    name, pretrained, record = find(model, pretrained)
    create = {"model_name": name, "pretrained": pretrained, "require_pretrained": True}
    with quiet():
        try:
            loaded = open_clip.create_model(**create, quick_gelu=record["model_cfg"]["quick_gelu"])
        except Exception as error:
            raise ModelError(
                f"the weights of {model}{f' / {pretrained}' if pretrained else ''} cannot be loaded "
                f"({first_line(error)}); {OFFLINE_HELP}."
            ) from error
    if type(loaded) is not open_clip.CLIP:
        raise ModelError(f"{model} is a {type(loaded).__name__}; clipfit adapts models of open_clip's CLIP class only.")
    source = Source(
        model=model,
        pretrained=pretrained,
        sha256=state_sha256(loaded.state_dict()),
        model_cfg=record["model_cfg"],
        preprocess_cfg=plain(open_clip.get_model_preprocess_cfg(loaded)),
        adapt_defaults=record.get("adapt", {}),
    )
    return Clip(loaded, source, torch.device(device))


def rebuild(
    source: Source,
    state: Mapping[str, torch.Tensor],
    additions: Additions | None = None,
    device: torch.device | str = "cpu",
) -> Clip:
    """A backbone from recorded facts and weights, without the pre-trained ones."""
    with quiet():
        model = open_clip.CLIP(**copy.deepcopy(dict(source.model_cfg)))
    backbone = Clip(model, source, torch.device(device), additions)
    backbone.load_state(state)
    return backbone


def reload(source: Source, device: torch.device | str = "cpu") -> Clip:
    """Load the recorded pre-trained weights again, into the recorded architecture with the recorded preprocessing.

    What a configuration says today (a file beside the weights, a tag of another open_clip) may differ from what the
    run was made with.

    Raises:
        ModelError: they cannot be had, or are not the recorded ones.
    """
    backbone = load(source.model, source.pretrained, device)
    if backbone.source.sha256 != source.sha256:
        raise ModelError(
            f"the weights of {source.model} changed since the run was made: expected SHA-256 {source.sha256[:16]}…, "
            f"found {backbone.source.sha256[:16]}…; restore them, or adapt again."
        )
    return rebuild(source, backbone.state(), device=device)
