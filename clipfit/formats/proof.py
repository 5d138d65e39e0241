"""The proof of an export: the logits of its consumer beside those of the run, on the run's own shots."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.functional import to_pil_image

from clipfit.data.images import content_hash, decode
from clipfit.errors import ClipfitError, DataError, UsageError
from clipfit.formats.consumer import Answer, Request
from clipfit.formats.stored import stored
from clipfit.formats.subject import Subject, plain
from clipfit.measure import scoring
from clipfit.model.clip import Clip
from clipfit.prompts import prompts
from clipfit.runs.run import Run

MOST = 64  # pictures
# of a cosine, of which a logit is τ⁻¹ times as much: what another order of float32 sums may cost, and rounded weights
BOUNDS = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}
SEEN_ALIKE = 1e-3  # of a normalised pixel; one step of 255 is 0.01 or more


@dataclass(frozen=True)
class Pictures:
    """What an export is proved on: uint8 images (n, 3, H, W) as the model's geometry leaves them.

    Shots have their files, their names in shots.jsonl, and their classes; random pictures have none of these.
    """

    images: torch.Tensor
    files: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Agreement:
    """A consumer's logits beside the run's: the largest absolute difference, and how many best labels are the same.

    accuracy: of the consumer's best labels, where the pictures are shots. clear: how many images have a best label
    that leads, among the run's logits, by more than twice that difference; clear_same_labels: for how many of these it
    is the consumer's too.
    """

    images: int
    largest_difference: float
    same_labels: int
    accuracy: float | None
    clear: int
    clear_same_labels: int


@dataclass(frozen=True)
class SeenOtherwise:
    """A file that the consumer's own way to open it makes another picture of; what it is, and what helps."""

    path: str
    reason: str
    advice: str


@dataclass(frozen=True)
class Proof:
    """What is read back is the run's model: on identical pixels, and on the files as the consumer decodes them.

    further: other ways that a consumer may take, and how far they are from the run's model; further_pixels: the
    largest difference of a normalised pixel that they make of noise.
    """

    consumer: str
    pictures: str  # "shots", or "random" where none is any more where it was
    identical_pixels: Agreement
    files: Agreement | None  # None: there are none, or what was exported takes no pictures
    seen_otherwise: tuple[SeenOtherwise, ...] = ()
    read_otherwise: tuple[SeenOtherwise, ...] = ()  # texts, where a path stands for files
    further: Mapping[str, Agreement] = field(default_factory=dict)
    further_pixels: Mapping[str, float] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """What `export --json` and proof.json say."""
        return {
            **asdict(self),
            "seen_otherwise": [asdict(file) for file in self.seen_otherwise],
            "read_otherwise": [asdict(text) for text in self.read_otherwise],
        }


def pictures_of(run: Run, model: Clip) -> Pictures:
    """Up to 64 shots, spread over the classes, as far as they are where they were; else random pictures."""
    shots = []
    for shot, path in _shots_still_there(run):
        try:
            picture = model.geometry(decode(path, run.record.grey_bits))
            shots.append((picture, path, shot["path"], shot["class"]))
        except DataError:  # gone since a moment ago
            continue
        if len(shots) == MOST:
            break
    if not shots:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(256, (8, 3, *model.image_size), generator=generator)
        return Pictures(noise.to(torch.uint8))
    images, paths, names, classes = zip(*shots, strict=True)
    return Pictures(torch.stack(images), tuple(paths), tuple(names), tuple(classes))


def _shots_still_there(run: Run) -> Iterator[tuple[Mapping[str, str], Path]]:
    """Shots and their files, where their content is the recorded one; the first of every class, the second, …"""
    place, root = run.place("shots"), run.place("image_root")
    if place is None:
        return
    # names start in the folder, in its parent (class folders alone), or where the rows of a file start
    starts = (root or place.parent,) if place.is_file() else (place, place.parent)
    for shot in _spread(run.shots):
        for path in (start / shot["path"] for start in starts):
            if path.is_file() and content_hash(path) == shot["sha256"]:
                yield shot, path
                break


def _spread(shots: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Ordered by their number within their class."""
    seen: dict[str, int] = {}
    numbers = []
    for shot in shots:
        numbers.append(seen.setdefault(shot["class"], 0))
        seen[shot["class"]] += 1
    return [shot for _, shot in sorted(zip(numbers, shots, strict=True), key=lambda pair: pair[0])]


def prove(
    subject: Subject, pictures: Pictures, ask: Callable[[Request], Answer], cosine_bound: float | None = None
) -> Proof:
    """Compare a consumer with the model that was written.

    Args:
        cosine_bound: how much a cosine may differ on identical pixels; None: what the weights' type may cost.

    Raises:
        ClipfitError: on identical pixels its logits differ by more, or it preprocesses a picture in another way.
        UsageError: they differ by more for a type that is asked for.
    """
    model = subject.model
    pixels = model.normalize(pictures.images)
    request = _request(subject, pictures, pixels)
    expected = model.logits(request.image_embeddings, request.text_embeddings)  # (n, C)
    labels = [subject.run.base.index(name) for name in pictures.classes]
    answer = ask(request)
    identical = _agreement(answer.logits, expected, labels)
    most = bound(subject) if cosine_bound is None else float(request.scale) * cosine_bound
    if not identical.largest_difference <= most:  # nor where it is no number
        if (dtype := subject.options.dtype) != "fp32" and math.isfinite(identical.largest_difference):
            raise UsageError(
                f"--dtype {dtype} loses too much of this run: what moved a weight by less than a step of it is gone. "
                f"Logits differ by up to {identical.largest_difference:g}, and {most:g} is usual; leave out --dtype."
            )
        raise ClipfitError(
            f"{answer.consumer} reads another model from the export: its logits differ by up to "
            f"{identical.largest_difference:g} (at most {most:g} may be rounding); it is not kept: please report it."
        )
    view = model.normalize(model.geometry(to_pil_image(request.probe.permute(2, 0, 1)))[None])[0]
    if answer.probe is not None and not _largest(answer.probe, view) <= SEEN_ALIKE:
        raise ClipfitError(
            f"{answer.consumer} preprocesses pictures in another way than the run; the export is not kept: "
            "please report it."
        )
    opened = [k for k in range(len(expected)) if k not in answer.errors]
    labels = [labels[k] for k in opened] if labels else []

    def of_opened(logits: torch.Tensor) -> Agreement:
        return _agreement(logits[opened], expected[opened], labels)

    return Proof(
        answer.consumer, "shots" if pictures.files else "random", identical,
        of_opened(answer.file_logits) if pictures.files and answer.file_logits is not None else None,
        _seen_otherwise(subject, pictures, pixels, answer), _read_otherwise(request, answer),
        {what: of_opened(logits) for what, logits in answer.further.items()},
        {what: _largest(probe, view) for what, probe in answer.further_probes.items()},
    )  # fmt: skip


def bound(subject: Subject) -> float:
    """How much a logit may differ where weights are of the type that was asked for."""
    return float(subject.model.scale) * BOUNDS[subject.options.dtype]


@torch.no_grad()
def _request(subject: Subject, pictures: Pictures, pixels: torch.Tensor) -> Request:
    """What the consumer is asked, with what the run's model makes of it, on the CPU."""
    model, names, templates = subject.model, subject.run.base, subject.run.templates
    texts = scoring.texts(model, names, templates)
    images = torch.cat([model.encode_image(part, texts.class_tokens).cpu() for part in pixels.split(16)])  # (n, D)
    written = [text for template in templates for text in prompts(names, template)]
    return Request(
        pixels.cpu(), _probe(model), written, [plain(model.source, text) for text in written],
        model.tokenize(written).cpu(), pictures.files, images, texts.embeddings, model.scale.cpu(),
        torch.zeros(()) if model.bias is None else model.bias.cpu(), len(templates),
    )  # fmt: skip


def _probe(model: Clip) -> torch.Tensor:
    """A picture of noise (h, w, 3) uint8, larger than the model takes and not of its shape.

    Where the shorter side is resized to the model's, what is cut off the other one is even: half of an odd number is
    rounded in one way here and another there, which moves the crop by a pixel; the rows of files show that.
    """
    height, width = (size + 37 * k for k, size in enumerate(model.image_size, 1))
    while (model.image_size[0] * width // height - model.image_size[1]) % 2:
        width += 1
    generator = torch.Generator().manual_seed(1)
    return torch.randint(256, (3, height, width), generator=generator).to(torch.uint8).permute(1, 2, 0)


def _seen_otherwise(
    subject: Subject, pictures: Pictures, pixels: torch.Tensor, answer: Answer
) -> tuple[SeenOtherwise, ...]:
    shortest = subject.model.source.preprocess_cfg.get("resize_mode", "shortest") == "shortest"
    side = subject.model.image_size[0] if shortest else None
    found: list[SeenOtherwise] = []
    if answer.file_pixels is None:
        return ()
    for k, (name, path) in enumerate(zip(pictures.names, pictures.files, strict=True)):
        if k in answer.errors:
            found.append(SeenOtherwise(name, f"cannot be opened there ({answer.errors[k]})", stored(path).advice))
        elif _largest(answer.file_pixels[k], pixels[k]) > SEEN_ALIKE:
            found.append(SeenOtherwise(name, *stored(path, side)))
    return tuple(found)


def _agreement(found: torch.Tensor, expected: torch.Tensor, labels: Sequence[int]) -> Agreement:
    """Logits (n, C) beside logits (n, C); labels: n, or none for pictures that have none."""
    best, largest = found.argmax(1), _largest(found, expected)
    accuracy = float((best == torch.tensor(labels)).float().mean()) if labels else None
    same = best == expected.argmax(1)
    first, second = expected.topk(2, dim=1).values.T
    clear = first - second > 2 * largest
    return Agreement(len(expected), largest, int(same.sum()), accuracy, int(clear.sum()), int((same & clear).sum()))


def _read_otherwise(request: Request, answer: Answer) -> tuple[SeenOtherwise, ...]:
    """Texts of which the consumer's own tokenizer makes other ids. Raises ClipfitError: even of their plain form."""
    if answer.tokens is None:
        return ()
    found: list[SeenOtherwise] = []
    given, plain_form = answer.tokens.split(len(request.texts))
    for k, (text, repaired) in enumerate(zip(request.texts, request.plain_texts, strict=True)):
        if not torch.equal(plain_form[k], request.tokens[k]):
            raise ClipfitError(
                f"{answer.consumer} makes other tokens of {repaired!r} than the run; the export is not kept: "
                "please report it."
            )
        if not torch.equal(given[k], request.tokens[k]):
            found.append(SeenOtherwise(text, "is repaired by open_clip before it is read", f"write {repaired!r}"))
    return tuple(found)


def _largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference; of nothing, 0."""
    return float((found - expected.cpu()).abs().max()) if len(expected) else 0.0
