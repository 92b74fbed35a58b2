"""GPT-J with the KV heads its plan gives each layer; neighbours rotate together, in the first part of each head."""

import torch
from huggingface_hub.dataclasses import strict
from transformers import GPTJConfig, GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification, GPTJModel
from transformers.generation import GenerationMixin
from transformers.models.gptj.modeling_gptj import GPTJAttention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .planned_attention import PlannedAttention
from .planned_model import BuiltEagerly, PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="gptj",
    attention="h.{layer_idx}.attn",
    output="out_proj",
    rotary="interleaved",
    key_value_heads_field=None,
    passes_keywords=False,
    position="RoPE on part of each head, interleaved",
)


@strict
class GQAGPTJConfig(PlannedConfig, GPTJConfig):
    model_type = "gqa_gptj"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None


def eager_attention(module, query, key, value, attention_mask, **kwargs):
    """The native attention, on as many KV heads as it expects."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    mixed, weights = module._attn(query, key, value, attention_mask)
    return mixed.transpose(1, 2), weights


class GQAGPTJAttention(PlannedAttention, GPTJAttention):
    donor_layout = DONOR_LAYOUT
    eager = staticmethod(eager_attention)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.attention_dropout, self.scaling = config.attn_pdrop, self.head_dim**-0.5

    def forward(self, hidden_states, layer_past=None, attention_mask=None, position_ids=None, **kwargs):
        sine_and_cosine = self.embed_positions.to(hidden_states.device)[position_ids].to(hidden_states.dtype)
        output, weights = super().forward(
            hidden_states,
            attention_mask=attention_mask,
            past_key_values=layer_past,
            position_embeddings=sine_and_cosine.chunk(2, dim=-1),
            **kwargs,
        )
        return self.resid_dropout(output), weights

    def rotate(self, query, key, sine, cosine):
        """Of `[B, heads, Q, D]`; the native function takes `[B, Q, heads, D]`."""
        return tuple(self.rotated(heads.transpose(1, 2), sine, cosine).transpose(1, 2) for heads in (query, key))

    def rotated(self, heads, sine, cosine):
        width = self.rotary_dim or self.head_dim
        turned = apply_rotary_pos_emb(heads[..., :width], sine, cosine)
        return torch.cat([turned, heads[..., width:]], dim=-1)


class GQAGPTJModel(BuiltEagerly, PlannedModel, GPTJModel):
    config: GQAGPTJConfig
    config_class = GQAGPTJConfig
    attention_class = GQAGPTJAttention
    default_attention = NAME
    _supports_sdpa = True


class GQAGPTJHead(BuiltEagerly, PlannedHead):
    config_class = GQAGPTJConfig
    model_class = GQAGPTJModel
    default_attention = NAME
    _supports_sdpa = True


class GQAGPTJForCausalLM(GQAGPTJHead, GPTJForCausalLM, GenerationMixin):
    config: GQAGPTJConfig


class GQAGPTJForSequenceClassification(GQAGPTJHead, GPTJForSequenceClassification):
    config: GQAGPTJConfig


class GQAGPTJForQuestionAnswering(GQAGPTJHead, GPTJForQuestionAnswering):
    config: GQAGPTJConfig
