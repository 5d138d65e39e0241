"""Methods that edit patch tokens: their gradients, their runs, and the candidates that every figure depends on."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import terms_of
from PIL import Image
from safetensors.torch import load_file

from clipfit import AdaptConfig, EvaluateConfig, adapt, evaluate
from clipfit.errors import ModelError
from clipfit.measure import scoring
from clipfit.methods import METHODS, Task
from clipfit.model import edits as token_edits
from clipfit.model import loading
from clipfit.model.clip import Clip
from clipfit.model.named import Additions
from clipfit.prompts import prompts
from clipfit.runs.run import open_run

EDITED = [name for name, method in METHODS.items() if method.edits(method.configure({})) is not None]
NAMES = ["bee", "cow", "dog", "elk"]
# visible at once, and patches of every kind among the 16 of the little model
OPTIONS = {"head_ratio": 0.25, "tail_ratio": 0.25, "head_strength": 0.9, "tail_strength": 0.4, "strength_rate": 0.05}


def objective_of(clip, method, **options):
    """The objective; its `clip` is the given model with the method's edits."""
    configured = METHODS[method].configure({**OPTIONS, **options})
    edited = clip.with_additions(Additions(METHODS[method].edits(configured)))
    return METHODS[method].build(Task(edited, clip.tokenize(prompts(NAMES, "a photo of a {}"))), configured)


def batch(labels=(0, 1, 1, 3)):
    return torch.randn(len(labels), 3, 32, 32, generator=torch.Generator().manual_seed(1)), torch.tensor(labels)


def text_gradient(backbone, loss) -> float:
    parameters = [p for n, p in backbone.model.named_parameters() if not n.startswith("visual.") and p.requires_grad]
    found = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
    return sum(float(g.norm()) for g in found if g is not None)


def test_these_are_the_methods_that_edit():
    assert EDITED == ["atha", "cite+atha"]


def test_atha_is_cross_entropy_over_all_classes_of_edited_images(vit):
    objective = objective_of(vit, "atha")
    images, labels = batch()
    value = terms_of(objective, images, labels)["ce"].value
    u, t = objective.clip.encode(images, objective.tokens)
    expected = -(vit.scale * u @ t.T).log_softmax(1)[torch.arange(4), labels].mean()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    scaled = terms_of(objective_of(vit, "atha", logit_scale=4.0), images, labels)["ce"].value
    assert scaled.item() == pytest.approx((-(4 * u @ t.T).log_softmax(1)[torch.arange(4), labels].mean()).item())


def test_the_strengths_have_a_rate_of_their_own(vit):
    objective = objective_of(vit, "atha")
    (group,), edits = objective.groups, objective.clip.edits
    assert group.parameters == {"clipfit.head": edits.head, "clipfit.tail": edits.tail}
    assert group.learning_rate == 0.05
    assert (group.weight_decay, group.momentum) == (0.0, None)  # AdamW
    assert METHODS["atha"].configure({}).strength_rate == 1e-3
    assert edits.head.tolist() == pytest.approx([0, 0.9])  # ⌊7·2/12⌋ = 1
    assert edits.tail.tolist() == pytest.approx([0.4, 0.4])


def test_dva_sends_no_gradient_to_the_text_tower(vit):
    objective = objective_of(vit, "cite+atha")
    terms = terms_of(objective, *batch())
    assert text_gradient(vit, terms["dva"].value) == 0
    assert text_gradient(vit, terms["scl"].value) > 0
    strengths = list(objective.clip.edits.parameters())
    assert all(g.abs().sum() > 0 for g in torch.autograd.grad(terms["dva"].value, strengths))


def test_cite_on_edited_images_has_its_three_losses(vit):
    """The value of each from losses written out, the teacher being plain CLIP."""
    plain = vit.with_additions(Additions(), copied=True)
    objective = objective_of(vit, "cite+atha")
    images, labels = batch((0, 1, 2, 3))
    terms = {name: term.value.item() for name, term in terms_of(objective, images, labels).items()}
    with torch.no_grad():
        u, t = objective.clip.encode(images, objective.tokens)
        teacher_u, teacher_t = plain.encode(images, objective.tokens)
        s, p = vit.scale * u @ t.T, (vit.scale * teacher_u @ teacher_t.T).log_softmax(1)
        at = torch.arange(4)
        dva = -(vit.scale * u @ teacher_t.T).log_softmax(1)[at, labels].mean()
        scl = -(s.log_softmax(1)[at, labels] + s.log_softmax(0)[at, labels]).mean()
        vld = (s.softmax(1) * (s.log_softmax(1) - p)).sum(1).mean()
    assert terms == pytest.approx({"dva": dva.item(), "scl": scl.item(), "vld": vld.item()}, rel=1e-4)
    assert terms["vld"] > 1e-4  # not 0 at the first step: the strengths start above 0


@pytest.fixture(params=EDITED)
def edited_run(request, split, models, tmp_path):
    config = AdaptConfig(
        split, request.param, models["vit"], alpha=0.25, output=tmp_path / "run", method_options=OPTIONS
    )
    return adapt(config).run


def test_strengths_are_trained_stored_and_interpolated_towards_zero(edited_run, models):
    finetuned, ensemble = (load_file(edited_run / f"{name}.safetensors") for name in ("finetuned", "model"))
    before = loading.load(models["vit"]).state()
    assert finetuned.keys() - before.keys() == {"clipfit.head", "clipfit.tail"}
    assert finetuned["clipfit.head"][0] != 0  # 0 when training began
    for name in ("clipfit.head", "clipfit.tail"):
        torch.testing.assert_close(ensemble[name], 0.25 * finetuned[name])
    assert json.loads((edited_run / "config.json").read_text())["edits"] == {
        "head_ratio": 0.25, "tail_ratio": 0.25, "head_strength": 0.9, "head_block": 1, "tail_strength": 0.4,
        "text_block": 0, "class_token_inverse": "least-squares", "soft_edits": False,
    }  # fmt: skip


def test_every_set_of_classes_has_a_forward_pass_of_its_own(edited_run, split):
    """Right answers, image by image, each compared with the classes of one figure and no others."""
    run = open_run(edited_run)
    measured = evaluate(EvaluateConfig(edited_run, alphas=(0.0, 0.25, 1.0)))
    names = {"Ant-Lion": "Ant Lion", "cow": "cow", "dog": "dog", "elk": "elk"}
    for row in measured.rows:
        model = loading.rebuild(run.source, run.state(row.alpha), run.additions)
        for part, classes, own in (
            (row.base, ["bee", "cow", "dog"], ["cow", "dog"]),
            (row.new, ["Ant Lion", "elk"], ["Ant-Lion", "elk"]),
            (row.union, ["bee", "cow", "dog", "Ant Lion", "elk"], list(names)),
        ):
            tokens = model.tokenize(prompts(classes, "a photo of a {}"))
            right = 0
            for folder in own:
                for file in (split / "test" / folder).iterdir():
                    x = model.normalize(model.geometry(Image.open(file).convert("RGB"))[None])
                    with torch.no_grad():
                        u, t = model.encode(x, tokens)
                    right += classes[int((u @ t.T).argmax())] == names[folder]
            assert part.right == right


def test_images_are_encoded_with_the_tokens_of_exactly_their_candidates(edited_run, monkeypatch):
    """Right answers alone hardly tell: of each figure, the class tokens that its images are encoded with."""
    run, seen = open_run(edited_run), []
    usual = Clip.encode_image

    def watched(self, images, class_tokens=None):
        seen.append((class_tokens, len(images)))
        return usual(self, images, class_tokens)

    monkeypatch.setattr(Clip, "encode_image", watched)
    evaluate(EvaluateConfig(edited_run, alphas=(0.0,)))
    model = loading.rebuild(run.source, run.state(0.0), run.additions)
    expected = []
    for classes, images in (
        (["bee", "cow", "dog", "Ant Lion", "elk"], 9), (["Ant Lion", "elk"], 4), (["bee", "cow", "dog"], 5)
    ):  # fmt: skip
        with torch.no_grad():
            expected.append((model.read(model.tokenize(prompts(classes, "a photo of a {}"))).class_tokens, images))
    assert [n for _, n in seen] == [n for _, n in expected]
    for (found, _), (z, _) in zip(seen, expected, strict=True):
        torch.testing.assert_close(found, z)


def test_edits_are_float32_under_bf16(split, models, tmp_path, monkeypatch):
    """A ranking in bf16 would be one of ties; evaluate measures in the precision that is asked for."""
    ranked, precisions = [], []
    similarities, texts = token_edits.similarities, scoring.texts

    def watched(x, z):
        ranked.append(similarities(x, z))
        return ranked[-1]

    monkeypatch.setattr(token_edits, "similarities", watched)
    monkeypatch.setattr(
        scoring, "texts", lambda model, *rest: precisions.append(model.precision) or texts(model, *rest)
    )
    config = AdaptConfig(split, "atha", models["vit"], precision="bf16", output=tmp_path / "run", recipe={"epochs": 1})
    run = adapt(config).run
    assert ranked
    assert {s.dtype for s in ranked} == {torch.float32}
    assert not any(torch.equal(s, s.bfloat16().float()) for s in ranked)
    precisions.clear()
    evaluate(EvaluateConfig(run, precision="bf16"))
    assert set(precisions) == {"bf16"}


def test_alpha_zero_is_plain_clip_to_the_bit(edited_run, models):
    run, plain = open_run(edited_run), loading.load(models["vit"])
    model = loading.rebuild(run.source, run.state(0.0), run.additions)
    x, tokens = batch()[0], plain.tokenize(prompts(NAMES, "a photo of a {}"))
    with torch.no_grad():
        assert all(map(torch.equal, model.encode(x, tokens), plain.encode(x, tokens)))


def test_a_plain_clip_cannot_hold_an_edited_one(cli, edited_run, models):
    cli("export", edited_run).fails(2, "edits of patch tokens", "--alpha 0")
    exported = cli("export", edited_run, "--alpha", 0, "--json")
    assert exported.code == 0, exported.stderr
    written = load_file(f"{exported.document['output']}/open_clip_model.safetensors")
    before = loading.load(models["vit"]).state()
    assert written.keys() == before.keys()
    assert all(torch.equal(written[name], before[name]) for name in before)
    run = open_run(edited_run)
    with pytest.raises(ModelError, match="do not fit"):
        loading.rebuild(run.source, run.state(1.0))


def test_what_it_cannot_do_is_said_in_one_sentence(cli, models, split):
    cli("adapt", split, "--method", "atha", "--model", models["resnet"]).fails(
        4, "ModifiedResNet", "take a model such as ViT-B-16"
    )
    cli("adapt", split, "--method", "atha", "--model", models["vit"], "--head-block", 2).fails(2, "between 0 and 1")
    cli("adapt", split, "--method", "atha", "--model", models["vit"], "--head-ratio", 0.95).fails(2, "exceed 1")
    cli("adapt", split, "--method", "finetune", "--model", models["vit"], "--head-ratio", 0.5).fails(2, "head_ratio")
    cli("adapt", split, "--method", "atha", "--model", models["vit"], "--strength-rate", 0).fails(2, "strength_rate")


def test_options_reach_the_method(cli, models, split, tmp_path):
    made = cli(
        "adapt", split, "--method", "atha", "--model", models["vit"], "--head-ratio", 0.3, "--tail-ratio", 0.2,
        "--head-strength", 0.6, "--head-block", 0, "--tail-strength", 0, "--text-block", 1, "--soft-edits",
        "--class-token-inverse", "transpose", "--strength-rate", 0.01, "--logit-scale", 4, "--json",
    )  # fmt: skip
    assert made.code == 0, made.stderr
    options = json.loads((tmp_path / made.document["run"] / "config.json").read_text())["method_options"]
    assert options == {
        "head_ratio": 0.3, "tail_ratio": 0.2, "head_strength": 0.6, "head_block": 0, "tail_strength": 0.0,
        "text_block": 1, "class_token_inverse": "transpose", "soft_edits": True, "strength_rate": 0.01,
        "logit_scale": 4.0,
    }  # fmt: skip
