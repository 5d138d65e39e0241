"""`predict`: a row an image, in the order of the images, however many there are and whatever is wrong with some."""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np
import torch

from clipfit import predictor, ranks
from clipfit.config.predict import PredictConfig
from clipfit.data import lists
from clipfit.data.ahead import ahead
from clipfit.data.names import read_new_classes
from clipfit.data.stream import Input, Inputs, is_no_input
from clipfit.errors import DataError, UsageError, first_line
from clipfit.events import Counter, CountReport, Silent
from clipfit.predictor import Candidates, Prediction, Predictor
from clipfit.prompts import excluding
from clipfit.rows import tables, vectors
from clipfit.rows.spool import Spool
from clipfit.runs import files, place
from clipfit.runs.run import newest
from clipfit.text import valid
from clipfit.training.saving import require_same
from clipfit.verbs import predict_files, predict_ranks, predict_ray

Row = dict[str, Any]
Judged = tuple[list[Row], "np.ndarray[Any, Any] | None"]  # and, where they are wanted, embeddings (rows, D)
BATCHES_AHEAD = 2  # decoded beside the forward pass


class Gallery(Protocol):
    """Keeps some of the rows to be looked at."""

    def wants(self, row: Row) -> bool:
        """Whether it would keep the row as things stand."""

    def add(self, row: Row, view: torch.Tensor | None) -> None:
        """Keep a row, with its image as the model sees it: (3, H, W) uint8, or None where it could not be read."""

    def page(self) -> str:
        """The page as text."""


@dataclass
class Counts:
    """Rows so far: all, those of images that could not be read, and those without a label."""

    rows: int | None = 0  # None: they were finished before, and not counted again
    errors: int = 0
    abstained: int = 0

    def add(self, row: Mapping[str, Any]) -> None:
        """One more."""
        self.rows = (self.rows or 0) + 1
        self.errors += row["error"] is not None
        self.abstained += row["abstained"]


@dataclass(frozen=True)
class PredictResult:
    """What `predict` did. left_out: files of folders that are not called as images are.

    features: the number type of the towers, and what computed the image tower where it was not torch.
    """

    output: Path | None
    model: str
    counts: Counts
    alpha: float | None = None
    classes: int = 0
    calibrated: bool = False
    left_out: int = 0
    features: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The document of `predict --json`."""
        return {
            "output": str(self.output) if self.output else None, "model": self.model, "alpha": self.alpha,
            "classes": self.classes, "calibrated": self.calibrated, "left_out": self.left_out,
            "features": self.features, **asdict(self.counts),
        }  # fmt: skip


def predict(
    config: PredictConfig, out: TextIO | None = None, progress: Counter | None = None, gallery: Gallery | None = None
) -> PredictResult:
    """Name every image that is given.

    Several processes (within `ranks.joined()`) share the batches; the first of them goes through the inputs and writes.

    Args:
        out: where rows go without `config.output`. gallery: what makes the page of `config.html`.

    Raises:
        ClipfitError: see errors; never for what is wrong with an image, which its row says.
    """
    if config.engine == "ray":
        predict_ray.require_ray()
        if ranks.here().count > 1:
            raise UsageError("--engine ray shares the images out by itself: leave torchrun out, or --engine.")
    model, places = _split(config)
    if not ranks.here().leads:
        if not predict_ranks.said(False):
            loaded = _loaded(config, model, Silent())
            predict_ranks.follow(Job(config, loaded, loaded.candidates(), Inputs(()), None))
        return PredictResult(None, str(model), Counts())
    return _predicted(config, model, places, out, progress or Silent(), gallery)


def _predicted(
    config: PredictConfig,
    model: str | Path,
    places: tuple[Path, ...],
    out: TextIO | None,
    progress: Counter,
    gallery: Gallery | None,
) -> PredictResult:
    inputs = Inputs(places, config.column, config.image_root)
    inputs.require_lists()
    predict_files.require_writable(config, model, places)
    with place.locked(config.output) if config.output else contextlib.nullcontext():
        predict_files.require_free(config)
        if predict_files.is_finished(config):
            progress.say(f"{config.output} is finished already: nothing is left to do; --overwrite makes it anew")
            predict_ranks.said(True)
            return PredictResult(config.output, str(model), Counts(rows=None))
        predict_ranks.said(False)
        with predict_files.claimed(config.output):
            loaded = _loaded(config, model, progress)
            job = Job(config, loaded, loaded.candidates(), inputs, gallery)
            counts = _carry_out(job, out, progress)
    if counts.rows == counts.errors > 0 and config.image_root is None and any(map(lists.is_list, places)):
        progress.say("no image was read (paths in a list start at its folder, or at --image-root)")
    return PredictResult(config.output, str(model), counts, loaded.alpha, len(job.candidates.names),
                         job.candidates.temperature is not None, inputs.left_out, loaded.model.features)  # fmt: skip


@dataclass(frozen=True)
class Job:
    """What is to be done: the model, the classes, the images."""

    config: PredictConfig
    predictor: Predictor
    candidates: Candidates
    inputs: Inputs
    gallery: Gallery | None

    @property
    def identity(self) -> dict[str, Any]:
        """What must be the same for kept rows to be this job's."""
        c, p = self.config, self.predictor
        return {
            "weights": p.origin.digest, "alpha": p.alpha, "template": p.template, "grey_bits": p.grey_bits,
            "templates": list(p.templates) if len(p.templates) > 1 else None,
            "classes": list(self.candidates.names), "temperature": self.candidates.temperature,
            "top": c.top, "abstain_below": c.abstain_below, "batch_size": c.batch_size, "column": c.column,
            "inputs": [valid(str(p)) for p in c.inputs], "embeddings": valid(str(c.embeddings)),
            "html": valid(str(c.html)), "precision": p.model.precision, "device": p.model.device.type,
            "engine": c.engine, "runtime": p.model.runtime,
            "image_root": None if c.image_root is None else valid(str(c.image_root)),
        }  # fmt: skip

    def view(self, image: Input) -> torch.Tensor | str:
        """The image as the model sees it, (3, H, W) uint8; or why there is none."""
        if image.error is not None or image.path is None:
            return image.error or "there is no image."
        try:
            return self.predictor.view(image.path, image.data)
        except DataError as error:
            return str(error)
        except Exception as error:  # whatever a decoder makes of a hostile file: one row, and no stop
            return f"image {image.name} cannot be read ({first_line(error)})."


def _carry_out(job: Job, out: TextIO | None, progress: Counter) -> Counts:
    """Every row, and the files that are made of them."""
    counts, images = Counts(), iter(job.inputs)
    total = job.inputs.count()
    with _spooling(job, progress) as (spool, before):
        if spool and before:
            _pass_by(job, spool, images, counts)
        for rows, embeddings in _batches(job, images):
            lines = [json.dumps(row) for row in rows]
            if spool:
                spool.append(lines, embeddings)
            if out and not job.config.output:
                out.write("".join(f"{line}\n" for line in lines))
                out.flush()
            for row in rows:
                counts.add(row)
            progress.count(CountReport(counts.rows or 0, total, counts.errors, before))
        if spool:
            _publish(job, spool)
        elif job.config.html and job.gallery:
            files.write_text(job.config.html, job.gallery.page())
    return counts


def _batches(job: Job, images: Iterator[Input]) -> Iterator[Judged]:
    """Rows and embeddings; a batch is cut by the images' numbers alone."""
    if job.config.engine == "ray":
        yield from predict_ray.batches(job, images)
        return
    if ranks.here().count > 1:
        yield from predict_ranks.batches(job, images)
        return
    size = job.config.batch_size

    def viewed_of(holder: list[Input]) -> tuple[Input, torch.Tensor | str]:
        image = holder.pop()  # a member of an archive: its bytes are not held until its batch is judged
        return replace(image, data=None), job.view(image)

    with contextlib.closing(ahead(([image] for image in images), viewed_of, BATCHES_AHEAD * size)) as coming:
        viewed = (found for _, found in coming)
        while batch := list(itertools.islice(viewed, size)):
            rows, embeddings = judged(job, batch)
            if job.gallery:
                for row, (_, view) in zip(rows, batch, strict=True):
                    if job.gallery.wants(row):
                        job.gallery.add(row, _picture(view))
            yield rows, embeddings


def judged(job: Job, batch: Sequence[tuple[Input, torch.Tensor | str]]) -> Judged:
    """The rows of a batch of images and their views (or why there are none)."""
    embeddings, predictions = _judged(job, [view for _, view in batch if isinstance(view, torch.Tensor)])
    named = iter(predictions)
    rows = [
        _row(image, view, None, job) if isinstance(view, str) else _row(image, None, next(named), job)
        for image, view in batch
    ]
    return rows, _spread(embeddings, rows) if job.config.embeddings else None


def _judged(job: Job, views: list[torch.Tensor]) -> tuple[torch.Tensor, list[Prediction]]:
    if not views:
        return torch.empty(0, job.predictor.clip.embed_dim if job.config.embeddings else 0), []
    together = np.stack([view.numpy() for view in views])  # torch's threads would wait for those that read
    u, logits = job.predictor.judged(torch.from_numpy(together), job.candidates)
    return u, job.candidates.predictions(logits, job.config.top)


def _row(image: Input, error: str | None, found: Prediction | None, job: Job) -> Row:
    least = job.config.abstain_below
    abstained = found is not None and least is not None and found.probability < least
    return {
        "path": valid(image.name),
        "label": None if found is None or abstained else found.label,
        "probability": None if found is None else _short(found.probability),
        "top": [{"label": name, "probability": _short(p)} for name, p in found.top] if found else [],
        "abstained": abstained,
        "error": None if error is None else valid(error),
        "calibrated": found is not None and found.calibrated,
    }


def _short(probability: float) -> float:
    """To the six digits that a float32 softmax can vouch for."""
    return float(f"{probability:.6g}")


def _spread(embeddings: torch.Tensor, rows: list[Row]) -> np.ndarray[Any, Any]:
    """(rows, D): NaN where there is an error."""
    spread = np.full((len(rows), embeddings.shape[1]), np.nan, np.float32)
    spread[[row["error"] is None for row in rows]] = embeddings.numpy()
    return spread


def _picture(view: torch.Tensor | str) -> torch.Tensor | None:
    return view if isinstance(view, torch.Tensor) else None


def _pass_by(job: Job, spool: Spool, images: Iterator[Input], counts: Counts) -> None:
    """Go past the images whose rows are kept. Raises DataError where they are others than then."""
    for row in spool.rows():
        image = next(images, None)
        if image is None or valid(image.name) != row["path"]:
            now = f"now it is of {valid(image.name)}" if image else "now there are fewer images"
            raise DataError(
                f"row {(counts.rows or 0) + 1} was of {row['path']}, {now}: give the same inputs, or start anew with "
                "--overwrite."
            )
        counts.add(row)
        if job.gallery and job.gallery.wants(row):
            job.gallery.add(row, _picture(job.view(image)))


# ---- files


@contextlib.contextmanager
def _spooling(job: Job, progress: Counter) -> Iterator[tuple[Spool | None, int]]:
    """Where rows are kept until they are whole, and how many are; a spool beside an output outlives a kill."""
    config = job.config
    width = job.predictor.clip.embed_dim if config.embeddings else None
    if config.output:
        spool = predict_files.spool_of(config.output, width)
        before = 0
        if config.resume and spool.job is not None:
            require_same(spool.job, job.identity, f"what is kept in {spool.folder}")
            before = spool.go_on(config.batch_size)
            progress.say(f"going on after {before} rows")
        else:
            spool.start(job.identity)
        yield spool, before
    elif config.embeddings:
        with tempfile.TemporaryDirectory(prefix=".clipfit-", dir=config.embeddings.parent) as folder:
            spool = Spool(Path(folder) / "rows", width)
            spool.start(job.identity)
            yield spool, 0
    else:
        yield None, 0


def _publish(job: Job, spool: Spool) -> None:
    """The rows last: while they are in the spool, all this can be done again."""
    config = job.config
    if config.embeddings:
        vectors.publish(spool, job.predictor.clip.embed_dim, config.embeddings)
    if config.html and job.gallery:
        files.write_text(config.html, job.gallery.page())
    if config.output:
        tables.publish(spool, config.output)
    spool.remove()


# ---- what names them


def _split(config: PredictConfig) -> tuple[str | Path, tuple[Path, ...]]:
    """The model, and the images: the first input is the model if it is a run or an export and others follow."""
    first, *others = config.inputs
    if config.model is not None:
        return config.model, config.inputs
    predictor.folder_of(first)
    if predictor.is_model(first):
        if not others:
            raise UsageError(f"{first} is a run or an export: give images after it.")
        return first, tuple(others)
    if others and is_no_input(first):
        raise UsageError(f"there is no run, export or image {first}: name the run, or leave it out for the newest.")
    return newest(), config.inputs


def _loaded(config: PredictConfig, model: str | Path, progress: Counter) -> Predictor:
    progress.say(f"loading {model}")
    file = config.classes or config.add_classes
    listed = read_new_classes(file) if file else ()  # before anything takes long
    found = predictor.load(
        model, pretrained=config.pretrained, alpha=config.alpha, template=config.template,
        templates=config.templates, device=config.device, precision=config.precision, runtime=config.runtime,
    )  # fmt: skip
    if config.embeddings:
        _ = found.clip  # a graph of logits has none
    own = () if config.classes else found.classes
    found = found.among((*own, *excluding(listed, own)) if file else None)
    for note in found.origin.run.notes if found.origin.run else ():
        progress.say(note)
    if not found.classes:
        raise UsageError(f"{model} has no classes of its own: give --classes.")
    ratio = "" if found.alpha is None else f" at α = {found.alpha:g}"
    progress.say(f"{model}{ratio}, {len(found.classes)} classes, on {found.model.device} in {found.model.features}")
    return found
