"""The pages cannot drift: links lead somewhere, commands parse, Python runs, lists are whole."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer
from test_imports import ROWS

from clipfit.cli import app
from clipfit.errors import ClipfitError

ROOT = Path(__file__).parent.parent
PAGES = [
    path
    for pattern in ("*.md", "docs/*.md", "examples/**/*.md", "benchmarks/*.md")
    for path in sorted(ROOT.glob(pattern))
    if "node_modules" not in path.parts
]
IN_PAGES = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in PAGES}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)|^\[[^]]+\]: (\S+)", re.MULTILINE)
OF_SCRIPTS = {"--part", "--methods", "--tokens", "--batch", "--stage"}
GROUP = typer.main.get_command(app)


def blocks(text: str, language: str) -> list[str]:
    """Fenced code of a language."""
    return [body for found, body in FENCE.findall(text) if found == language]


def prose(text: str) -> str:
    return FENCE.sub("", text)


def anchors(text: str) -> set[str]:
    """What headings are linked by, as GitHub makes it."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def shell_commands(text: str) -> list[list[str]]:
    """Every simple command of the shell blocks, in words; comments are left out."""
    found: list[list[str]] = []
    for line in "\n".join(blocks(text, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars="|&;")
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if set(word) <= set("|&;"):
                found += [command] if command else []
                command = []
            else:
                command.append(word)
    return found


def whole_commands() -> list[tuple[str, str]]:
    """(page, `clipfit …`) of the shell blocks."""
    return [
        (page, shlex.join(command[1:]))
        for page, text in IN_PAGES.items()
        for command in shell_commands(text)
        if Path(command[0]).name == "clipfit"
    ]


def inline(text: str) -> list[str]:
    """Code within a line."""
    return re.findall(r"`([^`\n]+)`", prose(text))


@pytest.mark.parametrize("page", IN_PAGES)
def test_links_within_the_repository_lead_somewhere(page):
    for target in (first or second for first, second in LINK.findall(prose(IN_PAGES[page]))):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = ((ROOT / page).parent / file).resolve() if file else ROOT / page
        assert path.exists(), f"{page}: {target}"
        if anchor:
            assert anchor in anchors(path.read_text("utf-8")), f"{page}: {target}"


def test_commands_are_found_in_the_pages():
    """So that the test below cannot pass by finding none."""
    assert {command.split()[0] for _, command in whole_commands()} >= {"adapt", "evaluate", "export", "explain"}
    assert shell_commands("```sh\na 'b c' --d | e; f && g # h\n```") == [["a", "b c", "--d"], ["e"], ["f"], ["g"]]


def parse(command: str) -> None:
    """As far as the command line goes without carrying it out: the verb, its options and the types of their values."""
    verb, *arguments = shlex.split(command)
    with GROUP.commands[verb].make_context(verb, arguments):
        pass


@pytest.mark.parametrize(("page", "command"), whole_commands())
def test_commands_parse(page, command):
    parse(command)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("adept shots", "adept"),
        ("adapt", "(?i)missing .*shots"),
        ("adapt shots --metod cite", "--metod"),
        ("evaluate --alpha half", "valid (number|float)"),
    ],
)
def test_a_command_that_is_wrong_does_not_parse(wrong, words):
    with pytest.raises(Exception, match=words):
        parse(wrong)


@pytest.mark.parametrize("page", IN_PAGES)
def test_verbs_and_flags_that_are_named_exist(page):
    """`clipfit verb --flag` has that flag; a bare `--flag` is one of some verb's, or of a script of the examples."""
    flags = {name: {o for option in c.params for o in option.opts} | {"--help"} for name, c in GROUP.commands.items()}
    of_any = set().union(*flags.values(), {"--version", "--nproc-per-node"}, OF_SCRIPTS)  # the second is torchrun's
    for code in inline(IN_PAGES[page]):
        words = code.replace("…", " ").split()
        of_clipfit = len(words) > 1 and words[0] == "clipfit" and not words[1].startswith("--")
        known = flags[words[1]] if of_clipfit else of_any
        assert {word.rstrip(",") for word in words if re.match(r"--[a-z]", word)} <= known, f"{page}: {code}"


@pytest.mark.parametrize("page", IN_PAGES)
def test_scripts_that_are_named_exist(page):
    for command in shell_commands(IN_PAGES[page]):
        scripts = [word for word in command[:2] if re.fullmatch(r"[\w./-]+\.(py|sh)", word)]
        for script in scripts:
            assert (ROOT / script).is_file() or ((ROOT / page).parent / script).is_file(), f"{page}: {script}"


def test_the_python_of_the_readme_runs(models, tmp_path, monkeypatch):
    """On the example, with a little model in place of clipfit-tiny."""
    (code,) = blocks(IN_PAGES["README.md"], "python")
    assert '"clipfit-tiny"' in code
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    exec(compile(code.replace('"clipfit-tiny"', repr(models["vit"])), "README.md", "exec"), {})


def test_the_readme_lists_the_files_of_a_run(split_run):
    listing = IN_PAGES["README.md"].split("runs/my_shots-cite/\n")[1].split("```")[0]
    named = set(re.findall(r"^  ([\w.]+)", listing, re.MULTILINE))
    asked_for = {"evaluations", "folds.json"}
    assert named - asked_for == {path.name for path in split_run.iterdir()} - asked_for
    assert asked_for <= named


def test_the_readme_lists_the_exit_codes():
    """Those of the help, and those of the errors."""
    text = " ".join(IN_PAGES["README.md"].split())
    codes = text.split("Exit codes: ")[1].split(". ")[0]
    assert codes == " ".join(str(GROUP.epilog).removeprefix("Exit codes:").rstrip(".").split())
    numbers = set(re.findall(r"\b\d+\b", codes))
    assert {str(kind.exit_code) for kind in ClipfitError.__subclasses__()} <= numbers


def test_the_rows_of_the_house_are_those_of_the_import_test():
    table = re.findall(r"^\| (`.+`) \| .+ \|$", IN_PAGES["docs/architecture.md"], re.MULTILINE)
    assert [set(re.findall(r"`(\w+)`", cell)) for cell in table] == [row for row in ROWS[::-1] if row != {"__main__"}]


@pytest.mark.parametrize("page", [p for p in IN_PAGES if p != "CHANGELOG.md"])
def test_files_that_are_named_exist(page):
    for name in inline(IN_PAGES[page]):
        if re.fullmatch(r"(\w+/)+\w+\.py", name):
            places = (ROOT, ROOT / "clipfit", (ROOT / page).parent)
            assert any((place / name).is_file() for place in places), f"{page}: {name}"


def test_the_readme_is_one_page():
    lines = IN_PAGES["README.md"].splitlines()
    assert len(lines) <= 135
