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
from clipfit.model import compat, hub, preprocess, published
from clipfit.model.published import Training

LOCAL_DIR, HUB = "local-dir:", hub.PREFIX
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


@dataclass(frozen=True)
class Source:
    """Where pre-trained weights came from, and what they are: enough to load the same ones again."""

    # an open_clip name, clipfit-tiny, hf-hub:owner/name, or local-dir:FOLDER (a model's, or a run's that goes on)
    model: str
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
    tag: Mapping[str, Any] = field(default_factory=dict)  # open_clip's entry, where it fetches them
    sha256: str = ""  # of all tensors, where an export of clipfit's says what it must be

    @property
    def label(self) -> str:
        """What people call it."""
        return f"{self.model} / {self.pretrained}" if self.pretrained else self.model

    @property
    def architecture(self) -> str:
        """What its weights have to fit, in words."""
        return f"the model that {CONFIG} describes" if self.model.startswith((LOCAL_DIR, HUB)) else self.model


def find(model: str, pretrained: str | None = None) -> Origin:
    """The model that is named; no weights are fetched, of the hub's models their configuration alone.

    Args:
        model: `clipfit-tiny`, a name of open_clip (`ViT-B-16`), `hf-hub:owner/name`, or a folder, also as
            `local-dir:FOLDER`.
        pretrained: for open_clip's names: one of its tags (default: `openai`, else the only one), a local weight
            file, or TAG:FILE for weights that were trained as those of a tag.

    Raises:
        UsageError: no such model or tag (the nearest names are given), none named of several, other weights for a
            model that has its own, weights of which it is not known how they were trained, or a folder that is a run.
        ModelError: a folder or repository that is none of a model, or a model that has not two towers.
    """
    folder = TINY_FOLDER if model == TINY else folder_of(model)
    own = folder is not None or model.startswith(HUB)
    if own and pretrained:
        raise UsageError(f"{model} has its own weights: leave --pretrained {pretrained} out.")
    if folder is None:
        origin = _hub(model) if own else _architecture(model, pretrained)
    elif is_run(folder):
        raise UsageError(f"{folder} is a run, which only `adapt` goes on from: export it, and name the export here.")
    else:
        origin = _folder(recorded_name(model), folder)
    _require_two_towers(model, origin.model_cfg)
    return origin


def recorded(source: Source) -> Origin:
    """Where the weights of a run are to be had today, with everything else as it was when the run was made.

    Raises:
        ModelError: the folder or file is gone, or open_clip does not know the tag any more.
    """
    folder = TINY_FOLDER if source.model == TINY else folder_of(source.model)
    file: Path | None = None
    tag: Mapping[str, Any] = {}
    missing = ""
    if source.model.startswith(HUB):
        tag = _entry(source.model)
    elif folder:
        file = compat.checkpoint_in(folder)
        missing = f"{folder} has no weights any more: restore {WEIGHTS} there"
    else:
        given = source.pretrained or DEFAULT_TAG
        tag = open_clip.get_pretrained_cfg(_open_clip_name(source.model), given)
        file = None if tag else published.split(given)[1]
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
    if model.startswith(HUB):
        return None
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


def weight_file(pretrained: str | None) -> Path | None:
    """The local file that `--pretrained` names, as FILE or TAG:FILE; None for a tag."""
    return published.split(pretrained)[1] if pretrained else None


def are_published(source: Source) -> bool:
    """Whether open_clip knows where to fetch the weights: by their tag, or from the hub."""
    return source.model.startswith(HUB) or bool(
        source.pretrained and open_clip.get_pretrained_cfg(_open_clip_name(source.model), source.pretrained)
    )


def default_tag(name: str) -> str:
    """The tag that is taken where none is named: `openai` where there is one, else the only one.

    Raises:
        UsageError: open_clip has no weights of the architecture, or several.
    """
    tags = open_clip.list_pretrained_tags_by_model(name)
    if DEFAULT_TAG in tags:
        return DEFAULT_TAG
    if not tags:
        raise UsageError(f"open_clip has no pre-trained weights of {name}: pass --pretrained FILE, or another --model.")
    if len(tags) > 1:
        raise UsageError(f"{name} has {len(tags)} pre-trained weights: pass --pretrained, one of {', '.join(tags)}.")
    return tags[0]


def _architecture(model: str, pretrained: str | None) -> Origin:
    name = _open_clip_name(model)
    if name not in open_clip.list_models():
        raise UsageError(_unknown(model))
    _require_two_towers(model, open_clip.get_model_config(name))  # before a tag is asked for
    pretrained = pretrained or default_tag(name)
    tag = open_clip.get_pretrained_cfg(name, pretrained)
    training, file = (Training.of_tag(tag), None) if tag else _of_file(name, pretrained)
    # the activation belongs to the weights, not to the name (open_clip #771)
    config = {**open_clip.get_model_config(name), "quick_gelu": training.quick_gelu}
    return Origin(model, pretrained, config, training.preprocess_cfg, file=file, tag=tag)


def _of_file(name: str, pretrained: str) -> tuple[Training, Path]:
    """A local weight file for an architecture, and how it was trained."""
    given, file = published.split(pretrained)
    tags = open_clip.list_pretrained_tags_by_model(name)
    if file is None and Path(pretrained).is_dir():
        raise UsageError(f"--pretrained {pretrained} is a folder: pass it as --model, alone.")
    if file is None or (given and not open_clip.get_pretrained_cfg(name, given)):
        no = f"{given!r} is no" if given else f"{pretrained!r} is neither a file nor a"
        raise UsageError(
            f"{no} pretrained tag of {name}{_nearest(given or pretrained, tags)}; "
            f"its tags are {', '.join(tags) or 'none'}."
        )
    if given:
        return Training.of_tag(open_clip.get_pretrained_cfg(name, given)), file
    if file.with_name(CONFIG).is_file():
        beside, settings = _described(file.with_name(CONFIG))
        return Training(bool(beside["quick_gelu"]), settings), file
    return published.training_of(name, file), file


def _unknown(model: str) -> str:
    """Why there is no such model, and what may have been meant."""
    if Path(model).is_file():
        return f"{model} is a file: pass it as --pretrained, and the name of its architecture as --model."
    if model.count("/") == 1:
        same = hub.same_weights(model)
        meant = f"the same weights are {same}" if same else f"a model of the Hugging Face hub is called {HUB}{model}"
        return f"there is no run, export or model {model!r}; {meant}."
    if "/" in model:
        return f"there is no run, export or model {model!r}."
    return f"unknown model {model!r}{_nearest(model, [TINY, *open_clip.list_models()])}."


def _hub(model: str) -> Origin:
    model_cfg, settings = _described(hub.small_file(model.removeprefix(HUB), CONFIG))
    return Origin(model, None, model_cfg, settings, tag=_entry(model))


def _entry(model: str) -> dict[str, str]:
    """A tag as open_clip's own ones, which says where it fetches a hub model's weights."""
    return {"hf_hub": model.removeprefix(HUB) + "/"}


def _folder(model: str, folder: Path) -> Origin:
    file = folder / CONFIG
    if not file.is_file():
        raise ModelError(f"{folder} is no model folder: {FOLDER_NEEDS}, but {_found(folder)}.")
    model_cfg, settings = _described(file)
    weights = compat.checkpoint_in(folder)
    if weights is None:
        raise ModelError(f"{folder} is no model folder yet: {FOLDER_NEEDS}, but it has no weights.")
    about = _json_object(folder / "clipfit.json") if (folder / "clipfit.json").is_file() else {}
    defaults, sha256 = about.get("adapt", {}), str(about.get("sha256", ""))
    return Origin(model, None, model_cfg, settings, defaults, file=weights, sha256=sha256)


def _found(folder: Path) -> str:
    """What is there in place of a model folder."""
    if not folder.exists():
        return "there is no such folder"
    if not folder.is_dir():
        return "this is a file (weights alone go to --pretrained)"
    if (folder / "config.json").is_file() and (folder / "preprocessor_config.json").is_file():
        return "this is a folder of the transformers library, in which tensors have other names"
    return f"it has no {CONFIG}"


def _described(file: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a model's configuration says: its architecture, with the activation said, and its preprocessing."""
    record = _json_object(file)
    found = record.get("model_cfg")
    model_cfg: dict[str, Any] = found if isinstance(found, dict) else {}
    for name, kind, what in (
        ("embed_dim", int, "a whole number"),
        ("vision_cfg", dict, "an object"),
        ("text_cfg", dict, "an object"),
    ):
        if not isinstance(model_cfg.get(name), kind):
            raise ModelError(f"{file}: model_cfg.{name} must be {what}; found {model_cfg.get(name)!r}.")
    settings = preprocess.settings(record.get("preprocess_cfg") or {}, f"{file}: preprocess_cfg")
    return {"quick_gelu": False, **model_cfg}, settings


def _json_object(file: Path) -> dict[str, Any]:
    try:
        record = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file} cannot be read as JSON ({first_line(error)}): restore it.") from error
    if not isinstance(record, dict):
        raise ModelError(f"{file} must hold one JSON object; found {type(record).__name__}.")
    return record


def _require_two_towers(model: str, model_cfg: Mapping[str, Any]) -> None:
    reason = compat.lacks_towers(model_cfg)
    if reason:
        raise ModelError(f"{model} {reason}: clipfit adapts models of an image tower and a text tower.")


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
