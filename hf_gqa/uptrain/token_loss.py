"""Cross-entropy and distillation over (tokens, vocabulary) logits that are held once.

Shapes: `B` batch, `S` sequence, `V` vocabulary, `E` hidden, `N = B * S` tokens.

The plain computation keeps the student's logits, their fp32 copy, both softmaxes, the teacher's logits and the gradient:
six tensors `[N, V]`. Here the student's logits are the only one: chunk by chunk their gradient, which has a closed form,
replaces them in their own storage.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd.function import once_differentiable


CHUNK_TOKENS = 1024
PARTS = ("kl", "cross_entropy", "teacher_cross_entropy", "agreement", "tokens")

TeacherLogits = Callable[[int, int], torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWeights:
    """What one token's loss is made of.

    Args:
        kl: weight of the forward KL, teacher to student, times `temperature` squared (Hinton et al. 2015,
            arXiv 1503.02531), so that its gradient does not shrink with the temperature.
        cross_entropy: weight of the cross-entropy with the text.
        teacher_choice: weight of the cross-entropy with the teacher's likeliest token.
        temperature: by which both models' logits are divided in the KL.
    """

    kl: float
    cross_entropy: float
    teacher_choice: float = 0.0
    temperature: float = 1.0


def next_token_labels(labels_BS: torch.Tensor) -> torch.Tensor:
    """`[N]`: at each position the token to predict there; -100 where there is none."""
    shifted = torch.nn.functional.pad(labels_BS[:, 1:], (0, 1), value=-100)
    return shifted.reshape(-1)


def token_loss(
    logits_NV: torch.Tensor,
    labels_N: torch.Tensor,
    teacher_logits: TeacherLogits | None,
    weights: TokenWeights,
    num_items: torch.Tensor | float,
    chunk_tokens: int = CHUNK_TOKENS,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weighted sum over all tokens of KL to the teacher and cross-entropy, divided by `num_items`.

    Args:
        logits_NV: of the student. Where it takes part in a graph, its storage is overwritten by its gradient: the values
            are gone afterwards. It must not be a leaf.
        labels_N: as `next_token_labels` gives them; tokens with -100 count nowhere.
        teacher_logits: (start, stop) -> `[stop - start, V]`; None without a teacher.
        weights: of the parts.
        num_items: what the sum is divided by, usually the number of tokens that count.
        chunk_tokens: tokens worked on at a time.

    Returns:
        The loss, and the plain fp32 sums over tokens named in `PARTS`, at temperature 1 and unweighted, without graph:
        KL, cross-entropy, the teacher's cross-entropy, agreeing argmaxes, tokens.
    """
    if not logits_NV.is_contiguous():
        logits_NV = logits_NV.contiguous()
    overwrites = torch.is_grad_enabled() and logits_NV.requires_grad
    return _TokenLoss.apply(logits_NV, labels_N, teacher_logits, weights, num_items, chunk_tokens, overwrites)


class _TokenLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits_NV, labels_N, teacher_logits, weights, num_items, chunk_tokens, overwrites):
        parts = torch.zeros(len(PARTS), dtype=torch.float32, device=logits_NV.device)
        loss = torch.zeros((), dtype=torch.float32, device=logits_NV.device)
        written = logits_NV.detach()
        for start in range(0, len(labels_N), chunk_tokens):
            stop = min(start + chunk_tokens, len(labels_N))
            teacher = teacher_logits(start, stop).to(logits_NV.device).float() if teacher_logits is not None else None
            total, chunk_parts, gradient = _chunk(written[start:stop], labels_N[start:stop], teacher, weights)
            loss += total
            parts += chunk_parts
            if overwrites:
                written[start:stop].copy_(gradient.div_(num_items))
        if overwrites:
            ctx.save_for_backward(written)
        ctx.mark_non_differentiable(parts)
        return loss / num_items, parts

    @staticmethod
    @once_differentiable
    def backward(ctx, loss_gradient, parts_gradient):
        (gradient_NV,) = ctx.saved_tensors
        return gradient_NV.mul_(loss_gradient.to(gradient_NV.dtype)), None, None, None, None, None, None


def _chunk(logits_nV, labels_n, teacher_nV, weights: TokenWeights):
    """Summed loss, the sums of PARTS and the gradient with respect to `logits_nV`, in fp32."""
    counts_n = labels_n != -100
    label_n1 = labels_n.clamp(min=0).unsqueeze(-1)
    student_nV = logits_nV.float()
    student_log_nV = student_nV.log_softmax(-1)
    cross_entropy = _sum(-student_log_nV.gather(-1, label_n1).squeeze(-1), counts_n)
    loss = weights.cross_entropy * cross_entropy
    choice_weight = weights.teacher_choice if teacher_nV is not None else 0.0
    gradient = student_log_nV.exp().mul_(weights.cross_entropy + choice_weight)
    _add_at(gradient, label_n1, -weights.cross_entropy)
    kl = teacher_cross_entropy = agreement = torch.zeros_like(cross_entropy)
    if teacher_nV is not None:
        teacher_log_nV = teacher_nV.log_softmax(-1)
        teacher_cross_entropy = _sum(-teacher_log_nV.gather(-1, label_n1).squeeze(-1), counts_n)
        choice_n1 = teacher_nV.argmax(-1, keepdim=True)
        agreement = _sum((choice_n1.squeeze(-1) == student_nV.argmax(-1)).float(), counts_n)
        if choice_weight:
            loss = loss + choice_weight * _sum(-student_log_nV.gather(-1, choice_n1).squeeze(-1), counts_n)
            _add_at(gradient, choice_n1, -choice_weight)
        temperature = weights.temperature
        kl_n = _kl(teacher_log_nV, student_log_nV, gradient, weights.kl if temperature == 1.0 else 0.0)
        kl = soft_loss = _sum(kl_n, counts_n)
        if temperature != 1.0:
            soft_teacher_nV = (teacher_nV / temperature).log_softmax(-1)
            soft_student_nV = (student_nV / temperature).log_softmax(-1)
            soft_loss = _sum(_kl(soft_teacher_nV, soft_student_nV, gradient, weights.kl * temperature), counts_n)
        loss = loss + weights.kl * temperature**2 * soft_loss
    gradient[~counts_n] = 0
    return loss, torch.stack([kl, cross_entropy, teacher_cross_entropy, agreement, counts_n.sum().float()]), gradient


def _kl(teacher_log_nV, student_log_nV, gradient_nV, weight: float) -> torch.Tensor:
    """Forward KL of each token; `weight` times its gradient is added to `gradient_nV`."""
    teacher_nV = teacher_log_nV.exp()
    if weight:
        gradient_nV.add_(student_log_nV.exp(), alpha=weight).sub_(teacher_nV, alpha=weight)
    return teacher_nV.mul_(teacher_log_nV - student_log_nV).sum(-1)


def _add_at(gradient_nV: torch.Tensor, chosen_n1: torch.Tensor, amount: float) -> None:
    """In place, at one token of each row."""
    gradient_nV.scatter_add_(-1, chosen_n1, gradient_nV.new_full(chosen_n1.shape, amount))


def _sum(values_n: torch.Tensor, counts_n: torch.Tensor) -> torch.Tensor:
    return values_n.masked_fill(~counts_n, 0).sum()
