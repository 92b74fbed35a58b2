"""Every encoder-decoder: decoding with caches computes what one forward over the whole sequence computes."""

import functools

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel, StaticCache
from transformers.generation import GenerationMixin

from hf_gqa import convert
from hf_gqa.convert.cache_bytes_by_kind import cache_bytes_by_kind, cache_bytes_by_kind_measured
from hf_gqa.runtime.native_call import with_cache

from .seq2seq_conformance import assert_close, every_attention, every_family
from .seq2seq_donors import (
    decoder_tokens,
    encoder_inputs,
    language_model_class,
    logits_of,
    seq2seq_donor,
    sites_of,
)
from .tiny_donors import SEQ2SEQ_TYPES


CHUNKS = (5, 3, *[1] * 6)
NEW_TOKENS = 8


@functools.cache
def converted(model_type: str, num_key_value_heads: int) -> PreTrainedModel:
    return convert(seq2seq_donor(model_type), num_key_value_heads=num_key_value_heads)


def student_of(model_type: str, attention: str, num_key_value_heads: int = 2) -> PreTrainedModel:
    student = converted(model_type, num_key_value_heads)
    student.set_attn_implementation(attention)
    return student


def encoder_length(model: PreTrainedModel) -> int:
    return getattr(model.config, "max_source_positions", None) or encoder_inputs(model)["input_ids"].shape[1]


def new_caches(kind: str, model: PreTrainedModel) -> EncoderDecoderCache:
    if kind == "dynamic":
        return EncoderDecoderCache(DynamicCache(config=model.config), DynamicCache(config=model.config))
    lengths = (sum(CHUNKS) + 3, encoder_length(model))
    return EncoderDecoderCache(*(StaticCache(config=model.config, max_cache_len=length) for length in lengths))


@every_attention
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_cached_steps_equal_uncached_forward(model_type, attention, kind):
    student, done, pieces = student_of(model_type, attention), 0, []
    caches, tokens = new_caches(kind, student), decoder_tokens()
    with torch.no_grad():
        for size in CHUNKS:
            piece = tokens[:, done : done + size]
            output = student(**encoder_inputs(student), decoder_input_ids=piece, **with_cache(student, caches))
            pieces.append(output.logits)
            done += size
    assert_close(torch.cat(pieces, dim=1), logits_of(student))
    assert all(layer.keys.shape[1] == 2 for cache in (caches.self_attention_cache, caches.cross_attention_cache)
               for layer in cache.layers)  # fmt: skip


@every_family
def test_encoder_is_read_once_for_each_cache(model_type):
    """What a second forward is told of the encoder must not matter: its keys and values are kept."""
    student = student_of(model_type, "eager")
    caches, tokens = new_caches("dynamic", student), decoder_tokens()
    inputs = encoder_inputs(student)
    with torch.no_grad():
        student(**inputs, decoder_input_ids=tokens[:, :5], **with_cache(student, caches))
        inputs = {k: v.flip(-1) if k != "attention_mask" else v for k, v in inputs.items()}
        second = student(**inputs, decoder_input_ids=tokens[:, 5:], **with_cache(student, caches)).logits
    assert_close(second, logits_of(student)[:, 5:])


def generate(model: PreTrainedModel, **kwargs):
    """Exactly NEW_TOKENS tokens; by the plain loop, which Whisper wraps into one of its own."""
    wanted = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    shown = {"return_dict_in_generate": True, "output_logits": True, "output_scores": True}
    generated = GenerationMixin.generate(model, **encoder_inputs(model), **(wanted | shown | kwargs))
    assert generated.sequences.shape[1] == 1 + NEW_TOKENS
    return generated


@every_attention
def test_greedy_generation_is_the_same_without_a_cache(model_type, attention):
    student = student_of(model_type, attention)
    expected = generate(student, use_cache=False)
    for options in ({}, {"cache_implementation": "static", "disable_compile": True}):
        found = generate(student, use_cache=True, **options)
        assert torch.equal(found.sequences, expected.sequences)
        assert_close(torch.stack(found.logits), torch.stack(expected.logits))


@every_family
def test_beam_search_is_the_same_without_a_cache(model_type):
    student = student_of(model_type, "eager")
    cached, uncached = (
        generate(student, num_beams=3, num_return_sequences=3, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close(cached.sequences_scores, uncached.sequences_scores)


@every_family
@pytest.mark.parametrize("num_key_value_heads", [4, 2, 1])
def test_cache_bytes_are_those_of_the_sites(model_type, num_key_value_heads):
    student = converted(model_type, num_key_value_heads)
    sites = sites_of(student)
    heads = [4 if site.kind == "encoder" else num_key_value_heads for site in sites]
    computed = cache_bytes_by_kind(sites, heads, student.dtype)
    assert computed == dict.fromkeys(("self", "cross"), 2 * 2 * num_key_value_heads * 8 * 4)
    measured = cache_bytes_by_kind_measured(student, **encoder_inputs(student), decoder_input_ids=decoder_tokens())
    assert measured == computed


def test_every_language_model_is_looked_at():
    assert {language_model_class(name) for name in SEQ2SEQ_TYPES} == {
        "AutoModelForSeq2SeqLM",
        "AutoModelForSpeechSeq2Seq",
    }
