"""ALBERT with the KV heads its plan gives each group of layers; one attention computes in all layers of its group."""

from huggingface_hub.dataclasses import strict
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertModel,
)
from transformers.models.albert.modeling_albert import AlbertAttention

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="albert",
    attention="encoder.albert_layer_groups.{layer_idx}.albert_layers.0.attention",
    query="query",
    key="key",
    value="value",
    output="dense",
    key_value_heads_field=None,
    bidirectional=True,
    position="learned",
    ties_layers=True,
    num_layers_field="num_hidden_groups",
)


def donor_obstacle(config: AlbertConfig) -> str | None:
    """A group of several attentions has no row for each."""
    if config.inner_group_num != 1:
        return f"inner_group_num = {config.inner_group_num}, and hf_gqa knows groups of one attention (inner_group_num = 1)"
    return None


@strict
class GQAAlbertConfig(PlannedConfig, AlbertConfig):
    model_type = "gqa_albert"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None
    rows_field = "num_hidden_groups"


class AlbertAttentionOfGroup(AlbertAttention):
    def __init__(self, config, layer_idx: int):
        super().__init__(config)
        self.layer_idx = layer_idx
        self.head_dim = self.attention_head_size
        del self.attention_dropout  # a module, where planned attention reads a fraction
        self.attention_dropout = config.attention_probs_dropout_prob


class GQAAlbertAttention(NativeCall, PlannedAttention, AlbertAttentionOfGroup):
    donor_layout = DONOR_LAYOUT

    def compute(self, hidden_states, **kwargs):
        output, weights = super().compute(hidden_states, **kwargs)
        return self.LayerNorm(hidden_states + self.output_dropout(output)), weights


class GQAAlbertModel(PlannedModel, AlbertModel):
    config: GQAAlbertConfig
    config_class = GQAAlbertConfig
    attention_class = GQAAlbertAttention
    default_attention = NAME


class GQAAlbertHead(PlannedHead):
    config_class = GQAAlbertConfig
    model_class = GQAAlbertModel
    default_attention = NAME


class GQAAlbertForMaskedLM(GQAAlbertHead, AlbertForMaskedLM):
    config: GQAAlbertConfig


class GQAAlbertForSequenceClassification(GQAAlbertHead, AlbertForSequenceClassification):
    config: GQAAlbertConfig


class GQAAlbertForTokenClassification(GQAAlbertHead, AlbertForTokenClassification):
    config: GQAAlbertConfig


class GQAAlbertForQuestionAnswering(GQAAlbertHead, AlbertForQuestionAnswering):
    config: GQAAlbertConfig


class GQAAlbertForMultipleChoice(GQAAlbertHead, AlbertForMultipleChoice):
    config: GQAAlbertConfig


class GQAAlbertForPreTraining(GQAAlbertHead, AlbertForPreTraining):
    config: GQAAlbertConfig
