"""DistilBERT with the KV heads its plan gives each layer; an encoder."""

from huggingface_hub.dataclasses import strict
from transformers import (
    DistilBertConfig,
    DistilBertForMaskedLM,
    DistilBertForMultipleChoice,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
)
from transformers.models.distilbert.modeling_distilbert import DistilBertSelfAttention

from .attention_layout import AttentionLayout
from .bert_attention import BertAttentionNames
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="distilbert",
    attention="transformer.layer.{layer_idx}.attention",
    query="q_lin",
    key="k_lin",
    value="v_lin",
    output="out_lin",
    key_value_heads_field=None,
    bidirectional=True,
    position="learned or sinusoidal",
)


@strict
class GQADistilBertConfig(PlannedConfig, DistilBertConfig):
    model_type = "gqa_distilbert"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None


class DistilBertAttentionOfLayer(BertAttentionNames, DistilBertSelfAttention):
    def __init__(self, config, layer_idx: int):
        super().__init__(config)
        self.layer_idx = layer_idx


class GQADistilBertAttention(NativeCall, PlannedAttention, DistilBertAttentionOfLayer):
    donor_layout = DONOR_LAYOUT


class GQADistilBertModel(PlannedModel, DistilBertModel):
    config: GQADistilBertConfig
    config_class = GQADistilBertConfig
    attention_class = GQADistilBertAttention
    default_attention = NAME


class GQADistilBertHead(PlannedHead):
    config_class = GQADistilBertConfig
    model_class = GQADistilBertModel
    default_attention = NAME


class GQADistilBertForMaskedLM(GQADistilBertHead, DistilBertForMaskedLM):
    config: GQADistilBertConfig


class GQADistilBertForSequenceClassification(GQADistilBertHead, DistilBertForSequenceClassification):
    config: GQADistilBertConfig


class GQADistilBertForTokenClassification(GQADistilBertHead, DistilBertForTokenClassification):
    config: GQADistilBertConfig


class GQADistilBertForQuestionAnswering(GQADistilBertHead, DistilBertForQuestionAnswering):
    config: GQADistilBertConfig


class GQADistilBertForMultipleChoice(GQADistilBertHead, DistilBertForMultipleChoice):
    config: GQADistilBertConfig
