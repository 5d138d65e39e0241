"""Learnt context vectors: they stand where the embeddings of the template's first words stood (CoOp, as in ATHA)."""

from __future__ import annotations

from typing import Any

import torch

from clipfit.errors import ModelError, UsageError
from clipfit.model import text_tower


def word_embeddings(model: Any, tokens: torch.Tensor, words: str, name: str) -> torch.Tensor:
    """The model's own embeddings of words that a text begins with: (number of tokens, text width).

    Args:
        tokens: (1, context length), of the words alone. name: of the model, for the error.

    Raises:
        ModelError: a text tower that pools elsewhere than at the end of the text, so that the end cannot be told.
        UsageError: there are no words, or the last one runs into the class name.
    """
    tower = text_tower.require_own(model, name, "a learnt context")
    if not tower.pools_at_end:
        raise ModelError(
            "context vectors need texts that are read at their end-of-text token, but the text tower of "
            f"{name} pools by {tower.pool!r}: leave --context out."
        )
    if words[-1:].isalnum():
        raise UsageError("context vectors stand for whole words, but the template's run into the class name.")
    count = int(tower.ends(tokens)) - 1  # between start and end of the text
    if count < 1:
        raise UsageError("context vectors stand for words before the class name, but the template has none there.")
    embeddings: torch.Tensor = tower.parts.token_embedding(tokens[0, 1 : 1 + count]).detach()
    return embeddings.clone()
