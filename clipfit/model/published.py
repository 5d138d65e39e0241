"""How the weights in a local file were trained: the activation, and how their pictures were made.

Both belong to the weights, and a weight file says neither. With another activation, or other means, nothing fails and
every feature is wrong (open_clip #771), so that what is not known is asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip

from clipfit.errors import UsageError
from clipfit.model import hub, preprocess


@dataclass(frozen=True)
class Training:
    """The activation that weights were trained with, and open_clip's preprocessing of their pictures."""

    quick_gelu: bool
    preprocess_cfg: Mapping[str, Any]

    @classmethod
    def of_tag(cls, tag: Mapping[str, Any]) -> Training:
        """What open_clip says of published weights."""
        return cls(bool(tag.get("quick_gelu", False)), preprocess.settings(tag))

    def differences(self, other: Training) -> set[str]:
        """The keys in which two differ."""
        mine, others = ({"quick_gelu": t.quick_gelu, **t.preprocess_cfg} for t in (self, other))
        return {key for key, value in mine.items() if others[key] != value}


def split(pretrained: str) -> tuple[str, Path | None]:
    """`--pretrained` where it is no tag: FILE, or TAG:FILE for weights trained as a tag's → (tag or "", file)."""
    tag, colon, rest = pretrained.partition(":")
    if colon and not Path(pretrained).is_file() and Path(rest).is_file():
        return tag, Path(rest)
    return "", Path(pretrained) if Path(pretrained).is_file() else None


def training_of(name: str, file: Path) -> Training:
    """How the weights in a file were trained, of which no configuration lies beside it.

    By the tag whose published file it is; else as all tags of the architecture were; without any, as open_clip trains
    the architecture.

    Raises:
        UsageError: the tags differ; says in what, and how to say which of them holds.
    """
    tags = {tag: open_clip.get_pretrained_cfg(name, tag) for tag in open_clip.list_pretrained_tags_by_model(name)}
    matching = _matching(file, tags)
    trainings = {tag: Training.of_tag(tags[tag]) for tag in matching or tags}
    if not trainings:
        return Training(bool(open_clip.get_model_config(name).get("quick_gelu", False)), preprocess.settings({}))
    first = next(iter(trainings.values()))
    differing = sorted(set().union(*(first.differences(training) for training in trainings.values())))
    if differing:
        raise UsageError(
            f"{file} does not say how its weights were trained, and the tags of {name} differ in "
            f"{', '.join(differing)} ({_kinds(trainings)}): say which they are like, as --pretrained "
            f"{next(iter(trainings))}:{file}, or lay an open_clip_config.json beside it."
        )
    return first


def _matching(file: Path, tags: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """The tags that a file names: as it was published, in its name, or by its folder in the Hugging Face cache."""
    cached = {part.removeprefix("models--") for part in file.absolute().parts if part.startswith("models--")}
    published = [tag for tag, entry in tags.items() if _is_of(file, entry) or _repository(entry) in cached]
    if published:
        return published
    named = [tag for tag in tags if _words(tag) in _words(file.stem)]
    return [tag for tag in named if not any(_words(tag) in _words(longer) for longer in named if longer != tag)]


def _is_of(file: Path, entry: Mapping[str, Any]) -> bool:
    return str(entry.get("url", "")).rpartition("/")[2] == file.name


def _repository(entry: Mapping[str, Any]) -> str:
    """As the cache calls its folder, behind "models--"."""
    return hub.repository_of(entry).replace("/", "--")


def _words(text: str) -> str:
    """ "ViT-B-16-laion2B-s34B" → "_vit_b_16_laion2b_s34b_": one text is in another as whole words."""
    return f"_{re.sub('[^a-z0-9]+', '_', text.lower()).strip('_')}_"


def _kinds(trainings: Mapping[str, Training]) -> str:
    """The tags by how they were trained: "openai and 3 more, or laion400m_e31 and 10 more"."""
    groups: list[list[str]] = []
    for tag, training in trainings.items():
        alike = (group for group in groups if not trainings[group[0]].differences(training))
        found = next(alike, None)
        if found is None:
            groups.append([tag])
        else:
            found.append(tag)
    return ", or ".join(tags[0] + (f" and {len(tags) - 1} more" if len(tags) > 1 else "") for tags in groups)
