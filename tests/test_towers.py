"""Every family of two-tower models of open_clip: encoded, trimmed, edited and adapted as its layers allow."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from pathlib import Path

import oracles
import pytest
import torch
import torch.nn.functional as F
from conftest import task_of, terms_of
from families import ADAPTED, EDITED, FAMILIES, TRIMMED, make_family, plain

from clipfit.config.edits import EditSettings
from clipfit.config.lora import LoraSettings
from clipfit.errors import ModelError
from clipfit.model import loading, lora, text_tower
from clipfit.model.clip import Clip
from clipfit.model.image_tower import lacks_patches
from clipfit.model.lora import Adapters
from clipfit.model.named import Additions
from clipfit.prompts import prompts

NAMES = ["bee", "a much longer class name", "dog"]
STRONG = EditSettings(head_strength=3.0, tail_strength=1.0, head_ratio=0.3, tail_ratio=0.2, head_block=0, text_block=0)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("families")
    return {name: make_family(name, root) for name in FAMILIES}


def inputs(clip: Clip) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(4, 3, *clip.image_size, generator=torch.Generator().manual_seed(0))
    return x, clip.tokenize(prompts(NAMES, "a photo of a {}"))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_features_and_logits_are_those_of_open_clip(folders, name):
    clip = loading.load(folders[name])
    model, tokenizer = plain(folders[name])
    x, tokens = inputs(clip)
    assert torch.equal(tokenizer(prompts(NAMES, "a photo of a {}")), tokens)
    u, t = clip.encode(x, tokens)
    torch.testing.assert_close(u, model.encode_image(x, normalize=True), atol=1e-6, rtol=0)
    torch.testing.assert_close(t, model.encode_text(tokens, normalize=True), atol=2e-6, rtol=0)
    torch.testing.assert_close(clip.logits(u, t), model.get_logits(x, tokens)[0], atol=1e-4, rtol=0)
    assert (u[0] - u[1]).abs().max() > 1e-3
    assert (t[0] - t[1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_are_cut_where_that_is_exact_and_nowhere_else(folders, name):
    clip = loading.load(folders[name])
    tokens = inputs(clip)[1]
    cut = text_tower.cut(clip.model, tokens)
    assert (cut.shape[1] < tokens.shape[1]) == text_tower.trims(clip.model) == (name in TRIMMED)


def test_a_logit_bias_is_kept_frozen_and_counts_in_logits_alone(folders):
    clip = loading.load(folders["siglip"])
    assert clip.bias == -10
    assert not clip.model.logit_bias.requires_grad
    u, t = (F.normalize(torch.randn(n, 64, generator=torch.Generator().manual_seed(n)), dim=1) for n in (2, 3))
    torch.testing.assert_close(clip.logits(u, t), clip.scale * u @ t.T - 10)
    torch.testing.assert_close(clip.logits(u, t).softmax(1), (clip.scale * u @ t.T).softmax(1))
    assert loading.load(folders["pe"]).bias is None


def test_nothing_is_drawn_and_no_statistic_moves_in_training(folders):
    """Stochastic depth and dropout stay off, batch-norm statistics as pre-trained, for timm's towers as for others."""
    clip = loading.load(folders["mobileclip-s"])
    buffers = {name: b.clone() for name, b in clip.model.named_buffers()}
    x, tokens = inputs(clip)
    first, again = (clip.encode(x, tokens)[0] for _ in range(2))
    first.sum().backward()
    assert torch.equal(first, again)
    assert not any(module.training for module in clip.model.modules())
    assert all(torch.equal(b, buffers[name]) for name, b in clip.model.named_buffers())


# ---- CITE


@pytest.mark.parametrize("name", ["siglip", "pe", "mobileclip-s", "convnext"])
def test_cite_is_its_equations_in_value_and_gradient(folders, name, monkeypatch):
    """As for CLIP: against naive loops in float64 over a full-length text for every image."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    clip = loading.load(folders[name])
    clip.model.double()
    task, objective = task_of(clip, NAMES, "cite")
    _shift(clip)
    labels = [0, 2, 2, 0]
    x = inputs(clip)[0].double()
    found = terms_of(objective, x, torch.tensor(labels))
    u = clip.model.encode_image(x, normalize=True)
    t = [clip.model.encode_text(task.tokens[[y]], normalize=True)[0] for y in labels]
    with torch.no_grad():
        start = loading.load(folders[name])
        start.model.double()
        teacher_u = start.model.encode_image(x, normalize=True)
        teacher_t = [start.model.encode_text(task.tokens[[y]], normalize=True)[0] for y in labels]
    scale = float(clip.scale)
    expected = {
        "dva": oracles.dva(u, objective.classifier, labels, scale),
        "scl": oracles.scl(u, t, labels, scale, False),
        "vld": oracles.vld(u, t, teacher_u, teacher_t, scale),
    }
    parameters = [p for p in clip.model.parameters() if p.requires_grad]
    for term, value in expected.items():
        torch.testing.assert_close(found[term].value, value, atol=1e-9, rtol=1e-7)
        pairs = zip(_gradient(found[term].value, parameters), _gradient(value, parameters), strict=True)
        assert max((a - b).abs().max() for a, b in pairs) < 1e-7, term


def _shift(clip: Clip) -> None:
    draw = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for p in clip.model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=draw, dtype=p.dtype))


def _gradient(value: torch.Tensor, parameters: list[torch.nn.Parameter]) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)


# ---- ATHA


def edited_features(model, images, tokens, settings: EditSettings) -> torch.Tensor:
    """ATHA's forward pass through a timm tower, by nothing but its own modules and the naive edit."""
    text, trunk = model.text, model.visual.trunk
    h = text.token_embedding(tokens) + text.positional_embedding
    for block in text.transformer.resblocks[: settings.text_block + 1]:
        h = block(h, attn_mask=text.attn_mask)
    f = text.ln_final(h)[torch.arange(len(h)), tokens.argmax(1)] @ text.text_projection
    linear = trunk.head if isinstance(trunk.head, torch.nn.Linear) else model.visual.head[-1]
    norm = trunk.norm if isinstance(trunk.norm, torch.nn.LayerNorm) else trunk.fc_norm
    f = f if linear.bias is None else f - linear.bias
    z = (torch.linalg.lstsq(linear.weight, f.T, driver="gelsd").solution.T - norm.bias) / norm.weight
    prefix, numbers = trunk.num_prefix_tokens, itertools.count()

    def before(block, args):
        x, number = args[0], next(numbers)
        a = settings.head_strength if number == settings.head_block else 0.0
        patches = oracles.edited(x[:, prefix:], z, a, settings.tail_strength, settings.head_ratio, settings.tail_ratio)
        return (torch.cat([x[:, :prefix], patches], 1), *args[1:])

    for block in trunk.blocks:
        block.register_forward_pre_hook(before)
    return F.normalize(model.visual(images), dim=1)


@pytest.mark.parametrize("name", EDITED)
def test_edits_are_those_of_a_naive_pass_in_value_and_gradient(folders, name, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    clip = loading.load(folders[name])
    clip.model.double()
    clip = clip.with_additions(Additions(STRONG))
    clip.edits.double()
    clip.edits.start()
    x, tokens = inputs(clip)
    x = x.double()
    expected = edited_features(copy.deepcopy(clip.model), x, tokens, STRONG)
    plain_u = clip.model.encode_image(x, normalize=True)
    u = clip.encode(x, tokens)[0]
    torch.testing.assert_close(u, expected, atol=1e-9, rtol=0)
    assert (u - plain_u).abs().max() > 1e-3

    def value(strength: float) -> torch.Tensor:
        with torch.no_grad():
            clip.edits.head[0] = strength
        return (clip.encode(x, tokens)[0] * torch.arange(32)).sum()

    (slope,) = torch.autograd.grad(value(3.0), [clip.edits.head])
    with torch.no_grad():
        step = (value(3.0 + 1e-6) - value(3.0 - 1e-6)) / 2e-6
    torch.testing.assert_close(slope[0], step, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_missing_for_edits_is_said(folders, name):
    clip = loading.load(folders[name])
    if name in EDITED:
        assert lacks_patches(clip.model) is None
        return
    words = "pools its patches by attention" if name in ADAPTED else "no sequence of patch tokens of one width"
    with pytest.raises(ModelError, match=f"{words}.*: take a model such as ViT-B-16, MobileCLIP-B"):
        clip.with_additions(Additions(EditSettings()))


# ---- LoRA


@pytest.mark.parametrize("name", ADAPTED)
@torch.no_grad()
def test_adapters_start_without_effect_and_merge_into_plain_weights(folders, name):
    clip = loading.load(folders[name])
    names, (x, tokens) = list(clip.state()), inputs(clip)
    before = clip.encode(x, tokens)
    lora.attach(clip.model, Adapters(LoraSettings(), 0, clip.device))
    for a, b in zip(clip.encode(x, tokens), before, strict=True):
        torch.testing.assert_close(a, b, atol=2e-6, rtol=0)
    draw = torch.Generator().manual_seed(1)
    low = [module for module in clip.model.modules() if isinstance(module, lora.LowRank)]
    assert sorted({(m.place.tower, m.place.block, part) for m in low for part in m.place.parts}) == sorted(
        itertools.product(("image", "text"), (0, 1), (0, 1, 2))
    )
    for module in low:
        module.up.copy_(0.2 * torch.randn(module.up.shape, generator=draw))
    unmerged = clip.encode(x, tokens)
    assert all((a - b).abs().max() > 1e-3 for a, b in zip(unmerged, before, strict=True))
    lora.merge(clip.model)
    assert list(clip.state()) == names
    for a, b in zip(clip.encode(x, tokens), unmerged, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


def test_layers_of_their_own_have_the_adapters_of_one_layer_of_three(folders):
    """EVA-02 has three layers where others have one: each has its own share of A, of the masks and of B."""
    clip = loading.load(folders["eva02"])
    lora.attach(clip.model, Adapters(LoraSettings(dropout=0.5), 0, clip.device))
    attn = clip.model.visual.trunk.blocks[0].attn
    whole = Adapters(LoraSettings(), 0, clip.device).started("image", 0, (3, LoraSettings().rank, 64))
    for part, layer in enumerate((attn.q_proj, attn.k_proj, attn.v_proj)):
        assert torch.equal(layer.down[0], whole[part])
        assert layer.place == lora.Place("image", 0, (part,))


# ---- whole commands


@pytest.mark.parametrize(("name", "method", "tuning"), [
    ("siglip", "cite", "full"), ("pe", "flyp", "lora"), ("vitamin", "cite+atha", "full"),
    ("mobileclip-s", "finetune", "full"), ("eva02", "atha", "lora"),
])  # fmt: skip
def test_adapt_evaluate_and_export(cli, folders, split, name, method, tuning):
    made = cli("adapt", split, "--model", folders[name], "--method", method, "--tuning", tuning, "--json").document
    rows = cli("evaluate", made["run"], "--json").document["alphas"]
    assert [row["alpha"] for row in rows] == [0.0, 0.5]
    alpha = 0 if "atha" in method else 0.5
    exported = cli("export", made["run"], "--alpha", alpha, "--json").document
    assert exported["proof"]["identical_pixels"]["largest_difference"] < 1e-3
    model, _ = plain(f"local-dir:{Path(exported['output']).absolute()}")
    assert (model.logit_bias is not None) == (name == "siglip")


def test_a_model_of_a_family_is_the_same_after_export(cli, folders, split):
    """What adapts on from an export starts where plain open_clip stands: the architecture is recorded whole."""
    made = cli("adapt", split, "--model", folders["siglip"], "--json").document
    output = Path(cli("export", made["run"], "--json").document["output"]).absolute()
    again, model = loading.load(str(output)), plain(f"local-dir:{output}")[0]
    x, tokens = inputs(again)
    with torch.no_grad():
        torch.testing.assert_close(
            again.logits(*again.encode(x, tokens)), model.get_logits(x, tokens)[0], atol=1e-4, rtol=0
        )
    assert replace(again.source, model="", sha256="", pretrained=None).model_cfg["init_logit_bias"] == -10
