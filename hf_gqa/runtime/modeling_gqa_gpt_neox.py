"""GPT-NeoX (Pythia) with the KV heads its plan gives each layer; only the first part of each head rotates."""

from huggingface_hub.dataclasses import strict
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GPTNeoXForQuestionAnswering,
    GPTNeoXForSequenceClassification,
    GPTNeoXForTokenClassification,
    GPTNeoXModel,
)
from transformers.generation import GenerationMixin
from transformers.models.gpt_neox.modeling_gpt_neox import GPTNeoXAttention, apply_rotary_pos_emb

from .attention_layout import AttentionLayout
from .grouped_attention import NAME
from .layer_plan import Rows
from .native_call import NativeCall
from .planned_attention import PlannedAttention
from .planned_model import PlannedConfig, PlannedHead, PlannedModel


DONOR_LAYOUT = AttentionLayout(
    model_type="gpt_neox",
    attention="layers.{layer_idx}.attention",
    fused="query_key_value",
    fused_blocks=None,
    output="dense",
    rotary="halves",
    key_value_heads_field=None,
    position="RoPE on part of each head",
)
STORED_NAMES = {"lm_head.weight": "embed_out.weight"}  # checkpoints of the native class keep the name it had first


@strict
class GQAGPTNeoXConfig(PlannedConfig, GPTNeoXConfig):
    model_type = "gqa_gpt_neox"
    num_key_value_heads: int | None = None
    layer_plan: Rows = None


class GQAGPTNeoXAttention(NativeCall, PlannedAttention, GPTNeoXAttention):
    donor_layout = DONOR_LAYOUT
    rotate = staticmethod(apply_rotary_pos_emb)

    @property
    def head_dim(self) -> int:
        return self.head_size


class GQAGPTNeoXModel(PlannedModel, GPTNeoXModel):
    config: GQAGPTNeoXConfig
    config_class = GQAGPTNeoXConfig
    attention_class = GQAGPTNeoXAttention
    default_attention = NAME


class GQAGPTNeoXHead(PlannedHead):
    config_class = GQAGPTNeoXConfig
    model_class = GQAGPTNeoXModel
    default_attention = NAME


class GQAGPTNeoXForCausalLM(GQAGPTNeoXHead, GPTNeoXForCausalLM, GenerationMixin):
    """Its head is called `lm_head` with every transformers; before 5.23 the native class calls it `embed_out`."""

    config: GQAGPTNeoXConfig
    _tied_weights_keys = {"lm_head.weight": "gpt_neox.embed_in.weight"}

    @property
    def embed_out(self):
        return self.lm_head

    def __setattr__(self, name, value):
        super().__setattr__("lm_head" if name == "embed_out" else name, value)


class GQAGPTNeoXForSequenceClassification(GQAGPTNeoXHead, GPTNeoXForSequenceClassification):
    config: GQAGPTNeoXConfig


class GQAGPTNeoXForTokenClassification(GQAGPTNeoXHead, GPTNeoXForTokenClassification):
    config: GQAGPTNeoXConfig


class GQAGPTNeoXForQuestionAnswering(GQAGPTNeoXHead, GPTNeoXForQuestionAnswering):
    config: GQAGPTNeoXConfig
