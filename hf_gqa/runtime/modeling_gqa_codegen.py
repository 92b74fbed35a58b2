"""CodeGen with the KV heads its plan gives each layer; neighbours rotate together, in the first part of each head."""

import torch
from huggingface_hub.dataclasses import strict
from transformers import CodeGenConfig, CodeGenForCausalLM, CodeGenModel
from transformers.generation import GenerationMixin
from transformers.models.codegen.modeling_codegen import CodeGenAttention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .planned_attention import PlannedAttention
from .planned_model import BuiltEagerly, PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="codegen",
    attention="h.{layer_idx}.attn",
    fused="qkv_proj",
    fused_order=("query", "value", "key"),
    fused_blocks=4,
    output="out_proj",
    rotary="interleaved",
    key_value_heads_field=None,
    passes_keywords=False,
    position="RoPE on part of each head, interleaved",
)


@strict
class GQACodeGenConfig(PlannedConfig, CodeGenConfig):
    model_type = "gqa_codegen"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None


def eager_attention(module, query, key, value, attention_mask, **kwargs):
    """The native attention, on as many KV heads as it expects."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    mixed, weights = module._attn(query, key, value, attention_mask)
    return mixed.transpose(1, 2), weights


class GQACodeGenAttention(PlannedAttention, CodeGenAttention):
    donor_layout = DONOR_LAYOUT
    eager = staticmethod(eager_attention)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config, self.attention_dropout, self.scaling = config, config.attn_pdrop, self.head_dim**-0.5

    def forward(self, hidden_states, layer_past=None, attention_mask=None, position_ids=None, **kwargs):
        sine_and_cosine = self.embed_positions.to(hidden_states.device)[position_ids].chunk(2, dim=-1)
        key_dtype = None if layer_past is None else hidden_states.dtype
        output, weights = super().forward(
            hidden_states,
            attention_mask=attention_mask,
            past_key_values=layer_past,
            position_embeddings=(*sine_and_cosine, key_dtype),
            **kwargs,
        )
        return self.resid_dropout(output), weights

    def rotate(self, query, key, sine, cosine, key_dtype):
        """Of `[B, heads, Q, D]`, in float32; as in the native class, keys are rounded where they are cached."""
        query, key = (self.rotated(heads.transpose(1, 2), sine, cosine).transpose(1, 2) for heads in (query, key))
        return query, key.to(key_dtype or key.dtype)

    def rotated(self, heads, sine, cosine):
        width = self.rotary_dim or self.head_dim
        turned = apply_rotary_pos_emb(heads[..., :width], sine, cosine)
        return torch.cat([turned, heads[..., width:]], dim=-1)

    def run_attention(self, query, key, value, attention_mask, **kwargs):
        if self.config._attn_implementation != "eager":
            query, key = query.to(value.dtype), key.to(value.dtype)
        return super().run_attention(query, key, value, attention_mask, **kwargs)


class GQACodeGenModel(BuiltEagerly, PlannedModel, CodeGenModel):
    config: GQACodeGenConfig
    config_class = GQACodeGenConfig
    attention_class = GQACodeGenAttention
    default_attention = NAME
    _supports_sdpa = True


class GQACodeGenForCausalLM(BuiltEagerly, PlannedHead, CodeGenForCausalLM, GenerationMixin):
    config: GQACodeGenConfig
    config_class = GQACodeGenConfig
    model_class = GQACodeGenModel
    default_attention = NAME
    _supports_sdpa = True
