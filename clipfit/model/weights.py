"""Weight files: into a model, with the right sentence where one is damaged, of another model, or holds code."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from pathlib import Path

import open_clip
import torch

from clipfit.errors import ModelError, first_line
from clipfit.model.sources import quiet

# with it torch unpickles where nobody said how to load; open_clip does not say it when it tries a second time
UNPICKLING_FORCED = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"
SAVE_TENSORS = "save its tensors as .safetensors, which hold nothing else"


def fill(model: torch.nn.Module, file: Path, name: str) -> None:
    """Load a weight file into a model; open_clip reads it, pickles by torch's `weights_only`.

    Args:
        name: of the architecture, for the errors.

    Raises:
        ModelError: the file is damaged, its tensors are not this architecture's, it holds more than tensors, or one of
            them is not finite.
    """
    pickled = file.suffix != ".safetensors"
    if pickled and os.environ.get(UNPICKLING_FORCED, "0") not in ("", "0"):
        raise ModelError(f"{file} is not opened while {UNPICKLING_FORCED} is set: unset it, or {SAVE_TENSORS}.")
    with quiet():
        try:
            open_clip.load_checkpoint(model, str(file), strict=True, weights_only=True)
        except Exception as error:
            raise ModelError(_reason(file, name, pickled, error)) from error
    require_finite(model.state_dict(), str(file))


def require_finite(state: Mapping[str, torch.Tensor], place: str) -> None:
    """Raises ModelError for the first tensor that holds NaN or infinity."""
    for name, tensor in state.items():
        if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
            raise ModelError(
                f"the weights of {place} are damaged: {name} holds values that are not finite numbers; take other ones."
            )


def state_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors in order of name: the same for every container.

    Tensors on the CPU are read where they lie; from another device one at a time is copied.
    """
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _reason(file: Path, name: str, pickled: bool, error: Exception) -> str:
    """Why a weight file cannot be loaded; what torch says of pickles is not passed on: it tells people to unpickle."""
    text = str(error)
    if "Error(s) in loading state_dict" in text:
        return f"{file} does not hold the weights of {name}: {_misfit(text)}; take those of the same architecture."
    if "TorchScript" in text:
        return f"{file} is a TorchScript program and is not run: take a tag (--pretrained openai), or {SAVE_TENSORS}."
    if pickled and any(word in text for word in ("GLOBAL", "Unsupported class", "unrecognized function")):
        return f"{file} is a pickle that holds more than tensors and is not opened: {SAVE_TENSORS}."
    said = "" if pickled else f" ({first_line(error)})"
    return (
        f"{file} is damaged or holds no weights of {name}{said}: expected tensors by open_clip's names, in "
        ".safetensors or a state dict; copy it again."
    )


def _misfit(text: str) -> str:
    """The first thing in which tensors differ from the architecture's, of what load_state_dict lists."""
    shape = re.search(r"size mismatch for (\S+): .*?torch\.Size\((.*?)\).*?torch\.Size\((.*?)\)", text)
    if shape:
        tensor, found, expected = shape.groups()
        return f"{tensor} must have shape {expected}, but has {found}"
    for kind, words in (("Missing", "it lacks {}"), ("Unexpected", "it holds {}, which the architecture has not")):
        listed = re.search(rf"{kind} key\(s\) in state_dict: (.*?)\. *$", text, re.MULTILINE)
        if listed:
            names = listed[1].replace('"', "").split(", ")
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            return words.format(f"{names[0]}{more}")
    return "its tensors differ from the architecture's"
