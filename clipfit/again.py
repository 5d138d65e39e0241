"""The command that makes a run again: what its config.json says, as flags."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, get_args

from clipfit import methods
from clipfit.config import Recipe
from clipfit.config.options import Declared
from clipfit.methods import ShotCounts
from clipfit.methods.declared import PARTS, adapt_options
from clipfit.model import templates
from clipfit.prompts import Templates
from clipfit.runs.run import Run

TEMPLATES = "templates.txt"


@dataclass(frozen=True)
class Again:
    """words: the command, to be given in the folder where the first one was. listed: what templates.txt must hold
    then; empty where there is no such file."""

    words: tuple[str, ...]
    listed: Templates = ()

    @property
    def shell(self) -> str:
        """For a POSIX shell; a list of templates is written first."""
        command = shlex.join(self.words)
        if not self.listed:
            return command
        return f"printf '%s\\n' {shlex.join(self.listed)} > {TEMPLATES} &&\n{command}"


def command_of(run: Run) -> Again:
    """What differs from the defaults as flags, and device and precision always: they were found on the machine.

    The output goes beside the run, so that both can be compared. Memory for images and saved states change no byte and
    are not there.
    """
    values, listed = _values(run)
    declared = {key: option.declared for key, option in adapt_options().items()}
    words = [word for key, value in values.items() for word in _flag(declared[key], value)]
    shots = run.record.shots
    many = ("torchrun", "--nproc-per-node", str(run.record.processes), "-m") if run.record.processes > 1 else ()
    return Again((*many, "clipfit", "adapt", *words, *(["--"] if shots.startswith("-") else []), shots), listed)


def _values(run: Run) -> tuple[dict[str, Any], Templates]:
    """Options by key, None where the default is meant; and the templates of a file that has to be written."""
    record, source = run.record, run.source
    method = methods.find(record.method)
    listed = record.templates or ()
    of_clip = bool(listed) and listed == templates.read(templates.OWN)
    found = {
        "method": record.method,
        "model": source.model,
        "pretrained": source.pretrained,
        "alpha": "auto" if record.goal else _unless(0.5, record.alpha),
        "goal": record.goal,
        "forecast": (record.forecast and not record.goal) or None,
        "shots_per_class": record.shots_per_class,
        "balance": record.balance or None,
        "classes": record.classes,
        "image_root": record.image_root,
        "templates": None if not listed else templates.OWN if of_clip else TEMPLATES,
        "skip_bad_images": bool(record.skipped) or None,
        "seed": _unless(0, record.seed),
        "tuning": _unless("full", record.tuning),
        "context": record.context is not None or None,
        **_changed(asdict(method.configure({})), record.method_options, method.options),
        **(_changed(asdict(method.lora.settings), asdict(record.lora), PARTS["lora"]) if record.lora else {}),
        **_recipe(run),
        "device": record.device,
        "precision": record.precision,
        "output": str(run.path.with_name(f"{run.path.resolve().name}-again")),
    }
    return found, () if of_clip else listed


def _recipe(run: Run) -> dict[str, Any]:
    """What must be given for the recipe to become the run's: one field after the other, for some follow from others."""
    record, defaults = run.record, run.source.adapt_defaults
    method = methods.find(record.method)
    counts = Counter(shot["class"] for shot in run.shots).values()
    # a list of templates gives the first one to training; that of a run that is adapted on is left with --template
    given: dict[str, Any] = {}
    if record.templates is None and defaults.get("templates"):
        given["template"] = record.recipe.template
    names = ["batch_size", *(f.name for f in fields(Recipe) if f.name != "batch_size")]
    while True:
        lora = method.lora.recipe(ShotCounts(max(counts), sum(counts), given.get("batch_size")))
        found = Recipe.resolved(defaults, method.name, given, lora if record.lora else None)
        if record.templates and "template" not in given:
            found = found.changed({"template": record.templates[0]})
        different = [name for name in names if getattr(found, name) != getattr(record.recipe, name)]
        if not different:
            return given
        given[different[0]] = getattr(record.recipe, different[0])


def _changed(defaults: Mapping[str, Any], values: Mapping[str, Any], owner: type) -> dict[str, Any]:
    """By key, what is not the default."""
    keys = {f.name: f.metadata["option"].key or f.name for f in fields(owner)}
    return {keys[name]: value for name, value in values.items() if value != defaults[name]}


def _unless(default: Any, value: Any) -> Any:
    return None if value == default else value


def _flag(declared: Declared, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, bool):
        return [declared.flag if value else f"--no-{declared.flag.removeprefix('--')}"]
    if not isinstance(value, (tuple, list)):
        return [declared.flag, _text(value)]
    texts = [_text(one) for one in value]
    if declared.option.parse:
        return [declared.flag, ",".join(texts)]
    if get_args(declared.kind)[1:] == (...,):
        return [word for text in texts for word in (declared.flag, text)]
    return [declared.flag, *texts]


def _text(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
