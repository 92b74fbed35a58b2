"""Distillation against the k likeliest tokens of a teacher, holding one chunk of float32 logits at a time.

Shapes: N tokens, V vocabulary, k listed tokens, C tokens of a chunk, J = k + 1 outcomes.
"""

import torch
from torch.autograd.function import once_differentiable


TOKENS_PER_CHUNK = 1024


def top_k_kl(
    student_logits_NV: torch.Tensor,
    token_ids_Nk: torch.Tensor,
    teacher_log_probs_Nk: torch.Tensor,
    weights_N: torch.Tensor,
    *,
    in_place: bool = False,
    tokens_per_chunk: int = TOKENS_PER_CHUNK,
) -> torch.Tensor:
    """Weighted sum over tokens of KL(teacher || student), in nats, over k + 1 outcomes at temperature 1.

    The outcomes are the k listed tokens and "any other token", which holds the remaining mass of either model. Merging
    outcomes can only lower a divergence, so this bounds the KL over the whole vocabulary from below; with k = V it is
    that KL. Listed probabilities that rounding makes sum to more than 1 are scaled to 1; where no other token is left, or
    only tokens whose student logit is -inf, those that sum to less are too.

    Source: https://arxiv.org/abs/1503.02531 (distillation).

    Args:
        student_logits_NV: float32, bfloat16, float16 or float64; the gradient goes here alone, in the same dtype.
        token_ids_Nk: int64, distinct within a row.
        teacher_log_probs_Nk: natural logarithms under the teacher's full softmax.
        weights_N: what each token counts, such as 1 / tokens of the batch; 0 to ignore one.
        in_place: the backward pass writes the gradient over the logits, which saves a tensor of their size. They hold
            no logits afterwards, in whatever other views of them there are.
        tokens_per_chunk: what bounds the float32 memory: about two tensors (tokens_per_chunk, V).

    Returns:
        A float32 scalar (float64 for float64 logits).

    Raises:
        ValueError: shapes that do not fit, or `in_place` with logits that are a parameter or a view of one.
    """
    shapes = [tuple(t.shape) for t in (student_logits_NV, token_ids_Nk, teacher_log_probs_Nk, weights_N)]
    (N, *V), (*_, k) = shapes[0], shapes[1]
    if len(V) != 1 or shapes[1:] != [(N, k), (N, k), (N,)] or not 1 <= k <= V[0]:
        raise ValueError(
            "top_k_kl: shapes of student_logits_NV, token_ids_Nk, teacher_log_probs_Nk, weights_N are "
            f"{', '.join(map(str, shapes))}. Give (N, V), (N, k), (N, k), (N,) with 1 <= k <= V."
        )
    root = student_logits_NV if student_logits_NV._base is None else student_logits_NV._base
    if in_place and root.is_leaf and root.requires_grad:
        raise ValueError(
            "top_k_kl: in_place=True would overwrite a leaf that requires grad. Give logits that a model computed, "
            "or in_place=False."
        )
    return _TopKKL.apply(student_logits_NV, token_ids_Nk, teacher_log_probs_Nk, weights_N, in_place, tokens_per_chunk)


class _TopKKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, student_logits_NV, token_ids_Nk, teacher_log_probs_Nk, weights_N, in_place, tokens_per_chunk):
        tensors = (student_logits_NV, token_ids_Nk, teacher_log_probs_Nk, weights_N)
        ctx.save_for_backward(*tensors)
        ctx.in_place, ctx.tokens_per_chunk = in_place, tokens_per_chunk
        total = student_logits_NV.new_zeros((), dtype=_compute_dtype(student_logits_NV))
        for logits_CV, token_ids_Ck, teacher_log_probs_Ck, weights_C in _chunks(tensors, tokens_per_chunk):
            probs_CJ, log_probs_CJ, _ = _outcomes(logits_CV, token_ids_Ck, teacher_log_probs_Ck)
            kl_C = (torch.xlogy(probs_CJ, probs_CJ) - probs_CJ * log_probs_CJ).sum(-1)
            total += (kl_C * weights_C).sum()
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total):
        tensors = ctx.saved_tensors
        grad_NV = tensors[0].detach() if ctx.in_place else torch.empty_like(tensors[0])
        start = 0
        for logits_CV, token_ids_Ck, teacher_log_probs_Ck, weights_C in _chunks(tensors, ctx.tokens_per_chunk):
            probs_CJ, log_probs_CJ, log_rest_C1 = _outcomes(logits_CV, token_ids_Ck, teacher_log_probs_Ck)
            errors_CJ = (log_probs_CJ.exp() - probs_CJ) * (grad_total * weights_C).unsqueeze(-1)
            # an unlisted token gets its part of the error of "any other token"; listed logits are -inf by now
            logits_CV.sub_(log_rest_C1).exp_().mul_(errors_CJ[:, -1:])
            logits_CV.scatter_(-1, token_ids_Ck, errors_CJ[:, :-1])
            grad_NV[start : start + len(logits_CV)] = logits_CV
            start += len(logits_CV)
        return grad_NV, None, None, None, None, None


def _compute_dtype(logits_NV: torch.Tensor) -> torch.dtype:
    return torch.float64 if logits_NV.dtype == torch.float64 else torch.float32


def _chunks(tensors, tokens_per_chunk: int):
    """Chunks of tokens; their logits, log-probabilities and weights are copies to compute with."""
    dtype = _compute_dtype(tensors[0])
    for logits, token_ids, log_probs, weights in zip(*(t.split(tokens_per_chunk) for t in tensors), strict=True):
        yield logits.to(dtype, copy=True), token_ids, log_probs.to(dtype), weights.to(dtype)


def _outcomes(
    logits_CV: torch.Tensor, token_ids_Ck: torch.Tensor, teacher_log_probs_Ck: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The teacher's probabilities and the student's log-probabilities of the k + 1 outcomes.

    Overwrites the listed logits with -inf, so that the student's rest is a sum over the others and not a difference.

    Returns:
        probs_CJ, log_probs_CJ, and the logsumexp of the unlisted logits (C, 1).
    """
    listed_Ck = logits_CV.gather(-1, token_ids_Ck)
    logits_CV.scatter_(-1, token_ids_Ck, -torch.inf)
    lowest = torch.finfo(logits_CV.dtype).min  # for outcomes without mass: -inf would make NaN
    log_rest_C1 = logits_CV.logsumexp(-1, keepdim=True).clamp(min=lowest)
    log_all_C1 = torch.logaddexp(listed_Ck.logsumexp(-1, keepdim=True), log_rest_C1)
    log_probs_CJ = (torch.cat((listed_Ck, log_rest_C1), -1) - log_all_C1).clamp(min=lowest)

    mass_C1 = teacher_log_probs_Ck.logsumexp(-1, keepdim=True)
    # where the student has no other token, a rest of the teacher's would be a rounding error that costs infinitely much
    excess_C1 = torch.where(log_rest_C1 == lowest, mass_C1, mass_C1.clamp(min=0))
    rest_C1 = -torch.expm1(mass_C1 - excess_C1)
    return torch.cat(((teacher_log_probs_Ck - excess_C1).exp(), rest_C1), -1), log_probs_CJ, log_rest_C1
