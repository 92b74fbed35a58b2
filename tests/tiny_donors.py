"""A tiny random donor of every registered family; a new family has one by existing."""

import os
from dataclasses import fields

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from hf_gqa import use_grouped_attention
from hf_gqa.convert.families import FAMILIES, load_family


STORAGE = ("inner", "fused", "fused_order", "fused_blocks", "transposed", "norm_list")  # of a layout


def of_each_storage(model_types: list[str]) -> list[str]:
    """One family for each way of storing heads: for tests of what does not depend on how a family computes with them."""
    found = {}
    for name in sorted(model_types, key=lambda name: (name not in ("llama", "gpt2"), name == "albert", name)):
        layout = load_family(name).donor_layout
        used = (getattr(layout, field, None) for field in STORAGE)
        kind = (value if isinstance(value, tuple | int) else bool(value) for value in used)
        found.setdefault((layout.key_value_heads_field is None, layout.norm_weights, *kind), name)
    return sorted(found.values())


def is_of_another_alone(case) -> bool:
    """Whether a case of a parametrized test, if it is one, is about families but about none of `REPRESENTATIVES`."""
    values = [] if case is None else case.params.values()
    firsts = [value[0] if isinstance(value, tuple) and value else value for value in values]
    families = {name for name in firsts if isinstance(name, str)} & set(KNOWN)
    return bool(families) and not families & REPRESENTATIVES


def can_be_configured(model_type: str) -> bool:
    """False where a release of transformers refuses its own settings (mBART, M2M-100 and OLMo 2 in 5.4)."""
    try:
        CONFIG_MAPPING[model_type](tie_word_embeddings=False)
    except StrictDataclassError:
        return False
    return True


KNOWN = [name for name in FAMILIES.names() if can_be_configured(name)]
SEQ2SEQ_TYPES = [name for name in KNOWN if load_family(name).donor_layout.cross_attention is not None]
ALL_MODEL_TYPES = [name for name in KNOWN if name not in SEQ2SEQ_TYPES]
if "ONE_OF_EACH_STORAGE" in os.environ:  # for a second transformers, where the others run a shorter list of tests
    ALL_MODEL_TYPES = of_each_storage(ALL_MODEL_TYPES)
ENCODERS = [name for name in ALL_MODEL_TYPES if load_family(name).donor_layout.bidirectional]
UNTIED_ENCODERS = [name for name in ENCODERS if not load_family(name).donor_layout.ties_layers]
MODEL_TYPES = [name for name in ALL_MODEL_TYPES if name not in ENCODERS]  # causal language models
# What training and evaluation do does not depend on how a family attends; the others go through the conformance suite.
SOME_MODEL_TYPES = ["gemma3_text", "gpt2", "llama", "mistral", "qwen2", "qwen3"]
# Those that `make test-fast` goes through: one of each way of storing heads, windows, experts, kinds of encoder-decoders.
REPRESENTATIVES = {*of_each_storage(ALL_MODEL_TYPES), "gemma3_text", "mistral", "mixtral", "bart", "t5", "whisper"}
NUM_ATTENTION_HEADS = 4
NUM_LAYERS = 2
VOCAB_SIZE = 99
SPECIAL = {
    "albert": {"embedding_size": 16, "num_hidden_groups": 2},  # a group for each layer: tests count heads by layers
    "falcon": {"multi_query": False},
    "gpt_bigcode": {"multi_query": False},
    "gpt_neo": {"attention_types": [[["global"], 1], [["local"], 1]], "window_size": 6},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4, "n_ctx": 64},
    "mpt": {"max_seq_len": 64, "use_cache": True},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    "modernbert": {
        "local_attention": 12,
        "layer_types": ["full_attention", "sliding_attention"],
        "cls_token_id": 1,
        "sep_token_id": 2,
    },
    "mistral": {"sliding_window": 6},
    "starcoder2": {"sliding_window": 6},
    "phi": {"qk_layernorm": True},
    "phi3": {"sliding_window": 6},
    "gemma2": {
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 7,
        "attn_logit_softcapping": 2.0,
    },
    "smollm3": {
        "no_rope_layers": [1, 0],
        "use_sliding_window": True,
        "sliding_window": 6,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "stablelm": {"qk_layernorm": True, "use_qkv_bias": True, "partial_rotary_factor": 0.5},
    "granite": {
        "attention_multiplier": 0.3,
        "residual_multiplier": 0.7,
        "embedding_multiplier": 2.0,
        "logits_scaling": 3.0,
    },
    "cohere": {"use_qk_norm": True, "logit_scale": 0.3},
    "mixtral": {"num_local_experts": 4, "sliding_window": 6},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "use_sliding_window": True,
        "sliding_window": 6,
        "head_dim": 16,
    },
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]},
}


def tiny_config(model_type: str, num_key_value_heads: int = NUM_ATTENTION_HEADS, **changes):
    special = SPECIAL.get(model_type, {})
    wanted = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": NUM_ATTENTION_HEADS,
        "num_key_value_heads": num_key_value_heads,
        "head_dim": 16 if model_type in ("qwen3", "gemma3_text") else 8,
        "max_position_embeddings": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        **special,
        **changes,
    }
    config_class = type(AutoConfig.for_model(model_type))
    known = {field.name for field in fields(config_class)} | set(config_class.attribute_map)
    return config_class(**{key: value for key, value in wanted.items() if key in known or key in special})


def tiny_donor(
    model_type: str,
    num_key_value_heads: int = NUM_ATTENTION_HEADS,
    seed: int = 0,
    auto_class: str | None = None,
    **changes,
) -> PreTrainedModel:
    """Weights are large enough that no head, bias or norm can be ignored without showing in the logits.

    Args:
        auto_class: of the head; by default that of a language model, causal or masked.
    """
    auto_class = auto_class or default_head(model_type)
    config = tiny_config(model_type, num_key_value_heads, **changes)
    donor = getattr(transformers, auto_class).from_config(config).eval()
    fill_with_noise(donor, seed=seed)
    return donor


@torch.no_grad()
def fill_with_noise(model: PreTrainedModel, scale: float = 0.25, seed: int = 0) -> None:
    """Norms around one, all else around zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.copy_(1 + 0.1 * noise if "norm" in name.lower() or "ln_" in name else scale * noise)


def default_head(model_type: str) -> str:
    return "AutoModelForMaskedLM" if model_type in ENCODERS else "AutoModelForCausalLM"


def use_attention(model: PreTrainedModel, attention: str, or_skip: bool = True) -> None:
    """Where the class has no `sdpa`, our own function takes its place, or eager attention where there is no interface.

    Args:
        or_skip: skip the test rather than have it do again what it does with eager attention.
    """
    if not model._can_set_attn_implementation():
        if model._supports_sdpa:  # Falcon reads the name at every call
            model.config._attn_implementation = attention
        elif attention != "eager" and or_skip:
            pytest.skip(f"{type(model).__name__} has eager attention only")
    elif attention == "sdpa" and not model._supports_sdpa:
        use_grouped_attention(model)
    else:
        model.set_attn_implementation(attention)


def head_classes(model_types: list[str]) -> list[tuple[str, str]]:
    """Families with the Auto class of each of their heads but those that other conformance tests use."""
    heads = [(name, auto_class) for name in model_types for auto_class in load_family(name).head_classes]
    return [(name, auto_class) for name, auto_class in heads if auto_class != "AutoModelForCausalLM"]


def tokens_and_mask(batch: int = 2, length: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens without pad, and a mask that left-pads every row but the first."""
    tokens = torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    for row in range(1, batch):
        mask[row, : 3 * row] = 0
    return tokens, mask
