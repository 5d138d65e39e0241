"""Which models there are and where their weights come from: names, tags, folders, tokenizers, preprocessing.

Nothing here fetches weights: what a model is gets decided first, from its configuration.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip

from clipfit.errors import ModelError, UsageError, first_line
from clipfit.model import compat, preprocess

LOCAL_DIR = "local-dir:"
DEFAULT_TAG = "openai"
TINY = "clipfit-tiny"
TINY_FOLDER = Path(__file__).parent.parent / "assets" / TINY
CONFIG = "open_clip_config.json"
WEIGHTS = "open_clip_model.safetensors"
FOLDER_NEEDS = f"it needs {CONFIG} and weights ({WEIGHTS})"
OFFLINE_HELP = (
    f"without a network use --model {TINY} (ships with clipfit), --model FOLDER ({CONFIG} beside its weights) or "
    "--pretrained FILE.safetensors"
)
# what people know from Hugging Face transformers, and the same weights' names in open_clip
TRANSFORMERS_NAMES = {
    "openai/clip-vit-base-patch32": ("ViT-B-32", "openai"),
    "openai/clip-vit-base-patch16": ("ViT-B-16", "openai"),
    "openai/clip-vit-large-patch14": ("ViT-L-14", "openai"),
    "openai/clip-vit-large-patch14-336": ("ViT-L-14-336", "openai"),
}


@dataclass(frozen=True)
class Source:
    """Where pre-trained weights came from, and what they are: enough to load the same ones again."""

    model: str  # an open_clip name, clipfit-tiny, or local-dir:FOLDER (of a model, or a run that was adapted on from)
    pretrained: str | None
    sha256: str  # of all tensors after loading: see weights.state_sha256
    model_cfg: Mapping[str, Any]  # open_clip's architecture, with the activation the weights were trained with
    preprocess_cfg: Mapping[str, Any]
    adapt_defaults: Mapping[str, Any] = field(default_factory=dict)  # the model's own recipe, see config.Recipe


@dataclass(frozen=True)
class Origin:
    """A model whose weights can be had: what a Source says of it, before anything is fetched."""

    model: str
    pretrained: str | None
    model_cfg: Mapping[str, Any]
    preprocess_cfg: Mapping[str, Any]
    adapt_defaults: Mapping[str, Any] = field(default_factory=dict)
    file: Path | None = None  # the weights, where they are on this machine
    tag: Mapping[str, Any] = field(default_factory=dict)  # open_clip's entry, where they have to be fetched

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{self.model} / {self.pretrained}" if self.pretrained else self.model

    @property
    def architecture(self) -> str:
        """What its weights have to fit, in words."""
        return f"the model that {CONFIG} describes" if self.model.startswith(LOCAL_DIR) else self.model


def find(model: str, pretrained: str | None = None) -> Origin:
    """The model that is named; nothing is fetched.

    Args:
        model: `clipfit-tiny`, a name of open_clip (`ViT-B-16`), or a folder, also as `local-dir:FOLDER`.
        pretrained: for open_clip's names: one of its tags (default `openai`) or a local weight file.

    Raises:
        UsageError: no such model or tag (the nearest names are given), other weights for a folder that has its own, or
            a folder that is a run.
        ModelError: a folder that is none of a model, or a model that is not of open_clip's CLIP class.
    """
    folder = TINY_FOLDER if model == TINY else folder_of(model)
    if folder is None:
        origin = _architecture(model, pretrained or DEFAULT_TAG)
    elif pretrained:
        raise UsageError(f"{model} has its own weights: leave --pretrained {pretrained} out.")
    elif is_run(folder):
        raise UsageError(f"{folder} is a run, which only `adapt` goes on from: export it, and name the export here.")
    else:
        origin = _folder(recorded_name(model), folder)
    _require_clip_class(model, origin.model_cfg)
    return origin


def recorded(source: Source) -> Origin:
    """Where the weights of a run are to be had today, with everything else as it was when the run was made.

    Raises:
        ModelError: the folder or file is gone, or open_clip does not know the tag any more.
    """
    folder = TINY_FOLDER if source.model == TINY else folder_of(source.model)
    tag: Mapping[str, Any] = {}
    if folder:
        file = compat.checkpoint_in(folder)
        missing = f"{folder} has no weights any more: restore {WEIGHTS} there"
    else:
        given = source.pretrained or DEFAULT_TAG
        tag = open_clip.get_pretrained_cfg(_open_clip_name(source.model), given)
        file = None if tag else Path(given)
        missing = f"{given!r} is neither a file nor a tag that this open_clip knows: restore it"
    if not tag and not (file and file.is_file()):
        raise ModelError(f"the pre-trained weights of {source.model} are needed, but {missing}.")
    return Origin(
        source.model, source.pretrained, source.model_cfg, source.preprocess_cfg, source.adapt_defaults, file, tag
    )


def folder_of(model: str) -> Path | None:
    """The folder that `--model` names, be it there or not; None for a name of open_clip, and for clipfit-tiny.

    A name of open_clip wins over a folder that is called so, unless it is written as a path (`./ViT-B-16`).
    """
    if model.startswith(LOCAL_DIR):
        return Path(model.removeprefix(LOCAL_DIR)).expanduser()
    if model.startswith((".", "/", "~")) or model.endswith("/") or Path(model).is_absolute():
        return Path(model).expanduser()
    known = model == TINY or _open_clip_name(model) in open_clip.list_models()
    return Path(model) if not known and Path(model).is_dir() else None


def recorded_name(model: str) -> str:
    """A model's name as a Source has it: a folder says that it is one."""
    return model if model == TINY or model.startswith(LOCAL_DIR) else f"{LOCAL_DIR}{Path(model)}"


def is_run(folder: Path) -> bool:
    """Whether a folder is one that `adapt` wrote, by its files; open_run reads it, and says what is wrong with it."""
    return not (folder / CONFIG).exists() and all((folder / name).is_file() for name in ("config.json", "shots.jsonl"))


def _open_clip_name(model: str) -> str:
    """As open_clip reads "ViT-B/16"."""
    return model.replace("/", "-")


def _architecture(model: str, pretrained: str) -> Origin:
    name = _open_clip_name(model)
    if name not in open_clip.list_models():
        raise UsageError(_unknown(model))
    config = open_clip.get_model_config(name)
    config.setdefault("quick_gelu", False)
    tag, file = open_clip.get_pretrained_cfg(name, pretrained), Path(pretrained)
    if tag:
        # the activation belongs to the weights, not to the name (open_clip #771)
        config["quick_gelu"] = bool(tag.get("quick_gelu", False))
        return Origin(model, pretrained, config, preprocess.settings(tag), tag=tag)
    if file.is_file():
        if file.with_name(CONFIG).is_file():
            config["quick_gelu"] = bool(_model_cfg(file.with_name(CONFIG))["quick_gelu"])
        return Origin(model, pretrained, config, preprocess.settings({}), file=file)
    if file.is_dir():
        raise UsageError(f"--pretrained {pretrained} is a folder: pass it as --model, alone.")
    tags = open_clip.list_pretrained_tags_by_model(name)
    raise UsageError(
        f"{pretrained!r} is neither a file nor a pretrained tag of {name}{_nearest(pretrained, tags)}; "
        f"its tags are {', '.join(tags) or 'none'}."
    )


def _unknown(model: str) -> str:
    """Why there is no such model, and what may have been meant."""
    if Path(model).is_file():
        return f"{model} is a file: pass it as --pretrained, and the name of its architecture as --model."
    hub = model.removeprefix("hf-hub:")
    if "/" in hub or hub != model:
        name, tag = _by_hub_name().get(hub, ("", ""))
        meant = f"the same weights are --model {name} --pretrained {tag}" if name else (
            "download its folder in open_clip's form and name that"
        )  # fmt: skip
        return f"there is no folder {model!r}, and names of a model hub are not read: {meant}."
    return f"unknown model {model!r}{_nearest(model, [TINY, *open_clip.list_models()])}."


def _by_hub_name() -> dict[str, tuple[str, str]]:
    """ "owner/name" on a model hub → open_clip's (architecture, tag); of several architectures the first."""
    names = dict(TRANSFORMERS_NAMES)
    for name, tag in open_clip.list_pretrained():
        names.setdefault(open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "").rstrip("/"), (name, tag))
    return names


def _folder(model: str, folder: Path) -> Origin:
    file = folder / CONFIG
    if not file.is_file():
        raise ModelError(f"{folder} is no model folder: {FOLDER_NEEDS}, but {_found(folder)}.")
    record = _json_object(file)
    model_cfg = _model_cfg(file)
    settings = preprocess.settings(record.get("preprocess_cfg") or {}, f"{file}: preprocess_cfg")
    weights = compat.checkpoint_in(folder)
    if weights is None:
        raise ModelError(f"{folder} is no model folder yet: {FOLDER_NEEDS}, but it has no weights.")
    extra = folder / "clipfit.json"
    defaults = _json_object(extra).get("adapt", {}) if extra.is_file() else {}
    return Origin(model, None, model_cfg, settings, defaults, file=weights)


def _found(folder: Path) -> str:
    """What is there in place of a model folder."""
    if not folder.exists():
        return "there is no such folder"
    if not folder.is_dir():
        return "this is a file (weights alone go to --pretrained)"
    if (folder / "config.json").is_file() and (folder / "preprocessor_config.json").is_file():
        return "this is a folder of the transformers library, in which tensors have other names"
    return f"it has no {CONFIG}"


def _model_cfg(file: Path) -> dict[str, Any]:
    """The architecture in a model folder's configuration, with its activation said."""
    found = _json_object(file).get("model_cfg")
    model_cfg: dict[str, Any] = found if isinstance(found, dict) else {}
    for name, kind, what in (
        ("embed_dim", int, "a whole number"),
        ("vision_cfg", dict, "an object"),
        ("text_cfg", dict, "an object"),
    ):
        if not isinstance(model_cfg.get(name), kind):
            raise ModelError(f"{file}: model_cfg.{name} must be {what}; found {model_cfg.get(name)!r}.")
    return {"quick_gelu": False, **model_cfg}


def _json_object(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({first_line(error)}): restore it.") from error
    if not isinstance(record, dict):
        raise ModelError(f"{file} must hold one JSON object; found {type(record).__name__}.")
    return record


def _require_clip_class(model: str, model_cfg: Mapping[str, Any]) -> None:
    kind = compat.model_class(model_cfg)
    if kind != "CLIP":
        raise ModelError(f"{model} is a {kind}; clipfit adapts models of open_clip's CLIP class only.")


def tokenizer_of(source: Source) -> Any:
    """open_clip's tokenizer for the architecture: list of texts → token ids (n, context length).

    Raises:
        ModelError: it belongs to another library, and its files cannot be had.
    """
    text = source.model_cfg["text_cfg"]
    name = text.get("hf_tokenizer_name")
    options: dict[str, Any] = dict(text.get("tokenizer_kwargs") or {})
    options["context_length"] = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    if not name:
        return open_clip.SimpleTokenizer(**options)
    folder = folder_of(source.model)
    place = str(folder) if folder and (folder / CONFIG).is_file() else name  # open_clip looks into a model folder
    with quiet():
        try:
            return compat.hub_tokenizer(place, text.get("tokenizer_mode"), options)
        except Exception as error:
            raise ModelError(f"the tokenizer of {source.model} cannot be had ({first_line(error)}).") from error


def geometry_of(source: Source) -> list[Any]:
    """The part of open_clip's own evaluation transform that comes before ToTensor and Normalize."""
    return preprocess.geometry(source.preprocess_cfg)


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
