"""The methods' objectives through the real encoders, against the equations with a text for every image."""

from __future__ import annotations

import copy
from dataclasses import replace

import oracles
import pytest
import torch
import torch.nn.functional as F
from conftest import task_of, terms_of
from open_clip.loss import ClipLoss
from test_losses import BATCHES as DENSE

from clipfit.methods import METHODS, Task
from clipfit.model import loading
from clipfit.model.named import Additions
from clipfit.prompts import prompts

# as there, but with gaps: which classes are in a batch is not how many
BATCHES = {name: [[4, 1, 3, 0, 2][c] for c in labels] for name, labels in DENSE.items()}
NAMES = ["cat", "a much longer class name", "dog", "owl", "red fish"]


def task_in_double(model: str) -> Task:
    backbone = loading.load(model)
    backbone.model.double()
    return Task(backbone, backbone.tokenize(prompts(NAMES, "a photo of a {}")))


def batch(task: Task, labels: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.rand(
        len(labels), 3, *task.clip.image_size, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return noise * 4 - 2, torch.tensor(labels)


def perturb(parameters, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in parameters:
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=generator, dtype=p.dtype))


def total(terms) -> torch.Tensor:
    return sum(term.weight * term.value for term in terms.values())


def gradients(value: torch.Tensor, parameters) -> torch.Tensor:
    parts = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True, materialize_grads=True)
    return torch.cat([part.flatten() for part in parts])


def extra(objective):
    return [p for group in objective.groups for p in group.parameters.values()]


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("literal", [False, True], ids=["default", "literal"])
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)
def test_cite_is_its_equations_with_a_text_for_every_image(models, labels, literal):
    """Value and the gradient by every weight: texts once a class and cut short, against B full-length texts."""
    task = task_in_double(models["vit"])
    objective = METHODS["cite"].build(task, METHODS["cite"].configure({"literal_scl": literal}))
    model, teacher = task.clip.model, copy.deepcopy(task.clip.model)
    perturb(model.parameters())  # away from the first step, where L_VLD is flat
    perturb([objective.classifier], seed=3)
    images, y = batch(task, labels)

    u = model.encode_image(images, normalize=True)
    texts = model.encode_text(task.tokens[y], normalize=True)
    with torch.no_grad():
        teacher_u, teacher_texts = (
            teacher.encode_image(images, normalize=True),
            teacher.encode_text(task.tokens[y], normalize=True),
        )
    scale = teacher.logit_scale.exp().item()
    dva = oracles.dva(u, objective.classifier, labels, scale)
    scl = oracles.scl(u, texts, labels, scale, literal)
    vld = oracles.vld(u, texts, teacher_u, teacher_texts, scale)
    naive = dva + 0.7 * scl + 0.1 * vld

    terms = terms_of(objective, images, y)
    assert {name: term.value.item() for name, term in terms.items()} == pytest.approx(
        {"dva": dva.item(), "scl": scl.item(), "vld": vld.item()}, rel=1e-9
    )
    parameters = [*(p for p in model.parameters() if p.requires_grad), *extra(objective)]
    ours, expected = gradients(total(terms), parameters), gradients(naive, parameters)
    assert ((ours - expected).norm() / expected.norm()).item() <= 1e-9


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("literal", [False, True], ids=["default", "literal"])
def test_a_batch_of_one_class_moves_by_dva_alone(models, literal):
    task = task_in_double(models["vit"])
    objective = METHODS["cite"].build(task, METHODS["cite"].configure({"literal_scl": literal}))
    perturb(task.clip.model.parameters())
    terms = terms_of(objective, *batch(task, [2, 2, 2]))
    parameters = [*(p for p in task.clip.model.parameters() if p.requires_grad), *extra(objective)]
    assert terms["scl"].value.item() == 0
    assert terms["vld"].value.item() == 0
    expected = gradients(terms["dva"].value, parameters)
    assert expected.norm() > 0
    assert (gradients(total(terms), parameters) - expected).norm() <= 1e-12 * expected.norm()


def test_cite_in_float32_agrees_too(vit):
    """The encoders as they are used, without any patch: ‖g − g′‖ / ‖g‖ ≤ 1e-5."""
    labels, pretrained = BATCHES["repeated"], copy.deepcopy(vit.model)
    task = Task(vit, vit.tokenize(prompts(NAMES, "a photo of a {}")))
    objective = METHODS["cite"].build(task, METHODS["cite"].configure({}))
    perturb(vit.model.parameters())
    images, y = batch(task, labels)
    images = images.float()
    parameters = [*(p for p in vit.model.parameters() if p.requires_grad), *extra(objective)]
    ours = gradients(total(terms_of(objective, images, y)), parameters)

    double = copy.deepcopy(vit.model).double()
    classifier = objective.classifier.detach().double().requires_grad_()
    teacher = objective.teacher.visual.double()
    before = pretrained.double()
    u, texts = double.encode_image(images.double(), normalize=True), double.encode_text(task.tokens[y], normalize=True)
    with torch.no_grad():
        teacher_u = F.normalize(teacher(images.double()), dim=1)
        teacher_t = before.encode_text(task.tokens[y], normalize=True)
    s = double.logit_scale.exp().detach()
    similarity = s * u @ texts.T
    other = y[:, None] != y[None, :]
    positive = similarity.diagonal()
    negatives = similarity.masked_fill(~other, -torch.inf)
    scl = (F.softplus(negatives.logsumexp(1) - positive) + F.softplus(negatives.logsumexp(0) - positive)).mean()
    p, q = similarity.log_softmax(1), (s * teacher_u @ teacher_t.T).log_softmax(1)
    vld = (p.exp() * (p - q)).sum(1).mean()
    dva = F.cross_entropy(s * u @ F.normalize(classifier, dim=1).T, y)
    expected = gradients(
        dva + 0.7 * scl + 0.1 * vld, [*(p for p in double.parameters() if p.requires_grad), classifier]
    )
    assert ((ours - expected).norm() / expected.norm()).item() <= 1e-5


@pytest.mark.parametrize("name", ["vit", "resnet"])
def test_cite_starts_at_the_zero_shot_cross_entropy_and_without_distillation(models, name):
    backbone = loading.load(models[name])
    task = Task(backbone, backbone.tokenize(prompts(NAMES, "a photo of a {}")))
    images, y = batch(task, BATCHES["repeated"])
    images = images.float()
    terms = terms_of(METHODS["cite"].build(task, METHODS["cite"].configure({})), images, y)
    with torch.no_grad():
        logits = backbone.model.get_logits(images, task.tokens)[0]
    assert terms["dva"].value.item() == pytest.approx(F.cross_entropy(logits, y).item(), rel=1e-5)
    assert terms["vld"].value.item() == pytest.approx(0, abs=1e-6)
    assert {name: term.weight for name, term in terms.items()} == {"dva": 1.0, "scl": 0.7, "vld": 0.1}


@pytest.mark.parametrize("method", ["cite", "cite+atha"])
def test_each_loss_has_the_weight_that_is_asked_for(vit, method):
    weights = {"dva": 0.25, "scl": 0.5, "vld": 0.0}
    _, objective = task_of(vit, NAMES, method, **{f"{name}_weight": value for name, value in weights.items()})
    terms = terms_of(objective, torch.rand(2, 3, 32, 32), torch.tensor([0, 1]))
    assert {name: term.weight for name, term in terms.items()} == weights


def test_dva_sends_no_gradient_into_the_text_tower(vit):
    task = Task(vit, vit.tokenize(prompts(NAMES, "a photo of a {}")))
    objective = METHODS["cite"].build(task, METHODS["cite"].configure({"scl_weight": 0.0, "vld_weight": 0.0}))
    images, y = batch(task, [0, 1, 2])
    terms_of(objective, images.float(), y)["dva"].value.backward()
    assert vit.model.visual.conv1.weight.grad.norm() > 0
    assert objective.classifier.grad.norm() > 0
    text = [p for n, p in vit.model.named_parameters() if not n.startswith("visual.") and n != "logit_scale"]
    assert all(p.grad is None for p in text)


def test_the_teacher_is_not_the_student(vit):
    task = Task(vit, vit.tokenize(prompts(NAMES, "a photo of a {}")))
    objective = METHODS["cite"].build(task, METHODS["cite"].configure({}))
    images, y = batch(task, [0, 1, 2, 1])
    before = {name: p.clone() for name, p in objective.teacher.visual.named_parameters()}
    perturb(vit.model.parameters())
    total(terms := terms_of(objective, images.float(), y)).backward()
    assert terms["vld"].value.item() > 1e-4
    assert all(p.grad is None and torch.equal(p, before[n]) for n, p in objective.teacher.visual.named_parameters())


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)
def test_flyp_is_clips_loss_over_b_full_length_texts(models, labels):
    task = task_in_double(models["vit"])
    images, y = batch(task, labels)
    model = task.clip.model
    objective = METHODS["flyp"].build(task, METHODS["flyp"].configure({}))
    u, t, scale = model(images, task.tokens[y])[:3]
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = gradients(ClipLoss()(u, t, scale), parameters)
    ours = gradients(total(terms_of(objective, images, y)), parameters)
    assert ((ours - expected).norm() / expected.norm()).item() <= 1e-9


@pytest.mark.usefixtures("doubles")
def test_finetune_is_the_cross_entropy_of_open_clips_logits(models):
    task = task_in_double(models["vit"])
    images, y = batch(task, BATCHES["repeated"])
    model = task.clip.model
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = gradients(F.cross_entropy(model.get_logits(images, task.tokens)[0], y), parameters)
    ours = gradients(total(terms_of(METHODS["finetune"].build(task, None), images, y)), parameters)
    assert ((ours - expected).norm() / expected.norm()).item() <= 1e-9


@pytest.mark.usefixtures("doubles")
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_order_of_the_classes_changes_nothing(models, method):
    """Every method of the table, away from its start; W moves with its class."""
    task = task_in_double(models["vit"])
    if edits := method.edits(method.configure({})):
        task = replace(task, clip=task.clip.with_additions(Additions(edits)))
    images, y = batch(task, BATCHES["repeated"])
    order = torch.tensor([3, 0, 4, 1, 2])  # new place of each class
    other = Task(task.clip, task.tokens[order.argsort()])
    first, second = (method.build(t, method.configure({})) for t in (task, other))
    perturb(task.clip.model.parameters())
    before, after = total(terms_of(first, images, y)), total(terms_of(second, images, order[y]))
    assert after.item() == pytest.approx(before.item(), rel=1e-10)
    wrong = total(terms_of(second, images, y))
    assert abs(wrong.item() - before.item()) > 1e-3  # so that the equality above says something
