"""`explain`: what a model sees, as a picture per image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torchvision.transforms.functional import to_pil_image

from clipfit.config import ExplainConfig
from clipfit.config.edits import EditSettings
from clipfit.data.images import decode
from clipfit.data.names import read_new_classes
from clipfit.errors import UsageError
from clipfit.events import Progress, Silent
from clipfit.measure import scoring
from clipfit.model import loading
from clipfit.model.clip import Additions, Clip, Texts
from clipfit.model.edits import Look
from clipfit.prompts import excluding
from clipfit.runs import files
from clipfit.runs.run import open_run


@dataclass(frozen=True)
class Explanation:
    """One image beside its candidate classes. `looks`: by block, see token_edits.Look, of this image alone."""

    image: Path
    seen: Image.Image  # as the model's preprocessing leaves it
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]
    grid: tuple[int, int]  # rows and columns of patches
    looks: dict[int, Look]
    head: tuple[float, ...]  # a_l of every block
    tail: tuple[float, ...]  # b_l

    @property
    def best(self) -> int:
        """The class it is taken for."""
        return max(range(len(self.classes)), key=self.probabilities.__getitem__)


@dataclass(frozen=True)
class Explained:
    """Where the pictures are, and what each image was taken for."""

    run: Path
    alpha: float
    pictures: tuple[Path, ...]
    predictions: tuple[dict[str, Any], ...]

    def as_json(self) -> dict[str, Any]:
        """The document of `explain --json`."""
        return {**asdict(self), "run": str(self.run), "pictures": [str(p) for p in self.pictures]}


def explain(
    config: ExplainConfig, draw: Callable[[Explanation], Image.Image], progress: Progress | None = None
) -> Explained:
    """Draw, for each image, what every block's edit goes by; for a method without edits, what it would go by.

    Args:
        draw: Explanation → picture (PIL), see report.picture.

    Raises:
        ClipfitError: see errors; a model without patch tokens cannot be explained.
    """
    progress = progress or Silent()
    run = open_run(config.run)
    alpha = run.alpha if config.alpha is None else config.alpha
    model = loading.rebuild(run.source, run.state(alpha), run.additions)
    if model.edits is None:
        model = model.with_additions(Additions(EditSettings()))
    listed = read_new_classes(config.new_classes) if config.new_classes else ()
    names = [*run.base, *excluding(listed, run.base)]
    blocks = _blocks(config, model)
    output = config.output or run.path / f"explain-{alpha:g}"
    files.make_folder(output)
    texts = scoring.texts(model, names, run.template)
    pictures: list[Path] = []
    predictions: list[dict[str, Any]] = []
    for path in config.images:
        progress.say(f"{path}")
        found = _explained(model, path, names, texts, blocks)
        picture = output / f"{len(pictures) + 1:03d}-{path.stem}.png"
        draw(found).save(picture)
        pictures.append(picture)
        predictions.append({"image": str(path), "class": names[found.best],
                            "probability": found.probabilities[found.best]})  # fmt: skip
    return Explained(run.path, alpha, tuple(pictures), tuple(predictions))


def _explained(model: Clip, path: Path, names: list[str], texts: Texts, blocks: tuple[int, ...]) -> Explanation:
    assert model.edits is not None
    seen = model.geometry(decode(path))  # (3, H, W)
    u, looks = model.looks(model.normalize(seen[None]), texts)
    probabilities = (model.scale * u @ texts.embeddings.to(u).T).softmax(1)[0]  # (C,)
    return Explanation(
        path, to_pil_image(seen), tuple(names), tuple(probabilities.tolist()), model.patch_grid,
        {block: Look(*(part[0] for part in looks[block])) for block in blocks},
        tuple(model.edits.head.tolist()), tuple(model.edits.tail.tolist()),
    )  # fmt: skip


def _blocks(config: ExplainConfig, model: Clip) -> tuple[int, ...]:
    """Those asked for; else the first, the head's and the last."""
    assert model.edits is not None
    count, middle = len(model.edits.head), model.edits.settings.head_block
    if config.blocks is None:
        return tuple(sorted({0, middle or 0, count - 1}))
    wrong = [block for block in config.blocks if not 0 <= block < count]
    if wrong:
        raise UsageError(f"the model's blocks are 0 to {count - 1}; found {wrong[0]}.")
    return config.blocks
