"""`predict` by several processes: the first goes through the inputs and writes; in rounds, each judges a batch.

Batches are those of one process, whoever judges them, and so are the rows.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clipfit import ranks
from clipfit.data.ahead import cores, on_one_core
from clipfit.data.stream import Input
from clipfit.errors import ModelError, UsageError

if TYPE_CHECKING:
    from clipfit.verbs.predict import Job, Judged

Told = tuple[str, str | None, str | None]  # an Input's name, path and error
Round = list[list[Told]] | None  # a batch a process; None: there are no more


def batches(job: Job, images: Iterator[Input]) -> Iterator[Judged]:
    """Of the first process: rows and, where they are wanted, embeddings (rows, D), whichever process judged them.

    Raises:
        UsageError: an image lies in an archive.
    """
    here, size = ranks.here(), job.config.batch_size

    def round_of() -> Round:
        own = [list(itertools.islice(images, size)) for _ in range(here.count)]
        return [[_told(image) for image in batch] for batch in own if batch] or None

    for told, judged in _rounds(job, round_of):
        for batch, (rows, embeddings) in zip(told, judged, strict=True):
            for row, image in zip(rows, batch, strict=True):
                if job.gallery and job.gallery.wants(row):
                    view = job.view(_input(image))
                    job.gallery.add(row, view if isinstance(view, torch.Tensor) else None)
            yield rows, embeddings


def follow(job: Job) -> None:
    """Of every other process: judge what it is told to, until there is no more."""
    for _ in _rounds(job, lambda: None):
        pass


def said(finished: bool) -> bool:
    """Whether the rows are finished already, as the first process finds: then no process has anything to judge."""
    return ranks.here().told(lambda: finished)


def _rounds(job: Job, find: Callable[[], Round]) -> Iterator[tuple[list[list[Told]], list[Judged]]]:
    """The same in all processes; the images of a round are decoded in threads while the one before is judged."""
    from clipfit.verbs.predict import judged

    here = ranks.here()
    if not ranks.agree(job.identity):
        raise ModelError(
            "the processes do not find the same model, classes and options: give all of them the same files."
        )
    pool = ThreadPoolExecutor(min(cores(), 16), initializer=on_one_core)
    try:

        def begun() -> tuple[Round, Iterator[torch.Tensor | str], list[Input]]:
            told: Round = here.told(find)
            own = [_input(image) for batch in (told or [])[here.rank : here.rank + 1] for image in batch]
            return told, pool.map(job.view, own), own

        told, views, own = begun()
        while told is not None:
            upcoming = begun()
            found = judged(job, list(zip(own, views, strict=True))) if own else ([], None)
            every = here.all_told(json.dumps([found[0], _text_of(found[1])]))
            yield told, [_judged_of(text, job) for text in every[: len(told)]]
            told, views, own = upcoming
    finally:
        pool.shutdown(cancel_futures=True)  # who is stopped does not wait for what nobody will read


def _told(image: Input) -> Told:
    if image.data is not None:
        raise UsageError(f"{image.name} lies in an archive, which processes of torchrun do not share: unpack it.")
    return image.name, str(image.path) if image.path else None, image.error


def _input(told: Sequence[Any]) -> Input:
    name, path, error = told
    return Input(name, Path(path) if path else None, error=error)


def _text_of(embeddings: np.ndarray[Any, Any] | None) -> str | None:
    return None if embeddings is None else base64.b64encode(embeddings.astype("<f4").tobytes()).decode()


def _judged_of(text: str, job: Job) -> Judged:
    rows, numbers = json.loads(text)
    if numbers is None:
        return rows, None
    return rows, np.frombuffer(base64.b64decode(numbers), "<f4").reshape(len(rows), job.predictor.clip.embed_dim)
