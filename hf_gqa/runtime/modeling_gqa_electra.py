"""ELECTRA, generator or discriminator, with the KV heads its plan gives each layer; an encoder."""

from huggingface_hub.dataclasses import strict
from transformers import (
    ElectraConfig,
    ElectraForMaskedLM,
    ElectraForMultipleChoice,
    ElectraForPreTraining,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    ElectraModel,
)
from transformers.models.electra.modeling_electra import ElectraSelfAttention

from .attention_layout import AttentionLayout
from .bert_attention import BertAttentionNames
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="electra",
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
class GQAElectraConfig(PlannedConfig, ElectraConfig):
    model_type = "gqa_electra"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None


class GQAElectraAttention(NativeCall, PlannedAttention, BertAttentionNames, ElectraSelfAttention):
    donor_layout = DONOR_LAYOUT


class GQAElectraModel(PlannedModel, ElectraModel):
    config: GQAElectraConfig
    config_class = GQAElectraConfig
    attention_class = GQAElectraAttention
    default_attention = NAME


class GQAElectraHead(PlannedHead):
    config_class = GQAElectraConfig
    model_class = GQAElectraModel
    default_attention = NAME


class GQAElectraForMaskedLM(GQAElectraHead, ElectraForMaskedLM):
    config: GQAElectraConfig


class GQAElectraForSequenceClassification(GQAElectraHead, ElectraForSequenceClassification):
    config: GQAElectraConfig


class GQAElectraForTokenClassification(GQAElectraHead, ElectraForTokenClassification):
    config: GQAElectraConfig


class GQAElectraForQuestionAnswering(GQAElectraHead, ElectraForQuestionAnswering):
    config: GQAElectraConfig


class GQAElectraForMultipleChoice(GQAElectraHead, ElectraForMultipleChoice):
    config: GQAElectraConfig


class GQAElectraForPreTraining(GQAElectraHead, ElectraForPreTraining):
    config: GQAElectraConfig
