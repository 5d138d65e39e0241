"""Which models there are and where their weights come from: names, tags, folders, tokenizers, preprocessing."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch

from clipfit.errors import ModelError, UsageError, first_line

LOCAL_DIR = "local-dir:"
DEFAULT_TAG = "openai"
TINY = "clipfit-tiny"
TINY_FOLDER = Path(__file__).parent.parent / "assets" / TINY
OFFLINE_HELP = (
    "without a network use --model clipfit-tiny (ships with clipfit), --model local-dir:FOLDER "
    "(an open_clip_config.json beside its weights) or --pretrained FILE.safetensors"
)


@dataclass(frozen=True)
class Source:
    """Where pre-trained weights came from, and what they are: enough to load the same ones again."""

    model: str
    pretrained: str | None
    sha256: str  # of all tensors after loading: see state_sha256
    model_cfg: Mapping[str, Any]  # open_clip's architecture, with the activation the weights were trained with
    preprocess_cfg: Mapping[str, Any]
    adapt_defaults: Mapping[str, Any] = field(default_factory=dict)  # the model's own recipe, see config.Recipe


def find(model: str, pretrained: str | None) -> tuple[str, str | None, dict[str, Any]]:
    """What open_clip is asked for (name, tag or file), and the model's record: model_cfg and perhaps "adapt".

    Raises:
        UsageError: no such model or tag (the nearest names are given), or other weights for a folder that has its own.
        ModelError: a folder that is none of a model.
    """
    if model == TINY or model.startswith(LOCAL_DIR):
        if pretrained:
            raise UsageError(f"{model} has its own weights: leave --pretrained {pretrained} out.")
        folder = TINY_FOLDER if model == TINY else Path(model.removeprefix(LOCAL_DIR)).expanduser()
        return f"{LOCAL_DIR}{folder}", None, _folder_record(folder)
    pretrained = pretrained or DEFAULT_TAG
    return model, pretrained, _builtin_record(model, pretrained)


def _builtin_record(model: str, pretrained: str) -> dict[str, Any]:
    if ":" in model:
        raise UsageError(f"{model!r} cannot be loaded directly: download its folder and pass --model local-dir:FOLDER.")
    model = model.replace("/", "-")  # as open_clip reads "ViT-B/16"
    config = open_clip.get_model_config(model)
    if config is None:
        raise UsageError(f"unknown model {model!r}{_nearest(model, [TINY, *open_clip.list_models()])}.")
    config.setdefault("quick_gelu", False)
    tag = open_clip.get_pretrained_cfg(model, pretrained)
    if tag:
        # the activation belongs to the weights, not to the name (open_clip #771)
        config["quick_gelu"] = bool(tag.get("quick_gelu", False))
    elif Path(pretrained).is_file():
        beside = Path(pretrained).with_name("open_clip_config.json")
        if beside.is_file():
            config["quick_gelu"] = bool(_folder_record(beside.parent)["model_cfg"]["quick_gelu"])
    else:
        tags = open_clip.list_pretrained_tags_by_model(model)
        raise UsageError(
            f"{pretrained!r} is neither a file nor a pretrained tag of {model}{_nearest(pretrained, tags)}; "
            f"its tags are {', '.join(tags) or 'none'}."
        )
    return {"model_cfg": config}


def _folder_record(folder: Path) -> dict[str, Any]:
    file = folder / "open_clip_config.json"
    try:
        record = json.loads(file.read_text("utf-8"))
        record["model_cfg"].setdefault("quick_gelu", False)
        extra = folder / "clipfit.json"
        if extra.is_file():
            record["adapt"] = json.loads(extra.read_text("utf-8")).get("adapt", {})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{folder} is no model folder: it needs {file.name} and weights ({error}).") from error
    return dict(record)


def tokenizer_of(source: Source) -> Any:
    text = source.model_cfg["text_cfg"]
    if text.get("hf_tokenizer_name"):
        with quiet():
            try:
                return open_clip.get_tokenizer(source.model)
            except Exception as error:
                raise ModelError(f"the tokenizer of {source.model} cannot be had ({first_line(error)}).") from error
    context = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    return open_clip.SimpleTokenizer(context_length=context, **(text.get("tokenizer_kwargs") or {}))


def geometry_of(source: Source) -> list[Any]:
    """The part of open_clip's own evaluation transform that comes before ToTensor and Normalize."""
    cfg = open_clip.transform.PreprocessCfg(**source.preprocess_cfg)
    steps = open_clip.transform.image_transform_v2(cfg, is_train=False).transforms
    kinds = [type(step).__name__ for step in steps]
    if not kinds[-2].endswith("ToTensor") or kinds[-1] != "Normalize":
        raise ModelError(f"this open_clip preprocesses in an unknown way ({', '.join(kinds)}); please report it.")
    return list(steps[:-2])


def state_sha256(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes of all tensors in order of name: the same for every container."""
    digest = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def plain(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """JSON's types only: tuples become lists."""
    return dict(json.loads(json.dumps(dict(cfg))))


def _nearest(name: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.4)
    return f"; did you mean {' or '.join(close)}?" if close else ""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """open_clip logs through the root logger; what matters of it reaches people as our own errors."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
