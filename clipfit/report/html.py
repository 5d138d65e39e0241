"""`predict --html`: thumbnails by predicted class on one page that needs nothing else, and no network."""

from __future__ import annotations

import base64
import heapq
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from typing import Any

import jinja2
import torch
from PIL import Image

from clipfit.text import printable

A_CLASS = 24  # thumbnails shown of each
AT_MOST = 4000  # kept in all, so that memory stays bounded whatever the number of classes
SIDE = 112  # pixels
ABSTAINED, ERRORS = "", "\0"  # keys of what has no class: no class is called so


@dataclass(order=True)
class Shown:
    """A row that is shown; the one that goes first when another is kept in its place is the least of all."""

    rank: tuple[float, int]  # −probability, −number: the most certain, of equals the last, is the least
    row: Mapping[str, Any] = field(compare=False)
    jpeg: str | None = field(compare=False)  # base64; None where there is no picture

    @property
    def short(self) -> str:
        """The end of its path, which tells it from its neighbours."""
        return printable("/".join(str(self.row["path"]).split("/")[-2:]))

    @property
    def top(self) -> list[tuple[str, str]]:
        """Names and percentages of the three most probable classes."""
        return [(printable(one["label"]), percent(one["probability"])) for one in self.row["top"][:3]]


@dataclass
class Group:
    """A class: how many rows it has, and those that are shown."""

    count: int = 0
    kept: list[Shown] = field(default_factory=list)


class Thumbnails:
    """Keeps the least certain rows of every class, those without a label, and those that could not be read."""

    def __init__(self, a_class: int = A_CLASS, at_most: int = AT_MOST):
        self._a_class, self._at_most = a_class, at_most
        self._groups: dict[str, Group] = {}
        self._number = 0
        self._kept = 0

    def wants(self, row: Mapping[str, Any]) -> bool:
        """Counts the row, and whether it is less certain than one that is shown of its class."""
        self._number += 1
        group = self._groups.setdefault(_key(row), Group())
        group.count += 1
        if len(group.kept) < self._a_class and self._kept < self._at_most:
            return True
        return bool(group.kept) and self._rank(row) > group.kept[0].rank

    def add(self, row: Mapping[str, Any], view: torch.Tensor | None) -> None:
        """Keep the row that `wants` was asked about last, with its view (3, H, W) uint8."""
        group = self._groups[_key(row)]
        shown = Shown(self._rank(row), row, None if view is None else _jpeg(view))
        if len(group.kept) < self._a_class and self._kept < self._at_most:
            heapq.heappush(group.kept, shown)
            self._kept += 1
        else:
            heapq.heapreplace(group.kept, shown)

    def page(self) -> str:
        """The page: abstentions first, then classes, the largest first, then what could not be read."""
        template = _environment().from_string(files("clipfit.report").joinpath("thumbnails.html").read_text("utf-8"))
        return template.render(
            sections=list(self._sections()), rows=self._number, a_class=self._a_class, at_most=self._at_most, side=SIDE
        )

    def _rank(self, row: Mapping[str, Any]) -> tuple[float, int]:
        return -(row["probability"] or 0.0), -self._number

    def _sections(self) -> Iterator[dict[str, Any]]:
        classes = sorted(self._groups.keys() - {ABSTAINED, ERRORS}, key=lambda name: (-self._groups[name].count, name))
        titles = {ABSTAINED: "No label: below the least probability", ERRORS: "Could not be read"}
        for number, name in enumerate((ABSTAINED, *classes, ERRORS)):
            if group := self._groups.get(name):
                shown = sorted(group.kept, reverse=True)  # least certain first
                title = titles.get(name, name)
                yield {"id": f"c{number}", "title": printable(title), "count": group.count, "shown": shown,
                       "of_class": name not in titles}  # fmt: skip


def percent(probability: float) -> str:
    """ "97.3%"; never 100.0% for less."""
    return f"{min(100 * probability, 99.9):.1f}%" if probability < 1 else "100%"


def _key(row: Mapping[str, Any]) -> str:
    if row["error"] is not None:
        return ERRORS
    return ABSTAINED if row["abstained"] else str(row["label"])


def _jpeg(view: torch.Tensor) -> str:
    picture = Image.fromarray(view.permute(1, 2, 0).numpy())
    picture.thumbnail((SIDE, SIDE))
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=80)
    return base64.b64encode(data.getvalue()).decode("ascii")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
                                     lstrip_blocks=True)  # fmt: skip
    environment.filters["printable"] = printable
    return environment
