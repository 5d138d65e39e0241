"""ATHA's edit of patch tokens against naive loops, and what it must never touch."""

from __future__ import annotations

import copy
import math

import oracles
import pytest
import torch
import torch.nn.functional as F

from clipfit.config.edits import EditSettings
from clipfit.errors import ModelError, UsageError
from clipfit.model import loading
from clipfit.model.edits import edit_tokens, ends, invert_head, share
from clipfit.model.image_tower import Head
from clipfit.model.named import Additions
from clipfit.prompts import prompts

NAMES = ["bee", "cow", "dog", "elk", "red fox"]
STRONG = EditSettings(head_ratio=0.25, tail_ratio=0.2, head_strength=0.7, head_block=0, tail_strength=0.3)


@pytest.fixture
def tokens():
    draw = torch.Generator().manual_seed(0)
    x, z = torch.randn(3, 10, 6, generator=draw), torch.randn(4, 6, generator=draw)
    x[0, 3] = x[0, 7]  # ties
    x[1] = x[1, :1]
    return x.double(), z.double()


@pytest.mark.parametrize(
    ("rho", "gamma"), [(0.3, 0.2), (0.5, 0.5), (0.0, 0.3), (0.3, 0.0), (0.05, 0.09), (1.0, 0.0), (0.0, 1.0)]
)
def test_an_edit_is_that_of_the_naive_loop(tokens, rho, gamma):
    x, z = tokens
    a, b = torch.tensor(0.8), torch.tensor(0.3)
    ours = edit_tokens(x.float(), z.float(), a, b, rho, gamma)
    torch.testing.assert_close(ours.double(), oracles.edited(x, z, 0.8, 0.3, rho, gamma), atol=1e-6, rtol=1e-6)
    assert (ours != x.float()).any(2).sum(1).tolist() == [
        math.floor(10 * rho + 1e-9) + math.floor(10 * gamma + 1e-9)
    ] * 3


def test_soft_edits_weigh_all_classes(tokens):
    x, z = tokens
    a, b, scale = torch.tensor(0.8), torch.tensor(0.3), torch.tensor(20.0)
    ours = edit_tokens(x.float(), z.float(), a, b, 0.1, 0.1, scale)
    torch.testing.assert_close(ours.double(), oracles.soft_edited(x, z, 0.8, 0.3, 20.0), atol=1e-6, rtol=1e-6)
    hard = edit_tokens(x.float(), z.float(), a, b, 0.1, 0.1)
    torch.testing.assert_close(edit_tokens(x.float(), z.float(), a, b, 0.1, 0.1, scale * 1e4)[0], hard[0])


def test_gradients_flow_through_added_tokens_and_strengths_alone(tokens):
    x, z = (t.float().requires_grad_() for t in tokens)
    a, b = torch.tensor(0.8, requires_grad=True), torch.tensor(0.3, requires_grad=True)
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    (edit_tokens(x, z, a, b, 0.2, 0.3) * cotangent).sum().backward()
    assert torch.equal(x.grad, cotangent)
    head, tail = ends(torch.nn.functional.cosine_similarity(x[:, :, None], z, dim=3).amax(2), 0.2, 0.3)
    similarity = torch.nn.functional.cosine_similarity(x[:, :, None], z, dim=3)
    expected = torch.zeros_like(z)
    for image, patch in head.nonzero().tolist():
        expected[similarity[image, patch].argmax()] += 0.8 * cotangent[image, patch]
    for image, patch in tail.nonzero().tolist():
        expected[similarity[image, patch].argmin()] -= 0.3 * cotangent[image, patch]
    torch.testing.assert_close(z.grad, expected)
    assert a.grad != 0
    assert b.grad != 0


def test_shares_are_not_lost_to_rounding():
    assert [share(100, 0.29), share(50, 0.1), share(49, 0.1), share(16, 0.05), share(10, 1.0)] == [29, 5, 4, 0, 10]


@pytest.mark.parametrize(("width", "embed"), [(48, 32), (32, 32), (24, 32)])
def test_class_tokens_invert_the_vision_head(width, embed):
    draw = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=draw)  # noqa: E731
    f, proj, weight, bias = normal(5, embed), normal(width, embed), 1 + 0.1 * normal(width), normal(width)
    z = invert_head(f, Head(proj, None, weight, bias))
    through = (z * weight + bias) @ proj
    y = torch.linalg.lstsq(proj.T.double(), f.T.double(), driver="gelsd").solution.T
    torch.testing.assert_close((z * weight + bias).double(), y, atol=2e-4, rtol=1e-3)
    if embed <= width:
        torch.testing.assert_close(through, f, atol=1e-4, rtol=1e-4)
    for tensor in (f, proj, weight, bias):
        tensor.requires_grad_(True)
    invert_head(f, Head(proj, None, weight, bias)).square().sum().backward()
    assert f.grad is not None
    assert proj.grad is weight.grad is bias.grad is None
    transposed = invert_head(f, Head(proj, None, weight, bias), "transpose")
    torch.testing.assert_close(transposed, (f @ proj.T - bias) / weight)


def test_the_blocks_default_to_the_papers_places():
    placed = EditSettings().placed(12, 12)
    assert (placed.head_block, placed.text_block) == (7, 10)
    placed = EditSettings().placed(6, 4)
    assert (placed.head_block, placed.text_block) == (3, 2)
    assert EditSettings(head_block=0, text_block=0).placed(6, 4).head_block == 0


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"head_block": 6}, "head_block must lie between 0 and 5"),
        ({"head_block": -1}, "head_block must be at least 0"),
        ({"text_block": 4}, "text_block must lie between 0 and 3"),
    ],
    ids=["deep", "negative", "text"],
)
def test_a_block_that_is_not_there(wrong, words):
    with pytest.raises(UsageError, match=words):
        EditSettings(**wrong).placed(6, 4)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"head_ratio": 0.6, "tail_ratio": 0.5}, "must not exceed 1 together"),
        ({"tail_ratio": -0.1}, "tail_ratio must lie between 0 and 1"),
    ],
)
def test_ratios_that_make_no_sense(wrong, words):
    with pytest.raises(UsageError, match=words):
        EditSettings(**wrong)


def test_an_unknown_inverse():
    with pytest.raises(UsageError, match="least-squares, transpose"):
        EditSettings(class_token_inverse="magic")


def test_only_a_vision_transformer_has_patch_tokens(models):
    with pytest.raises(
        ModelError, match="a ModifiedResNet, which has no sequence of patch tokens of one width: take a"
    ):
        loading.load(models["resnet"]).with_additions(Additions(EditSettings()))


def started(backbone):
    """The model with strong edits in effect."""
    edited = backbone.with_additions(Additions(STRONG))
    edited.edits.start()
    return edited


def images_and_texts(backbone):
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return x, backbone.tokenize(prompts(NAMES, "a photo of a {}"))


@pytest.mark.parametrize("name", ["vit", "eos", "bidirectional", "quick"])
def test_attached_but_not_started_nothing_changes_to_the_bit(models, name):
    backbone = loading.load(models[name])
    x, tokens = images_and_texts(backbone)
    with torch.no_grad():
        before = backbone.encode(x, tokens)
        backbone = backbone.with_additions(Additions(STRONG))
        after = backbone.encode(x, tokens)
        assert all(map(torch.equal, before, after))
        backbone.edits.start()
        assert not torch.allclose(backbone.encode(x, tokens)[0], before[0], atol=1e-3)


@pytest.mark.parametrize("name", ["vit", "eos", "bidirectional"])
def test_the_whole_forward_pass_is_that_of_a_naive_one(models, name):
    """open_clip's modules, called one by one in float64, with the naive edit before every block."""
    backbone = loading.load(models[name])
    x, tokens = images_and_texts(backbone)
    backbone = started(backbone)
    with torch.no_grad():
        u, t = backbone.encode(x, tokens)

        m = copy.deepcopy(backbone.model).double()
        expected = oracles.edited_features(m, x.double(), tokens, STRONG, STRONG.placed(2, 2).text_block)
        expected_t = m.encode_text(tokens, normalize=True)
    torch.testing.assert_close(u.double(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(t.double(), expected_t, atol=1e-5, rtol=0)


def test_the_class_token_is_never_touched_and_no_token_comes_or_goes(vit):
    x, tokens = images_and_texts(vit)
    vit = started(vit)
    came: list[torch.Tensor] = []  # before the edit
    went: list[torch.Tensor] = []  # after it
    blocks = vit.model.visual.transformer.resblocks
    for block in blocks:
        block.register_forward_pre_hook(lambda _module, args: came.append(args[0].clone()))
    texts = vit.read(tokens)
    for block in blocks:
        block.ln_1.register_forward_pre_hook(lambda _module, args: went.append(args[0].clone()))
    with torch.no_grad():
        vit.encode_image(x, texts.class_tokens)
    assert len(came) == len(went) == 2
    for before, after, edited in zip(came, went, (4 + 3, 3), strict=True):  # 25% and 20% of 16; a is 0 in the second
        assert before.shape == after.shape == (4, 17, 64)
        assert torch.equal(before[:, 0], after[:, 0])
        assert (before != after).any(2).sum(1).tolist() == [edited] * 4


def test_under_bf16_the_stream_is_float32_from_the_first_edited_block_on(vit):
    """An edit of b = 0.01 added to a bf16 stream would lose many of its coordinates, now or in the next block."""
    x, tokens = images_and_texts(vit)
    edited = started(vit)
    edited.precision = "bf16"
    went: list[torch.Tensor] = []
    for block in edited.model.visual.transformer.resblocks:
        block.register_forward_hook(lambda _module, _args, out: went.append(out))
        block.ln_1.register_forward_pre_hook(lambda _module, args: went.append(args[0]))
    with torch.no_grad():
        edited.encode(x, tokens)
    assert len(went) == 4
    assert all(h.dtype == torch.float32 and not torch.equal(h, h.bfloat16().float()) for h in went)


def test_without_effect_it_is_plain_clip_to_the_bit_under_bf16_too(vit):
    x, tokens = images_and_texts(vit)
    edited = vit.with_additions(Additions(STRONG))
    vit.precision = edited.precision = "bf16"
    with torch.no_grad():
        assert all(map(torch.equal, vit.encode(x, tokens), edited.encode(x, tokens)))


def test_hooks_are_gone_after_a_forward_pass(vit):
    x, tokens = images_and_texts(vit)
    vit = started(vit)
    vit.encode(x, tokens)
    assert all(not block._forward_pre_hooks for block in vit.model.visual.transformer.resblocks)


def test_images_without_their_candidates_are_refused(vit):
    x, tokens = images_and_texts(vit)
    z = torch.zeros(2, 64)
    with pytest.raises(ValueError, match="class tokens"):
        vit.encode_image(x, z)
    vit = vit.with_additions(Additions(STRONG))
    with pytest.raises(ValueError, match="class tokens"):
        vit.encode_image(x)
    assert vit.read(tokens).class_tokens.shape == (5, 64)


def test_permuting_the_classes_permutes_nothing_else(vit):
    x, tokens = images_and_texts(vit)
    vit = started(vit)
    order = torch.tensor([3, 0, 4, 1, 2])
    with torch.no_grad():
        u, t = vit.encode(x, tokens)
        other_u, other_t = vit.encode(x, tokens[order])
    torch.testing.assert_close(other_u, u, atol=1e-6, rtol=0)
    torch.testing.assert_close(other_t, t[order], atol=1e-6, rtol=0)


def test_features_depend_on_the_candidates(vit):
    x, tokens = images_and_texts(vit)
    vit = started(vit)
    with torch.no_grad():
        assert not torch.allclose(vit.encode(x, tokens)[0], vit.encode(x, tokens[:2])[0], atol=1e-3)


def test_strengths_have_the_gradient_of_finite_differences(vit):
    x, tokens = images_and_texts(vit)
    vit = started(vit)
    edits = vit.edits
    target = torch.tensor([0, 1, 2, 3])

    def loss() -> torch.Tensor:
        u, t = vit.encode(x, tokens)
        return F.cross_entropy(20 * u @ t.T, target)

    loss().backward()
    for strengths in (edits.head, edits.tail):
        for block in range(2):
            step, values = 1e-2, []
            for sign in (1, -1):
                with torch.no_grad():
                    strengths[block] += sign * step
                    values.append(loss().item())
                    strengths[block] -= sign * step
            assert strengths.grad[block].item() == pytest.approx(
                (values[0] - values[1]) / (2 * step), rel=0.05, abs=2e-4
            )
            assert strengths.grad[block] != 0
