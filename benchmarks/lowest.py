"""The lowest versions that pyproject.toml promises, and the receipt of the tests under them; see lowest.sh."""

from __future__ import annotations

import platform
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parent.parent
NOT_IMPORTED = {"setuptools", "ruff", "mypy"}  # what builds and lints; no test imports it


def lowest() -> dict[str, str]:
    """Package → lowest version, of what is installed with or without an extra."""
    bounds = re.findall(r'"([A-Za-z0-9_.-]+)>=([0-9.]+)[^"]*"', (ROOT / "pyproject.toml").read_text("utf-8"))
    return {name: bound for name, bound in bounds if name not in NOT_IMPORTED}


def ending(log: Path) -> str:
    """pytest's last line: how many passed and failed."""
    ends = re.findall(r"^=*\s*((?:\d+ \w+,? ?)+in [\d.]+s.*?)\s*=*$", log.read_text("utf-8"), re.MULTILINE)
    return ends[-1] if ends else "no tests ended"


def receipt(log: Path, tests: list[str]) -> str:
    """docs/lowest.md."""
    commit = subprocess.check_output(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, text=True).strip()
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", log.read_text("utf-8"), re.MULTILINE)
    rows = [f"| {name} | {bound} | {version(name)} |" for name, bound in lowest().items()]
    lines = [
        "# The lowest versions",
        "",
        f"Written by `benchmarks/lowest.sh` at commit {commit}, Python {platform.python_version()} on "
        f"{platform.system()} {platform.machine()}.",
        "",
        "| package | promised | tried |",
        "|---|---|---|",
        *rows,
        "",
        f"{ending(log)}, of {'all fast tests' if not tests else 'these files'}.",
        *[f"- {name}" for name in sorted(tests)],
        *(["", "Failed:", "", *[f"- {name}" for name in failed]] if failed else []),
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "pins":
        print("\n".join(f"{name}=={bound}" for name, bound in lowest().items()))
    else:
        print(receipt(Path(rest[0]), rest[1:]), end="")
