"""A model made ready to name pictures: a run at a ratio α, an export, or a pre-trained model."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import torch

from clipfit import engines
from clipfit.config import Recipe
from clipfit.config.options import declared_by
from clipfit.config.predict import PredictConfig
from clipfit.data.names import given_classes
from clipfit.data.pictures import Picture, each, opened
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

Listed: TypeAlias = "Sequence[str] | str | Path"  # templates, or a file of them
SETS_KEPT = 8  # of classes whose texts are kept
OPTIONS = declared_by(PredictConfig)  # what they may be is said there
ALPHA = replace(OPTIONS["alpha"], kind=float)  # where it is given


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
        self.temperature = temperature
        self._read: dict[tuple[str, ...], Candidates] = {}
        self._reading, self._encoding = threading.Lock(), threading.Lock()

    def __repr__(self) -> str:
        ratio = "" if self.alpha is None else f"α = {self.alpha:g}, "
        return f"Predictor({self.origin.name}, {ratio}{len(self.classes)} classes, {self.model.device})"

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
            DataError: an image cannot be read. UsageError: it is none, `top` is below 1, or as `candidates` does.
        """
        top = OPTIONS["top"].checked(top)
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
        sentences = _sentences(texts)
        found = scoring.texts(self.clip, sentences, ("{}",)) if sentences else None
        return found.embeddings if found else torch.empty(0, self.clip.embed_dim)

    def at(self, alpha: float) -> Predictor:
        """A run, or an export in the format difference, at another ratio.

        Raises:
            UsageError: it is neither, or α is not between 0 and 1. ModelError: as a run's weights do.
        """
        alpha = ALPHA.checked(alpha)
        if alpha == self.alpha:
            return self
        found = _at(self.origin, alpha, self.model.device)
        Engine(self.clip.runtime, self.clip.precision).attach(found.clip)
        return found.among(None if self.classes == found.classes else self.classes, templates=self.templates)

    def among(
        self, classes: Iterable[str] | None = None, template: str | None = None, templates: Listed | None = None
    ) -> Predictor:
        """The same model with other classes of its own, or another template or list of them (see `load`).

        Raises:
            UsageError: both; or others for a run whose context was learnt, in place of its template's words; classes
                that are no list of names, each once. DataError: the file of templates is not as it must be.
        """
        names = self.classes if classes is None else given_classes(classes)
        made = _asked(template, templates) or self.templates
        if (names, made) == (self.classes, self.templates):
            return self
        _require_takes(self, names, made)
        found = Predictor(self.model, self.origin, self.alpha, names, made, self.temperature, self.grey_bits)
        found._reading, found._encoding = self._reading, self._encoding  # of one model
        return found

    # ---- parts of it, for streams

    def candidates(self, classes: Sequence[str] | None = None) -> Candidates:
        """What the model reads of classes. Raises UsageError: there are none, or no list of names, each once."""
        names = self.classes if classes is None else given_classes(classes)
        if not names:
            raise UsageError(f"{self.origin.name} has no classes of its own: give some.")
        return self.read(names)

    def read(self, names: tuple[str, ...]) -> Candidates:
        """What the model reads of names, whatever they are, by one pass for each set of them."""
        with self._reading:
            found = self._read.pop(names, None) or _candidates(self, names)
            self._read[names] = found  # last: the one used last
            while len(self._read) > SETS_KEPT:
                del self._read[next(iter(self._read))]
        return found

    def view(self, image: Picture, data: bytes | None = None) -> torch.Tensor:
        """An image resized and cropped as the model wants it, by the pixels of training: (3, H, W) uint8.

        Takes and raises what `pictures.opened` does.
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


def _sentences(texts: str | Iterable[str]) -> list[str]:
    found = list(texts) if isinstance(texts, Iterable) and not isinstance(texts, (str, bytes)) else [texts]
    for sentence in found:
        if not isinstance(sentence, str):
            raise UsageError(f"texts must be one text or a list of them; found {type(sentence).__name__}.")
    return found


def _require_takes(model: Predictor, names: tuple[str, ...], made: Templates) -> None:
    if isinstance(model.model, Graph):
        model.model.read(names, made)
    elif model.clip.context is not None and made != model.templates:
        raise UsageError(f"the words before the class were learnt for {model.template!r}: leave the template.")


def _candidates(model: Predictor, names: tuple[str, ...]) -> Candidates:
    if isinstance(model.model, Graph):
        return Candidates(names, *model.model.read(names, model.templates))
    found, alpha = model.temperature, model.alpha
    holds = found is not None and alpha is not None and found.holds_for(alpha, names, model.templates)
    texts = scoring.texts(model.clip, names, model.templates)
    return Candidates(names, texts, found.value if found is not None and holds else None)


def load(
    source: str | Path,
    *,
    pretrained: str | None = None,
    alpha: float | None = None,
    classes: Sequence[str] | None = None,
    template: str | None = None,
    templates: Listed | None = None,
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
    asked = _asked(template, templates)  # all that is given, before anything takes long
    names = None if classes is None else given_classes(classes)
    alpha = None if alpha is None else ALPHA.checked(alpha)
    given = {"pretrained": pretrained, "device": device, "precision": precision, "runtime": runtime}
    for option, value in given.items():
        OPTIONS[option].checked(value)
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
    return found.among(names, templates=asked)


def _asked(template: str | None, templates: Listed | None) -> Templates | None:
    if template is not None and templates is not None:
        raise UsageError("templates list what template is one of: give one of them.")
    given = templates if template is None else (template,)
    return None if given is None else words.given(given)


def folder_of(source: str | Path) -> Path | None:
    """The folder that is named, a replaced run in its place again; None for a model by name."""
    if not isinstance(source, (str, Path)):
        raise UsageError(f"a run, an export or a model is named by a path or a text; found {type(source).__name__}.")
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
    several = iter(each(images))
    while batch := [model.view(image) for image in itertools.islice(several, 64)]:
        yield torch.stack(batch)
