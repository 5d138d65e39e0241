"""Low-rank tuning: exactly the adapters of the papers, and nothing left of them when they are merged."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path

import open_clip
import pytest
import standins
import torch
from conftest import TEXT, VISION, picture
from safetensors.torch import load_file
from torchvision.transforms.functional import pil_to_tensor

from clipfit import AdaptConfig
from clipfit.adaptation import Adaptation
from clipfit.config.lora import LoraSettings
from clipfit.errors import ModelError, UsageError
from clipfit.methods import METHODS
from clipfit.model import loading, lora
from clipfit.model.lora import Adapters, LoraAttention
from clipfit.model.named import Additions
from clipfit.prompts import prompts
from clipfit.streams import Rows

NAMES = ["bee", "cow", "dog"]


def adapters(backbone) -> dict[str, LoraAttention]:
    return {n: m for n, m in backbone.model.named_modules() if isinstance(m, LoraAttention)}


def attached(backbone, **settings) -> dict[str, LoraAttention]:
    backbone.adapters = lora.attach(backbone.model, Adapters(LoraSettings(**settings), 0, backbone.device))
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


def test_attention_as_version_4_of_open_clip_has_it_is_adapted_alike(models):
    """Called with keywords, and a tensor in return; the same adapters, trained features and merged weights."""
    clips = [loading.load(models["vit"]) for _ in range(2)]
    standins.as_version_4(clips[1].model)
    seen = []
    for clip in clips:
        modules = attached(clip, dropout=0.0)
        moved(modules)
        with torch.no_grad():
            seen.append(features(clip))
        assert len(modules) == 4
        lora.merge(clip.model)
    for a, b in zip(*seen, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    old, new = (clip.state() for clip in clips)
    assert old.keys() == new.keys()
    assert all(torch.equal(tensor, new[name]) for name, tensor in old.items())


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


def masks(seed: int = 0, dropout: float = 0.25) -> Adapters:
    return Adapters(LoraSettings(dropout=dropout), seed, torch.device("cpu"))


def mask(numbers: tuple[int, ...], seed: int = 0, step: int = 7, tower: str = "image", block: int = 1, length: int = 9):
    adapters = masks(seed)
    with adapters.drawing(Rows(step, numbers)):
        return adapters.mask(tower, block, length, 16)


def test_a_dropout_mask_follows_from_seed_step_block_and_row_alone():
    """So that any part of a batch, and any process, draws its own."""
    whole = mask((3, 5, 8))
    assert whole.shape == (3, 3, 9, 16)  # q k v, rows, length, width
    assert torch.equal(mask((8, 3)), whole[:, [2, 0]])
    assert torch.equal(mask((3, 5, 8), length=4), whole[:, :, :4])
    others = [mask((3,), seed=1), mask((3,), step=8), mask((3,), tower="text"), mask((3,), block=0), mask((4,))]
    assert all(not torch.equal(other, whole[:, :1]) for other in others)
    assert not torch.equal(whole[0], whole[1])
    assert (~mask(tuple(range(200)))).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_dropout_is_of_the_adapters_input_and_only_in_training(vit):
    """Embeddings with gradient differ by rows and steps; without one they are those of no dropout at all."""
    moved(attached(vit, dropout=0.25))
    x, tokens = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)), vit.tokenize(NAMES)
    rows = Rows(0, (0, 1, 2, 3))
    u, t = vit.encode_image(x, rows=rows), vit.encode_text(tokens, Rows(0, (0, 1, 2)))
    assert torch.equal(vit.encode_image(x, rows=rows), u)
    torch.testing.assert_close(vit.encode_image(x[2:], rows=Rows(0, (2, 3))), u[2:], atol=1e-6, rtol=0)
    torch.testing.assert_close(vit.encode_text(tokens[1:], Rows(0, (1, 2))), t[1:], atol=1e-6, rtol=0)
    assert not torch.allclose(vit.encode_image(x, rows=Rows(1, (0, 1, 2, 3))), u, atol=1e-3)
    with pytest.raises(ValueError, match="which images or classes"):
        vit.encode_image(x)
    with torch.no_grad():
        plain = vit.encode_image(x)
    assert not torch.allclose(plain, u, atol=1e-3)
    for module in adapters(vit).values():
        object.__setattr__(module.settings, "dropout", 0.0)
    torch.testing.assert_close(vit.encode_image(x), plain, atol=1e-6, rtol=0)


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
    attached(vit, rank=8)
    blocks = vit.model.visual.transformer.resblocks
    down = torch.stack([block.attn.down for block in blocks])  # (blocks, 3, rank, width)
    assert down.abs().max() <= 64**-0.5
    assert down.std().item() == pytest.approx((3 * 64) ** -0.5, rel=0.05)
    assert not any(block.attn.up.any() for block in blocks)
    starts = {
        tuple(Adapters(LoraSettings(), seed, vit.device).started(tower, block, (3, 2, 4)).flatten().tolist())
        for seed in (0, 1) for tower in ("image", "text") for block in (0, 1)
    }  # fmt: skip
    assert len(starts) == 8


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
    cli(*adapt, models["vit"], "--tuning", "lora", "--lora-rank", 0).fails(2, "lora_rank must be at least 1; found 0")
    with pytest.raises(UsageError, match="dropout"):
        LoraSettings(dropout=1.0)
    normed = open_clip.CLIP(32, VISION, {**TEXT, "qk_norm": True})
    with pytest.raises(ModelError, match="plain multi-head attention, but the text tower has Attention: use --tuning"):
        lora.attach(normed, Adapters(LoraSettings(), 0, torch.device("cpu")))
