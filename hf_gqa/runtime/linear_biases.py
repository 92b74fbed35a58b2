"""Linear biases (ALiBi) as attention functions take them: in the mask.

Source: Press et al. 2022 (arXiv 2108.12409). Shapes: B batch, Q/S query/key length, H query heads.
"""

from torch.nn.functional import pad

from .grouped_attention import biased, causal_mask


def padded(bias, key_length: int):
    """`[..., S]`: a bias that is shorter than the keys, where the rest of a static cache is empty and masked."""
    return pad(bias, (0, key_length - bias.shape[-1]))


def biased_mask(bias, attention_mask, query, key):
    """Bias and mask as one additive `[B, H, Q, S]`.

    Args:
        bias: broadcastable to that.
        attention_mask: bool (True may be looked at), additive, or None: then several tokens are causal from the first
            key on, and one token may look at every key.

    Raises:
        ValueError: a mask that is none of these, as some attention implementations are given.
    """
    if attention_mask is None and query.shape[2] > 1:
        attention_mask = causal_mask(query, key)
    if attention_mask is not None and (attention_mask.dim() != 4):
        raise ValueError(
            f"attention_mask has the shape {tuple(attention_mask.shape)}, and linear biases need one with four "
            f"dimensions. Use attn_implementation='grouped_sdpa', 'sdpa' or 'eager'."
        )
    return biased(bias, attention_mask)
