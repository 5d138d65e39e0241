"""The Hugging Face hub, and its cache on this machine, which is all that there is of it without a network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
from huggingface_hub import constants
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from clipfit.errors import ModelError, UsageError, first_line

PREFIX = "hf-hub:"
# what people know from the transformers library, and the same weights' names in open_clip
TRANSFORMERS_NAMES = {
    "openai/clip-vit-base-patch32": ("ViT-B-32", "openai"),
    "openai/clip-vit-base-patch16": ("ViT-B-16", "openai"),
    "openai/clip-vit-large-patch14": ("ViT-L-14", "openai"),
    "openai/clip-vit-large-patch14-336": ("ViT-L-14-336", "openai"),
}


def small_file(repository: str, name: str) -> Path:
    """A configuration file of a repository, downloaded where the cache has not got it.

    Raises:
        UsageError: "owner/name" is not what the repository is called. ModelError: it or the file cannot be had.
    """
    try:
        return Path(huggingface_hub.hf_hub_download(repository, name, library_name="open_clip"))
    except HFValidationError as error:
        raise UsageError(f"{PREFIX}{repository} is not of the form {PREFIX}owner/name.") from error
    except LocalEntryNotFoundError as error:  # an EntryNotFoundError too, hence first
        why = f"is neither in the Hugging Face cache ({cache()}) nor to be had over a network"
        raise ModelError(f"{name} of {PREFIX}{repository} {why}; {_meant(repository)}.") from error
    except (EntryNotFoundError, RepositoryNotFoundError) as error:
        missing = "such repository" if isinstance(error, RepositoryNotFoundError) else name
        raise ModelError(f"{PREFIX}{repository}: the hub has no {missing} there; {_meant(repository)}.") from error
    except Exception as error:
        raise ModelError(
            f"{name} of {PREFIX}{repository} cannot be had ({first_line(error)}); {_meant(repository)}."
        ) from error


def cached(entry: str) -> Path | None:
    """The weights in the cache that open_clip would take for "owner/name/" or "owner/name/file"; None without any."""
    repository, _, name = entry.rpartition("/")
    return next(filter(None, (_kept(repository, candidate) for candidate in _candidates(name))), None)


def kept_folder(repository: str, names: Sequence[str]) -> Path | None:
    """The folder of the cache in which all these files of a repository are; None where it has not got them."""
    found = [_kept(repository, name) for name in names]
    return found[0].parent if found[0] and all(found) else None


def _kept(repository: str, name: str) -> Path | None:
    found = huggingface_hub.try_to_load_from_cache(repository, name, cache_dir=cache())
    return Path(found) if isinstance(found, str) else None  # of a file that is known not to be there: an object


def _candidates(name: str) -> list[str]:
    """The file names that open_clip tries, in its order."""
    if not name:
        return ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"]
    path = Path(name)
    return [str(path.with_suffix(".safetensors")), name] if path.suffix in (".bin", ".pth") else [name]


def cache() -> Path:
    """Where the hub's files are kept on this machine: HF_HUB_CACHE, or below HF_HOME."""
    return Path(constants.HF_HUB_CACHE)


def repository_of(tag: Mapping[str, Any]) -> str:
    """ "owner/name" of a tag of open_clip's; "" where it is on no hub."""
    return str(tag.get("hf_hub", "")).rpartition("/")[0]


def open_clips_name(repository: str) -> tuple[str, str] | None:
    """open_clip's (architecture, tag) of the weights in a repository; of several architectures the first."""
    names = dict(TRANSFORMERS_NAMES)
    for name, tag in open_clip.list_pretrained():
        names.setdefault(repository_of(open_clip.get_pretrained_cfg(name, tag)), (name, tag))
    return names.get(repository)


def same_weights(repository: str) -> str:
    """The options that name a repository's weights as open_clip does; "" where it does not know them."""
    known = open_clips_name(repository)
    return f"--model {known[0]} --pretrained {known[1]}" if known else ""


def _meant(repository: str) -> str:
    same = same_weights(repository)
    if same:
        return f"the same weights are {same}"
    return "look at its name, or name a folder that holds its files"
