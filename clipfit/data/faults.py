"""What is wrong with labelled images that no model is needed for: pixels, copies, counts."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from clipfit.data.copies import first_of_each
from clipfit.data.findings import Finding, error, hint
from clipfit.data.layout import LabelledImages
from clipfit.data.looks import Seen
from clipfit.data.names import shortened, some
from clipfit.data.objections import ObjectionError
from clipfit.data.shots import UNBALANCED

ENLARGED = 2  # a picture that the model sees more than so many times enlarged is tiny
# chosen by looking at sharp photographs and drawings, and the same blurred: the table in docs/check.md
BLURRED, OF_THE_MEDIAN = 0.01, 0.1
# correlation of 16 x 16 thumbnails, and cosine of embeddings: between copies and two drawings of one object, see there
SAME_THUMB, SAME_EMBEDDING = 0.99, 0.85
BLOCK = 1024
FEW = 8  # images a class
ADVICE = {
    "empty-class": "add images of it, or remove the folder",
    "same-name": "give each class a name of its own, with --classes",
    "two-labels": "remove the one that is labelled wrongly",
}


def of_layout(objections: Iterable[ObjectionError]) -> list[Finding]:
    """What reading the place had to object to."""
    return [error(o.kind, str(o).rstrip("."), ADVICE[o.kind], o.images, o.classes) for o in objections]


def of_pixels(seen: Seen, image_size: tuple[int, int]) -> list[Finding]:
    """Tiny, blurred and blank pictures. image_size: height and width of what the model sees."""
    least = min(image_size) / ENLARGED
    known = [look.sharpness for look in seen.looks if look.sharpness is not None]
    soft = min(BLURRED, OF_THE_MEDIAN * float(np.median(known))) if known else 0.0  # a whole set may be soft by nature
    found: list[Finding] = []
    for sample, look in zip(seen.samples, seen.looks, strict=True):
        about = ((sample.source,), (sample.label,))
        width, height = look.size
        if look.sharpness is None:
            found.append(hint("blank", f"{sample.source} is of one colour", "replace or remove it", *about))
        elif min(look.size) < least:
            message = f"{sample.source} is of {width} x {height} pixels, which the model sees enlarged"
            found.append(hint("tiny", message, "take a larger copy, where there is one", *about))
        elif look.sharpness < soft:
            message = f"{sample.source} is blurred: sharpness {look.sharpness:.4f}, half of the images have "
            message += f"{np.median(known):.2g} or more"
            found.append(hint("blurred", message, "look at it; remove it if its class cannot be seen", *about))
    return found


def of_copies(seen: Seen, embeddings: torch.Tensor) -> list[Finding]:
    """Pictures that are there twice, to the pixel or nearly; embeddings: (n, D) of unit norm."""
    same: dict[str, list[int]] = defaultdict(list)
    for k, look in enumerate(seen.looks):
        same[look.pixels].append(k)
    found = [finding for group in same.values() if len(group) > 1 for finding in _of_group(seen, group, True)]
    first = first_of_each([look.pixels for look in seen.looks])
    thumbs = [seen.looks[k].thumb for k in first]
    for alike in near_copies(thumbs, embeddings[first]):
        group = sorted(k for i in alike for k in same[seen.looks[first[i]].pixels])
        found += _of_group(seen, group, False)
    return found


def _of_group(seen: Seen, group: Sequence[int], exact: bool) -> list[Finding]:
    samples = [seen.samples[k] for k in group]
    labels = list(dict.fromkeys(sample.label for sample in samples))
    parts = sorted({seen.parts[k] for k in group})
    sources = [sample.source for sample in samples]
    about = (tuple(sources), tuple(labels))
    what = f"{shortened(sources)} are " + ("the same picture" if exact else "nearly the same picture")
    surely = error if exact else hint
    found = []
    if len(labels) > 1:
        advice = "remove the one that is labelled wrongly" if exact else "look at them; keep those labelled rightly"
        found.append(surely("two-labels", f"{what}, labelled {some(labels)}", advice, *about))
    if len(parts) > 1:
        spoils = surely if "test" in parts else hint
        advice = "keep it in one part, or what is measured on it is no evidence"
        found.append(spoils("leak", f"{what}, in {' and '.join(parts)}", advice, *about))
    if not found:
        advice = "keep one: in training it weighs as many, in a test it counts as many"
        found.append(hint("duplicate" if exact else "near-duplicate", what, advice, *about))
    return found


def near_copies(thumbs: Sequence[np.ndarray], embeddings: torch.Tensor) -> list[list[int]]:
    """Groups of pictures that are nearly the same: n thumbnails (16, 16, 3) uint8 and embeddings (n, D) of unit norm.

    Both must agree: thumbnails of two drawings on white may correlate, and embeddings be alike for two of one object.
    Compared in blocks, so that memory grows with n and not with its square.
    """
    n = len(thumbs)
    group = np.arange(n)
    for a in range(0, n, BLOCK):
        left = _correlating(thumbs[a : a + BLOCK])
        for b in range(a, n, BLOCK):
            alike = left @ _correlating(thumbs[b : b + BLOCK]).T >= SAME_THUMB
            if a == b:
                alike = alike.triu(1)
            if alike.any():
                alike &= embeddings[a : a + BLOCK] @ embeddings[b : b + BLOCK].T >= SAME_EMBEDDING
                i, j = (index.numpy() for index in alike.nonzero(as_tuple=True))
                group = _joined(group, a + i, b + j)
    members: dict[int, list[int]] = defaultdict(list)
    for k, number in enumerate(group.tolist()):
        members[number].append(k)
    return [them for them in members.values() if len(them) > 1]


def _correlating(thumbs: Sequence[np.ndarray]) -> torch.Tensor:
    """(n, 768) whose products are the correlations of the thumbnails; 0 for one of one colour."""
    values = torch.from_numpy(np.stack(thumbs)).float().flatten(1, 2)  # (n, 256, 3)
    return torch.nn.functional.normalize((values - values.mean(1, keepdim=True)).flatten(1), dim=1)


def _joined(group: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """The number of each one's group after i and j are joined."""
    from scipy.sparse import coo_matrix  # takes a while to import
    from scipy.sparse.csgraph import connected_components

    n = len(group)
    rows, columns = np.concatenate([i, np.arange(n)]), np.concatenate([j, _representative(group)])
    joined: np.ndarray = connected_components(coo_matrix((np.ones(len(rows)), (rows, columns)), (n, n)), False)[1]
    return joined


def _representative(group: np.ndarray) -> np.ndarray:
    """Of each one's group the first member."""
    _, first, number = np.unique(group, return_index=True, return_inverse=True)
    return np.asarray(first[number])


def of_counts(found: LabelledImages, readable: Mapping[str, Counter[str]]) -> list[Finding]:
    """Classes without images, with few, or with many more than others; readable: images by part and class."""
    train = {name: readable["train"][name] for name in dict.fromkeys(sample.label for sample in found.train)}
    findings = [_unreadable_class(name) for name, count in train.items() if count == 0]
    if len(train) < 2:
        here = f"there is only {some(list(train))}" if train else "there is none"
        findings.append(error("few-classes", f"at least two classes with training images are needed; {here}",
                              "add another class, as a folder of images", classes=tuple(train)))  # fmt: skip
    if few := [name for name, count in train.items() if 0 < count < FEW]:
        message = f"fewer than {FEW} training images of {shortened([f'{name!r} ({train[name]})' for name in few])}"
        findings.append(hint("few-images", message, "add some, if there are any", classes=tuple(few)))
    counted = {name: count for name, count in train.items() if count}
    if counted and max(counted.values()) >= UNBALANCED * min(counted.values()):
        most, least = max(counted, key=counted.__getitem__), min(counted, key=counted.__getitem__)
        message = f"{most!r} has {counted[most]} training images and {least!r} {counted[least]}"
        findings.append(hint("unbalanced", message, "adapt with --balance, or add images", classes=(most, least)))
    untested = [name for name in train if found.test is not None and readable["test"][name] == 0]
    if untested:
        message = f"no test images of {some(untested)}: nothing can be measured on them"
        findings.append(hint("untested", message, "add some to the part test", classes=tuple(untested)))
    return findings


def _unreadable_class(name: str) -> Finding:
    return error("empty-class", f"no training image of {name!r} can be read", "replace its images", classes=(name,))
