"""What `benchmark` is given, and what a plan says: sets × methods × shots × seeds × α, in a protocol of the papers."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import KW_ONLY, MISSING, dataclass, field
from pathlib import Path
from typing import Any

from clipfit.config import shared
from clipfit.config.options import Checked, argument, declared_by, option, require, settings
from clipfit.config.parsing import parse_alphas
from clipfit.errors import UsageError
from clipfit.text import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # the same, before it was Python's own

PROTOCOLS = ("fsl", "bng", "dg", "cdg", "episodes")
ACROSS = ("dg", "cdg")  # those that test on other sets than they train on
ZERO_SHOT = "zero-shot"
MEAN = "mean"  # over the sets: in tables in the place of a set's name


@dataclass(frozen=True)
class BenchmarkConfig(Checked):
    """Everything `benchmark` is given beside the plan."""

    plan: Path = argument("The plan, a TOML file: docs/benchmark.md.")
    _: KW_ONLY
    data: Path | None = option(None, "Where the plan's paths start.", default_is="the plan's own folder")
    output: Path | None = option(None, "Where finished cells and tables are kept.", default_is="benchmark/<plan>")
    sets: tuple[str, ...] = option((), "A set of the plan, which has no others then; may be repeated.", flag="--set")
    methods: tuple[str, ...] = option((), "A row of its methods, likewise.", flag="--method")
    model: str | None = option(None, "Adapted in place of the plan's.", default_is="the plan's")
    pretrained: str | None = option(None, "Its weights.", default_is="the plan's")
    reference: str | None = option(
        None, "The row that differences are taken to; nothing is done again for it.", default_is="the plan's"
    )
    dry_run: bool = option(False, "Read all that the plan names, and say what there is to do.")
    batch_size: int = option(128, "Images a forward pass; training has the method's own.", low=1)
    cache_bytes: int = shared.cache_bytes("images")
    device: str = shared.device()
    precision: str = shared.precision()

    @property
    def place(self) -> Path:
        """Where finished cells and tables are kept."""
        return self.output or Path("benchmark") / self.plan.stem


@dataclass(frozen=True)
class SetRow(Checked):
    """A table `[sets.NAME]` or `[targets.NAME]`: labelled images, and what is said of them."""

    data: Path = option(MISSING, "Folder, manifest or CoOp split, from --data.")
    _: KW_ONLY
    image_root: Path | None = option(None, "Where its paths start, from --data.", default_is="its folder")
    classes: Path | None = shared.class_names()
    templates: tuple[str, ...] = option(
        (), "A sentence with {}, a list of such, or clip for CLIP's own.", default_is="the methods'",
        parse=lambda text: (text,),
    )  # fmt: skip
    few_shot: str | None = option(
        None, "CoOp's list of the shots drawn, a JSON file: {shots} and {seed} stand for the numbers."
    )
    settings: Mapping[str, Any] = field(default_factory=dict)  # options of adapt, for this set

    def placed(self, root: Path) -> SetRow:
        """Its paths from a folder on."""
        paths = {key: root / value for key in ("data", "image_root", "classes") if (value := getattr(self, key))}
        few_shot = str(root / self.few_shot) if self.few_shot else None
        return SetRow(**{"few_shot": few_shot, "templates": self.templates, "settings": self.settings, **paths})


@dataclass(frozen=True)
class Published:
    """A table `[published.NAME]`: figures of a paper, in percent, by set, in the order of the table's columns.

    nan stands for one that the paper does not give.
    """

    source: str
    figures: Mapping[str, tuple[float, ...]]


@dataclass(frozen=True)
class Plan(Checked):
    """A plan file. `methods`: a row of the tables by name, options of `adapt` under their flat keys."""

    protocol: str = option(MISSING, "What is trained on, and what measured on.", choices=PROTOCOLS)
    _: KW_ONLY
    model: str = shared.model()
    pretrained: str | None = shared.pretrained()
    shots: tuple[int, ...] = option((), "Shots a class.", low=1, default_is="all training images")
    seeds: tuple[int, ...] = option((0,), "Of the draw, the order and the crops.", low=0, high=2**40 - 1)
    alphas: tuple[float, ...] = option(
        (0.5, 1.0), "Ratios that each adaptation is measured at.", low=0, high=1, parse=parse_alphas
    )
    reference: str = option(ZERO_SHOT, "The row that differences are taken to.")
    episodes: int = option(100, "episodes: how many.", low=1)
    way: int = option(5, "episodes: classes of each.", low=2)
    query: int = option(15, "episodes: images a class to measure on.", low=1)
    methods: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    sets: Mapping[str, SetRow] = field(default_factory=dict)
    targets: Mapping[str, SetRow] = field(default_factory=dict)
    published: Mapping[str, Published] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.methods), "a plan needs a row of methods, [methods.NAME]", "none")
        require(bool(self.sets), "a plan needs a set, [sets.NAME]", "none")
        require(bool(self.seeds) and bool(self.alphas), "seeds and alphas must name at least one", "none")
        for key in ("shots", "seeds", "alphas"):
            values = getattr(self, key)
            require(len(set(values)) == len(values), f"{key} must name each value once", list(values))
        if (self.protocol in ACROSS) != bool(self.targets):
            which = "needs" if self.protocol in ACROSS else "has no"
            raise UsageError(f"protocol {self.protocol} {which} sets to test on, [targets.NAME].")
        for name in (*self.methods, *self.sets, *self.targets, *self.published):
            require(bool(name.strip()) and name.isprintable(), "a name must be one line that can be read", name)
        require(MEAN not in self.sets, f"no set can be called {MEAN}, which is what the table of all is called", MEAN)
        both = [name for name in self.sets if name in self.targets and self.sets[name] != self.targets[name]]
        require(not both, "a name in both sets and targets must stand for one set", ", ".join(both))
        twice = [name for name in self.sets if name in self.targets and self.protocol == "dg"]
        require(not twice, "dg tests on the set itself, so that no target is called like it", ", ".join(twice))
        require(self.protocol != "episodes" or bool(self.shots), "episodes need shots, a list of numbers", "none")
        _known("reference", [self.reference], self.methods)

    def only(self, sets: tuple[str, ...], methods: tuple[str, ...]) -> Plan:
        """A plan of some of its sets and rows (empty: all). Raises UsageError for one that there is not."""
        _known("--set", sets, self.sets)
        _known("--method", methods, self.methods)
        kept = {name for name in self.methods if not methods or name in (*methods, self.reference)}
        values = {key: getattr(self, key) for key in (*declared_by(Plan), "targets", "published")}
        return Plan(
            **values,
            sets={name: row for name, row in self.sets.items() if not sets or name in sets},
            methods={name: row for name, row in self.methods.items() if name in kept},
        )


def _known(what: str, names: tuple[str, ...] | list[str], there: Mapping[str, Any]) -> None:
    for name in names:
        if name not in there:
            raise UsageError(
                f"{what}: there is no {name!r} in the plan{did_you_mean(name, there)}; it has {', '.join(there)}."
            )


def read_plan(file: Path) -> Plan:
    """A plan file.

    Raises:
        UsageError: it is missing or no TOML, names what there is not, or a value is not as it must be.
    """
    if file.exists() and not file.is_file():  # reading a pipe may never end
        raise UsageError(f"the plan {file} is no file: expected one in TOML.")
    try:
        document = tomllib.loads(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"the plan {file} cannot be read: {why}.") from None
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"the plan {file} is no TOML: {error}.") from None
    tables = {key: _tables(file, document.pop(key, {}), key) for key in ("methods", "sets", "targets", "published")}
    try:
        values = settings(Plan, document, "a plan")
        plan = Plan(
            **{"protocol": "", **values},
            methods=tables["methods"],
            sets={name: _set(name, table, "sets") for name, table in tables["sets"].items()},
            targets={name: _set(name, table, "targets") for name, table in tables["targets"].items()},
            published={name: _published(name, table) for name, table in tables["published"].items()},
        )
        for name, table in plan.published.items():
            _known(f"[published.{name}]", list(table.figures), {**plan.sets, MEAN: None})
    except UsageError as error:
        raise UsageError(f"{file}: {error}") from None
    return plan


def _tables(file: Path, found: object, key: str) -> Mapping[str, Mapping[str, Any]]:
    if not isinstance(found, dict) or not all(isinstance(table, dict) for table in found.values()):
        raise UsageError(f"{file}: {key} must be tables, [{key}.NAME]; found {str(found)[:60]}.")
    return found


def _set(name: str, table: Mapping[str, Any], kind: str) -> SetRow:
    given = dict(table)
    own = given.pop("settings", {})
    try:
        require("data" in given and isinstance(own, dict), "it needs data, and perhaps a table of settings", table)
        return SetRow(**settings(SetRow, given, "a set"), settings=own)
    except UsageError as error:
        raise UsageError(f"[{kind}.{name}]: {error}") from None


def _published(name: str, table: Mapping[str, Any]) -> Published:
    given = dict(table)
    source = str(given.pop("source", ""))
    for key, values in given.items():
        if not isinstance(values, list) or not all(_is_figure(value) for value in values):
            raise UsageError(f"[published.{name}]: {key} must be a list of numbers, a column each; found {values!r}.")
    require(source.isprintable(), f"[published.{name}]: the source must be one line that can be read", source)
    return Published(source, {key: tuple(map(float, values)) for key, values in given.items()})


def _is_figure(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isinf(value)
