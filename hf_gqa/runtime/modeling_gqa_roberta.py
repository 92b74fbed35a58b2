"""RoBERTa with the KV heads its plan gives each layer; an encoder, whose output projection stands beside its attention."""

from huggingface_hub.dataclasses import strict
from transformers import (
    RobertaConfig,
    RobertaForMaskedLM,
    RobertaForMultipleChoice,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)
from transformers.models.roberta.modeling_roberta import RobertaSelfAttention

from .attention_layout import AttentionLayout
from .bert_attention import BertAttentionNames
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="roberta",
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
class GQARobertaConfig(PlannedConfig, RobertaConfig):
    model_type = "gqa_roberta"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None


class GQARobertaAttention(NativeCall, PlannedAttention, BertAttentionNames, RobertaSelfAttention):
    donor_layout = DONOR_LAYOUT


class GQARobertaModel(PlannedModel, RobertaModel):
    config: GQARobertaConfig
    config_class = GQARobertaConfig
    attention_class = GQARobertaAttention
    default_attention = NAME


class GQARobertaHead(PlannedHead):
    config_class = GQARobertaConfig
    model_class = GQARobertaModel
    default_attention = NAME


class GQARobertaForMaskedLM(GQARobertaHead, RobertaForMaskedLM):
    config: GQARobertaConfig


class GQARobertaForSequenceClassification(GQARobertaHead, RobertaForSequenceClassification):
    config: GQARobertaConfig


class GQARobertaForTokenClassification(GQARobertaHead, RobertaForTokenClassification):
    config: GQARobertaConfig


class GQARobertaForQuestionAnswering(GQARobertaHead, RobertaForQuestionAnswering):
    config: GQARobertaConfig


class GQARobertaForMultipleChoice(GQARobertaHead, RobertaForMultipleChoice):
    config: GQARobertaConfig
