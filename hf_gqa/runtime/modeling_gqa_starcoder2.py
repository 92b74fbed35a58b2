"""StarCoder 2 with the KV heads its plan gives each layer; biases, one sliding window, dropout after attention."""

from huggingface_hub.dataclasses import strict
from torch.nn.functional import dropout
from transformers import (
    Starcoder2Config,
    Starcoder2ForCausalLM,
    Starcoder2ForSequenceClassification,
    Starcoder2ForTokenClassification,
    Starcoder2Model,
)
from transformers.generation import GenerationMixin
from transformers.models.starcoder2.modeling_starcoder2 import Starcoder2Attention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="starcoder2",
    attention="layers.{layer_idx}.self_attn",
    rotary="halves",
    position="RoPE, sliding window",
)


@strict
class GQAStarcoder2Config(PlannedConfig, Starcoder2Config):
    model_type = "gqa_starcoder2"
    layer_plan: Rows = None


class GQAStarcoder2Attention(NativeCall, PlannedAttention, Starcoder2Attention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.sliding_window = config.sliding_window

    def compute(self, hidden_states, **kwargs):
        output, weights = super().compute(hidden_states, **kwargs)
        return dropout(output, p=self.residual_dropout, training=self.training), weights


class GQAStarcoder2Model(PlannedModel, Starcoder2Model):
    config: GQAStarcoder2Config
    config_class = GQAStarcoder2Config
    attention_class = GQAStarcoder2Attention
    default_attention = NAME


class GQAStarcoder2Head(PlannedHead):
    config_class = GQAStarcoder2Config
    model_class = GQAStarcoder2Model
    default_attention = NAME


class GQAStarcoder2ForCausalLM(GQAStarcoder2Head, Starcoder2ForCausalLM, GenerationMixin):
    config: GQAStarcoder2Config


class GQAStarcoder2ForSequenceClassification(GQAStarcoder2Head, Starcoder2ForSequenceClassification):
    config: GQAStarcoder2Config


class GQAStarcoder2ForTokenClassification(GQAStarcoder2Head, Starcoder2ForTokenClassification):
    config: GQAStarcoder2Config
