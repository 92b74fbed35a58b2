"""GPT-BigCode (StarCoder, SantaCoder) with the KV heads its plan gives each layer; learned positions."""

from huggingface_hub.dataclasses import strict
from transformers import (
    GPTBigCodeConfig,
    GPTBigCodeForCausalLM,
    GPTBigCodeForSequenceClassification,
    GPTBigCodeForTokenClassification,
    GPTBigCodeModel,
)
from transformers.generation import GenerationMixin
from transformers.models.gpt_bigcode.modeling_gpt_bigcode import GPTBigCodeAttention

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows, uniform_rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="gpt_bigcode",
    attention="h.{layer_idx}.attn",
    fused="c_attn",
    fused_blocks=None,
    output="c_proj",
    key_value_heads_field=None,
    position="learned",
)


def native_key_value_heads(config) -> int:
    return 1 if config.multi_query else config.num_attention_heads


def native_fields(config, num_key_value_heads: int) -> dict | str:
    """What a native configuration says of this many KV heads, or why it cannot."""
    if num_key_value_heads in (1, config.num_attention_heads):
        return {"multi_query": num_key_value_heads == 1}
    return "a native gpt_bigcode has one KV head, or as many as query heads"


@strict
class GQAGPTBigCodeConfig(PlannedConfig, GPTBigCodeConfig):
    model_type = "gqa_gpt_bigcode"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None

    def __post_init__(self, **kwargs):
        """The native configuration sets `num_key_value_heads` by `multi_query`, whatever it was given."""
        if self.layer_plan is None:
            heads = self.num_key_value_heads or native_key_value_heads(self)
            self.layer_plan = [row.to_dict() for row in uniform_rows(self.num_hidden_layers, heads)]
        super().__post_init__(**kwargs)
        self.num_key_value_heads = max(row["num_key_value_heads"] for row in self.layer_plan)


class GQAGPTBigCodeAttention(NativeCall, PlannedAttention, GPTBigCodeAttention):
    donor_layout = DONOR_LAYOUT

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.attention_dropout = config.attn_pdrop

    def compute(self, hidden_states, **kwargs):
        output, weights = super().compute(hidden_states, **kwargs)
        return self.resid_dropout(output), weights


class GQAGPTBigCodeModel(PlannedModel, GPTBigCodeModel):
    config: GQAGPTBigCodeConfig
    config_class = GQAGPTBigCodeConfig
    attention_class = GQAGPTBigCodeAttention
    default_attention = NAME


class GQAGPTBigCodeHead(PlannedHead):
    config_class = GQAGPTBigCodeConfig
    model_class = GQAGPTBigCodeModel
    default_attention = NAME


class GQAGPTBigCodeForCausalLM(GQAGPTBigCodeHead, GPTBigCodeForCausalLM, GenerationMixin):
    config: GQAGPTBigCodeConfig


class GQAGPTBigCodeForSequenceClassification(GQAGPTBigCodeHead, GPTBigCodeForSequenceClassification):
    config: GQAGPTBigCodeConfig


class GQAGPTBigCodeForTokenClassification(GQAGPTBigCodeHead, GPTBigCodeForTokenClassification):
    config: GQAGPTBigCodeConfig
