"""GPT-J with the KV heads its plan gives each layer; neighbours rotate together, in the first part of each head."""

import torch
from huggingface_hub.dataclasses import strict
from transformers import GPTJConfig, GPTJForCausalLM, GPTJForQuestionAnswering, GPTJForSequenceClassification, GPTJModel
from transformers.generation import GenerationMixin
from transformers.models.gptj import modeling_gptj

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import BuiltEagerly, PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="gptj",
    attention="h.{layer_idx}.attn",
    output="out_proj",
    rotary="interleaved",
    position_names=("position_embeddings", "position_ids"),  # before 5.24 the attention made the former of the latter
    sine_first=True,
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
    if hasattr(modeling_gptj, "eager_attention_forward"):  # since 5.24
        return modeling_gptj.eager_attention_forward(module, query, key, value, attention_mask, **kwargs)
    mixed, weights = module._attn(query, key, value, attention_mask)
    return mixed.transpose(1, 2), weights


class GQAGPTJAttention(NativeCall, PlannedAttention, modeling_gptj.GPTJAttention):
    donor_layout = DONOR_LAYOUT
    eager = staticmethod(eager_attention)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.attention_dropout, self.scaling = config.attn_pdrop, self.head_dim**-0.5

    def compute(self, hidden_states, position_embeddings, **kwargs):
        """Before transformers 5.24 the position embeddings that are handed over are the positions."""
        if isinstance(position_embeddings, torch.Tensor):
            table = self.embed_positions.to(hidden_states.device)
            position_embeddings = table[position_embeddings].to(hidden_states.dtype).chunk(2, dim=-1)
        output, weights = super().compute(hidden_states, position_embeddings=position_embeddings, **kwargs)
        return self.resid_dropout(output), weights

    def rotate(self, query, key, sine, cosine):
        """Of `[B, heads, Q, D]`; the native function takes `[B, Q, heads, D]`."""
        return tuple(self.rotated(heads.transpose(1, 2), sine, cosine).transpose(1, 2) for heads in (query, key))

    def rotated(self, heads, sine, cosine):
        width = self.rotary_dim or self.head_dim
        turned = modeling_gptj.apply_rotary_pos_emb(heads[..., :width], sine, cosine)
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
