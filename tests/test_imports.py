"""Imports only point downwards, heavy ones have one home, and the help answers without torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from conftest import of_python

import clipfit

PACKAGE = Path(clipfit.__file__).parent
# from the bottom up; a module may import from lower rows, and a package from itself
ROWS = [
    {"errors", "version", "prompts", "losses", "events", "interrupts", "stdio", "streams", "text"},
    {"config", "ensemble", "ranks"},
    {"data"},
    {"model"},
    {"runs"},
    {"methods"},
    {"training"},
    {"measure", "rows"},
    {"formats"},
    {"engines"},
    {"adaptation", "again", "predictor"},
    {"folding"},
    {"outlook", "plans"},
    {"verbs"},
    {"report"},
    {"cli"},
    {"__main__"},
]
RANK = {name: rank for rank, row in enumerate(ROWS) for name in row}
SOURCES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
INSIDE = [path for path in SOURCES if path != Path("__init__.py")]


CONSUMERS = [path.as_posix() for path in SOURCES if path.name.startswith("_consume_")]


def part_of(path: Path) -> str:
    return path.parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, str | None]]:
    """(module, name imported from it or None), wherever in the file it stands."""
    found: list[tuple[str, str | None]] = []
    for node in ast.walk(ast.parse((PACKAGE / path).read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found += [(str(node.module), alias.name) for alias in node.names]
    return found


def own_imports(path: Path) -> list[str | None]:
    """The parts of clipfit that a file imports; None for a name of the public API."""
    parts: list[str | None] = []
    for module, name in imports(path):
        if module == "clipfit" and name is not None:
            is_module = (PACKAGE / f"{name}.py").is_file() or (PACKAGE / name).is_dir()
            parts.append(name if is_module else None)
        elif module.split(".")[0] == "clipfit":
            parts.append(module.split(".")[1] if "." in module else None)
    return parts


def test_every_part_of_the_package_has_its_row():
    assert {part_of(path) for path in INSIDE} == set(RANK)


@pytest.mark.parametrize("path", INSIDE, ids=str)
def test_imports_point_downwards(path):
    own = part_of(path)
    for imported in own_imports(path):
        if imported is not None:
            assert imported == own or RANK[imported] < RANK[own], f"{path} imports {imported}"


@pytest.mark.parametrize("path", INSIDE, ids=str)
def test_only_the_command_line_uses_the_public_api_and_it_uses_nothing_else(path):
    parts = own_imports(path)
    if part_of(path) == "cli":
        below = {"methods", "config", "errors", "interrupts", "ranks", "stdio", "text", "version"}
        assert set(parts) <= {None, "cli", "report", *below}
    else:
        assert None not in parts, f"{path} imports from clipfit/__init__.py"


@pytest.mark.parametrize(
    ("library", "homes"),
    [
        (
            "open_clip",
            {"model", "verbs/adapt.py", "formats/_consume_open_clip.py", "formats/_consume_difference.py"},
        ),  # adapt: its version; the consumer: it is nothing but that
        ("huggingface_hub", {"model/hub.py", "formats/card.py"}),
        ("rich", {"report"}),
        ("typer", {"cli"}),
        ("safetensors", {"runs/files.py", *CONSUMERS}),
        ("transformers", {"formats/_consume_transformers.py"}),
        ("pyarrow", {"data/lists.py", "rows/tables.py"}),
        ("jinja2", {"report"}),
        ("matplotlib", {"report/plots.py"}),
        ("ray", {"verbs/predict_ray.py"}),
        ("filelock", {"runs/place.py", "plans/cells.py"}),
        ("msgspec", {"runs/record.py"}),
        (
            "PIL",
            {
                "data",
                "model/clip.py",
                "model/preprocess.py",
                "formats",
                "engines",
                "predictor.py",
                "verbs/explain.py",
                "report",
            },
        ),
        ("pickle", set()),
    ],
)
def test_libraries_have_their_homes(library, homes):
    for path in INSIDE:
        if any(module.split(".")[0] == library for module, _ in imports(path)):
            assert path.as_posix() in homes or path.parts[0] in homes, f"{path} imports {library}"


def test_consumers_of_exports_know_nothing_of_clipfit():
    scripts = [path for path in INSIDE if path.name.startswith("_consume_")]
    assert scripts
    for path in scripts:
        assert not own_imports(path), f"{path} imports clipfit"


def test_nothing_is_ever_unpickled():
    for path in INSIDE:
        for node in ast.walk(ast.parse((PACKAGE / path).read_text("utf-8"))):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
                assert node.attr not in ("load", "save"), f"{path} uses torch.{node.attr}"


@pytest.mark.parametrize(
    "arguments", [["--help"], ["adapt", "--help"], ["--version"], ["evaluate", "--help"], ["predict", "--help"]]
)
def test_help_does_not_import_torch(arguments):
    done = of_python(
        "import sys\nfrom clipfit.cli import main\n"
        f"sys.argv = ['clipfit', *{arguments!r}]\n"
        "try:\n    main()\nfinally:\n"
        "    heavy = {'torch', 'torchvision', 'open_clip', 'numpy', 'PIL', 'rich.progress'} & set(sys.modules)\n"
        "    print('heavy:', sorted(heavy), file=sys.stderr)\n"
    )
    assert done.returncode == 0, done.stderr
    assert "heavy: []" in done.stderr
    assert "clipfit" in done.stdout
    if arguments == ["adapt", "--help"]:
        from clipfit.methods import METHODS

        assert all(name in done.stdout for name in METHODS)


def test_no_garbage_is_looked_for_while_the_library_is_imported():
    """Nor among what was imported later; where torch is there already, its owner's garbage is left alone."""
    done = of_python(
        "import gc\n"
        "from clipfit.cli.common import imports\n"
        "passes = []\n"
        "gc.callbacks.append(lambda phase, info: passes.append(phase))\n"
        "with imports():\n"
        "    import clipfit\n"
        "    clipfit.evaluate\n"
        "print(len(passes), gc.isenabled(), gc.get_freeze_count() > 100_000)\n"
        "gc.unfreeze()\n"
        "with imports():\n"
        "    assert gc.isenabled()\n"
        "print(gc.get_freeze_count())\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "0 True True\n0\n"


def test_the_public_api_is_what_it_says():
    for name in clipfit.__all__:
        assert callable(getattr(clipfit, name))
    assert set(clipfit.__all__) == set(clipfit._HOME)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        clipfit.nothing  # noqa: B018
