"""Settings: the paper's by default, checked once, refused with what was expected and found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from clipfit import AdaptConfig, EvaluateConfig, ExportConfig, Recipe, UsageError
from clipfit.config import parse_alphas
from clipfit.methods import METHODS, find
from clipfit.prompts import prompts


def test_the_papers_settings_are_the_defaults():
    recipe = Recipe()
    assert (recipe.learning_rate, recipe.epochs, recipe.batch_size) == (5e-6, 20, 32)
    assert recipe.weight_decay == 0.1
    assert recipe.crop_scale == (0.08, 1.0)
    assert recipe.crop_ratio == pytest.approx((0.75, 1.3333333))
    assert recipe.template == "a photo of a {}"
    config = AdaptConfig(Path("x"))
    assert (config.method, config.model, config.alpha) == ("cite", "ViT-B-16", 0.5)
    options = METHODS["cite"].configure({})
    assert (options.scl_weight, options.vld_weight, options.literal_scl) == (0.7, 0.1, False)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0}, {"learning_rate": 1.0}, {"learning_rate": float("nan")}, {"weight_decay": -0.1},
        {"epochs": 0}, {"batch_size": 0}, {"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.5, 0.2)},
        {"crop_scale": (0.5, 1.2)}, {"crop_ratio": (0.0, 1.0)}, {"template": "a photo"}, {"template": "{} {}"},
    ],
)  # fmt: skip
def test_recipes_that_cannot_be(wrong):
    with pytest.raises(UsageError, match="; found "):
        AdaptConfig(Path("x"), recipe=wrong)


def test_a_recipe_changes_by_what_is_given():
    changed = Recipe().changed({"epochs": 3, "template": None, "crop_scale": [0.5, 1]})
    assert changed == Recipe(epochs=3, crop_scale=(0.5, 1))
    with pytest.raises(
        UsageError, match=r"the recipe has no option 'epoch' \(did you mean epochs\?\); its options: batch_size"
    ):
        Recipe().changed({"epoch": 3})


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"epochs": 2.5}, "epochs must be of type int; found 2.5"),
        ({"epochs": True}, "epochs must be of type int; found True"),
        ({"learning_rate": "fast"}, "learning_rate must be of type float; found 'fast'"),
        ({"crop_scale": [0.5]}, r"crop_scale must be of type tuple\[float, float\]; found \[0.5\]"),
        ({"crop_scale": (0.5, "1")}, r"found \(0.5, '1'\)"),
        ({"template": 3}, "template must be of type str"),
    ],
)
def test_settings_of_another_type_are_refused(wrong, message):
    with pytest.raises(UsageError, match=message):
        AdaptConfig(Path("x"), recipe=wrong)


def test_scalars_of_numpy_and_torch_become_pythons():
    """config.json could not hold them."""
    for three, half in ((np.int64(3), np.float32(0.5)), (torch.tensor(3), torch.tensor(0.5)), (np.array(3), 0.5)):
        recipe = Recipe().changed({"epochs": three, "learning_rate": half})
        assert [type(recipe.epochs), type(recipe.learning_rate)] == [int, float]
    with pytest.raises(UsageError, match="epochs must be of type int"):
        AdaptConfig(Path("x"), recipe={"epochs": np.float64(3)})


def test_options_of_another_type_are_refused():
    atha = METHODS["atha"]
    assert atha.configure({"head_block": 1, "soft_edits": False, "head_strength": 1}).head_strength == 1
    for wrong in ({"head_block": 1.0}, {"head_block": "1"}, {"soft_edits": "False"}, {"soft_edits": 1}):
        with pytest.raises(UsageError, match=r"must be of type (int . None|bool); found "):
            atha.configure(wrong)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_ratios_lie_between_the_two_models(alpha):
    for make in (
        lambda: AdaptConfig(Path("x"), alpha=alpha),
        lambda: EvaluateConfig(alphas=(0.5, alpha)),
        lambda: ExportConfig(alpha=alpha),
    ):
        with pytest.raises(UsageError, match=r"alphas? must lie between 0 and 1; found"):
            make()


@pytest.mark.parametrize(
    ("text", "ratios"),
    [
        ("0:1:0.1", (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1)),
        ("0:1:0.25", (0, 0.25, 0.5, 0.75, 1)),
        ("0.2:0.9:0.5", (0.2, 0.7)),
        ("0.5:0.5:1", (0.5,)),
        ("0,0.5,1", (0, 0.5, 1)),
        ("0.3", (0.3,)),
    ],
)
def test_ratios_as_a_range_or_a_list(text, ratios):
    assert parse_alphas(text) == ratios


@pytest.mark.parametrize(
    "text", ["", "a", "0:1", "0:1:0", "0:1:-0.1", "0:1:0.1:2", "0;1", "1:0:0.1", "0:inf:1", "0:1:nan"]
)
def test_ratios_that_are_neither(text):
    with pytest.raises(UsageError, match=r"alphas must be first:last:step \(0:1:0.1\) or a list \(0,0.5,1\); found"):
        EvaluateConfig(alphas=text)


@pytest.mark.parametrize("text", ["0:1:1e-8", "0:1:1e-300", "0:1:0.0009"])
def test_so_many_ratios_are_a_mistake(text):
    with pytest.raises(UsageError, match=r"alphas must be of 1000 steps at most; found"):
        EvaluateConfig(alphas=text)
    assert len(EvaluateConfig(alphas="0:1:0.001").alphas) == 1001


def test_methods_are_found_by_name_or_the_nearest_is_named():
    for name, method in METHODS.items():
        assert find(name) is method
        assert method.name == name
        assert method.summary
        assert method.citation
    with pytest.raises(UsageError, match=r"unknown method 'sight' \(did you mean cite\?\); there are cite, "):
        find("sight")


def test_options_of_another_method_are_refused():
    with pytest.raises(UsageError, match="method flyp has no option 'scl_weight'; its options: none"):
        METHODS["flyp"].configure({"scl_weight": 0.5, "vld_weight": None})
    with pytest.raises(UsageError, match="vld_weight must be at least 0; found -1"):
        METHODS["cite"].configure({"vld_weight": -1})


def test_under_lora_a_model_keeps_its_own_template():
    own = {"recipe": {"template": "an icon of a {}", "epochs": 3}}
    lora = Recipe.resolved(own, "atha", {}, {"epochs": 100})
    assert (lora.template, lora.epochs) == ("an icon of a {}", 100)
    assert Recipe.resolved(own, "atha", {"template": "{}"}, {"epochs": 100}).template == "{}"
    assert Recipe.resolved({}, "atha", {}, {"epochs": 100}).template == Recipe().template


def test_a_template_may_hold_other_braces():
    assert prompts(["cat", "{}"], "a {photo} of {}") == ["a {photo} of cat", "a {photo} of {}"]
