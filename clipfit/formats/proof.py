"""The proof of an export: the logits of its consumer beside those of the run, on the run's own shots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms.functional import to_pil_image

from clipfit.data.images import content_hash, decode
from clipfit.errors import ClipfitError, DataError
from clipfit.formats.consumer import Answer, Request
from clipfit.formats.stored import stored
from clipfit.measure import scoring
from clipfit.model.clip import Clip
from clipfit.prompts import prompts
from clipfit.runs.run import Run

MOST = 64  # pictures
BOUND = 1e-3  # of a logit, whose scale is 100: what another order of float32 sums may cost
SEEN_ALIKE = 1e-3  # of a normalised pixel; one step of 255 is 0.01 or more


@dataclass(frozen=True)
class Pictures:
    """What an export is proved on: uint8 images (n, 3, H, W) as the model's geometry leaves them.

    Shots have their files, and their names in shots.jsonl; random pictures have neither.
    """

    images: torch.Tensor
    files: tuple[Path, ...] = ()
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Agreement:
    """A consumer's logits beside the run's: the largest absolute difference, and how many best labels are the same."""

    images: int
    largest_difference: float
    same_labels: int


@dataclass(frozen=True)
class SeenOtherwise:
    """A file that the consumer's own way to open it makes another picture of; what it is, and what helps."""

    path: str
    reason: str
    advice: str


@dataclass(frozen=True)
class Proof:
    """What is read back is the run's model: on identical pixels, and on the files as the consumer decodes them."""

    consumer: str
    pictures: str  # "shots", or "random" where none is any more where it was
    identical_pixels: Agreement
    files: Agreement | None  # None: there are none
    seen_otherwise: tuple[SeenOtherwise, ...]

    def as_json(self) -> dict[str, Any]:
        """What `export --json` and proof.json say."""
        return {**asdict(self), "seen_otherwise": [asdict(file) for file in self.seen_otherwise]}


def pictures_of(run: Run, model: Clip) -> Pictures:
    """Up to 64 shots, spread over the classes, as far as they are where they were; else random pictures."""
    shots = []
    for name, path in _shots_still_there(run):
        try:
            shots.append((name, path, model.geometry(decode(path, run.record.grey_bits))))
        except DataError:  # gone since a moment ago
            continue
        if len(shots) == MOST:
            break
    if not shots:
        generator = torch.Generator().manual_seed(0)
        noise = torch.randint(256, (8, 3, *model.image_size), generator=generator)
        return Pictures(noise.to(torch.uint8))
    names, paths, images = zip(*shots, strict=True)
    return Pictures(torch.stack(images), tuple(paths), tuple(names))


def _shots_still_there(run: Run) -> Iterator[tuple[str, Path]]:
    """Names and files of shots whose content is the recorded one; the first of every class, the second, …"""
    place, root = run.place("shots"), run.place("image_root")
    if place is None:
        return
    # names start in the folder, in its parent (class folders alone), or where the rows of a file start
    starts = (root or place.parent,) if place.is_file() else (place, place.parent)
    for shot in _spread(run.shots):
        for path in (start / shot["path"] for start in starts):
            if path.is_file() and content_hash(path) == shot["sha256"]:
                yield shot["path"], path
                break


def _spread(shots: Sequence[Mapping[str, str]]) -> list[Mapping[str, str]]:
    """Ordered by their number within their class."""
    seen: dict[str, int] = {}
    numbers = []
    for shot in shots:
        numbers.append(seen.setdefault(shot["class"], 0))
        seen[shot["class"]] += 1
    return [shot for _, shot in sorted(zip(numbers, shots, strict=True), key=lambda pair: pair[0])]


def prove(model: Clip, run: Run, pictures: Pictures, ask: Callable[[Request], Answer]) -> Proof:
    """Compare a consumer with the model that was written.

    Raises:
        ClipfitError: on identical pixels its logits differ, or it preprocesses a picture in another way.
    """
    pixels = model.normalize(pictures.images)
    generator = torch.Generator().manual_seed(1)
    probe = torch.randint(256, (3, *(size + 37 * k for k, size in enumerate(model.image_size, 1))), generator=generator)
    probe = probe.to(torch.uint8)
    expected = _logits(model, run, pixels)
    answer = ask(Request(pixels.cpu(), probe.permute(1, 2, 0), prompts(run.base, run.template), pictures.files))
    identical = _agreement(answer.logits, expected)
    if not identical.largest_difference <= BOUND:  # nor where it is no number
        raise ClipfitError(
            f"{answer.consumer} reads another model from the export: its logits differ by up to "
            f"{identical.largest_difference:g} (at most {BOUND:g} may be rounding); it is not kept: please report it."
        )
    view = model.normalize(model.geometry(to_pil_image(probe))[None])[0]
    if _largest(answer.probe, view) > SEEN_ALIKE:
        raise ClipfitError(
            f"{answer.consumer} preprocesses pictures in another way than the run; the export is not kept: "
            "please report it."
        )
    if not pictures.files:
        return Proof(answer.consumer, "random", identical, None, ())
    opened = [k for k in range(len(pictures.files)) if k not in answer.errors]
    files = _agreement(answer.file_logits[opened], expected[opened])
    return Proof(answer.consumer, "shots", identical, files, _seen_otherwise(pictures, pixels, answer))


def _seen_otherwise(pictures: Pictures, pixels: torch.Tensor, answer: Answer) -> tuple[SeenOtherwise, ...]:
    found = []
    for k, (name, path) in enumerate(zip(pictures.names, pictures.files, strict=True)):
        if k in answer.errors:
            found.append(SeenOtherwise(name, f"cannot be opened there ({answer.errors[k]})", stored(path).advice))
        elif _largest(answer.file_pixels[k], pixels[k]) > SEEN_ALIKE:
            found.append(SeenOtherwise(name, *stored(path)))
    return tuple(found)


@torch.no_grad()
def _logits(model: Clip, run: Run, pixels: torch.Tensor) -> torch.Tensor:
    """Of normalised images (n, 3, H, W) among the base classes: (n, C), on the CPU."""
    texts = scoring.texts(model, run.base, run.template)
    features = torch.cat([model.encode_image(part, texts.class_tokens).cpu() for part in pixels.split(16)])  # (n, D)
    return model.scale.cpu() * features @ texts.embeddings.T


def _agreement(found: torch.Tensor, expected: torch.Tensor) -> Agreement:
    same = int((found.argmax(1) == expected.argmax(1)).sum())
    return Agreement(len(expected), _largest(found, expected), same)


def _largest(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference; of nothing, 0."""
    return float((found - expected.cpu()).abs().max()) if len(expected) else 0.0
