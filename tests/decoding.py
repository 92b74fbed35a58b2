"""Decoding with a cache, token by token and by `generate`."""

import functools

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hf_gqa import convert
from hf_gqa.runtime.native_call import with_cache

from .conformance import assert_close_for_float32, logits_of
from .tiny_donors import tiny_donor, tokens_and_mask, use_attention


# prefill beyond the window, a chunk of several tokens, then token by token
CHUNKS = (9, 4, *[1] * 7)
NEW_TOKENS = 10
VARIED = {"no_repeat_ngram_size": 2}  # one token over and over would show nothing


@functools.cache
def converted(model_type: str, export: str, num_key_value_heads: int, seed: int) -> PreTrainedModel:
    """Untied, because tied embeddings make random models repeat their last token, which hides mistakes."""
    donor = tiny_donor(model_type, seed=seed, tie_word_embeddings=False)
    return convert(donor, num_key_value_heads=num_key_value_heads, export=export)


def student_of(model_type: str, export: str, num_key_value_heads: int = 2, seed: int = 0, attention: str = "sdpa"):
    student = converted(model_type, export, num_key_value_heads, seed)
    use_attention(student, attention)
    return student


def new_cache(kind: str, model: PreTrainedModel):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=sum(CHUNKS) + 3)
    return DynamicCache(config=model.config)


@torch.no_grad()
def logits_in_chunks(model: PreTrainedModel, cache, chunks=CHUNKS) -> torch.Tensor:
    tokens, mask = tokens_and_mask(length=sum(chunks))
    pieces, done = [], 0
    for size in chunks:
        end = done + size
        output = model(tokens[:, done:end], attention_mask=mask[:, :end], **with_cache(model, cache))
        pieces.append(output.logits)
        done = end
    return torch.cat(pieces, dim=1)


def assert_cached_equals_uncached(model: PreTrainedModel, kind: str) -> None:
    real = tokens_and_mask()[1].bool()
    cached = logits_in_chunks(model, new_cache(kind, model))
    assert_close_for_float32(cached[real], logits_of(model, padded=True, use_cache=False)[real])


def generate(model: PreTrainedModel, batch: int = 2, **kwargs):
    """Left-padded greedy generation of exactly NEW_TOKENS tokens, unless told otherwise."""
    tokens, mask = tokens_and_mask(batch=batch)
    wanted = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    shown = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
    generated = model.generate(tokens, attention_mask=mask, **(wanted | shown | kwargs))
    assert generated.sequences.shape[1] == tokens.shape[1] + NEW_TOKENS
    return generated


def assert_same_generation(found, expected) -> None:
    assert torch.equal(found.sequences, expected.sequences)
    assert_close_for_float32(torch.stack(found.logits), torch.stack(expected.logits))
