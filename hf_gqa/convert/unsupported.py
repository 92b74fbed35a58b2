"""What is refused by name, and why; and what comes nearest to a model type that hf_gqa does not convert."""

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Unsupported:
    """Model types that are refused for one reason.

    Args:
        reason: goes on after "model_type = 'x'".
        nearest: a family that converts and is most like them, or None where none is.
    """

    model_types: tuple[str, ...]
    reason: str
    nearest: str | None


LATENT = (
    "axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "glm4_moe_lite", "glm_moe_dsa", "kimi_linear",
    "longcat_flash", "minicpm3", "youtu",
)  # fmt: skip
STATE_SPACE = ("falcon_mamba", "mamba", "mamba2", "rwkv", "xlstm")
HYBRID = (
    "bamba", "falcon_h1", "granitemoehybrid", "jamba", "lfm2", "lfm2_moe", "nemotron_h", "olmo_hybrid", "qwen3_next",
    "recurrent_gemma", "zamba", "zamba2",
)  # fmt: skip
MULTIMODAL_ROPE = ("glm4v", "qwen2_5_omni", "qwen2_5_vl", "qwen2_vl", "qwen3_vl", "qwen3_vl_moe")

UNSUPPORTED = (
    Unsupported(
        model_types=LATENT,
        reason="caches one small latent vector for all heads (multi-head latent attention), so that there are no KV heads "
        "to merge",
        nearest=None,
    ),
    Unsupported(
        model_types=STATE_SPACE,
        reason="keeps a state of one size and no keys and values, so that there is no cache to shrink",
        nearest=None,
    ),
    Unsupported(
        model_types=HYBRID,
        reason="has attention in some of its layers only; the others keep a state and no keys and values",
        nearest=None,
    ),
    Unsupported(
        model_types=("jetmoe",),
        reason="has as many KV heads as it has active attention experts, which share them; they cannot change alone",
        nearest="mixtral",
    ),
    Unsupported(
        model_types=("doge",),
        reason="computes a mask for each KV head from its values, with weights of its own; heads that merge would need one",
        nearest="qwen3",
    ),
    Unsupported(
        model_types=("gemma3n", "gemma3n_text", "gemma4", "gemma4_text"),
        reason="shares keys and values between its layers already, and owners and borrowers would have to change together",
        nearest="gemma3_text",
    ),
    Unsupported(
        model_types=("diffllama",),
        reason="subtracts the attention of paired heads, whose values are split over both; a merge would mix the pairs",
        nearest="llama",
    ),
    Unsupported(
        model_types=MULTIMODAL_ROPE,
        reason="rotates sections of each head by time, height and width (M-RoPE), which no layout of hf_gqa describes",
        nearest="qwen2",
    ),
    Unsupported(
        model_types=("esmc",),
        reason="has a configuration that takes no fewer KV heads than query heads",
        nearest="modernbert",
    ),
)


# Configuration fields that change what attention computes, in some family or in somebody's variant of one.
VARIANT_FLAGS = (
    "alibi", "attention_multiplier", "attention_sinks", "attn_logit_softcapping", "clip_qkv", "multi_query", "no_rope_layers",
    "qk_layernorm", "sliding_window", "use_alibi", "use_qk_norm",
)  # fmt: skip


def unknown_flag(raw_config: dict, config_class: type) -> str | None:
    """A field of `config.json` that changes attention and of which transformers' configuration class knows nothing."""
    known = {field.name for field in fields(config_class)} | set(config_class.attribute_map)
    return next((flag for flag in VARIANT_FLAGS if raw_config.get(flag) and flag not in known), None)


def reason_against(model_type: str, known: Sequence[str]) -> str:
    """Why this model type is not converted and what is nearest, as the end of a message that began with its name."""
    for entry in UNSUPPORTED:
        if model_type in entry.model_types:
            nearest = f"Nearest that is converted: {entry.nearest}." if entry.nearest else f"Known: {', '.join(known)}."
            return f"{entry.reason}. {nearest}"
    close = difflib.get_close_matches(model_type, known, n=1)
    nearest = f" Nearest that is converted: {close[0]}." if close else ""
    return (
        f"is not a family that hf_gqa converts; it does not guess how unknown attention stores its heads.{nearest} "
        f"docs/add-a-family.md says how to add one. Known: {', '.join(known)}."
    )
