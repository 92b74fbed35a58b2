"""Whisper with the KV heads its plan gives each attention of encoder and decoder; key projections have no bias."""

from huggingface_hub.dataclasses import strict
from transformers import WhisperConfig, WhisperForConditionalGeneration, WhisperModel
from transformers.generation import GenerationMixin
from transformers.models.whisper.modeling_whisper import WhisperAttention, eager_attention_forward

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_model import PlannedHead
from .planned_seq2seq import PlannedSeq2SeqAttention, PlannedSeq2SeqConfig, PlannedSeq2SeqModel


DONOR_LAYOUT = AttentionLayout(
    model_type="whisper",
    attention="decoder.layers.{layer_idx}.self_attn",
    cross_attention="decoder.layers.{layer_idx}.encoder_attn",
    encoder_attention="encoder.layers.{layer_idx}.self_attn",
    num_layers_field="decoder_layers",
    num_heads_field="decoder_attention_heads",
    num_encoder_layers_field="encoder_layers",
    num_encoder_heads_field="encoder_attention_heads",
    output="out_proj",
    key_value_heads_field=None,
    position="sinusoidal, learned in the decoder",
)


@strict
class GQAWhisperConfig(PlannedSeq2SeqConfig, WhisperConfig):
    model_type = "gqa_whisper"
    donor_layout = DONOR_LAYOUT
    layer_plan: Rows = None


class GQAWhisperAttention(NativeCall, PlannedSeq2SeqAttention, WhisperAttention):
    donor_layout = DONOR_LAYOUT
    native_eager = staticmethod(eager_attention_forward)

    def compute(self, hidden_states, key_value_states=None, cache=None, attention_mask=None, **kwargs):
        """As its neighbours', but queries are scaled before the product, which rounds otherwise than after it."""
        query, key, value = self.query_key_value(hidden_states, key_value_states, cache)
        query = (query * self.scaling).contiguous()
        return self.mix(query, key.contiguous(), value.contiguous(), attention_mask, scaling=1.0, **kwargs)


class GQAWhisperModel(PlannedSeq2SeqModel, WhisperModel):
    config: GQAWhisperConfig
    config_class = GQAWhisperConfig
    attention_class = GQAWhisperAttention
    default_attention = NAME


class GQAWhisperHead(PlannedHead):
    config_class = GQAWhisperConfig
    model_class = GQAWhisperModel
    default_attention = NAME


class GQAWhisperForSpeechSeq2Seq(GQAWhisperHead, WhisperForConditionalGeneration, GenerationMixin):
    config: GQAWhisperConfig
