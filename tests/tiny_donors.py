"""A tiny random donor of every registered family; a new family has one by existing."""

from dataclasses import fields

import torch
import transformers
from transformers import AutoConfig, PreTrainedModel

from hf_gqa.convert.families import FAMILIES, load_family


MODEL_TYPES = FAMILIES.names()
NUM_ATTENTION_HEADS = 4
NUM_LAYERS = 2
VOCAB_SIZE = 99
SPECIAL = {
    "falcon": {"multi_query": False},
    "gpt_bigcode": {"multi_query": False},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gptj": {"rotary_dim": 4},
    "codegen": {"rotary_dim": 4, "n_ctx": 64},
    "mpt": {"max_seq_len": 64},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "gpt_neox": {"rope_parameters": {"rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 0.5}},
    "mistral": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen3": {"use_sliding_window": True, "sliding_window": 6, "layer_types": ["full_attention", "sliding_attention"]},
}


def tiny_config(model_type: str, num_key_value_heads: int = NUM_ATTENTION_HEADS, **changes):
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
        **SPECIAL.get(model_type, {}),
        **changes,
    }
    config_class = type(AutoConfig.for_model(model_type))
    known = {field.name for field in fields(config_class)} | set(config_class.attribute_map)
    return config_class(**{key: value for key, value in wanted.items() if key in known})


def tiny_donor(
    model_type: str,
    num_key_value_heads: int = NUM_ATTENTION_HEADS,
    seed: int = 0,
    auto_class: str = "AutoModelForCausalLM",
    **changes,
) -> PreTrainedModel:
    """Weights are large enough that no head, bias or norm can be ignored without showing in the logits."""
    config = tiny_config(model_type, num_key_value_heads, **changes)
    donor = getattr(transformers, auto_class).from_config(config).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in donor.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name or ".ln_" in name else 0.25 * noise)
    return donor


def head_classes() -> list[tuple[str, str]]:
    """Every family with the Auto class of each of its heads but the one that it has a donor of by default."""
    return [
        (model_type, auto_class)
        for model_type in MODEL_TYPES
        for auto_class, head_class in load_family(model_type).head_classes.items()
        if head_class is not load_family(model_type).default_class
    ]


def tokens_and_mask(batch: int = 2, length: int = 20, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Random tokens without pad, and a mask that left-pads every row but the first."""
    tokens = torch.randint(3, VOCAB_SIZE, (batch, length), generator=torch.Generator().manual_seed(seed))
    mask = torch.ones_like(tokens)
    for row in range(1, batch):
        mask[row, : 3 * row] = 0
    return tokens, mask
