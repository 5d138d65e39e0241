"""The loss functions, as pure functions of tensors.

Letters: B images in a batch, U distinct classes in it, C classes, D width of the joint embedding. `u` are unit-norm
image embeddings, `t` unit-norm text embeddings, `scale` is τ⁻¹ = exp(logit_scale) of the pre-trained model.

Equations are those of "Fully Fine-tuned CLIP Models are Efficient Few-Shot Learners" (CLIP-CITE, arXiv 2407.04003).
The paper writes them over the B texts of a batch. Texts depend on their class alone, so each of the U distinct classes
is encoded once; `counts` n_c, the number of images of class c, makes values and gradients those over B texts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def visual_text_alignment(
    u: torch.Tensor, classifier: torch.Tensor, labels: torch.Tensor, scale: torch.Tensor
) -> torch.Tensor:
    """L_DVA (eq. 2–3): cross-entropy of softmax_c(τ⁻¹·cos(u_i, W_c)) with a trainable classifier W.

    Eq. 2 prints no τ where eq. 1 does; without it cosines, which lie in [-1, 1], cannot separate classes.

    Args:
        u: (B, D) float, unit norm. classifier: (C, D) float, any norm. labels: (B,) int64 in [0, C). scale: scalar.
    """
    return F.cross_entropy(scale * u @ F.normalize(classifier, dim=1).T, labels)


def supervised_contrastive(
    u: torch.Tensor,
    t: torch.Tensor,
    classes: torch.Tensor,
    scale: torch.Tensor,
    positive_in_denominator: bool = True,
) -> torch.Tensor:
    """L_SCL (eq. 4), image→text plus text→image; texts and images of the same class are never negatives.

    With S = τ⁻¹·u·tᵀ, for image i and for its text:

        softplus( log Σ_{c≠y_i} n_c·exp S_ic  −  S_i,y_i )  +  softplus( log Σ_{k: y_k≠y_i} exp S_k,y_i  −  S_i,y_i )

    averaged over i. Printed literally, eq. 4 leaves the positive out of its denominator (the identity in place of
    softplus: `positive_in_denominator=False`); the paper also says that the loss is FLYP's when all classes differ,
    which needs it in. It is the sum of both directions, without ½.

    Args:
        u: (B, D). t: (U, D), the batch's distinct classes. classes: (B,) int64 in [0, U), which t is image i's.

    Returns:
        A scalar; 0 (with zero gradient) when the batch has one class, for then there are no negatives.
    """
    if len(t) < 2:
        return (u.sum() + t.sum()) * 0
    similarity = scale * u @ t.T  # (B, U)
    own = classes[:, None] == torch.arange(len(t), device=t.device)  # (B, U)
    positive = similarity.gather(1, classes[:, None])[:, 0]  # (B,)
    log_counts = own.sum(0).to(similarity).log()  # (U,)
    # (B,): over the other classes' texts, each counted n_c times
    images = (similarity + log_counts).masked_fill(own, -torch.inf).logsumexp(1)
    # (U,) → (B,): over the images of other classes
    texts = similarity.masked_fill(own, -torch.inf).logsumexp(0)[classes]
    term = F.softplus if positive_in_denominator else torch.Tensor.clone
    return (term(images - positive) + term(texts - positive)).mean()


def similarity_distillation(
    u: torch.Tensor,
    t: torch.Tensor,
    teacher_u: torch.Tensor,
    teacher_t: torch.Tensor,
    counts: torch.Tensor,
    scale: torch.Tensor,
) -> torch.Tensor:
    """L_VLD (eq. 5): KL(p ‖ p̂), student first, of the softmax over the batch's texts, averaged over images.

    Args:
        u, teacher_u: (B, D). t, teacher_t: (U, D). counts: (U,) int64, images of each class in the batch.
    """
    log_counts = counts.to(u).log()
    student = (scale * u @ t.T + log_counts).log_softmax(1)  # (B, U)
    teacher = (scale * teacher_u @ teacher_t.T + log_counts).log_softmax(1)
    return F.kl_div(teacher, student, reduction="batchmean", log_target=True)


def batch_contrastive(u: torch.Tensor, t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """FLYP's loss (arXiv 2212.00638): CLIP's own, over B image–text pairs, the mean of both directions.

    Other pairs of the same class count as negatives, as in FLYP.

    Args:
        u, t: (B, D) float, unit norm, row i of both belonging together.
    """
    similarity = scale * u @ t.T
    own = torch.arange(len(u), device=u.device)
    return (F.cross_entropy(similarity, own) + F.cross_entropy(similarity.T, own)) / 2
