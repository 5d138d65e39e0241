"""A model made ready to name pictures: a run at a ratio α, an export, or a pre-trained model."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clipfit import engines
from clipfit.config import Recipe
from clipfit.data.pictures import Picture, opened
from clipfit.engines import Engine, graph
from clipfit.engines.graph import Graph
from clipfit.errors import UsageError
from clipfit.formats import reading
from clipfit.formats.subject import ABOUT
from clipfit.measure import scoring
from clipfit.measure.calibration import Temperature, temperature_of
from clipfit.model import loading, sources
from clipfit.model import templates as words
from clipfit.model.clip import Clip, Texts
from clipfit.prompts import Templates
from clipfit.runs import files, place
from clipfit.runs.run import Run, open_run

SETS_KEPT = 8  # of classes whose texts are kept


@dataclass(frozen=True)
class Prediction:
    """What a picture is taken for. top: the most probable classes, best first.

    calibrated: whether the probabilities are, by a temperature found for this very α, these classes and this template.
    """

    label: str
    probability: float
    top: tuple[tuple[str, float], ...]
    calibrated: bool


@dataclass(frozen=True)
class Origin:
    """Where a model is from: `name` as it was given; the run, where it is one; the digest of its weights.

    difference: the folder of an export that has every ratio, where it is one.
    """

    name: str
    run: Run | None
    digest: str
    difference: Path | None = None


@dataclass(frozen=True)
class Candidates:
    """Classes, what the model read of their texts, and the temperature of the logits among them."""

    names: tuple[str, ...]
    texts: Texts  # of a graph nothing (C, 0), for they are inside
    temperature: float | None  # None: there is none that holds

    def predictions(self, logits: torch.Tensor, top: int) -> list[Prediction]:
        """Logits (B, C) → what each image is taken for; ties go to the class that stands first."""
        p = (logits / (self.temperature or 1)).softmax(1)
        values, order = p.sort(dim=1, descending=True, stable=True)
        rows = zip(values[:, :top].tolist(), order[:, :top].tolist(), strict=True)
        found = [[(self.names[c], value) for value, c in zip(*row, strict=True)] for row in rows]
        return [Prediction(*best[0], tuple(best), self.temperature is not None) for best in found]


class Predictor:
    """Names pictures by the texts of classes. Loaded by `clipfit.load`, and never changed: threads may share it.

    With ATHA's edits the embedding of an image depends on all classes that it is compared with, so that probabilities
    among fewer or more classes are not those among the first, scaled.
    """

    def __init__(
        self,
        model: Clip | Graph,
        origin: Origin,
        alpha: float | None,
        classes: tuple[str, ...],
        templates: Templates,
        temperature: Temperature | None = None,
        grey_bits: int | None = None,
    ):
        self.model, self.origin, self.alpha = model, origin, alpha
        self.classes, self.templates, self.grey_bits = classes, templates, grey_bits
        self._temperature = temperature
        self._read: dict[tuple[str, ...], Candidates] = {}
        self._reading, self._encoding = threading.Lock(), threading.Lock()

    @property
    def clip(self) -> Clip:
        """The model in memory. Raises UsageError for a graph, which is none."""
        if isinstance(self.model, Graph):
            raise UsageError(f"{self.origin.name} gives logits among its classes and no embeddings: {graph.ELSE}.")
        return self.model

    @property
    def template(self) -> str:
        """The first of the templates whose mean text a class is."""
        return self.templates[0]

    # ---- what it says

    def predict(
        self, images: Picture | Iterable[Picture], top: int = 5, classes: Sequence[str] | None = None
    ) -> list[Prediction]:
        """What each image is taken for, in order.

        Args:
            images: one or several: paths, PIL pictures, or uint8 arrays (H, W, 3) of RGB or (H, W) of grey.
            top: how many classes to list. classes: candidates in place of the model's own.

        Raises:
            DataError: an image cannot be read. UsageError: there are no classes to compare with.
        """
        candidates = self.candidates(classes)
        parts = [self.judged(views, candidates)[1] for views in _batches(self, images)]
        return [prediction for logits in parts for prediction in candidates.predictions(logits, top)]

    def logits(self, images: Picture | Iterable[Picture], classes: Sequence[str] | None = None) -> torch.Tensor:
        """τ⁻¹·cosine of images with the texts of classes, in their order: (n, C) float32, before any temperature."""
        candidates = self.candidates(classes)
        parts = [self.judged(views, candidates)[1] for views in _batches(self, images)]
        return torch.cat(parts) if parts else torch.empty(0, len(candidates.names))

    def embed_images(self, images: Picture | Iterable[Picture], classes: Sequence[str] | None = None) -> torch.Tensor:
        """Unit-norm embeddings (n, D) float32; `classes` are what ATHA's edits go by, and nothing without them."""
        candidates = self.candidates(classes) if self.clip.edits else None
        parts = [self.embedded(views, candidates) for views in _batches(self, images)]
        return torch.cat(parts) if parts else torch.empty(0, self.clip.embed_dim)

    def embed_texts(self, texts: str | Sequence[str]) -> torch.Tensor:
        """Unit-norm embeddings (n, D) float32 of texts as they stand.

        Learnt context (`adapt --context`) takes the place of the first words of every text, whatever they are.
        """
        sentences = [texts] if isinstance(texts, str) else list(texts)
        return scoring.texts(self.clip, sentences, ("{}",)).embeddings

    def at(self, alpha: float) -> Predictor:
        """A run, or an export in the format difference, at another ratio.

        Raises:
            UsageError: it is neither. ModelError: as a run's weights do.
        """
        if alpha == self.alpha:
            return self
        found = _at(self.origin, alpha, self.model.device)
        Engine(self.clip.runtime, self.clip.precision).attach(found.clip)
        return found.among(self.classes, templates=self.templates)

    def among(
        self, classes: Iterable[str], template: str | None = None, templates: Sequence[str] | str | Path | None = None
    ) -> Predictor:
        """The same model with other classes of its own, or another template or list of them (see `load`).

        Raises:
            UsageError: both; or others for a run whose context was learnt, in place of its template's words.
            DataError: the file of templates is not as it must be.
        """
        names, made = tuple(classes), _asked(template, templates) or self.templates
        if (names, made) == (self.classes, self.templates):
            return self
        if isinstance(self.model, Graph):
            self.model.read(names, made)
        elif self.clip.context is not None and made != self.templates:
            raise UsageError(f"the words before the class were learnt for {self.template!r}: leave the template.")
        found = Predictor(self.model, self.origin, self.alpha, names, made, self._temperature, self.grey_bits)
        found._reading, found._encoding = self._reading, self._encoding  # of one model
        return found

    # ---- parts of it, for streams

    def candidates(self, classes: Sequence[str] | None = None) -> Candidates:
        """What the model read of the classes, by one pass for each set of them. Raises UsageError without any."""
        names = self.classes if classes is None else tuple(classes)
        if not names:
            raise UsageError(f"{self.origin.name} has no classes of its own: give some.")
        if isinstance(self.model, Graph):
            return Candidates(names, *self.model.read(names, self.templates))
        with self._reading:
            found = self._read.pop(names, None) or Candidates(
                names,
                scoring.texts(self.clip, names, self.templates),
                _value(self._temperature, self.alpha, names, self.templates),
            )
            self._read[names] = found  # last: the one used last
            while len(self._read) > SETS_KEPT:
                del self._read[next(iter(self._read))]
        return found

    def view(self, image: Picture, data: bytes | None = None) -> torch.Tensor:
        """An image resized and cropped as the model wants it, by the pixels of training: (3, H, W) uint8.

        Args:
            data: the file's bytes, where `image` is but its name.

        Raises:
            DataError: it cannot be read, or is too long to resize.
        """
        return self.model.geometry(opened(image, data, self.grey_bits))

    @torch.no_grad()
    def embedded(self, views: torch.Tensor, candidates: Candidates | None) -> torch.Tensor:
        """Views (B, 3, H, W) uint8 → unit-norm embeddings (B, D), on the CPU."""
        tokens = candidates.texts.class_tokens if candidates else None
        with self._encoding:  # edits hang on the model while it encodes
            return self.clip.encode_image(self.clip.normalize(views), tokens).cpu()

    def judged(self, views: torch.Tensor, candidates: Candidates) -> tuple[torch.Tensor, torch.Tensor]:
        """Views (B, 3, H, W) uint8 → embeddings (B, D; of a graph D = 0) and logits (B, C), on the CPU."""
        if isinstance(self.model, Graph):
            return torch.empty(len(views), 0), self.model.logits(views, candidates.names)
        u = self.embedded(views, candidates)
        return u, self.clip.logits(u, candidates.texts.embeddings)


def _value(found: Temperature | None, alpha: float | None, names: Sequence[str], made: Templates) -> float | None:
    holds = found is not None and alpha is not None and found.holds_for(alpha, names, made)
    return found.value if found is not None and holds else None


def load(
    source: str | Path,
    *,
    pretrained: str | None = None,
    alpha: float | None = None,
    classes: Sequence[str] | None = None,
    template: str | None = None,
    templates: Sequence[str] | str | Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    runtime: str | None = None,
) -> Predictor:
    """Load a run, an export, or a pre-trained model by name, and make it ready to name pictures.

    Args:
        source: the folder of a run, or of an export in the format open_clip, safetensors, difference or onnx (of a
            classifier, which has no embeddings, and its own classes alone); or what `adapt --model` takes. pretrained:
            weights for a model by name.
        alpha: of a run or a difference, its own by default. classes: candidates in place of those that the run was
            trained on; a pre-trained model has none. template: the text of a class; {} stands for its name.
            templates: several, a file of them, or "clip" for CLIP's own; a class is the mean of its texts, brought back
            to unit norm. precision: of the towers, "fp32", "bf16", or what is fast on the device. runtime: what
            computes the image tower, "torch", "onnxruntime" or "openvino"; torch, of a graph onnxruntime.

    Raises:
        ClipfitError: it cannot be had, is damaged, or cannot be taken so; see errors.
    """
    asked = _asked(template, templates)  # before anything takes long
    folder = folder_of(source)
    if folder is not None and pretrained and is_model(folder):
        raise UsageError(f"{folder} has its own weights: leave pretrained {pretrained} out.")
    if folder is not None and graph.is_graph(folder):
        found = _of_graph(str(source), Graph(folder, runtime, precision, device))
    else:
        engines.require_installed(runtime or engines.TORCH)
        found = _of_weights(source, folder, pretrained, alpha, engines.device_of(runtime or engines.TORCH, device))
        engines.engine_of(runtime or engines.TORCH, precision, found.clip).attach(found.clip)
    if alpha is not None:
        found = found.at(alpha)
    return found.among(found.classes if classes is None else classes, templates=asked)


def _asked(template: str | None, templates: Sequence[str] | str | Path | None) -> Templates | None:
    if template and templates is not None:
        raise UsageError("templates list what template is one of: give one of them.")
    if templates is not None:
        return words.given(templates)
    return (template,) if template else None


def folder_of(source: str | Path) -> Path | None:
    """The folder that is named, a replaced run in its place again; None for a model by name."""
    folder = source if isinstance(source, Path) else sources.folder_of(source)
    if folder is not None:
        place.recover(folder)
    return folder


def is_model(folder: Path) -> bool:
    """Whether a folder is a run or an export, by its files."""
    return folder.is_dir() and (sources.is_run(folder) or any((folder / name).is_file() for name in _OF_MODELS))


_OF_MODELS = (sources.CONFIG, ABOUT)


def _of_weights(
    source: str | Path, folder: Path | None, pretrained: str | None, alpha: float | None, device: torch.device
) -> Predictor:
    if folder is not None and sources.is_run(folder):
        run = open_run(folder)
        return _of_run(run, run.alpha if alpha is None else alpha, device)
    return _of_export(str(source), folder, alpha, device) or _of_model(str(source), pretrained, folder, device)


def _of_graph(name: str, found: Graph) -> Predictor:
    origin, about = Origin(name, None, found.digest), found.about
    return Predictor(found, origin, about["alpha"], found.classes, found.templates, None, about["grey_bits"])


def _of_run(run: Run, alpha: float, device: torch.device) -> Predictor:
    clip = loading.rebuild(run.source, run.state(alpha), run.additions, device)
    origin = Origin(str(run.path), run, run.digest("finetuned.safetensors"))
    return Predictor(clip, origin, alpha, run.base, run.templates, temperature_of(run), run.record.grey_bits)


def _at(origin: Origin, alpha: float, device: torch.device) -> Predictor:
    if origin.run:
        return _of_run(origin.run, alpha, device)
    found = _of_export(origin.name, origin.difference, alpha, device)
    if found is None:
        raise UsageError(
            f"{origin.name} is neither a run nor an export in the format difference: there is no other ratio to take "
            "it at."
        )
    return found


def _of_export(name: str, folder: Path | None, alpha: float | None, device: torch.device) -> Predictor | None:
    """An export that is no model folder of open_clip's; None for what is no such export."""
    export = reading.read(folder, alpha, device) if folder else None
    if folder is None or export is None:
        return None
    about = export.about
    origin = Origin(name, None, export.digest, folder if export.every_alpha else None)
    return Predictor(export.clip, origin, about["alpha"], tuple(about["classes"]),
                     tuple(about.get("templates", (about["template"],))), None, about["grey_bits"])  # fmt: skip


def _of_model(name: str, pretrained: str | None, folder: Path | None, device: torch.device) -> Predictor:
    """An open_clip export says its classes, templates and α; of another model a template alone may be known."""
    clip = loading.load(name if folder is None else f"{sources.LOCAL_DIR}{folder}", pretrained, device)
    about = files.read_json(folder / ABOUT) if folder and (folder / ABOUT).is_file() else {}
    own = about.get("template") or Recipe.resolved(clip.source.adapt_defaults, "", {}).template
    origin = Origin(name, None, clip.source.sha256)
    return Predictor(clip, origin, about.get("alpha"), tuple(about.get("classes", ())),
                     tuple(about.get("templates", (own,))), None, about.get("grey_bits"))  # fmt: skip


def _batches(model: Predictor, images: Picture | Iterable[Picture]) -> Iterator[torch.Tensor]:
    """Views (≤ 64, 3, H, W) of one image or of several."""
    several = iter([images] if isinstance(images, (str, Path, Image.Image, np.ndarray)) else images)
    while batch := [model.view(image) for image in itertools.islice(several, 64)]:
        yield torch.stack(batch)
