"""Writes docs/models.md: what clipfit can do with each architecture that the installed open_clip lists.

    python docs/models.py

From the table of `clipfit models` (see docs/architectures.py), told from the layers of each; tests/test_every_model.py
does to every one what its row says.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import open_clip

from clipfit.model import catalogue, compat
from clipfit.model.facts import Facts

PAGE = Path(__file__).with_suffix(".md")
HEAD = """# Models

Written by `python docs/models.py` from the layers of every architecture that open_clip {version} lists;
`clipfit models` shows the same for the open_clip that is installed, with tags and what is cached. `make test-all` does
to each of them what its row says: one step of every kind, an evaluation, an export, and reading that back in plain
open_clip.

**cite**, finetune and flyp under full tuning work with every model of an image and a text tower. **atha** needs patch
tokens of one width with a norm and a linear head behind them, and a text tower of open_clip's own; **lora** needs
attention whose queries, keys and values come from a plain linear layer, in both towers. **Short texts**: class names
cost no more than their own length, because nothing behind the end of a text can change its features; without it every
text is encoded at its full length. **Bias**: the model adds a logit bias (SigLIP); it is kept, frozen and exported, and
cancels in clipfit's probabilities, which are a softmax.

| model | pixels | parameters | cite | atha | lora | short texts | bias |
|---|---|---|---|---|---|---|---|
"""
FOOT = """
Parameters are those of both towers, in millions; –: the text tower's configuration comes from a hub. Numbers say what
is missing:

{reasons}

Not adapted: {refused} (a CoCa, whose captioner would be lost).
"""


def row(name: str, found: Facts, reasons: list[str]) -> str:
    """A line of the table; reasons that it names are added to the list."""
    height, width = found.image_size
    size = f"{height}" if height == width else f"{height} × {width}"
    millions = "–" if found.parameters is None else f"{found.parameters / 1e6:,.0f}"
    cells = [f"`{name}`", size, millions, "yes"]
    cells += [_cell(reason, reasons) for reason in (found.atha, found.lora)]
    return f"| {' | '.join([*cells, _yes(found.trims), _yes(found.logit_bias)])} |"


def _cell(reason: str | None, reasons: list[str]) -> str:
    if reason is None:
        return "yes"
    if reason not in reasons:
        reasons.append(reason)
    return f"no {reasons.index(reason) + 1}"


def _yes(holds: bool) -> str:
    return "yes" if holds else ""


def page() -> str:
    """The whole text, for the installed open_clip."""
    reasons: list[str] = []
    lines, refused = [], []
    for name in open_clip.list_models():
        cfg = open_clip.get_model_config(name)
        if compat.lacks_towers(cfg):
            refused.append(f"`{name}`")
        else:
            lines.append(row(name, catalogue.facts(name, cfg), reasons))
    numbered = "\n".join(f"{number}. {reason}" for number, reason in enumerate(reasons, 1))
    head = HEAD.format(version=version("open_clip_torch"))
    return head + "\n".join(lines) + "\n" + FOOT.format(reasons=numbered, refused=", ".join(refused))


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
