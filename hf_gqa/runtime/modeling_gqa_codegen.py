"""CodeGen with the KV heads its plan gives each layer; neighbours rotate together, in the first part of each head."""

import torch
from huggingface_hub.dataclasses import strict
from transformers import CodeGenConfig, CodeGenForCausalLM, CodeGenModel
from transformers.generation import GenerationMixin
from transformers.models.codegen import modeling_codegen

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
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
    position_names=("position_embeddings", "position_ids"),  # before 5.24 the attention made the former of the latter
    sine_first=True,
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
    if hasattr(modeling_codegen, "eager_attention_forward"):  # since 5.24
        return modeling_codegen.eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
    mixed, weights = module._attn(query, key, value, attention_mask)
    return mixed.transpose(1, 2), weights


class GQACodeGenAttention(NativeCall, PlannedAttention, modeling_codegen.CodeGenAttention):
    donor_layout = DONOR_LAYOUT
    eager = staticmethod(eager_attention)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config, self.attention_dropout, self.scaling = config, config.attn_pdrop, self.head_dim**-0.5

    def compute(self, hidden_states, position_embeddings, cache=None, **kwargs):
        """Before transformers 5.24 the position embeddings that are handed over are the positions.

        Queries and keys are rounded after their rotation in float32; before, only keys, and only where they are cached.
        """
        rounded = True, True
        if isinstance(position_embeddings, torch.Tensor):
            table = self.embed_positions.to(hidden_states.device)
            position_embeddings, rounded = table[position_embeddings].chunk(2, dim=-1), (False, cache is not None)
        output, weights = super().compute(
            hidden_states, position_embeddings=(*position_embeddings, rounded), cache=cache, **kwargs
        )
        return self.resid_dropout(output), weights

    def rotate(self, query, key, sine, cosine, rounded):
        """Of `[B, heads, Q, D]`."""
        turned = []
        for heads, is_rounded in zip((query, key), rounded, strict=True):
            rotated = self.rotated(heads.transpose(1, 2), sine, cosine).transpose(1, 2)
            turned.append(rotated.to(heads.dtype) if is_rounded else rotated)
        return turned

    def rotated(self, heads, sine, cosine):
        width = self.rotary_dim or self.head_dim
        turned = modeling_codegen.apply_rotary_pos_emb(heads[..., :width], sine, cosine)
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
