"""What the tests of every family share: the families, exports and attentions, donors, and when results are the same."""

import re

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from hf_gqa import convert
from hf_gqa.convert.families import load_family
from hf_gqa.methods import HEAD_COUNT_KINDS, METHODS, method_kind
from hf_gqa.runtime.native_call import with_cache

from .tiny_donors import (
    ALL_MODEL_TYPES,
    ENCODERS,
    MODEL_TYPES,
    NUM_ATTENTION_HEADS,
    SOME_MODEL_TYPES,
    of_each_storage,
    tiny_donor,
    tokens_and_mask,
)


EXPORTS = ("auto", "bundle")
ATTENTIONS = ("sdpa", "eager")
HEAD_COUNT_METHODS = [name for name in METHODS.names() if method_kind(name) in HEAD_COUNT_KINDS]
DROPOUTS = (
    "attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout_prob",
    "attention_probs_dropout_prob", "dropout", "embedding_dropout", "mlp_dropout",
    "residual_dropout", "hidden_dropout", "resid_dropout", "embed_dropout",
)  # fmt: skip


def has_native_gqa(model_type: str) -> bool:
    return load_family(model_type).donor_layout.key_value_heads_field is not None


every_model = pytest.mark.parametrize("model_type", ALL_MODEL_TYPES)
every_family = pytest.mark.parametrize("model_type", MODEL_TYPES)  # of causal language models
some_families = pytest.mark.parametrize("model_type", SOME_MODEL_TYPES)
every_storage = pytest.mark.parametrize("model_type", of_each_storage(ALL_MODEL_TYPES))
every_decoder_storage = pytest.mark.parametrize("model_type", of_each_storage(MODEL_TYPES))
every_student = pytest.mark.parametrize(  # once where both exports make a bundle
    ("model_type", "export"),
    [(name, export) for name in MODEL_TYPES for export in EXPORTS if export == "bundle" or has_native_gqa(name)],
)
every_export = pytest.mark.parametrize("export", EXPORTS)
every_attention = pytest.mark.parametrize("attention", ATTENTIONS)


def grouped_donor(model_type: str, num_key_value_heads: int = 2, seed: int = 0, **changes) -> PreTrainedModel:
    """A donor with fewer KV heads than query heads: native where the family has such, else one of our own class."""
    if has_native_gqa(model_type):
        return tiny_donor(model_type, num_key_value_heads, seed, **changes)
    return convert(
        tiny_donor(model_type, seed=seed, **changes), num_key_value_heads=num_key_value_heads, export="bundle"
    )


def in_bfloat16(donor: PreTrainedModel) -> PreTrainedModel:
    """As loading in bfloat16 gives it; `donor.to(bfloat16)` would round the rotary frequencies too."""
    narrow = type(donor)._from_config(donor.config, dtype=torch.bfloat16).eval()
    narrow.load_state_dict(donor.state_dict())
    for name, table in donor.named_buffers():  # of sines, made in the default dtype
        if name.endswith("embed_positions"):
            narrow.get_buffer(name).data = table
    return narrow


@torch.no_grad()
def logits_of(model: PreTrainedModel, padded: bool = False, **kwargs) -> torch.Tensor:
    tokens, mask = tokens_and_mask()
    return model(tokens, attention_mask=mask if padded else None, **kwargs).logits


def cached_head_counts(model: PreTrainedModel) -> list[int]:
    """KV heads of each layer as the cache, or an encoder's keys, see them, whatever the configuration says."""
    if model.config.model_type.removeprefix("gqa_") in ENCODERS:
        head_dim = model.config.hidden_size // model.config.num_attention_heads
        keys = re.compile(r"\.(?:k_proj|k_lin|key|Wqkv)\.weight$")
        rows = [len(tensor) // head_dim for name, tensor in model.state_dict().items() if keys.search(name)]
        return [heads if heads <= NUM_ATTENTION_HEADS else heads - 2 * NUM_ATTENTION_HEADS for heads in rows]
    cache = DynamicCache(config=model.config)
    logits_of(model, **with_cache(model, cache))
    return [layer.keys.shape[1] for layer in cache.layers]


def assert_close_for_float32(found: torch.Tensor, expected: torch.Tensor) -> None:
    """To 1e-5 of the largest value: rounding grows with the logits, and differs between processors."""
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, expected.abs().max().item()))


def assert_same_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
