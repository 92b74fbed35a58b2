"""T5's planned attention: a relative position bias over query heads, made in one layer and handed to those above.

Shapes: B batch, Q query length, S key length, H query heads.
"""

import torch
from torch import nn

from .planned_seq2seq import PlannedSeq2SeqAttention


def eager_attention_with_bias(
    module, query, key, value, attention_mask, scaling=1.0, dropout=0.0, position_bias=None, **kwargs
):
    """T5's attention in the open, for releases of transformers whose T5 has no such function."""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling + position_bias
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class PlannedT5Attention(PlannedSeq2SeqAttention):
    """Mixin after `NativeCall`, before the attention class of T5 and its like, whose heads are merged and whose bias stays as it is.

    Source: T5 (Raffel et al. 2020, arXiv 1910.10683) for the bias; GQA (Ainslie et al. 2023, arXiv 2305.13245).
    """

    scaling = 1.0
    weights_if_asked = False  # whether the layers around it expect weights only with `output_attentions`

    @classmethod
    def take_over(cls, native: nn.Module, site, num_key_value_heads: int, config) -> None:
        """As above, and T5's own initialisation, which transformers leaves out for classes that are not its own."""
        super().take_over(native, site, num_key_value_heads, config)
        for name in (cls.donor_layout.key, cls.donor_layout.value):
            projection = getattr(native, name)
            if not projection.weight.is_meta:  # there, what a checkpoint lacks must be found missing
                nn.init.normal_(projection.weight, std=config.initializer_factor * config.d_model**-0.5)
                projection._is_hf_initialized = True

    def compute(
        self, hidden_states, attention_mask=None, key_value_states=None, position_bias=None, cache=None, **kwargs
    ):
        """The output `[B, Q, E]`, the bias for the layer above, and the attention weights where there are any."""
        seen_tokens = self.seen_tokens(cache)
        query, key, value = self.query_key_value(hidden_states, key_value_states, cache)
        if position_bias is None:
            position_bias = self.position_bias(query, key, seen_tokens)
        output, weights = self.mix(query, key, value, attention_mask, position_bias=position_bias, **kwargs)
        if self.weights_if_asked and not kwargs.get("output_attentions"):
            return output, position_bias
        return output, position_bias, weights

    def seen_tokens(self, cache):
        """Before the cache is updated: a static cache counts in place."""
        seen = cache.get_seq_length(self.layer_idx) if cache is not None else 0
        return seen.clone() if isinstance(seen, torch.Tensor) else seen

    def position_bias(self, query, key, seen_tokens):
        """`[1, H, Q, S]`; zeros where the layer has none of its own."""
        tokens, key_length = query.shape[2], key.shape[2]
        if self.has_relative_attention_bias:
            return self.compute_bias(tokens, key_length, device=query.device, past_seen_tokens=seen_tokens)
        zeros = query.new_zeros(1, query.shape[1], tokens, key_length)
        checkpointed = getattr(self, "gradient_checkpointing", False) and self.training
        return zeros.requires_grad_() if checkpointed else zeros
