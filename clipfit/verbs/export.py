"""`export`: a run at a ratio α as a model that other tools load."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch

from clipfit.config import ExportConfig
from clipfit.errors import ClipfitError, UsageError
from clipfit.events import Progress, Silent
from clipfit.model import loading
from clipfit.model.clip import ADDED, Clip
from clipfit.prompts import prompts
from clipfit.runs import files
from clipfit.runs.record import Run, describe, open_run


@dataclass(frozen=True)
class ExportResult:
    """Where the exported model is, and how far its logits are from the run's (largest absolute difference)."""

    output: Path
    format: str
    run: Path
    alpha: float
    largest_difference: float

    def as_json(self) -> dict[str, Any]:
        """The document of `export --json`."""
        return {**asdict(self), "output": str(self.output), "run": str(self.run)}


def export(config: ExportConfig, progress: Progress | None = None) -> ExportResult:
    """Write a run in another format, and read it back before saying so.

    Raises:
        UsageError: no such format, or the output exists. ModelError: α needs weights that are missing.
    """
    progress = progress or Silent()
    if config.format not in FORMATS:
        raise UsageError(f"unknown export format {config.format!r}; there are {', '.join(FORMATS)}.")
    run = open_run(config.run)
    alpha = run.alpha if config.alpha is None else config.alpha
    output = config.output or run.path / f"export-{config.format}-{alpha:g}"
    if output.exists() and not config.overwrite:
        raise UsageError(f"{output} exists already: pass --overwrite to replace it or --output for another place.")
    if output.exists() and not (output / "clipfit.json").exists() and (output.is_file() or any(output.iterdir())):
        raise UsageError(f"{output} is no export of clipfit's; --overwrite will not delete it: choose another place.")
    files.require_kept(output, run.needed)
    progress.say(f"{run.path} at α = {alpha:g} → {output}")
    backbone = loading.rebuild(run.source, _plain_state(run, alpha, config.format))
    with files.building(output, config.overwrite) as folder:
        difference = FORMATS[config.format](run, backbone, alpha, folder)
    return ExportResult(output, config.format, run.path, alpha, difference)


def _plain_state(run: Run, alpha: float, format: str) -> dict[str, torch.Tensor]:
    """θ at α without what is attached. Raises UsageError where that has an effect."""
    state = run.state(alpha)
    edited = any(bool(state[name].any()) for name in (f"{ADDED}head", f"{ADDED}tail") if name in state)
    learnt = f"{ADDED}context" in state and alpha != 0
    if edited or learnt:
        raise UsageError(
            f"the format {format} cannot hold {'edits of patch tokens' if edited else 'context vectors'}, and without "
            "them it would be another model: use the run itself, or --alpha 0."
        )
    return {name: tensor for name, tensor in state.items() if not name.startswith(ADDED)}


def _open_clip_folder(run: Run, backbone: Clip, alpha: float, folder: Path) -> float:
    """What `open_clip.create_model_and_transforms("local-dir:FOLDER")` loads, and clipfit with --model local-dir:."""
    state, source = backbone.state(), backbone.source
    files.require_room(folder, backbone.bytes)
    about = describe(run.config, run.base, backbone.scale.item(), alpha)
    files.write_tensors(folder / "open_clip_model.safetensors", state, about)
    files.write_json(
        folder / "open_clip_config.json", {"model_cfg": source.model_cfg, "preprocess_cfg": source.preprocess_cfg}
    )
    files.write_json(folder / "clipfit.json", {**about, "adapt": source.adapt_defaults})

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(prompts(run.base, run.template))
    noise = torch.randint(256, (4, 3, *backbone.image_size), generator=torch.Generator().manual_seed(0))
    images = backbone.normalize(noise.to(torch.uint8))
    with torch.no_grad():
        ours = backbone.scale * backbone.encode_image(images) @ backbone.encode_text(tokens).T
        u, t, scale = model.eval()(images, tokens)[:3]
        difference = (ours - scale * u @ t.T).abs().max().item()
    normalize = preprocess.transforms[-1]
    same_view = [list(normalize.mean), list(normalize.std)] == [
        list(source.preprocess_cfg["mean"]), list(source.preprocess_cfg["std"])
    ]  # fmt: skip
    if not same_view or difference > 1e-3:
        raise ClipfitError(f"the exported model disagrees with the run by {difference:g} in its logits; not written.")
    return difference


FORMATS: dict[str, Callable[[Run, Clip, float, Path], float]] = {"open_clip": _open_clip_folder}
