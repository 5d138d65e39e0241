"""`explain`: what a model takes pictures for, and which of their patches look like that, as a picture each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from clipfit.config import ExplainConfig
from clipfit.data.images import decode
from clipfit.data.names import read_new_classes
from clipfit.errors import OutputError, UsageError
from clipfit.events import Progress, Silent
from clipfit.measure import scoring
from clipfit.model import loading
from clipfit.model.clip import Clip, Texts
from clipfit.model.edits import Look
from clipfit.model.patches import View, likeness, require_patches, view_of
from clipfit.prompts import excluding, prompts
from clipfit.runs import files
from clipfit.runs.place import building, recover
from clipfit.runs.run import Run, open_run

# not inside the run: they are none of its facts, and would go when it is replaced
EXPLANATIONS = Path("explanations")
ABOUT = "explanations.json"
TOP = 5


@dataclass(frozen=True)
class Edits:
    """What ATHA's edits go by and how strong they are. `looks`: by block, of this picture alone."""

    looks: Mapping[int, Look]
    head: tuple[float, ...]  # a_l of every block
    tail: tuple[float, ...]  # b_l


@dataclass(frozen=True)
class Explanation:
    """One picture beside its candidate classes.

    likeness: (L,) cosine of every patch's final feature with the text of the predicted class, see
    model.patches.likeness. It is not what the prediction was made from: that is one feature of the whole picture.
    """

    image: Path
    model: str  # in words
    photo: Image.Image  # whole and upright
    view: View  # what the model sees of it
    classes: tuple[str, ...]
    template: str
    probabilities: tuple[float, ...]
    grid: tuple[int, int]  # rows and columns of patches
    likeness: torch.Tensor
    edits: Edits | None  # of runs that edit patch tokens
    others: int = 0  # templates beside the first: a class's text is the mean of all

    @property
    def best(self) -> int:
        """The class it is taken for."""
        return max(range(len(self.classes)), key=self.probabilities.__getitem__)

    def text_of(self, index: int) -> str:
        """What the model reads for a class, by the first template."""
        return prompts([self.classes[index]], self.template)[0]

    def as_json(self) -> dict[str, Any]:
        """The picture, its class, and the most probable ones."""
        order = sorted(range(len(self.classes)), key=lambda c: -self.probabilities[c])[:TOP]
        top = [{"label": self.classes[c], "probability": self.probabilities[c]} for c in order]
        best = top[0]
        return {"image": str(self.image), "class": best["label"], "probability": best["probability"], "top": top}


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
    """Draw, for each image, what it is taken for, which patches look like that, and for ATHA what its edits go by.

    The pictures of an earlier call are replaced when all new ones are done; nothing else in their folder is.

    Args:
        draw: Explanation → picture (PIL), see report.picture.

    Raises:
        ClipfitError: see errors; a model without patch tokens cannot be explained.
    """
    progress = progress or Silent()
    run = open_run(config.run)
    alpha = run.alpha if config.alpha is None else config.alpha
    require_patches(run.source)
    output = config.output or EXPLANATIONS / f"{run.path.resolve().name}-{alpha:g}"
    recover(output)
    _require_own(output)
    files.require_kept(output, [*run.needed, *config.images])
    blocks = _blocks(config, run)
    listed = read_new_classes(config.new_classes) if config.new_classes else ()
    names = [*run.base, *excluding(listed, run.base)]
    model = loading.rebuild(run.source, run.state(alpha), run.additions)
    texts = scoring.texts(model, names, run.templates)
    pictures: list[str] = []
    predictions: list[dict[str, Any]] = []
    with building(output, True, progress.say) as folder:
        for number, path in enumerate(config.images, 1):
            progress.say(f"{path}")
            found = _explained(model, path, names, texts, Asked(run, alpha, blocks))
            pictures.append(_file_name(number, path))
            _save(draw(found), folder / pictures[-1])
            predictions.append(found.as_json())
        files.write_json(folder / ABOUT, {"run": run.path.resolve().name, "alpha": alpha, "pictures": pictures})
    return Explained(run.path, alpha, tuple(output / name for name in pictures), tuple(predictions))


@dataclass(frozen=True)
class Asked:
    """Of which run, at which ratio, and which blocks."""

    run: Run
    alpha: float
    blocks: tuple[int, ...]

    @property
    def words(self) -> str:
        """The model, for people."""
        return f"the run {self.run.path.resolve().name} ({self.run.method}) at alpha {self.alpha:g}"


def _explained(model: Clip, path: Path, names: list[str], texts: Texts, asked: Asked) -> Explanation:
    run = asked.run
    photo = decode(path, run.record.grey_bits)
    x = model.normalize(model.geometry(photo)[None])  # (1, 3, H, W)
    with torch.no_grad():
        u = model.encode_image(x, texts.class_tokens)  # (1, D)
    probabilities = model.logits(u, texts.embeddings).softmax(1)[0]  # (C,)
    patches = likeness(model, x, texts)[0, :, int(probabilities.argmax())]  # (L,)
    return Explanation(
        image=path,
        model=asked.words,
        photo=photo,
        view=view_of(run.source, *photo.size),
        classes=tuple(names),
        template=run.templates[0],
        others=len(run.templates) - 1,
        probabilities=tuple(probabilities.tolist()),
        grid=model.patch_tower.grid,
        likeness=patches.cpu(),
        edits=_edits(model, x, texts, asked.blocks),
    )


def _edits(model: Clip, x: torch.Tensor, texts: Texts, blocks: tuple[int, ...]) -> Edits | None:
    if model.edits is None:
        return None
    looks = model.looks(x, texts)[1]
    chosen = {block: Look(*(part[0].cpu() for part in looks[block])) for block in blocks}
    return Edits(chosen, tuple(model.edits.head.tolist()), tuple(model.edits.tail.tolist()))


def _blocks(config: ExplainConfig, run: Run) -> tuple[int, ...]:
    """Those asked for; else the first, the head's and the last. Of a run without edits there are none."""
    edits, count = run.additions.edits, int(run.source.model_cfg["vision_cfg"].get("layers", 12))
    if edits is None:
        if config.blocks is not None:
            raise UsageError(
                f"--blocks belongs to runs that edit patches before each block (atha), but {run.path} was made with "
                f"{run.method}: leave it out."
            )
        return ()
    if config.blocks is None:
        return tuple(sorted({0, edits.head_block or 0, count - 1}))
    wrong = [block for block in config.blocks if not 0 <= block < count]
    if wrong:
        raise UsageError(f"the model's blocks are 0 to {count - 1}; found {wrong[0]}.")
    return config.blocks


def _require_own(output: Path) -> None:
    """Raises UsageError for a place that is taken by something else than explanations."""
    if (output / ABOUT).is_file() or not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    raise UsageError(f"{output} holds something else than pictures of explain: choose another place with --output.")


def _file_name(number: int, image: Path) -> str:
    """Number and name of the image, without what file systems or terminals stumble over."""
    stem = "".join(char if char.isprintable() and char != "\\" else "_" for char in image.stem)
    return f"{number:03d}-{stem[:60]}.png"


def _save(picture: Image.Image, file: Path) -> None:
    try:
        picture.save(file)
    except OSError as error:
        raise OutputError(f"{file.name} cannot be written: {error.strerror or error}.") from error
