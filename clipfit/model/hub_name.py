"""What a model's pre-trained weights are called on the Hugging Face hub."""

from __future__ import annotations

import open_clip

from clipfit.model import hub
from clipfit.model.sources import Source


def hub_name(source: Source) -> str | None:
    """ "owner/name", or None where they are not known to be there: weights of a folder or file, say."""
    if source.model.startswith(hub.PREFIX):
        return source.model.removeprefix(hub.PREFIX)
    tag = open_clip.get_pretrained_cfg(source.model.replace("/", "-"), source.pretrained or "")
    return hub.repository_of(tag) or None
