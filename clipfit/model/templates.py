"""Lists of templates: from a file, or CLIP's own."""

from __future__ import annotations

import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import open_clip

from clipfit.data.names import read_text
from clipfit.errors import ClipfitError, DataError, UsageError
from clipfit.prompts import Templates

OWN = "clip"  # the name of CLIP's list


def read(place: str | Path) -> Templates:
    """The templates of a file, one a line, empty lines aside; of `clip`, those that CLIP was measured with on ImageNet.

    Raises:
        DataError: the file is missing, no UTF-8 or empty, or a line is no template or there twice.
    """
    if str(place) == OWN:
        return tuple(template("{}") for template in open_clip.OPENAI_IMAGENET_TEMPLATES)
    file = Path(place)
    lines = read_text(file, "file of templates").replace("\r\n", "\n").split("\n")
    found = [line.strip() for line in lines if line.strip()]
    if not found:
        raise DataError(f"file of templates {file} is empty: expected a line like `a photo of a {{}}` for each.")
    return _checked(found, f"file of templates {file}", DataError)


def given(templates: str | Path | Sequence[str]) -> Templates:
    """Templates as they are given in Python: a list of them, or what `read` takes.

    Raises:
        UsageError: it is empty, or one is no template or there twice. DataError: see `read`.
    """
    if isinstance(templates, (str, Path)):
        return read(templates)
    sentences = list(templates) if isinstance(templates, Iterable) else []
    if not sentences or not all(isinstance(sentence, str) for sentence in sentences):
        raise UsageError(
            f"templates must be at least one sentence with {{}} for the class name; found {sentences or templates!r}."
        )
    return _checked(sentences, "templates", UsageError)


def _checked(templates: list[str], where: str, error: Callable[[str], ClipfitError]) -> Templates:
    for template in templates:
        if template.count("{}") != 1:
            raise error(
                f"{where} must have {{}}, which stands for the class name, exactly once in each; found {template!r}."
            )
        if any(unicodedata.category(char) == "Cc" for char in template):
            raise error(f"{where} must have no control characters; found {template!r}.")
    [(most, count)] = Counter(templates).most_common(1)
    if count > 1:
        raise error(f"{where} must have each template once; found {most!r} {count} times.")
    return tuple(templates)
