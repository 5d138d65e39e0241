"""`check`: a look at labelled images and class names before anything is adapted or measured."""

from __future__ import annotations

import functools
from collections import Counter as Count
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from clipfit.config.check import CheckConfig
from clipfit.data import faults, layout
from clipfit.data.ahead import ahead
from clipfit.data.findings import ERROR, HINT, Finding, error
from clipfit.data.folders import PARTS
from clipfit.data.images import decode, grey_bits
from clipfit.data.layout import LabelledImages, Sample
from clipfit.data.looks import Look, Seen, look
from clipfit.data.objections import Objections
from clipfit.errors import DataError
from clipfit.events import Counter, CountReport, Silent
from clipfit.measure import suspicions
from clipfit.model.tokenizing import are_cut
from clipfit.predictor import Candidates, Predictor, load
from clipfit.prompts import prompts


@dataclass(frozen=True)
class Checked:
    """What was found. counts: images that can be read, by class and part; a part that the place lacks is not there."""

    shots: str
    model: str
    images: int
    counts: Mapping[str, Mapping[str, int]]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...] = ()

    @property
    def errors(self) -> tuple[Finding, ...]:
        """What must be changed."""
        return tuple(found for found in self.findings if found.severity == ERROR)

    @property
    def hints(self) -> tuple[Finding, ...]:
        """What is worth a look."""
        return tuple(found for found in self.findings if found.severity == HINT)

    def as_json(self) -> dict[str, Any]:
        """The document of `check --json`."""
        return {
            "shots": self.shots,
            "model": self.model,
            "images": self.images,
            "classes": {name: dict(counts) for name, counts in self.counts.items()},
            "errors": len(self.errors),
            "hints": len(self.hints),
            "findings": [finding.as_json() for finding in self.findings],
            "notes": list(self.notes),
        }

    def require_no_errors(self) -> None:
        """Raises DataError where there are; its `found` is this."""
        if not self.errors:
            return
        count = "1 error" if len(self.errors) == 1 else f"{len(self.errors)} errors"
        first = self.errors[0]
        which = ":" if len(self.errors) == 1 else ", the first:"
        refusal = DataError(f"{self.shots} has {count}{which} {first.message}; {first.advice}.")
        refusal.found = self
        raise refusal


def check(config: CheckConfig, progress: Counter | None = None) -> Checked:
    """Look at every image once, and at the class names as this model reads them.

    What is found is returned, errors too (`Checked.require_no_errors` raises them).

    Raises:
        ClipfitError: see errors; the place cannot be read at all, or the model cannot be had.
    """
    progress = progress or Silent()
    objections: Objections = []
    found = layout.read(config.shots, config.classes, config.image_root, objections)
    progress.say(f"loading {config.model}")
    model = load(config.model, pretrained=config.pretrained, templates=config.templates, device=config.device,
                 precision="fp32")  # fmt: skip  # in which the thresholds were measured
    names = tuple(dict.fromkeys(found.names.values()))
    candidates = model.read(names)  # be they twins: that is among the findings
    seen, embeddings, unreadable = _look_at_all(found, model, candidates, config.batch_size, progress)
    counts = {part: Count(s.label for s, p in zip(seen.samples, seen.parts, strict=True) if p == part)
              for part in PARTS}  # fmt: skip
    logits = functools.partial(model.clip.logits, t=candidates.texts.embeddings)
    doubtful, note = suspicions.doubtful_labels(seen.samples, names, embeddings, logits)
    findings = [
        *faults.of_layout(objections),
        *unreadable,
        *faults.of_counts(found, counts),
        *faults.of_copies(seen, embeddings),
        *_of_names(model, names, candidates),
        *faults.of_pixels(seen, model.clip.image_size),
        *doubtful,
    ]
    has = [part for part in PARTS if getattr(found, part)]
    return Checked(
        shots=str(config.shots),
        model=config.model,
        images=len(seen) + len(unreadable),
        counts={name: {part: counts[part][name] for part in has} for name in names},
        findings=tuple(sorted(findings, key=lambda finding: finding.severity != ERROR)),
        notes=(*found.notes, *([note] if note else [])),
    )


def _of_names(model: Predictor, names: Sequence[str], candidates: Candidates) -> list[Finding]:
    clip, texts = model.clip, candidates.texts.embeddings
    sentences = [prompts(names, template) for template in model.templates]
    cut = [any(several) for several in zip(*(are_cut(clip.source, them) for them in sentences), strict=True)]
    everyday = model.candidates(suspicions.EVERYDAY).texts.embeddings
    return [
        *suspicions.same_tokens(names, clip.tokenize(sentences[0])),
        *suspicions.long_names(names, cut),
        *suspicions.confusable_names(names, texts, everyday),
    ]


Listed = tuple[str, Sample]  # part and image


def _look_at_all(
    found: LabelledImages, model: Predictor, candidates: Candidates, batch_size: int, progress: Counter
) -> tuple[Seen, torch.Tensor, list[Finding]]:
    """What can be read, with its embeddings (n, D), and what cannot. Each file is decoded once, in threads beside the
    forward pass, and nothing of its size is kept."""
    listed: list[Listed] = [(part, sample) for part in PARTS for sample in getattr(found, part) or ()]
    bits = grey_bits([sample for _, sample in listed])

    def work(item: Listed) -> tuple[Look, torch.Tensor] | DataError:
        try:
            picture = decode(item[1].path, bits)
        except DataError as error:
            return error
        return look(picture), model.clip.geometry(picture)

    progress.say(f"looking at {len(listed)} images")
    seen, views, embeddings = Seen([], [], []), [], [torch.empty(0, model.clip.embed_dim)]
    unreadable: list[Finding] = []
    for done, ((part, sample), result) in enumerate(ahead(listed, work, 2 * batch_size), 1):
        if isinstance(result, DataError):
            unreadable.append(error("unreadable", str(result).rstrip("."), "replace or remove it",
                                    (sample.source,), (sample.label,)))  # fmt: skip
        else:
            seen.samples.append(sample)
            seen.parts.append(part)
            seen.looks.append(result[0])
            views.append(result[1])
        if views and (len(views) == batch_size or done == len(listed)):
            embeddings.append(model.embedded(torch.stack(views), candidates if model.clip.edits else None))
            views.clear()
        if done % batch_size == 0 or done == len(listed):
            progress.count(CountReport(done, len(listed), len(unreadable)))
    return seen, torch.cat(embeddings), unreadable
