"""What a format of `export` is given: a run at a ratio α as a model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from clipfit.config.edits import EditSettings
from clipfit.config.outputs import FormatOptions
from clipfit.measure.calibration import temperature_of
from clipfit.model import loading
from clipfit.model.clip import Clip
from clipfit.model.named import ADDED, Additions
from clipfit.model.sources import Source
from clipfit.model.tokenizing import tokenizer_of
from clipfit.runs import files
from clipfit.runs.record import describe
from clipfit.runs.run import Run

ABOUT = "clipfit.json"  # in every export
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # --dtype


@dataclass(frozen=True)
class Subject:
    """What is exported, and as what. `model`: θ at α, with the additions that are in effect there and no others."""

    run: Run
    alpha: float
    model: Clip
    format: str
    options: FormatOptions


def in_effect(run: Run, alpha: float) -> Additions:
    """What the run's model at α has beyond open_clip's CLIP, where it makes a difference.

    Edits of strength 0 change nothing, and neither do context vectors that equal the embeddings of their words. Both
    start so, and α interpolates between that and the fine-tuned values: what differs at 1 differs at every α but 0.
    Of a run that was adapted on from another one, both may have been in effect at α = 0 already.
    No model is built where the run has a file of the tensors.

    Raises:
        ModelError: they are missing or damaged.
    """
    additions = run.additions
    parent = run.record.parent
    if additions == Additions() or (alpha == 0 and not parent):
        return Additions()
    state = run.state(alpha) if parent else run.finetuned()
    return Additions(
        additions.edits if additions.edits and _edits_act(state, additions.edits) else None,
        additions.context if additions.context and _context_acts(state, additions.context, run.source) else None,
    )


def subject_of(run: Run, alpha: float, additions: Additions, format: str, options: FormatOptions) -> Subject:
    """The run at α, with the additions that are in effect there (see `in_effect`).

    Raises:
        ModelError: the pre-trained weights are needed and are missing or not the recorded ones.
    """
    kept = {*(_EDITS if additions.edits else ()), *((_CONTEXT,) if additions.context else ())}
    state = {name: t for name, t in run.state(alpha).items() if not name.startswith(ADDED) or name in kept}
    return Subject(run, alpha, loading.rebuild(run.source, state, additions), format, options)


def temperature_inside(subject: Subject) -> float | None:
    """What the logits of a classifier are divided by, so that their softmax can be trusted; None: nothing is known."""
    found = temperature_of(subject.run)
    holds = found is not None and found.holds_for(subject.alpha, subject.run.base, subject.run.templates)
    return found.value if found and holds else None


def about(subject: Subject) -> dict[str, Any]:
    """What makes a weight file self-describing, and what of the model it is."""
    described = describe(subject.run.record, subject.run.base, subject.model.scale.item(), subject.alpha)
    asked = {"format": subject.format, **asdict(subject.options)}
    return {**described, "export": asked, "grey_bits": subject.run.record.grey_bits}


def write_about(subject: Subject, folder: Path, sha256: str | None = None) -> None:
    """The file by which clipfit knows the folder for its own, and damage to what it loads. Raises OutputError.

    Args:
        sha256: of all tensors (see weights.state_sha256), where they are in the folder for clipfit to load.
    """
    checked = {} if sha256 is None else {"sha256": sha256}
    files.write_json(folder / ABOUT, {**about(subject), **checked, "adapt": subject.model.source.adapt_defaults})


def plain(source: Source, text: str) -> str:
    """A text as open_clip repairs it before it reads it: what other tokenizers have to be given for the same ids."""
    cleaned: str = tokenizer_of(source).clean_fn(text)
    return cleaned


_EDITS = (f"{ADDED}head", f"{ADDED}tail")
_CONTEXT = f"{ADDED}context"


def _edits_act(state: Mapping[str, torch.Tensor], settings: EditSettings) -> bool:
    ratios = (settings.head_ratio, settings.tail_ratio)
    return any(ratio > 0 and bool(state[name].any()) for name, ratio in zip(_EDITS, ratios, strict=True))


def _context_acts(state: Mapping[str, torch.Tensor], words: str, source: Source) -> bool:
    context = state[_CONTEXT]
    tokens = tokenizer_of(source)([words])[0, 1 : 1 + len(context)]  # behind the start of the text
    return not torch.equal(context, state["token_embedding.weight"][tokens])
