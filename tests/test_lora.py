"""Low-rank tuning: exactly the adapters of the papers, and nothing left of them when they are merged."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from conftest import picture
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

from clipfit import AdaptConfig
from clipfit.adaptation import Adaptation
from clipfit.config.lora import LoraSettings
from clipfit.errors import ModelError, UsageError
from clipfit.methods import METHODS
from clipfit.model import loading, lora
from clipfit.model.clip import Additions
from clipfit.model.lora import LoraAttention
from clipfit.prompts import prompts

NAMES = ["bee", "cow", "dog"]


def adapters(backbone) -> dict[str, LoraAttention]:
    return {n: m for n, m in backbone.model.named_modules() if isinstance(m, LoraAttention)}


def attached(backbone, **settings) -> dict[str, LoraAttention]:
    lora.attach(backbone.model, LoraSettings(**settings), torch.Generator().manual_seed(0))
    return adapters(backbone)


def moved(modules) -> None:
    draw = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in modules.values():
            module.up.copy_(0.1 * torch.randn(module.up.shape, generator=draw))


def features(backbone):
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return backbone.encode(x, backbone.tokenize(prompts(NAMES, "a photo of a {}")))


@pytest.mark.parametrize("name", ["vit", "eos", "bidirectional"])
@torch.no_grad()
def test_adapters_start_at_the_pre_trained_model_and_merge_into_plain_weights(models, name):
    backbone = loading.load(models[name])
    before, names = features(backbone), list(backbone.state())
    modules = attached(backbone)
    assert sorted(modules) == sorted(
        f"{tower}transformer.resblocks.{n}.attn" for tower in ("", "visual.") for n in range(2)
    )
    for a, b in zip(features(backbone), before, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    moved(modules)
    unmerged = features(backbone)
    assert all((a - b).abs().max() > 1e-2 for a, b in zip(unmerged, before, strict=True))
    lora.merge(backbone.model)
    assert not adapters(backbone)
    assert list(backbone.state()) == names
    for a, b in zip(features(backbone), unmerged, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@torch.no_grad()
def test_q_k_and_v_have_adapters_of_their_own(vit):
    """The merged matrices against W_j + α/√r · B_j·A_j written out."""
    before = copy.deepcopy(vit.model.visual.transformer.resblocks[1].attn.in_proj_weight)
    modules = attached(vit, rank=4, alpha=6.0)
    moved(modules)
    module = modules["visual.transformer.resblocks.1.attn"]
    parts = [before[64 * j : 64 * j + 64] + 6 / math.sqrt(4) * module.up[j] @ module.down[j] for j in range(3)]
    torch.testing.assert_close(module.merged().in_proj_weight, torch.cat(parts))
    assert len({float(part.norm()) for part in parts}) == 3


def test_dropout_is_of_the_adapters_input_and_only_in_training(vit):
    module = attached(vit, dropout=0.25)["visual.transformer.resblocks.0.attn"]
    x = torch.ones(50, 17, 64)
    dropped = module._dropped(x)
    assert dropped.shape == (3, 50, 17, 64)
    assert dropped.unique().tolist() == pytest.approx([0, 4 / 3])
    assert (dropped == 0).float().mean().item() == pytest.approx(0.25, abs=0.01)
    assert not torch.equal(dropped[0], dropped[1])
    with torch.no_grad():
        assert torch.equal(module._dropped(x)[2], x)
    assert torch.equal(attached(loading.load(vit.source.model), dropout=0.0)["transformer.resblocks.0.attn"]
                       ._dropped(x)[0], x)  # fmt: skip


@pytest.mark.parametrize("method", METHODS)
def test_only_the_adapters_change(models, method):
    backbone = loading.load(models["vit"])
    before = {n: p.clone() for n, p in backbone.model.named_parameters()}
    chosen = METHODS[method]
    config = AdaptConfig(Path("x"), method, tuning="lora", recipe={"epochs": 2, "batch_size": 4})
    made = Adaptation.resolve(chosen, chosen.configure({}), config, {}, [2, 2, 2])
    images = [pil_to_tensor(picture(k)) for k in range(6)]
    backbone = backbone.with_additions(made.additions)
    made.run(backbone, NAMES, images, [0, 0, 1, 1, 2, 2])
    after = dict(backbone.model.named_parameters())
    assert after.keys() == before.keys()
    changed = {n for n in before if not torch.equal(before[n], after[n])}
    vision = {f"visual.transformer.resblocks.{n}.attn.in_proj_weight" for n in range(2)}
    assert changed >= vision
    assert changed <= vision | {f"transformer.resblocks.{n}.attn.in_proj_weight" for n in range(2)}


def test_the_papers_settings():
    def planned(name, counts, **given):
        config = AdaptConfig(Path("x"), name, tuning="lora", lora=given)
        return Adaptation.resolve(METHODS[name], METHODS[name].configure({}), config, {"recipe": {"epochs": 3}}, counts)

    atha = planned("atha", [5] * 5)
    assert (atha.adapters, atha.recipe.batch_size, atha.recipe.epochs) == (LoraSettings(16, 8.0, 0.25), 25, 100)
    assert (atha.recipe.learning_rate, atha.recipe.crop_scale) == (2e-4, (1.0, 1.0))
    finetune = planned("finetune", [4] * 12)  # 48 images: two steps an epoch
    assert (finetune.adapters, finetune.recipe.batch_size) == (LoraSettings(2, 1.0, 0.25), 32)
    assert (finetune.recipe.learning_rate, finetune.recipe.epochs) == (2e-4, 1000)
    assert planned("atha", [1] * 5, rank=3, alpha=None).adapters == LoraSettings(3, 8.0, 0.25)
    for wrong in ({"rank": 2.5}, {"ranks": 2}):
        with pytest.raises(UsageError, match=next(iter(wrong))):
            planned("atha", [1], **wrong)


def test_the_papers_settings_end_where_the_papers_end():
    """A folder of thousands is no support set: neither one batch, nor 500 steps for every image of a class."""

    def planned(name, counts, **recipe):
        config = AdaptConfig(Path("x"), name, tuning="lora", recipe=recipe)
        return Adaptation.resolve(METHODS[name], METHODS[name].configure({}), config, {}, counts).recipe

    assert (planned("atha", [150] * 20).batch_size, planned("atha", [150] * 20).epochs) == (128, 100)
    assert planned("cite+atha", [150] * 20).batch_size == 128
    assert planned("finetune", [150] * 20).epochs == math.ceil(500 * 16 / 94)
    assert planned("finetune", [4] * 12, batch_size=8).epochs == math.ceil(500 * 4 / 6)


def test_the_adapters_start_as_a_linear_layer_does(vit):
    lora.attach(vit.model, LoraSettings(rank=8), torch.Generator().manual_seed(0))
    blocks = vit.model.visual.transformer.resblocks
    down = torch.stack([block.attn.down for block in blocks])  # (blocks, 3, rank, width)
    assert down.abs().max() <= 64**-0.5
    assert down.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    assert not any(block.attn.up.any() for block in blocks)


@pytest.mark.parametrize(("per_class", "scale"), [(1, 2.0), (5, 4.0)])
def test_atha_under_lora_has_a_low_scale_and_strengths_under_sgd(vit, per_class, scale):
    from clipfit.methods import Task

    vit = vit.with_additions(Additions(METHODS["atha"].edits(METHODS["atha"].configure({}))))
    task = Task(vit, vit.tokenize(NAMES), "lora", per_class)
    objective = METHODS["atha"].build(task, METHODS["atha"].configure({}))
    assert objective.scale == scale
    (strengths,) = objective.groups
    assert (strengths.learning_rate, strengths.momentum, strengths.weight_decay) == (1e-3, 0.9, 5e-4)
    full = METHODS["atha"].build(Task(vit, vit.tokenize(NAMES)), METHODS["atha"].configure({}))
    assert full.scale == vit.scale
    assert full.groups[0].momentum is None


def test_sgd_moves_the_strengths_as_sgd_does(vit):
    """Two steps of SGD with momentum and decay, by hand, at a constant gradient and an annealed rate."""
    from clipfit.config import Recipe
    from clipfit.methods import Group
    from clipfit.training.state import Trained

    strengths = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    group = Group({"strengths": strengths}, 0.1, weight_decay=0.01, momentum=0.9)
    trained = Trained.of(vit, [group], Recipe())
    value, speed, gradient = torch.tensor([1.0, -2.0]), torch.zeros(2), torch.tensor([0.5, 0.25])
    for annealed in (1.0, 0.5):
        strengths.grad = gradient.clone()
        trained.step(annealed)
        speed = 0.9 * speed + gradient + 0.01 * value
        value = value - 0.1 * annealed * speed
    torch.testing.assert_close(strengths.detach(), value)


def test_a_run_with_lora_is_a_run_like_any_other(cli, models, split, tmp_path):
    options = ("--tuning", "lora", "--epochs", 2, "--learning-rate", 0.01, "--json")
    made = cli("adapt", split, "--method", "finetune", "--model", models["vit"], "--lora-rank", 3, *options)
    assert made.code == 0, made.stderr
    run = tmp_path / made.document["run"]
    config = json.loads((run / "config.json").read_text())
    assert (config["tuning"], config["lora"]) == ("lora", {"rank": 3, "alpha": 1.0, "dropout": 0.25})
    before, after = loading.load(models["vit"]).state(), load_file(run / "finetuned.safetensors")
    assert before.keys() == after.keys()
    assert cli("evaluate", "--json").code == 0
    assert cli("export", "--json").code == 0
    again = cli("adapt", split, "--method", "finetune", "--model", models["vit"], "--lora-rank", 3, *options,
                "--output", "again")  # fmt: skip
    assert again.code == 0
    assert (tmp_path / "again/finetuned.safetensors").read_bytes() == (run / "finetuned.safetensors").read_bytes()


def test_what_it_cannot_do_is_said_in_one_sentence(cli, models, split):
    adapt = ("adapt", split, "--method", "finetune", "--model")
    cli(*adapt, models["resnet"], "--tuning", "lora").fails(4, "ModifiedResNet", "--tuning full")
    cli(*adapt, models["vit"], "--tuning", "qlora").fails(2, "full, lora", "'qlora'")
    cli(*adapt, models["vit"], "--lora-rank", 4).fails(2, "--tuning lora")
    cli(*adapt, models["vit"], "--tuning", "lora", "--lora-rank", 0).fails(2, "rank of at least 1")
    with pytest.raises(UsageError, match="dropout"):
        LoraSettings(dropout=1.0)
    with pytest.raises(ModelError, match="plain multi-head attention"):
        lora.attach(torch.nn.ModuleDict({"visual": torch.nn.Linear(1, 1), "transformer": torch.nn.Linear(1, 1)}),
                    LoraSettings(), torch.Generator())  # fmt: skip
