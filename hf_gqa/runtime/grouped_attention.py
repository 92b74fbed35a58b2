"""Attention for fewer KV heads than query heads: keys and values are read as they are cached, never copied to full size.

Shapes: B batch, Q/S query/key length, H query heads, K KV heads, G = H/K query heads per KV head, D head_dim.
"""

import torch
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .native_call import is_paged


NAME = "grouped_sdpa"
MOST_PACKED_TOKENS = 16  # with more tokens than this packing no longer wins, see docs/attention.md
HALF = (torch.bfloat16, torch.float16)


def grouped_sdpa(
    module,
    query,
    key,
    value,
    attention_mask,
    scaling=None,
    dropout=0.0,
    is_causal=None,
    position_bias=None,
    softcap=None,
    s_aux=None,
    **kwargs,
):
    """Grouped-query attention in the convention of transformers' attention functions.

    Source: GQA (Ainslie et al. 2023, arXiv 2305.13245). Same results as repeating keys and values G times.

    Args:
        module: the attention module; only its `is_causal` is read, and only where the argument is None.
        query: `[B, H, Q, D]`. key, value: `[B, K, S, D]`, where K divides H.
        attention_mask: broadcastable to `[B, H, Q, S]`; bool (True may be looked at) or floating point (added to the
            scores). Without one, several tokens are causal from the first key on, as with transformers' `sdpa`: its
            mask function gives a chunk on a filled cache a mask, and none to the prefill of an empty static cache.
            A token that may look at no key gets finite values that mean nothing.
        scaling: of the scores; None is `D ** -0.5`.
        position_bias: added to the scores, broadcastable to `[B, H, Q, S]` (T5).
        softcap: scores become `softcap * tanh(scores / softcap)` (Gemma 2).
        s_aux: `[H]`, one more score per head whose value is nothing: an attention sink (GPT-OSS).

    Returns:
        `[B, Q, H, D]`, and None for the attention weights, which exist nowhere.

    Raises:
        ValueError: head counts that do not divide, a mask of the wrong shape or dtype, a paged cache.
    """
    check_heads(query, key, value, kwargs)
    tokens = query.shape[2]
    may_be_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_causal = tokens > 1 and attention_mask is None and may_be_causal
    if is_causal and key.shape[2] > tokens:  # an empty static cache
        key, value = key[:, :, :tokens], value[:, :, :tokens]
        position_bias = None if position_bias is None else position_bias[..., :tokens]
    mask = checked("attention_mask", attention_mask, query, key)
    if position_bias is not None:
        mask = causal_mask(query, key) if is_causal else mask
        mask, is_causal = biased(checked("position_bias", position_bias, query, key), mask), False
    if softcap is not None or s_aux is not None or no_kernel_takes(query, key, value, mask, dropout):
        mask = causal_mask(query, key) if is_causal else mask
        mixed = explicit(query, key, value, mask, scaling, dropout, softcap, s_aux)
    else:
        mixed = fused(query, key, value, attn_mask=mask, scale=scaling, dropout_p=dropout, is_causal=is_causal)
    return mixed.transpose(1, 2).contiguous(), None


def fused(query, key, value, attn_mask, is_causal, **options):
    """`[B, H, Q, D]` by the kernels of torch, called so that none of them repeats keys and values.

    What is chosen when, and the measurements behind it: docs/attention.md.
    """
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    on_cpu = query.device.type == "cpu"
    if groups == 1 and tokens == 1 and on_cpu and query.dtype == torch.bfloat16 and not options["dropout_p"]:
        twice = torch.cat([query, query], dim=2)  # a product with one row takes a path 2.4 times as slow as with two
        return scaled_dot_product_attention(twice, key, value, attn_mask, **options)[:, :, :1]
    if groups == 1:
        return scaled_dot_product_attention(query, key, value, attn_mask, is_causal=is_causal, **options)
    if not is_causal and tokens <= MOST_PACKED_TOKENS:
        rows = query.reshape(query.shape[0], key.shape[1], groups * tokens, query.shape[3])
        packed = scaled_dot_product_attention(rows, key, value, packed_mask(attn_mask, groups, tokens), **options)
        return packed.reshape(*query.shape[:3], value.shape[3])
    if on_cpu or (attn_mask is None and query.dtype in HALF and query.shape[3] <= 256):
        options |= {"is_causal": is_causal, "enable_gqa": True}
        return scaled_dot_product_attention(query, key, value, attn_mask, **options)
    return member_by_member(query, key, value, attn_mask, is_causal=is_causal, **options)


def member_by_member(query, key, value, attn_mask, **options):
    """`[B, H, Q, D]`, one call for each of the G query heads of a group: for kernels that take no groups."""
    groups = query.shape[1] // key.shape[1]
    one_mask = attn_mask is None or attn_mask.shape[1] == 1
    masks = [attn_mask if one_mask else attn_mask[:, member::groups] for member in range(groups)]
    mixed = [
        scaled_dot_product_attention(query[:, member::groups], key, value, mask, **options)
        for member, mask in enumerate(masks)
    ]
    return torch.stack(mixed, dim=2).flatten(1, 2)


def explicit(query, key, value, mask, scaling, dropout, softcap, s_aux):
    """`[B, H, Q, D]` with the scores in the open, for what no kernel computes. They take B * H * Q * S numbers."""
    weights = probabilities(query, key, mask, scaling, softcap, s_aux)
    return mix(drop(weights.to(value.dtype), dropout), value)


def probabilities(query, key, mask, scaling, softcap=None, s_aux=None):
    """The attention matrix `[B, H, Q, S]`, in float32 at least."""
    batch, heads, tokens, head_dim = query.shape
    rows = query.reshape(batch, key.shape[1], -1, head_dim) * (head_dim**-0.5 if scaling is None else scaling)
    scores = torch.matmul(rows, key.transpose(2, 3))
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)).view(batch, heads, tokens, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    lowest = torch.finfo(scores.dtype).min  # not -inf: a row of nothing but that has no softmax
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, lowest)
    elif mask is not None:
        scores = (scores + mask).clamp(min=lowest)
    weights = scores.softmax(dim=-1)
    if s_aux is not None:  # exp(score) / (sum of exp(scores) + exp(sink))
        weights = weights * torch.sigmoid(scores.logsumexp(dim=-1, keepdim=True) - s_aux.view(1, -1, 1, 1))
    return weights


def mix(weights, value):
    """`[B, H, Q, D]`: values `[B, K, S, D]` by an attention matrix `[B, H, Q, S]`; nothing is repeated."""
    batch, heads, tokens, length = weights.shape
    rows = weights.reshape(batch, value.shape[1], -1, length)
    return torch.matmul(rows, value).reshape(batch, heads, tokens, value.shape[3])


def attention_probabilities(
    query, key, attention_mask, scaling, softcap=None, s_aux=None, position_bias=None, **kwargs
):
    """The attention matrix of one decoded token, `[B, H, 1, S]`, of which `grouped_sdpa` returns the product with values.

    Arguments as there; in the dtype of the query.
    """
    mask = checked("attention_mask", attention_mask, query, key)
    if position_bias is not None:
        mask = biased(checked("position_bias", position_bias, query, key), mask)
    return probabilities(query, key, mask, scaling, softcap, s_aux).to(query.dtype)


def no_kernel_takes(query, key, value, mask, dropout) -> bool:
    """Whether torch would fall back to a path that repeats keys and values."""
    if query.shape[1] == key.shape[1]:
        return False
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        return True
    return key.shape[3] != value.shape[3] or (dropout > 0 and query.device.type == "cpu")


def packed_mask(mask, groups: int, tokens: int):
    """A mask over `[Q, S]` as one over the rows `[G * Q, S]` of each KV head."""
    if mask is None or (mask.shape[1] == 1 and mask.shape[2] == 1):
        return mask
    if mask.shape[1] == 1:
        return mask.expand(-1, groups, -1, -1).reshape(mask.shape[0], 1, groups * mask.shape[2], mask.shape[3])
    return mask.expand(-1, -1, tokens, -1).reshape(mask.shape[0], -1, groups * tokens, mask.shape[3])


def biased(position_bias, mask):
    """Bias and mask as one additive mask."""
    if mask is None:
        return position_bias
    if mask.dtype == torch.bool:
        return torch.where(mask, position_bias, torch.finfo(position_bias.dtype).min)
    return position_bias + mask


def causal_mask(query, key):
    return torch.ones(1, 1, query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()


def checked(name: str, mask, query, key):
    """The mask, floating point masks in the dtype of the query; ValueError if it is none for these shapes."""
    if mask is None:
        return None
    wanted = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
    if mask.dim() != 4 or any(size not in (1, full) for size, full in zip(mask.shape, wanted, strict=True)):
        raise ValueError(
            f"{NAME}: {name} has the shape {tuple(mask.shape)}, which does not broadcast to [batch, query heads, "
            f"query length, key length] = {wanted}. Give it four dimensions, each of that size or 1."
        )
    if mask.dtype == torch.bool:
        return mask
    if not mask.is_floating_point():
        raise ValueError(
            f"{NAME}: {name} is {mask.dtype}; allowed are torch.bool (True may be looked at) and floating point "
            f"(added to the scores). Convert it, for zeros and ones with .bool()."
        )
    return mask.to(query.dtype)


def check_heads(query, key, value, options: dict) -> None:
    """Raise ValueError for what would otherwise fail far from here, or be computed wrongly without a word."""
    if key.shape[:3] != value.shape[:3] or query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{NAME}: query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit. "
            f"Keys and values need the same heads and length, and a number of heads that divides that of the queries."
        )
    if any(is_paged(option) for option in options.values()):
        raise ValueError(
            f"{NAME}: does not read the paged cache of continuous batching. Use attn_implementation='sdpa' for it."
        )


def register_grouped_attention() -> None:
    """Make `attn_implementation="grouped_sdpa"` known to transformers, with the masks that `sdpa` gets.

    A name without a mask function of its own would be given no masks at all, without a word.
    """
    ALL_ATTENTION_FUNCTIONS.register(NAME, grouped_sdpa)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])


if NAME not in ALL_ATTENTION_FUNCTIONS:  # a bundle without hf_gqa; never over the function of the hf_gqa that is here
    register_grouped_attention()
