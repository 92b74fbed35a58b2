"""GPT-2 with one KV head is GPT-BigCode (the StarCoder and SantaCoder class) with `multi_query`.

Source: MQA (Shazeer 2019, arXiv 1911.02150); SantaCoder (2301.03988) for the class.
"""

from transformers import GPTBigCodeConfig, PretrainedConfig

from ...runtime.layer_plan import LayerPlan
from . import Relative


NOT_SHARED = {
    "model_type", "architectures", "transformers_version", "auto_map", "layer_plan", "num_key_value_heads",
    "scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn",
}  # fmt: skip


def obstacle(config: PretrainedConfig, rows: tuple[LayerPlan, ...]) -> str | None:
    if any(row.num_key_value_heads != 1 for row in rows):
        return "gpt_bigcode, its native relative, has one KV head only"
    for field in ("scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn", "add_cross_attention"):
        if getattr(config, field):
            return f"gpt_bigcode, its native relative, has no {field}"
    return None


def to_gpt_bigcode(config: PretrainedConfig) -> GPTBigCodeConfig:
    shared = {field: value for field, value in config.to_dict().items() if field not in NOT_SHARED}
    return GPTBigCodeConfig(multi_query=True, **shared)


RELATIVE = Relative(
    model_type="gpt_bigcode",
    class_names={
        "GPT2Model": "GPTBigCodeModel",
        "GPT2LMHeadModel": "GPTBigCodeForCausalLM",
        "GPT2ForSequenceClassification": "GPTBigCodeForSequenceClassification",
        "GPT2ForTokenClassification": "GPTBigCodeForTokenClassification",
        "GQAGPT2Model": "GPTBigCodeModel",
        "GQAGPT2ForCausalLM": "GPTBigCodeForCausalLM",
    },
    obstacle=obstacle,
    config=to_gpt_bigcode,
    transposed=("mlp.c_fc.weight", "mlp.c_proj.weight"),
)
