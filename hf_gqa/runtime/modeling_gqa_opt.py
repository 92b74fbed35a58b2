"""OPT with the KV heads its plan gives each layer; learned positions."""

from huggingface_hub.dataclasses import strict
from transformers import OPTConfig, OPTForCausalLM, OPTForQuestionAnswering, OPTForSequenceClassification, OPTModel
from transformers.generation import GenerationMixin
from transformers.models.opt.modeling_opt import OPTAttention

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="opt",
    attention="decoder.layers.{layer_idx}.self_attn",
    output="out_proj",
    key_value_heads_field=None,
    passes_keywords=False,  # the native head calls the decoder below the base model
    position="learned",
)


@strict
class GQAOPTConfig(PlannedConfig, OPTConfig):
    model_type = "gqa_opt"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None


class GQAOPTAttention(NativeCall, PlannedAttention, OPTAttention):
    """The native forward would fold fewer KV heads into the sequence without a word; ours is `PlannedAttention`'s."""

    donor_layout = DONOR_LAYOUT

    def __init__(self, config, layer_idx: int):
        super().__init__(config, layer_idx)
        self.attention_dropout = config.attention_dropout

    def run_attention(self, query, key, value, attention_mask, scaling, **kwargs):
        """Queries are scaled, not scores: another rounding."""
        return super().run_attention(query * scaling, key, value, attention_mask, scaling=1.0, **kwargs)


class GQAOPTModel(PlannedModel, OPTModel):
    config: GQAOPTConfig
    config_class = GQAOPTConfig
    attention_class = GQAOPTAttention
    default_attention = NAME


class GQAOPTHead(PlannedHead):
    config_class = GQAOPTConfig
    model_class = GQAOPTModel
    default_attention = NAME


class GQAOPTForCausalLM(GQAOPTHead, OPTForCausalLM, GenerationMixin):
    config: GQAOPTConfig


class GQAOPTForSequenceClassification(GQAOPTHead, OPTForSequenceClassification):
    config: GQAOPTConfig


class GQAOPTForQuestionAnswering(GQAOPTHead, OPTForQuestionAnswering):
    config: GQAOPTConfig
