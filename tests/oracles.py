"""The papers' equations a second time, as loops that share nothing with clipfit: what its tensor code is compared with.

Inputs are float64; every batch has a text for every image, however many share a class.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clipfit.config.edits import EditSettings


def dot(a: Tensor, b: Tensor) -> Tensor:
    return sum((a[d] * b[d] for d in range(len(a))), torch.zeros((), dtype=a.dtype))


def dva(u: Tensor, classifier: Tensor, labels: Sequence[int], scale: float) -> Tensor:
    """CLIP-CITE's L_DVA: cross-entropy over the rows of the classifier, of any length."""
    total = torch.zeros((), dtype=u.dtype)
    for i, y in enumerate(labels):
        logits = [scale * dot(u[i], w) / dot(w, w).sqrt() for w in classifier]
        total = total - torch.log(torch.exp(logits[y]) / sum(torch.exp(x) for x in logits))
    return total / len(labels)


def scl(u: Tensor, texts: Sequence[Tensor], labels: Sequence[int], scale: float, literal: bool) -> Tensor:
    """CLIP-CITE's L_SCL (eq. 4); `literal`: as printed, the positive pair left out of the denominators."""
    b = len(labels)
    total = torch.zeros((), dtype=u.dtype)
    for i in range(b):
        own = torch.exp(scale * dot(u[i], texts[i]))
        others = [k for k in range(b) if labels[k] != labels[i]]
        over_texts = sum(torch.exp(scale * dot(u[i], texts[k])) for k in others)
        over_images = sum(torch.exp(scale * dot(u[k], texts[i])) for k in others)
        kept = 0.0 if literal else own
        total = total - torch.log(own / (over_texts + kept)) - torch.log(own / (over_images + kept))
    return total / b


def vld(u: Tensor, texts: Sequence[Tensor], teacher_u: Tensor, teacher_texts: Sequence[Tensor], scale: float) -> Tensor:
    """CLIP-CITE's L_VLD (eq. 5): KL(p ‖ p̂) over the B texts, student first."""
    b = len(u)
    total = torch.zeros((), dtype=u.dtype)
    for i in range(b):
        student = [torch.exp(scale * dot(u[i], texts[k])) for k in range(b)]
        teacher = [torch.exp(scale * dot(teacher_u[i], teacher_texts[k])) for k in range(b)]
        for k in range(b):
            p, q = student[k] / sum(student), teacher[k] / sum(teacher)
            total = total + p * torch.log(p / q)
    return total / b


def contrastive(u: Tensor, texts: Sequence[Tensor], scale: float) -> Tensor:
    """CLIP's own loss over a batch of pairs."""
    b = len(u)
    total = torch.zeros((), dtype=u.dtype)
    for i in range(b):
        own = scale * dot(u[i], texts[i])
        total = total + torch.log(sum(torch.exp(scale * dot(u[i], texts[k])) for k in range(b))) - own
        total = total + torch.log(sum(torch.exp(scale * dot(u[k], texts[i])) for k in range(b))) - own
    return total / (2 * b)


def edited(x: Tensor, z: Tensor, a: float, b: float, rho: float, gamma: float) -> Tensor:
    """ATHA's edit of patches x (B, N, W) by class tokens z (C, W), steps 1 to 4 of the paper, patch by patch.

    Of equal patches the earlier ranks higher.
    """
    out = x.clone()
    for image in range(len(x)):
        patches = range(x.shape[1])
        s = [
            [float((torch.dot(x[image, i], c) / (x[image, i].norm() * c.norm())).detach()) for c in z] for i in patches
        ]
        order = sorted(patches, key=lambda i: (-max(s[i]), i))
        for i in order[: math.floor(round(len(order) * rho, 6))]:
            out[image, i] = x[image, i] + a * z[s[i].index(max(s[i]))]
        for i in order[len(order) - math.floor(round(len(order) * gamma, 6)) :]:
            out[image, i] = x[image, i] - b * z[s[i].index(min(s[i]))]
    return out


def soft_edited(x: Tensor, z: Tensor, a: float, b: float, scale: float) -> Tensor:
    """The same for one head and one tail patch of each image, moved by softmax-weighted class tokens."""
    s = F.normalize(x, dim=2) @ F.normalize(z, dim=1).T
    order = s.amax(2).argsort(dim=1, descending=True, stable=True)
    out = x.clone()
    for image in range(len(x)):
        first, last = order[image, 0], order[image, -1]
        out[image, first] += a * (scale * s[image, first]).softmax(0) @ z
        out[image, last] -= b * (-scale * s[image, last]).softmax(0) @ z
    return out


def inner_features(model: Any, tokens: Tensor, text_block: int) -> Tensor:
    """f_c of an open_clip CLIP in float64, by its modules: texts (C, context length) → (C, D)."""
    h = model.token_embedding(tokens) + model.positional_embedding
    for block in model.transformer.resblocks[: text_block + 1]:
        h = block(h, attn_mask=model.attn_mask)
    return model.ln_final(h)[torch.arange(len(h)), tokens.argmax(1)] @ model.text_projection


def class_tokens(model: Any, f: Tensor) -> Tensor:
    """f_c (C, D) brought into the vision width by least squares: z_c (C, V)."""
    y = torch.linalg.lstsq(model.visual.proj.T, f.T, driver="gelsd").solution.T
    return (y - model.visual.ln_post.bias) / model.visual.ln_post.weight


def edited_features(model: Any, images: Tensor, tokens: Tensor, settings: EditSettings, text_block: int) -> Tensor:
    """ATHA's whole forward pass: the modules of an open_clip CLIP in float64, called one by one, edits in between."""
    z = class_tokens(model, inner_features(model, tokens, text_block))
    v = model.visual._embeds(images)
    for number, block in enumerate(model.visual.transformer.resblocks):
        a = settings.head_strength if number == settings.head_block else 0.0
        patches = edited(v[:, 1:], z, a, settings.tail_strength, settings.head_ratio, settings.tail_ratio)
        v = block(torch.cat([v[:, :1], patches], 1))
    return F.normalize(model.visual.ln_post(v[:, 0]) @ model.visual.proj, dim=1)


def certain(logits: Tensor, temperature: float) -> list[float]:
    """The probability of what each image is taken for."""
    return [
        max(math.exp(x / temperature) for x in row) / sum(math.exp(x / temperature) for x in row)
        for row in logits.double().tolist()
    ]


def calibration_error(confidence: Sequence[float], right: Sequence[bool], bins: int) -> float:
    """ECE, bin by bin; a probability on an edge belongs to the bin below."""
    total = 0.0
    for b in range(bins):
        own = [i for i, p in enumerate(confidence) if b / bins < p <= (b + 1) / bins]
        if own:
            mean = sum(confidence[i] for i in own) / len(own)
            total += len(own) / len(right) * abs(sum(right[i] for i in own) / len(own) - mean)
    return total


def accuracy_of_most_certain(confidence: Sequence[float], right: Sequence[bool], k: int) -> float:
    """The mean over all ways to take the k most certain: image by image, the chance that it is among them."""
    found = 0.0
    for p, hit in zip(confidence, right, strict=True):
        before, alike = sum(q > p for q in confidence), sum(q == p for q in confidence)
        found += hit * min(max((k - before) / alike, 0), 1)
    return found / k


def pooled(folds, a, temperature):
    """Image by image over all folds: whether it is named rightly, and the probability of its class."""
    right, likely = [], []
    for fold in folds:
        for row, label in zip(fold.logits[a].double().tolist(), fold.labels.tolist(), strict=True):
            weights = [math.exp(value / temperature) for value in row]
            likely.append(weights[label] / sum(weights))
            right.append(row.index(max(row)) == label)
    return right, likely


def chosen_ratio(curves):
    """Step by step, the gradient of the score by differences."""
    tables, ratios = [curve.likely.tolist() for curve in curves], curves[0].ratios

    def score(means):
        return len(means) / sum(1 / mean for mean in means)

    means = [[sum(row) / len(row) for row in table] for table in tables]
    at = [score(column) for column in zip(*means, strict=True)]
    best = at.index(max(at))
    errors = []
    for a in range(len(ratios)):
        variance = 0.0
        for k, table in enumerate(tables):
            column = [row[best] for row in means]
            step = 1e-6
            moved = [mean + step * (j == k) for j, mean in enumerate(column)]
            slope = (score(moved) - score(column)) / step
            gaps = [x - y for x, y in zip(table[best], table[a], strict=True)]
            mean = sum(gaps) / len(gaps)
            variance += slope**2 * sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1) / len(gaps)
        errors.append(math.sqrt(variance))
    behind = [at[best] - value for value in at]
    fewest = min(len(table[0]) for table in tables)
    won = behind[ratios.index(0.0)] * fewest - 1 - 1  # two images more that lose all
    if won / (fewest + 2) > 2 * errors[ratios.index(0.0)]:
        return max(r for r, b, e in zip(ratios, behind, errors, strict=True) if b <= e / 2)
    zero_shot = [bool(value) for value in curves[0].right[ratios.index(0.0)].tolist()]
    safe = 1 - (sum(zero_shot) / len(zero_shot)) ** 2
    return min((r for r, b, e in zip(ratios, behind, errors, strict=True) if b <= e), key=lambda r: abs(r - safe))
