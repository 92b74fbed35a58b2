"""BERT with the KV heads its plan gives each layer; an encoder, whose output projection stands beside its attention."""

from huggingface_hub.dataclasses import strict
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForNextSentencePrediction,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from transformers.models.bert.modeling_bert import BertSelfAttention

from .attention_layout import AttentionLayout
from .bert_attention import BertAttentionNames
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="bert",
    attention="encoder.layer.{layer_idx}.attention",
    inner="self",
    query="self.query",
    key="self.key",
    value="self.value",
    output="output.dense",
    key_value_heads_field=None,
    bidirectional=True,
    position="learned",
)


@strict
class GQABertConfig(PlannedConfig, BertConfig):
    model_type = "gqa_bert"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None


class GQABertAttention(NativeCall, PlannedAttention, BertAttentionNames, BertSelfAttention):
    donor_layout = DONOR_LAYOUT


class GQABertModel(PlannedModel, BertModel):
    config: GQABertConfig
    config_class = GQABertConfig
    attention_class = GQABertAttention
    default_attention = NAME


class GQABertHead(PlannedHead):
    config_class = GQABertConfig
    model_class = GQABertModel
    default_attention = NAME


class GQABertForMaskedLM(GQABertHead, BertForMaskedLM):
    config: GQABertConfig


class GQABertForSequenceClassification(GQABertHead, BertForSequenceClassification):
    config: GQABertConfig


class GQABertForTokenClassification(GQABertHead, BertForTokenClassification):
    config: GQABertConfig


class GQABertForQuestionAnswering(GQABertHead, BertForQuestionAnswering):
    config: GQABertConfig


class GQABertForMultipleChoice(GQABertHead, BertForMultipleChoice):
    config: GQABertConfig


class GQABertForPreTraining(GQABertHead, BertForPreTraining):
    config: GQABertConfig


class GQABertForNextSentencePrediction(GQABertHead, BertForNextSentencePrediction):
    config: GQABertConfig
