"""The command that makes a run again: carried out as it stands, it writes the same bytes."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import pytest
from conftest import Cli, make_classes

from clipfit.again import Again, command_of
from clipfit.methods import METHODS
from clipfit.runs.run import open_run


def bytes_of(run: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in run.iterdir() if p.is_file() and p.name != "timing.json"}


def carried_out(cli: Cli, again: Again) -> None:
    if again.listed:
        Path("templates.txt").write_text("\n".join(again.listed))
    clipfit, *words = again.words
    assert clipfit == "clipfit"
    done = cli(*words)
    assert done.code == 0, done.stderr


def made_again(cli: Cli, *arguments: object) -> Again:
    """A run by these arguments, and once more by its own command: both must be the same."""
    done = cli("adapt", *arguments, "--output", "mine")
    assert done.code == 0, done.stderr
    again = command_of(open_run(Path("mine")))
    for file in Path().glob("*.templates"):
        file.unlink()  # what the first command was given may be gone
    carried_out(cli, again)
    assert bytes_of(Path("mine-again")) == bytes_of(Path("mine"))
    return again


def test_a_run_by_its_defaults_needs_few_words(cli: Cli, flat, models):
    again = made_again(cli, flat, "--model", models["vit"])
    assert again.shell == (
        f"clipfit adapt --method cite --model {models['vit']} --device cpu --precision fp32 --output mine-again {flat}"
    )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_every_method_and_tuning(cli: Cli, flat, models, method, tuning):
    made_again(cli, flat, "--model", models["vit"], "--method", method, "--tuning", tuning, "--epochs", 1)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--method", "cite", "--scl-weight", 0.0, "--literal-scl", "--seed", 3, "--balance", "--alpha", 0.25],
        ["--method", "atha", "--tuning", "lora", "--lora-alpha", 3, "--batch-size", 2, "--head-strength", -0.5,
         "--epochs", 1],
        ["--method", "finetune", "--shots", 2, "--crop-scale", 0.5, 0.75, "--learning-rate", 5e-6, "--context"],
        ["--alpha", "auto", "--goal", "base", "--epochs", 1, "--method", "flyp"],
        ["--alpha", 0.1, "--forecast", "--epochs", 1, "--template", "it's \"a\" $HOME {}"],
        ["--templates", "clip", "--epochs", 1],
        ["--method", "cite+atha", "--tuning", "lora", "--micro-batch", 2, "--gradient-checkpointing", "--epochs", 1],
    ],
)  # fmt: skip
def test_options(cli: Cli, flat, models, arguments):
    made_again(cli, flat, "--model", models["vit"], *arguments)


def test_a_list_of_templates_is_in_the_command(cli: Cli, flat, models, tmp_path):
    (tmp_path / "two.templates").write_text("a photo of a {}\n%s it's \\n {}\n")
    again = made_again(cli, flat, "--model", models["vit"], "--templates", "two.templates")
    assert again.listed == ("a photo of a {}", "%s it's \\n {}")
    made, command = again.shell.split(" &&\n")
    assert shlex.split(made) == ["printf", "%s\\n", *again.listed, ">", "templates.txt"]
    assert shlex.split(command) == list(again.words)


def test_names_are_quoted_and_a_broken_image_is_left_out_again(cli: Cli, models, tmp_path):
    shots = make_classes(tmp_path / "-my 'shots'; $(x)", {"cat": 2, "dog": 2})
    (shots / "cat" / "9.png").write_bytes(b"none")
    done = cli("adapt", "--model", models["vit"], "--skip-bad-images", "--output", "mine", "--", shots.name)
    assert done.code == 0, done.stderr
    again = command_of(open_run(Path("mine")))
    assert again.words[-2:] == ("--", shots.name)
    assert shlex.split(again.shell) == list(again.words)
    carried_out(cli, again)
    assert bytes_of(Path("mine-again")) == bytes_of(Path("mine"))


def test_a_run_that_went_on_from_another(cli: Cli, flat, models):
    """The other's list of templates goes on, or is left with --template."""
    first = cli("adapt", flat, "--model", models["vit"], "--templates", "clip", "--epochs", 1, "--output", "first")
    assert first.code == 0, first.stderr
    assert "--templates" in made_again(cli, flat, "--model", "first", "--epochs", 1).words
    shutil.rmtree("mine"), shutil.rmtree("mine-again")
    again = made_again(cli, flat, "--model", "first", "--epochs", 1, "--template", "a bad photo of a {}.")
    assert "--templates" not in again.words
