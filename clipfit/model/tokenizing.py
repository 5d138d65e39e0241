"""Tokenizers: open_clip's own, and those of the transformers library, from a model's folder or the hub's cache."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch

from clipfit.errors import ModelError, first_line
from clipfit.model import compat, hub
from clipfit.model.sources import CONFIG, Source, folder_of, quiet

TOKENIZER = "tokenizer.json"
# what a folder of the hub's cache must have to be read as it is, with no look for a configuration that it may lack
WHOLE = (TOKENIZER, "tokenizer_config.json")
# any of them makes a folder one that has a tokenizer, for the transformers library
ANY = (*WHOLE, "spiece.model", "sentencepiece.bpe.model", "vocab.txt")


def is_of_transformers(source: Source) -> bool:
    """Whether its tokenizer is one of the transformers library, whose files may be missing."""
    return bool(source.model_cfg["text_cfg"].get("hf_tokenizer_name"))


def tokenizer_of(source: Source) -> Any:
    """open_clip's tokenizer for the architecture: list of texts → token ids (n, context length).

    Raises:
        ModelError: it belongs to the transformers library, which is not installed, or its files cannot be had.
    """
    text = source.model_cfg["text_cfg"]
    options: dict[str, Any] = dict(text.get("tokenizer_kwargs") or {})
    options["context_length"] = text.get("context_length", open_clip.tokenizer.DEFAULT_CONTEXT_LENGTH)
    if not is_of_transformers(source):
        return compat.plain_tokenizer(options)
    if importlib.util.find_spec("transformers") is None:
        raise ModelError(
            f"the tokenizer of {source.model} is one of the transformers library, which is not installed: "
            "pip install 'clipfit[transformers]'."
        )
    name, folder = text["hf_tokenizer_name"], _model_folder(source)
    place = folder if folder and any((folder / file).is_file() for file in ANY) else hub.kept_folder(name, WHOLE)
    with quiet():
        try:
            return compat.hub_tokenizer(str(place or name), text.get("tokenizer_mode"), options)
        except Exception as error:
            raise ModelError(_missing(source, name, folder, place, error)) from error


def are_cut(source: Source, texts: Sequence[str]) -> list[bool]:
    """Which texts are longer than the model's context, so that their ends are not read.

    The tokenizer, of whatever library, is asked for a context twice as long: to a text that fits it adds only padding.
    """
    tokenizer = tokenizer_of(source)
    read = tokenizer(list(texts))  # (n, length)
    longer = tokenizer(list(texts), context_length=2 * read.shape[1])
    same = (longer[:, : read.shape[1]] == read).all(1)
    padding = (longer[:, read.shape[1] :] == longer[:, -1:]).all(1)
    found: list[bool] = torch.logical_not(same & padding).tolist()
    return found


def write_tokenizer(source: Source, folder: Path) -> None:
    """The tokenizer's files, where it is one of the transformers library: open_clip looks for them in the folder.

    Raises:
        ModelError: it cannot be had.
    """
    if is_of_transformers(source):
        tokenizer_of(source).save_pretrained(str(folder))


def _model_folder(source: Source) -> Path | None:
    """Where open_clip looks for the tokenizer of a model that is a folder."""
    folder = folder_of(source.model)
    return folder if folder and (folder / CONFIG).is_file() else None


def _missing(source: Source, name: str, folder: Path | None, place: Path | None, error: Exception) -> str:
    """Which file is missing, and where it is to be had."""
    if place:
        return f"the tokenizer in {place} cannot be read ({first_line(error)}): restore {TOKENIZER} there."
    here = f"{folder} has no {TOKENIZER} and " if folder else ""
    to = folder or "FOLDER"
    return (
        f"the tokenizer of {source.model} cannot be had: {here}{TOKENIZER} of {name} is neither in the Hugging Face "
        f"cache ({hub.cache()}) nor to be had over a network; where there is one, "
        f"transformers.AutoTokenizer.from_pretrained({name!r}).save_pretrained('{to}') writes it"
        + ("." if folder else f", for a folder with {CONFIG} and the weights.")
    )
