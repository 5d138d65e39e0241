"""`evaluate`: base, new and union accuracy at each ratio α, zero-shot always beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from clipfit import backbone as backbones
from clipfit import protocols
from clipfit.backbone import Backbone
from clipfit.config import EvaluateConfig
from clipfit.data import layout
from clipfit.data.images import ImageStore
from clipfit.data.layout import Sample
from clipfit.data.names import read_new_classes, same_named
from clipfit.ensemble import interpolate
from clipfit.errors import DataError
from clipfit.metrics import Accuracy, accuracy, harmonic_mean
from clipfit.progress import Progress, Silent
from clipfit.run import Run, open_run


@dataclass(frozen=True)
class AlphaResult:
    """Figures at one α. base: within the base label set; new: within the new one; union: within both together.

    agreement: the share of all images on which the union's prediction is that of zero-shot; needs no labels.
    """

    alpha: float
    base: Accuracy | None
    new: Accuracy | None
    union: Accuracy | None
    agreement: float

    @property
    def harmonic_mean(self) -> float | None:
        return harmonic_mean(self.base.value, self.new.value) if self.base and self.new else None

    def as_json(self) -> dict[str, Any]:
        """One row of `evaluate --json`."""
        part = lambda a: a.as_json() if a else None  # noqa: E731
        return {
            "alpha": self.alpha,
            "base": part(self.base),
            "new": part(self.new),
            "harmonic_mean": self.harmonic_mean,
            "union": part(self.union),
            "agreement_with_zero_shot": self.agreement,
        }


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured. `held_out` False: on the shots themselves, no evidence of generalisation."""

    run: Path
    data: str
    method: str
    held_out: bool
    base_classes: tuple[str, ...]
    new_classes: tuple[str, ...]
    rows: tuple[AlphaResult, ...]
    notes: tuple[str, ...] = field(default=())
    skipped: tuple[str, ...] = field(default=())

    def as_json(self) -> dict[str, Any]:
        """The document of `evaluate --json`."""
        return {
            "run": str(self.run),
            "data": self.data,
            "method": self.method,
            "held_out": self.held_out,
            "base_classes": list(self.base_classes),
            "new_classes": list(self.new_classes),
            "alphas": [row.as_json() for row in self.rows],
            "notes": list(self.notes),
            "skipped": list(self.skipped),
        }


@dataclass(frozen=True)
class _TestSet:
    samples: tuple[Sample, ...]
    new: tuple[str, ...]
    held_out: bool
    notes: tuple[str, ...]


def evaluate(config: EvaluateConfig, progress: Progress | None = None) -> Evaluation:
    """Measure a run on held-out images.

    Raises:
        ClipfitError: see errors; the pre-trained weights are always needed, for zero-shot stands beside everything.
    """
    progress = progress or Silent()
    run = open_run(config.run)
    test = _test_set(run, config)
    device = backbones.resolve_device(config.device)
    progress.say(f"loading {run.source.model} on {device}")
    backbone = backbones.reload(run.source, device)
    backbone.precision = str(run.config["precision"]) if device.type == run.config["device"] else "fp32"
    pretrained = {name: tensor.clone() for name, tensor in backbone.state().items()}
    finetuned = {name: tensor.to(device) for name, tensor in run.finetuned().items()}

    progress.say(f"decoding {len(test.samples)} images")
    images = ImageStore(test.samples, config.cache_bytes, backbone.geometry, config.skip_bad_images)
    alphas = sorted({0.0, *(config.alphas if config.alphas is not None else (run.alpha,))})
    rows: list[AlphaResult] = []
    zero_shot: list[str] = []
    for alpha in alphas:
        progress.say(f"evaluating at α = {alpha:g}")
        backbone.load_state(interpolate(pretrained, finetuned, alpha))
        row, union_names = _measure(backbone, images, run, test.new, alpha, zero_shot, config.batch_size)
        zero_shot = zero_shot or union_names
        rows.append(row)
    data = str(config.data or run.config["shots"])
    return Evaluation(
        run.path, data, run.method, test.held_out, run.base, test.new, tuple(rows), test.notes, tuple(images.skipped)
    )


def _measure(
    backbone: Backbone,
    images: ImageStore,
    run: Run,
    new: Sequence[str],
    alpha: float,
    zero_shot: list[str],
    batch_size: int,
) -> tuple[AlphaResult, list[str]]:
    u = protocols.image_embeddings(backbone, images, batch_size)  # (n, D)
    labels = [sample.label for sample in images.samples]

    def within(names: Sequence[str]) -> Accuracy | None:
        own = [i for i, label in enumerate(labels) if label in set(names)]
        if not own:
            return None
        t = protocols.text_embeddings(backbone, names, run.template)
        return accuracy(protocols.best_names(u[torch.tensor(own)], t, names), [labels[i] for i in own])

    union = [*run.base, *new]
    union_names = protocols.best_names(u, protocols.text_embeddings(backbone, union, run.template), union)
    agreement = sum(a == b for a, b in zip(union_names, zero_shot or union_names, strict=True)) / len(union_names)
    has_both = bool(new) and within(new) is not None
    row = AlphaResult(
        alpha,
        base=within(run.base),
        new=within(new) if new else None,
        union=accuracy(union_names, labels) if has_both else None,
        agreement=agreement,
    )
    return row, union_names


def _test_set(run: Run, config: EvaluateConfig) -> _TestSet:
    """The images to measure on, their labels as class names, and the new classes."""
    place = config.data or Path(run.config["shots"])
    class_file = config.classes or (_path(run.config["classes"]) if config.data is None else None)
    image_root = config.image_root or (_path(run.config["image_root"]) if config.data is None else None)
    found = layout.read(place, class_file, image_root)
    shots = {shot["path"] for shot in run.shots}
    if config.data is not None:
        candidates = found.test if found.test is not None else found.train
    elif found.test is not None:
        candidates = found.test
    else:
        candidates = tuple(s for s in found.train if s.source not in shots)

    # matched by name, never by position: a test folder that lacks a class must not shift the labels
    base_of = {name: same_named(name, run.base) for name in found.names.values()}
    listed = read_new_classes(config.new_classes) if config.new_classes else None
    others = [name for name, base in base_of.items() if base is None]
    present = {s.label for s in candidates}
    notes: list[str] = []
    if listed is None:
        new = tuple(name for name in others if name in present)
        label_of = {**{name: base for name, base in base_of.items() if base}, **{name: name for name in new}}
    else:
        new = tuple(name for name in listed if same_named(name, run.base) is None)
        known = [name for name in listed if same_named(name, run.base) is not None]
        if known:
            notes.append(f"{', '.join(known)}: listed as new, but trained on; counted as base")
        if not new:
            raise DataError(f"every class in {config.new_classes} was trained on: there is none that is new.")
        label_of = {name: base or same_named(name, new) or "" for name, base in base_of.items()}
        _require_images(new, {label_of[name] for name in present}, config, found.test is not None)
    samples = tuple(Sample(s.path, s.source, label_of[s.label]) for s in candidates if label_of.get(s.label))
    if len(samples) < len(candidates):
        notes.append(f"{len(candidates) - len(samples)} images of classes that are neither base nor new were left out")

    if config.data is not None and not samples:
        raise DataError(f"{place} holds no image of a base or new class; base classes: {', '.join(run.base[:8])}.")
    held_out = any(s.label in run.base for s in samples)
    if not held_out:
        wanted = {shot["path"] for shot in run.shots}
        own = [s for s in found.train if s.source in wanted] if config.data is None else []
        samples += tuple(Sample(s.path, s.source, base_of[s.label] or "") for s in own)
        if own:
            notes.append("base accuracy is measured on the shots: no evidence of generalisation")
    if new and not any(s.label in new for s in samples):
        notes.append(_missing_new(new, place))
    elif not new:
        notes.append(_missing_new(("each new class",), place))
    return _TestSet(samples, new, held_out, tuple(notes))


def _missing_new(new: Sequence[str], place: Path) -> str:
    which = ", ".join(new[:5]) + (" …" if len(new) > 5 else "")
    return f"no new accuracy: add images as {place}/test/<class>/ or pass --data, with folders for {which}"


def _require_images(new: Sequence[str], present: set[str], config: EvaluateConfig, has_test: bool) -> None:
    """Where test images were provided, each listed new class must have some; a folder of shots alone may have none."""
    without = [name for name in new if name not in present]
    if without and (config.data is not None or has_test or len(without) < len(new)):
        raise DataError(
            f"{config.new_classes} names {len(without)} new class(es) without images: {', '.join(without[:5])}; "
            f"add a folder of images for each to {config.data or 'the test part'}, or take the names out."
        )


def _path(text: str | None) -> Path | None:
    return Path(text) if text else None
