"""Writes docs/options.md and docs/help.md from the declared options; `python docs/options.py` after changing one."""

from __future__ import annotations

from pathlib import Path

import typer
from typer.testing import CliRunner

from clipfit.cli import COMMANDS, application
from clipfit.cli.options import flag_text
from clipfit.config.options import Declared, declared_by, type_text
from clipfit.config.plan import Plan, SetRow
from clipfit.methods.declared import AdaptOption, adapt_options

HERE = Path(__file__).parent
PARTS = {
    "adapt": "The adaptation itself",
    "recipe": "How the weights move (`Recipe`)",
    "lora": "Adapters, under `--tuning lora` (`LoraSettings`)",
    "method": "Options of methods",
}
OF_PLANS = {
    "Keys of a plan of `benchmark`": Plan,
    "Keys of its sets, `[sets.NAME]` and `[targets.NAME]`": SetRow,
}
INTRODUCTION = """# Options of `adapt`, keys of a plan

Written by `python docs/options.py` from the fields where the options are declared. The key is the name in a plan file
and in `clipfit.adapt_config({...})`; config.json has the values under the same names (those of adapters without
`lora_`). What [`--help`](help.md) prints of every command stands beside, and
[what a plan is](benchmark.md).
"""


def row(key: str, option: AdaptOption) -> str:
    """A line of the table."""
    declared = option.declared
    flag = declared.key.upper() if declared.option.positional else flag_text(declared)
    methods = [", ".join(option.methods)] if option.part == "method" else []
    return _line([f"`{flag}`", f"`{key}`", *_cells(declared), *methods, declared.option.help])


def _cells(declared: Declared) -> list[str]:
    """Type, default and range."""
    allowed = ", ".join(declared.option.choices) or declared.option.range
    return [f"`{type_text(declared.kind)}`", declared.default_text, allowed]


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", r"\|").replace("<", "&lt;") for cell in cells) + " |"


def plan_tables() -> list[str]:
    """Of a plan's own keys and those of its sets: what is declared. Its tables are in docs/benchmark.md."""
    lines = []
    for title, owner in OF_PLANS.items():
        lines += [f"## {title}", "", "| key | type | default | range | help |", "|---" * 5 + "|"]
        lines += [_line([f"`{key}`", *_cells(found), found.option.help]) for key, found in declared_by(owner).items()]
        lines.append("")
    return lines


def options_page() -> str:
    """docs/options.md: a table a part."""
    options = adapt_options()
    lines = [INTRODUCTION]
    for part, title in PARTS.items():
        headings = ["flag", "key", "type", "default", "range", *(["methods"] if part == "method" else []), "help"]
        lines += [f"## {title}", "", f"| {' | '.join(headings)} |", "|---" * len(headings) + "|"]
        lines += [row(key, option) for key, option in options.items() if option.part == part]
        lines.append("")
    return "\n".join([*lines, *plan_tables()])


def help_page() -> str:
    """docs/help.md: what every command prints at 80 columns, by the typer that is installed."""
    lines = [f"# What `--help` prints\n\nWritten by `python docs/options.py`, with typer {typer_series()}.\n"]
    for name in ("", *COMMANDS):
        arguments = [name, "--help"] if name else ["--help"]
        shown = CliRunner().invoke(application(), arguments, env={"COLUMNS": "80"}, prog_name="clipfit").stdout
        lines.append(f"```\n$ clipfit {' '.join(arguments)}\n{shown}```\n")
    return "\n".join(lines)


def typer_series() -> str:
    """Of one major and minor version the help looks the same."""
    return ".".join(typer.__version__.split(".")[:2])


if __name__ == "__main__":
    (HERE / "options.md").write_text(options_page(), "utf-8")
    (HERE / "help.md").write_text(help_page(), "utf-8")
