"""An option is declared once: a toy method's shows up everywhere, by one file and one row."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import typer
from conftest import script_at
from typer.testing import CliRunner

from clipfit import AdaptConfig, EvaluateConfig, Recipe, adapt_config
from clipfit.cli import application
from clipfit.config.options import Checked, option
from clipfit.errors import UsageError
from clipfit.methods import METHODS
from clipfit.methods.declared import adapt_options
from clipfit.methods.finetune import METHOD as FINETUNE

DOCS = Path(__file__).parents[1] / "docs"


@dataclass(frozen=True)
class ToyOptions(Checked):
    toy_weight: float = option(0.5, "How much it plays.", low=0, high=1)
    toy_quietly: bool = option(True, "Whether it is heard.")


TOY = replace(FINETUNE, name="toy", options=ToyOptions)


@pytest.fixture
def _toy(monkeypatch):
    monkeypatch.setitem(METHODS, "toy", TOY)


@pytest.fixture(scope="module")
def pages() -> ModuleType:
    """docs/options.py, which is no part of the package."""
    return script_at(DOCS / "options.py")


# ---- a toy method: one class of options, one row


@pytest.mark.usefixtures("_toy")
def test_a_new_methods_option_is_a_flag_with_its_help():
    shown = CliRunner().invoke(application(), ["adapt", "--help"], env={"COLUMNS": "80"}).stdout
    assert "cite+atha|finetune|flyp|toy]" in shown
    words = " ".join(shown.split())
    assert "--toy-weight FLOAT toy: How much it plays. [default: 0.5]" in words
    assert "--toy-quietly / --no-toy-quietly toy: Whether it is heard." in words


@pytest.mark.usefixtures("_toy")
def test_a_new_methods_option_is_a_key_of_a_plan():
    config = adapt_config({"shots": "x", "method": "toy", "toy_weight": 1, "toy_quietly": False, "epochs": 3})
    assert config.method_options == {"toy_weight": 1, "toy_quietly": False}
    assert config.recipe == {"epochs": 3}
    with pytest.raises(UsageError, match=r"toy_weight must lie between 0 and 1; found 2.0\.$"):
        adapt_config({"shots": "x", "method": "toy", "toy_weight": 2})


@pytest.mark.usefixtures("_toy")
def test_a_new_methods_option_is_recorded_in_the_run(split, models, tmp_path):
    command = ["adapt", str(split), "--model", models["vit"], "--method", "toy", "--toy-weight", "0.25",
               "--no-toy-quietly", "--output", str(tmp_path / "run")]  # fmt: skip
    assert CliRunner().invoke(application(), command).exit_code == 0
    record = json.loads((tmp_path / "run" / "config.json").read_text("utf-8"))
    assert record["method_options"] == {"toy_weight": 0.25, "toy_quietly": False}


@pytest.mark.usefixtures("_toy")
def test_a_new_methods_option_is_a_row_of_the_docs(pages):
    row = "| `--toy-weight` | `toy_weight` | `float` | 0.5 | between 0 and 1 | toy | How much it plays. |"
    assert row in pages.options_page().splitlines()


def test_methods_that_declare_one_name_differently_are_a_fault(monkeypatch):
    @dataclass(frozen=True)
    class Other(Checked):
        scl_weight: float = option(0.5, "Another weight.")

    @dataclass(frozen=True)
    class Taken(Checked):
        epochs: int = option(3, "The recipe has that.")

    for options in (Other, Taken):
        monkeypatch.setitem(METHODS, "toy", replace(TOY, options=options))
        with pytest.raises(TypeError, match=r"method toy declares '(scl_weight|epochs)'"):
            adapt_options()


def test_methods_that_inherit_an_option_have_one_flag():
    assert adapt_options()["scl_weight"].methods == ("cite", "cite+atha")


# ---- flat keys


def test_flat_keys_are_sorted_to_where_they_belong():
    given = {
        "shots": "photos.csv", "method": "atha", "tuning": "lora", "lora_rank": 4, "crop_scale": [0.5, 1],
        "tail_ratio": 0, "classes": "names.txt", "context": True, "output": None,
    }  # fmt: skip
    expected = AdaptConfig(
        Path("photos.csv"), "atha", tuning="lora", context=True, classes=Path("names.txt"), lora={"rank": 4},
        recipe={"crop_scale": [0.5, 1]}, method_options={"tail_ratio": 0},
    )  # fmt: skip
    assert adapt_config(given) == expected


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"epoch": 3}, r"there is no option 'epoch' \(did you mean epochs\?\)"),
        ({"recipe": {"epochs": 3}}, "there is no option 'recipe'"),
        ({"method": "flyp", "scl_weight": 1}, "method flyp has no option 'scl_weight'"),
        ({"lora_rank": 2}, "belong to --tuning lora"),
        ({"tuning": "lora", "lora_alpha": 0}, "lora_alpha must be above 0; found 0"),
        ({"method": "citee"}, r"did you mean cite\?"),
        ({"shots": None}, "shots must be given"),
        ({"alpha": "best"}, "alpha must be a ratio between 0 and 1, or auto; found 'best'"),
        ({"model": 3}, "model must be of type str; found 3"),
        ({"save_every": 0}, "save_every must be at least 1; found 0"),
        ({"cache_bytes": -1}, r"cache_bytes \(--cache-gib\) must be at least 0; found -1"),
        ({"head_strength": float("inf"), "method": "atha"}, "head_strength must be a finite number; found inf"),
        ({"crop_ratio": [2, 1]}, r"crop_ratio must be in ascending order; found \(2.0, 1.0\)"),
        ({"head_ratio": 0.6, "tail_ratio": 0.6, "method": "atha"}, "must not exceed 1 together"),
    ],
)
def test_flat_keys_that_cannot_be(given, message):
    with pytest.raises(UsageError, match=message):
        adapt_config({"shots": "x", **given})


# ---- from Python


def test_paths_are_texts_too_and_numbers_numpys():
    config = AdaptConfig("x", output="y", alpha=np.float32(0.25), seed=np.int64(3))
    assert config == AdaptConfig(Path("x"), output=Path("y"), alpha=0.25, seed=3)
    assert (type(config.alpha), type(config.seed)) == (float, int)
    with pytest.raises(UsageError, match=r"seed must be of type int; found 3\.0"):
        AdaptConfig("x", seed=3.0)


@pytest.mark.parametrize("field", ["recipe", "method_options", "lora"])
def test_what_differs_from_the_defaults_is_a_mapping(field):
    """A whole Recipe would not say which of its values were asked for."""
    for given in (Recipe(epochs=1), None, [("epochs", 1)]):
        with pytest.raises(UsageError, match=f"^{field} must be a mapping .*; found {type(given).__name__}"):
            AdaptConfig("x", **{field: given})


def test_a_key_that_is_no_text_is_no_option():
    with pytest.raises(UsageError, match="the recipe has no option 1; its options: batch_size, "):
        AdaptConfig("x", recipe={1: 2})


def test_values_are_of_their_declared_type_however_they_are_written():
    config = EvaluateConfig("run", alphas=[0, 1])
    assert config == EvaluateConfig(Path("run"), alphas="0,1")
    assert isinstance(config.run, Path)
    assert config.alphas == (0.0, 1.0)
    assert [type(alpha) for alpha in config.alphas] == [float, float]


def test_flags_reach_the_config(flat, monkeypatch):
    seen = []

    def reached(config, progress):
        seen.append(config)
        raise UsageError("far enough")

    monkeypatch.setattr("clipfit.verbs.adapt.adapt", reached)
    command = ["adapt", str(flat), "--cache-gib", "0.5", "--balance", "--save-every", "7", "--crop-scale", "0.2", "1"]
    assert CliRunner().invoke(application(), command).exit_code == 2
    assert seen == [AdaptConfig(flat, cache_bytes=2**29, balance=True, save_every=7, recipe={"crop_scale": (0.2, 1.0)})]


# ---- without torch, and in the docs

BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "torchvision", "open_clip", "numpy", "PIL", "scipy", "safetensors"}:
            raise ImportError(f"{name} was imported")

sys.meta_path.insert(0, Blocked())
from clipfit.cli import main
sys.argv = ["clipfit", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ("adapt --help", 0, "--scl-weight"),
        ("evaluate --help", 0, "--new-classes"),
        ("adapt x --alpha 2", 2, "alpha must lie between 0 and 1; found 2.0"),
        ("adapt x --method citee", 2, "did you mean cite?"),
        ("adapt x --method atha --class-token-inverse left", 2, "least-squares, transpose; found 'left'"),
        ("adapt x --method flyp --scl-weight 1", 2, "method flyp has no option 'scl_weight'"),
        ("adapt x --lora-rank 4", 2, "belong to --tuning lora"),
        ("adapt x --tuning lora --lora-rank 0", 2, "lora_rank must be at least 1"),
        ("adapt x --method cite+atha --logit-scale 4", 2, "leave logit_scale out"),
        ("adapt x --epochs two", 2, "--epochs"),
        ("evaluate --alphas 0:2:1", 2, "alphas must lie between 0 and 1; found 2.0"),
        ("evaluate --way 3", 2, "--way"),
        ("benchmark x --batch-size 0", 2, "batch_size must be at least 1"),
        ("export --alpha -1", 2, "alpha must lie between"),
        ("explain run x.png --blocks one", 2, "blocks must be one whole number or several"),
    ],
)
def test_help_and_wrong_usage_answer_without_torch(arguments, code, words):
    done = subprocess.run([sys.executable, "-c", BLOCKED, *arguments.split()], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert words in (done.stderr if code else done.stdout)


def test_the_docs_are_those_of_the_declared_options(pages):
    assert (DOCS / "options.md").read_text("utf-8") == pages.options_page(), "run python docs/options.py"


def test_the_docs_show_what_help_prints(pages):
    kept = (DOCS / "help.md").read_text("utf-8")
    if f"with typer {pages.typer_series()}." not in kept:
        pytest.skip(f"typer {typer.__version__} lays the help out differently")
    assert kept == pages.help_page(), "run python docs/options.py"
