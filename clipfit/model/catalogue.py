"""The architectures that can be named: their weights, which of these are on this machine, and what each can do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import open_clip

from clipfit.config import AdaptConfig
from clipfit.config.options import declared_by
from clipfit.errors import ModelError, first_line
from clipfit.model import compat, hub
from clipfit.model.facts import Facts, facts_of
from clipfit.model.sources import DEFAULT_TAG, TINY, find, quiet

DEFAULT: str = declared_by(AdaptConfig)["model"].default
# to lay out every architecture takes minutes, hence a table, written by docs/architectures.py
KNOWN = Path(__file__).parent.parent / "assets" / "architectures.json"
SAME_AS = "-quickgelu"  # ends names of models whose tags the plain name has too


@dataclass(frozen=True)
class Tag:
    """Pre-trained weights. cached: on this machine. default: taken where none is named."""

    name: str
    cached: bool
    default: bool


@dataclass(frozen=True)
class Architecture:
    """What `--model` names. `facts` None: it cannot be adapted, and `refused` says why."""

    name: str
    tags: tuple[Tag, ...]  # none for clipfit-tiny, whose weights ship
    facts: Facts | None
    refused: str | None = None

    @property
    def ships(self) -> bool:
        """Whether its weights are part of clipfit."""
        return self.name == TINY

    @property
    def default(self) -> bool:
        """Whether it is the model that is taken where none is named."""
        return self.name == DEFAULT


def names(word: str | None = None) -> list[str]:
    """Names of architectures, clipfit-tiny first: those with pre-trained weights, or all in which the word is found.

    Punctuation and capitals do not count; a tag that has the word brings its architectures.
    """
    known = [TINY, *open_clip.list_models()]
    if word is None:
        return [name for name in known if name == TINY or (_tags(name) and not name.endswith(SAME_AS))]
    return [name for name in known if any(_bare(word) in _bare(text) for text in (name, *_tags(name)))]


def architecture(name: str) -> Architecture:
    """What is known of a name."""
    if name == TINY:
        return Architecture(name, (), facts_of(find(TINY).model_cfg))
    model_cfg = open_clip.get_model_config(name)
    tags = tuple(_described(name))
    refused = compat.lacks_towers(model_cfg)
    if refused:
        return Architecture(name, tags, None, refused)
    try:
        return Architecture(name, tags, facts(name, model_cfg))
    except ModelError as error:
        return Architecture(name, tags, None, str(error))


def facts(name: str, model_cfg: Mapping[str, Any]) -> Facts:
    """The facts of open_clip's configuration of that name, from the table where it is the one that the table is of.

    Raises:
        ModelError: open_clip cannot build it.
    """
    row = json.loads(KNOWN.read_text("utf-8")).get(name, {})
    if row.pop("config", None) == digest(model_cfg):
        return Facts(**{**row, "image_size": tuple(row["image_size"])})
    with quiet():
        try:
            return facts_of(model_cfg)
        except Exception as error:
            raise ModelError(f"cannot be built by this open_clip ({first_line(error)})") from error


def table() -> dict[str, dict[str, Any]]:
    """What KNOWN holds, told from the layers of every architecture: minutes."""
    rows = {}
    for name in open_clip.list_models():
        model_cfg = open_clip.get_model_config(name)
        if not compat.lacks_towers(model_cfg):
            with quiet():
                rows[name] = {"config": digest(model_cfg), **asdict(facts_of(model_cfg))}
    return rows


def digest(model_cfg: Mapping[str, Any]) -> str:
    """By which a configuration is known again."""
    return sha256(json.dumps(model_cfg, sort_keys=True).encode()).hexdigest()[:16]


def _tags(name: str) -> Sequence[str]:
    return open_clip.list_pretrained_tags_by_model(name)


def _described(name: str) -> Iterator[Tag]:
    tags = _tags(name)
    for tag in tags:
        entry = open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "")
        taken = tag == DEFAULT_TAG or len(tags) == 1
        yield Tag(tag, cached=bool(entry) and hub.cached(entry) is not None, default=taken)


def _bare(text: str) -> str:
    return re.sub("[^a-z0-9]", "", text.lower())
