"""What is measured: classification among a set of class names, from texts alone."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from clipfit import ranks
from clipfit.data.ahead import ahead, cores
from clipfit.data.images import Images, ImageStore
from clipfit.measure.figures import Tables
from clipfit.measure.predictions import Predictions
from clipfit.model.clip import Clip, Texts
from clipfit.prompts import Templates, prompts

TEXTS_AT_ONCE = 512


@torch.no_grad()
def image_embeddings(
    clip: Clip,
    images: Images,
    chosen: Sequence[int],
    batch_size: int,
    class_tokens: torch.Tensor | None = None,
) -> torch.Tensor:
    """Embeddings of n chosen images, in the CLIP's geometry: (n, D), unit norm, on the CPU.

    Several processes share the batches, and all have all embeddings.

    Args:
        class_tokens: of the texts they will be compared with (see `texts`), where the CLIP edits tokens.
    """

    def of(views: torch.Tensor) -> torch.Tensor:
        return _encoded(clip, views, class_tokens)

    return _by_batches(images, chosen, batch_size, clip.embed_dim, of)


def _encoded(clip: Clip, views: torch.Tensor, class_tokens: torch.Tensor | None) -> torch.Tensor:
    return clip.encode_image(clip.normalize(views), class_tokens).cpu()  # (B, D)


def _by_batches(
    images: Images, chosen: Sequence[int], size: int, width: int, of: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """What becomes of chosen images, batch by batch (B, 3, H, W): (n, width). A batch is the same in whichever process
    it is; the next ones are read in threads meanwhile, for not all of them are in memory."""
    here = ranks.here()
    found = torch.zeros(len(chosen), width)
    batches = here.share(math.ceil(len(chosen) / size))
    own = chosen[batches.start * size : batches.stop * size]
    with contextlib.closing(ahead(own, images.__getitem__, 2 * cores())) as coming:
        for k in batches:
            rows = slice(k * size, (k + 1) * size)
            views = [view.numpy() for _, view in itertools.islice(coming, len(chosen[rows]))]
            found[rows] = of(torch.from_numpy(np.stack(views)))  # torch's threads would wait for those that read
    return here.complete(found)


@torch.no_grad()
def texts(clip: Clip, names: Sequence[str], templates: Templates) -> Texts:
    """Class names in templates: unit-norm embeddings (C, D) on the CPU, and what images need of them.

    With several templates (CLIP's prompt ensembling, arXiv 2103.00020, section 3.1.4) t_c is the mean of the class's
    unit-norm texts, brought back to unit norm; where patch tokens are edited, z_c is that of the mean f_c. One template
    is no mean: its texts are what they are without such a list, to the bit. Memory holds 512 texts at once.
    """
    chunks = (names[start : start + TEXTS_AT_ONCE] for start in range(0, len(names), TEXTS_AT_ONCE))
    parts = [_mean_texts(clip, chunk, templates) for chunk in chunks]
    tokens = [part.class_tokens for part in parts if part.class_tokens is not None]
    return Texts(torch.cat([part.embeddings for part in parts]), torch.cat(tokens) if tokens else None)


def _mean_texts(clip: Clip, names: Sequence[str], templates: Templates) -> Texts:
    t, f = clip.text_features(clip.tokenize(prompts(names, templates[0])))  # (C, D)
    for template in templates[1:]:
        more_t, more_f = clip.text_features(clip.tokenize(prompts(names, template)))
        t = t + more_t
        f = None if f is None or more_f is None else f + more_f
    if len(templates) > 1:
        t = F.normalize(t, dim=1)  # of the sum is that of the mean
        f = None if f is None else f / len(templates)
    return Texts(t.cpu(), None if f is None else clip.class_tokens(f))


def best_names(images: torch.Tensor, texts: torch.Tensor, names: Sequence[str]) -> list[str]:
    """For image embeddings (n, D) and text embeddings (C, D): the name of the most similar text."""
    return [names[i] for i in (images @ texts.T).argmax(1).tolist()]


@torch.no_grad()
def predict(
    clip: Clip,
    images: ImageStore,
    chosen: Sequence[int],
    candidates: Sequence[str],
    templates: Templates,
    alpha: float,
    batch_size: int,
) -> Predictions:
    """Chosen images, in the CLIP's geometry, against the candidates; `alpha` is what the table will say.

    Beside the images of a few batches, memory holds the logits alone.
    """
    t, z = texts(clip, candidates, templates)  # (C, D)

    def of(views: torch.Tensor) -> torch.Tensor:
        return clip.logits(_encoded(clip, views, z), t)  # (B, C)

    logits = _by_batches(images, chosen, batch_size, len(candidates), of)
    samples = [images.samples[i] for i in chosen]
    return Predictions(
        tuple(sample.source for sample in samples), tuple(sample.label for sample in samples), tuple(candidates),
        logits, alpha, templates[0], clip.features, templates,
    )  # fmt: skip


def tables(
    clip: Clip,
    images: ImageStore,
    base: Sequence[str],
    new: Sequence[str],
    templates: Templates,
    alpha: float,
    batch_size: int,
) -> Tables:
    """All images among base and new classes together; what they are among fewer follows from that.

    Not so with edited patch tokens, which depend on what an image is compared with: then the images of base classes
    among those alone, and likewise of new ones, are passes and tables of their own.
    """
    labels = [sample.label for sample in images.samples]
    found = {"union": predict(clip, images, range(len(labels)), [*base, *new], templates, alpha, batch_size)}
    if clip.edits:
        for part, names in (("new", new), ("base", base)):
            own = [i for i, label in enumerate(labels) if label in names]
            if own:
                found[part] = predict(clip, images, own, names, templates, alpha, batch_size)
    return found
