"""GPT-2 with the KV heads its plan gives each layer; separate query, key and value, learned positions."""

from huggingface_hub.dataclasses import strict
from transformers import (
    GPT2Config,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)
from transformers.generation import GenerationMixin
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="gpt2",
    attention="h.{layer_idx}.attn",
    fused="c_attn",
    output="c_proj",
    transposed=frozenset({"c_attn", "c_proj"}),
    key_value_heads_field=None,
    position="learned",
)


@strict
class GQAGPT2Config(PlannedConfig, GPT2Config):
    model_type = "gqa_gpt2"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None


class GQAGPT2Attention(NativeCall, PlannedAttention, GPT2Attention):
    donor_layout = DONOR_LAYOUT

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.attention_dropout = config.attn_pdrop

    def compute(self, hidden_states, **kwargs):
        output, weights = super().compute(hidden_states, **kwargs)
        return self.resid_dropout(output), weights


class GQAGPT2Model(PlannedModel, GPT2Model):
    config: GQAGPT2Config
    config_class = GQAGPT2Config
    attention_class = GQAGPT2Attention
    default_attention = NAME


class GQAGPT2Head(PlannedHead):
    config_class = GQAGPT2Config
    model_class = GQAGPT2Model
    default_attention = NAME


class GQAGPT2ForCausalLM(GQAGPT2Head, GPT2LMHeadModel, GenerationMixin):
    config: GQAGPT2Config


class GQAGPT2ForSequenceClassification(GQAGPT2Head, GPT2ForSequenceClassification):
    config: GQAGPT2Config


class GQAGPT2ForTokenClassification(GQAGPT2Head, GPT2ForTokenClassification):
    config: GQAGPT2Config


class GQAGPT2ForQuestionAnswering(GQAGPT2Head, GPT2ForQuestionAnswering):
    config: GQAGPT2Config
