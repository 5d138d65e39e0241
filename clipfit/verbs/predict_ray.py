"""`predict --engine ray`: Ray Data has the batches read, decoded and judged wherever its cluster has room.

A worker has a model of its own. Batches are cut here, by the images' numbers alone, and come back in their order, so
that rows are those of one process. What a worker that dies was at, Ray gives to another one.
"""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import json
import signal
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clipfit import predictor
from clipfit.config.predict import PredictConfig
from clipfit.data.stream import Input, Inputs
from clipfit.errors import ClipfitError, ModelError, UsageError, first_line
from clipfit.prompts import Templates

if TYPE_CHECKING:
    from clipfit.verbs.predict import Job, Judged


def require_ray() -> None:
    """Raises UsageError where it is not installed."""
    if importlib.util.find_spec("ray") is None:
        raise UsageError("--engine ray needs Ray, which cannot be imported here: pip install 'clipfit[ray]'.")


@dataclass(frozen=True)
class Recipe:
    """From what a worker makes the job that the driver has."""

    config: PredictConfig
    model: str
    pretrained: str | None
    alpha: float | None
    templates: Templates
    classes: tuple[str, ...]
    digest: str

    @classmethod
    def of(cls, job: Job) -> Recipe:
        """Folders by their absolute paths: a worker starts elsewhere."""
        made, config = job.predictor, job.config
        folder = predictor.folder_of(Path(made.origin.name) if made.origin.run else made.origin.name)
        alpha = made.alpha if made.origin.run else None
        model = str(folder.absolute()) if folder else made.origin.name
        config = replace(config, html=None, precision=made.model.precision)  # all workers in one type, the driver's
        return cls(config, model, config.pretrained, alpha, made.templates, job.candidates.names,
                   made.origin.digest)  # fmt: skip

    def job(self) -> Job:
        """Raises ClipfitError where the worker cannot have the model, or has another one at its place."""
        from clipfit.verbs.predict import Job

        made = predictor.load(
            self.model, pretrained=self.pretrained, alpha=self.alpha, classes=self.classes, templates=self.templates,
            device=self.config.device, precision=self.config.precision, runtime=self.config.runtime,
        )  # fmt: skip
        if made.origin.digest != self.digest:
            raise ModelError(f"{self.model} is another model on a worker than here: give all of them the same files.")
        return Job(self.config, made, made.candidates(), Inputs(()), None)


class Worker:
    """What Ray keeps in a process of its own: judges a batch after the other."""

    def __init__(self, recipe: Recipe):
        self._job = recipe.job()

    def _viewed(self, name: str, path: str | None, given: str, error: str | None) -> tuple[Input, torch.Tensor | str]:
        image = Input(name, Path(path) if path else None, error=error)
        view = self._job.view(image)
        return image, view.replace(path, given) if isinstance(view, str) and path else view

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """`number` and `images` of a batch → its number, its rows as JSON, and the bytes of its embeddings."""
        from clipfit.verbs.predict import judged

        rows, embeddings = judged(self._job, [self._viewed(*told) for told in json.loads(batch["images"])])
        vectors = b"" if embeddings is None else embeddings.astype(np.float32).tobytes()
        return {"number": batch["number"], "rows": json.dumps(rows), "embeddings": vectors}


def batches(job: Job, images: Iterator[Input]) -> Iterator[Judged]:
    """Rows and, where they are wanted, embeddings (rows, D), batch by batch.

    The names of all images are held here; of the images nothing.

    Raises:
        UsageError: an image lies in an archive. ClipfitError: Ray cannot finish it.
    """
    items = [{"number": n, "images": told} for n, told in enumerate(_told(images, job.config.batch_size))]
    if not items:
        return
    import ray

    try:
        with _cluster():
            for n, row in enumerate(_mapped(items, Recipe.of(job))):
                if row["number"] != n:
                    raise ClipfitError(f"Ray gave batch {row['number']} in the place of {n}: please report it.")
                rows = json.loads(row["rows"])
                flat = np.frombuffer(row["embeddings"], np.float32)
                yield rows, flat.reshape(len(rows), -1) if job.config.embeddings else None
    except ray.exceptions.RayError as error:
        raise ClipfitError(f"Ray could not finish the images ({first_line(error)}).") from error


def _told(images: Iterator[Input], size: int) -> Iterator[str]:
    """Batches as JSON, in ASCII: what a file is called need not be UTF-8."""
    while batch := list(itertools.islice(images, size)):
        if inside := next((image for image in batch if image.data is not None), None):
            raise UsageError(f"{inside.name} lies in an archive, which --engine ray does not read: unpack it.")
        yield json.dumps([
            (image.name, str(image.path.absolute()) if image.path else None, str(image.path), image.error)
            for image in batch
        ])  # fmt: skip


def _mapped(items: list[dict[str, Any]], recipe: Recipe) -> Iterator[dict[str, Any]]:
    import ray

    gpus = int(ray.cluster_resources().get("GPU", 0)) if recipe.config.device != "cpu" else 0
    room = min(len(items), max(1, gpus or int(ray.cluster_resources().get("CPU", 1))))
    workers = ray.data.ActorPoolStrategy(min_size=1, max_size=room, initial_size=room)
    given = ray.data.from_items(items, override_num_blocks=len(items))
    needs = {"num_gpus": 1} if gpus else {"num_cpus": 1}
    yield from given.map(Worker, fn_constructor_args=(recipe,), compute=workers, **needs).iter_rows()


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """The cluster that is there (RAY_ADDRESS), or one of this machine while it is needed; in order, and quiet."""
    import ray

    with contextlib.redirect_stdout(sys.stderr):  # where Ray says what died: rows alone go to stdout
        started = not ray.is_initialized()
        if started:
            _start()
        context = ray.data.DataContext.get_current()
        before = (context.execution_options.preserve_order, context.enable_progress_bars)
        context.execution_options.preserve_order, context.enable_progress_bars = True, False
        try:
            yield
        finally:
            context.execution_options.preserve_order, context.enable_progress_bars = before
            if started:
                ray.shutdown()


def _start() -> None:
    import ray

    terminated = signal.getsignal(signal.SIGTERM)
    ray.init(include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, terminated)  # Ray puts its own in place
