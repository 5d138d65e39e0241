"""A run: the folder that `adapt` writes and the other commands read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from clipfit.runs import files
from clipfit.model.clip import Additions, Clip
from clipfit.model.loading import reload
from clipfit.ensemble import State, interpolate
from clipfit.errors import DataError, ModelError, UsageError
from clipfit.model.sources import LOCAL_DIR, Source
from clipfit.config.edits import EditSettings

RUNS = Path("runs")
FORMAT = 1


@dataclass(frozen=True)
class Run:
    """A finished run: where it is, and its config.json, classes.json and shots.jsonl."""

    path: Path
    config: Mapping[str, Any]
    base: tuple[str, ...]  # class names in order
    names: Mapping[str, str]  # folder → class name
    shots: Sequence[Mapping[str, str]]
    inputs: Mapping[str, str]  # where, as an absolute path, what it was made from was then

    def place(self, name: str) -> Path | None:
        """`shots`, `classes` or `image_root`: where it was, or, where it no longer is, as it was given."""
        given = self.config[name]
        return self._still(name) or (Path(given) if given else None)

    def _still(self, name: str) -> Path | None:
        known = self.inputs.get(name)
        return Path(known) if known and Path(known).exists() else None

    @property
    def needed(self) -> list[Path]:
        """The run, and the files its pre-trained weights come from."""
        return [self.path, *filter(None, (self._still(name) for name in ("model", "pretrained")))]

    @property
    def source(self) -> Source:
        """The pre-trained weights."""
        return Source(**self.config["pretrained"])

    @property
    def additions(self) -> Additions:
        """What the run's models have beyond open_clip's CLIP."""
        edits = self.config.get("edits")  # runs of before had neither
        return Additions(EditSettings(**edits) if edits else None, self.config.get("context"))

    @property
    def method(self) -> str:
        return str(self.config["method"])

    @property
    def template(self) -> str:
        return str(self.config["recipe"]["template"])

    @property
    def alpha(self) -> float:
        return float(self.config["alpha"])

    def pretrained(self, device: torch.device | str = "cpu") -> Clip:
        """The pre-trained model (α = 0); what the method adds is attached, without effect.

        Raises:
            ModelError: its weights cannot be had, or are not the recorded ones.
        """
        source, folder, file = self.source, self._still("model"), self._still("pretrained")
        if folder:
            source = replace(source, model=f"{LOCAL_DIR}{folder}")
        if file:
            source = replace(source, pretrained=str(file))
        return reload(source, device).with_additions(self.additions)

    def finetuned(self) -> dict[str, torch.Tensor]:
        """θ at α = 1."""
        return files.read_tensors(self.path / "finetuned.safetensors")[0]

    def state(self, alpha: float) -> dict[str, torch.Tensor]:
        """θ at α; the pre-trained weights are loaded only where they are needed.

        Raises:
            ModelError: the pre-trained weights are needed and are missing or not the recorded ones.
        """
        if alpha == 1:
            return self.finetuned()
        if alpha == self.alpha:
            return files.read_tensors(self.path / "model.safetensors")[0]
        return interpolate(self.pretrained().state(), self.finetuned(), alpha)


def open_run(path: Path | None) -> Run:
    """The run at `path`, or the newest below runs/.

    Raises:
        UsageError: there is none. DataError: it is not finished or damaged.
    """
    path = path or _newest()
    if not path.is_dir():
        raise UsageError(f"there is no run {path}: `clipfit adapt SHOTS` makes one below {RUNS}/.")
    if not (path / "model.safetensors").is_file():
        raise DataError(f"{path} is no finished run: it has no model.safetensors; run `clipfit adapt` again.")
    classes = files.read_json(path / "classes.json")
    config = files.read_json(path / "config.json")
    shots = files.read_lines(path / "shots.jsonl")
    if config.get("format") != FORMAT:
        raise ModelError(f"{path} has run format {config.get('format')!r}; this clipfit reads {FORMAT}.")
    timing = path / "timing.json"  # a run is complete without it
    inputs = files.read_json(timing).get("inputs", {}) if timing.exists() else {}
    return Run(path, config, tuple(classes["base"]), classes["names"], shots, inputs)


def _newest() -> Path:
    # a name that starts with a dot is a run half written
    done = [p.parent for p in RUNS.glob("*/model.safetensors") if not p.parent.name.startswith(".")]
    if not done:
        raise UsageError(f"no run is named and {RUNS}/ holds none: `clipfit adapt SHOTS` makes one.")
    return max(done, key=lambda p: ((p / "model.safetensors").stat().st_mtime_ns, p.name))


def target_folder(shots: Path, method: str, output: Path | None, overwrite: bool, inputs: Iterable[Path]) -> Path:
    """Where the run goes: `runs/<folder>-<method>` unless told otherwise.

    Raises:
        UsageError: it exists and `overwrite` is not set, it exists and is no run, it holds an input, or it would be
            taken for a class of the shots.
    """
    path = output or RUNS / f"{shots.resolve().stem if shots.is_file() else shots.resolve().name}-{method}"
    if path.exists() and not overwrite:
        raise UsageError(f"{path} exists already: pass --overwrite to replace it or --output for another place.")
    a_run = all((path / name).exists() for name in ("config.json", "shots.jsonl", "finetuned.safetensors"))
    if path.exists() and not a_run and (path.is_file() or any(path.iterdir())):
        raise UsageError(f"{path} is no run of clipfit's, so --overwrite will not delete it: choose another place.")
    files.require_kept(path, inputs)
    files.require_outside(path, shots)
    return path


@dataclass(frozen=True)
class RunFacts:
    """What a run folder says beside its weights."""

    config: Mapping[str, Any]
    base: Sequence[str]
    names: Mapping[str, str]
    shots: Sequence[Mapping[str, str]]
    steps: Sequence[Mapping[str, Any]]
    scale: float  # τ⁻¹


def write_run(folder: Path, facts: RunFacts, finetuned: State, ensemble: State) -> None:
    """Write every file of a run but timing.json; the same facts and weights give the same bytes.

    Raises:
        DataError: the disk is full or the place cannot be written.
    """
    config = {**facts.config, "format": FORMAT}
    template = config["recipe"]["template"]
    about = lambda alpha: describe(config, facts.base, facts.scale, alpha)  # noqa: E731
    files.write_json(folder / "config.json", config)
    classes = {"base": list(facts.base), "names": dict(facts.names), "template": template}
    files.write_json(folder / "classes.json", classes)
    files.write_lines(folder / "shots.jsonl", facts.shots)
    files.write_lines(folder / "metrics.jsonl", facts.steps)
    files.write_tensors(folder / "finetuned.safetensors", finetuned, about(1.0))
    files.write_tensors(folder / "model.safetensors", ensemble, about(config["alpha"]))


def describe(config: Mapping[str, Any], base: Sequence[str], scale: float, alpha: float) -> dict[str, Any]:
    """The metadata that makes a weight file self-describing."""
    return {
        "format": FORMAT,
        "clipfit": config["clipfit"],
        "alpha": alpha,
        "method": config["method"],
        "classes": list(base),
        "template": config["recipe"]["template"],
        "logit_scale_exp": scale,
        "edits": config.get("edits"),
        "context": config.get("context"),
        "pretrained": config["pretrained"],
    }
