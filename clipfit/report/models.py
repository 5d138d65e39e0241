"""The table of `models`, within 80 columns."""

from __future__ import annotations

from collections.abc import Sequence

import rich.box
import rich.console
from rich.table import Table
from rich.text import Text

from clipfit.model.catalogue import DEFAULT, Architecture
from clipfit.text import printable
from clipfit.verbs.models import Listed, ModelList


def text(result: ModelList) -> str:
    """The table and its notes, as they are printed."""
    console = rich.console.Console(highlight=False)
    with console.capture() as captured:
        console.print(_table(result))
        for note in _notes(result):
            console.print(printable(note), markup=False)
    return "\n".join(line.rstrip() for line in captured.get().rstrip().splitlines())


def _table(result: ModelList) -> Table:
    table = Table(box=rich.box.SIMPLE_HEAD, pad_edge=False, show_edge=False, collapse_padding=True)
    table.add_column("model", no_wrap=True)
    for heading in ("px", "size"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("atha", "lora"):
        table.add_column(heading, no_wrap=True)
    table.add_column("pre-trained", overflow="fold")
    for model in result.models:
        cells = (model.architecture.name, *_facts(model), _tags(model.architecture))
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _facts(model: Listed) -> tuple[str, str, str, str]:
    """Pixels, parameters, whether methods that edit tokens work, and adapters."""
    facts = model.architecture.facts
    if facts is None:
        return ("", "", "no", "no")
    height, width = facts.image_size
    pixels = str(height) if height == width else f"{height}×{width}"
    return (pixels, _size(facts.parameters), "–" if facts.atha else "yes", "–" if facts.lora else "yes")


def _size(parameters: int | None) -> str:
    """ "150M", "1.2B"; "?" where it is not known."""
    if parameters is None:
        return "?"
    return f"{parameters / 1e9:.1f}B" if parameters >= 999.5e6 else f"{parameters / 1e6:.0f}M"


def _tags(architecture: Architecture) -> str:
    """The first tag, and how many more."""
    if architecture.facts is None:
        return "cannot be adapted"
    if not architecture.tags:
        return "ships with clipfit" if architecture.ships else "none: --pretrained FILE"
    first, *more = _marked(architecture)
    if not more:
        return first
    here = any(tag.cached for tag in architecture.tags[1:])
    return f"{first} and {len(more)} more{' *' * here}"


def _marked(architecture: Architecture) -> list[str]:
    """The tags; + is the one that is taken, * what is on this machine."""
    return [f"{tag.name}{'+' * tag.default}{'*' * tag.cached}" for tag in architecture.tags]


def _notes(result: ModelList) -> list[str]:
    """What the marks mean, and what is missing where something does not work."""
    shown = [model.architecture for model in result.models]
    several = [architecture for architecture in shown if architecture.facts and len(architecture.tags) > 1]
    tags = [f"{each.name}: {', '.join(_marked(each))}" for each in several if result.whole]
    notes = [note for each in tags for note in ("", each)]
    notes += ["", "+ taken without --pretrained, * on this machine, in its Hugging Face cache"]
    if any(architecture.default for architecture in shown):
        notes.append(f"{DEFAULT} is taken without --model.")
    if any(architecture.facts and architecture.facts.parameters is None for architecture in shown):
        notes.append("? the text tower is laid out by a configuration that the transformers library fetches.")
    if not result.whole:
        notes.append("cite, finetune and flyp work wherever a size stands.")
        notes.append("clipfit models WORD: all tags of the models that have the word, and what they lack.")
        return notes
    return notes + [f"{_several(names)} {reason}." for reason, names in _missing(shown).items()]


def _missing(architectures: Sequence[Architecture]) -> dict[str, list[str]]:
    """Why something does not work → the models that it is true of."""
    found: dict[str, list[str]] = {}
    for architecture in architectures:
        facts, name = architecture.facts, architecture.name
        reasons = {"--method atha": facts.atha, "--tuning lora": facts.lora} if facts else {}
        said = [f"without {what}: {why}" for what, why in reasons.items() if why]
        for reason in [architecture.refused] if architecture.refused else said:
            found.setdefault(reason, []).append(name)
    return found


def _several(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
