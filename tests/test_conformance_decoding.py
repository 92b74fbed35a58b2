"""Every family: decoding with a cache computes what one forward over the whole sequence computes.

The sliding windows of the tiny donors are 6 long, the sequences 20 and more.
"""

import functools

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache

from hf_gqa import convert
from hf_gqa.runtime.native_call import with_cache

from .covering import each_pair, each_value
from .test_conformance import (
    ATTENTIONS,
    EXPORTS,
    assert_close_for_float32,
    every_family,
    every_student,
    logits_of,
)
from .tiny_donors import MODEL_TYPES, tiny_donor, tokens_and_mask, use_attention


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


@each_pair(
    model_type=MODEL_TYPES, export=EXPORTS, attention=ATTENTIONS, num_key_value_heads=[2, 1], kind=["dynamic", "static"]
)
def test_cached_steps_equal_uncached_forward(model_type, export, attention, num_key_value_heads, kind):
    student = student_of(model_type, export, num_key_value_heads, attention=attention)
    assert_cached_equals_uncached(student, kind)


@each_value(model_type=MODEL_TYPES, export=EXPORTS, attention=ATTENTIONS)
def test_greedy_generation_is_the_same_without_a_cache(model_type, export, attention):
    student = student_of(model_type, export, attention=attention)
    expected = generate(student, use_cache=False)
    assert_same_generation(generate(student, use_cache=True), expected)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert_same_generation(generate(student, use_cache=True, **static), expected)


@every_student
def test_beam_search_is_the_same_without_a_cache(model_type, export):
    student = student_of(model_type, export)
    cached, uncached = (
        generate(student, num_beams=3, num_return_sequences=3, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close_for_float32(cached.sequences_scores, uncached.sequences_scores)


@every_student
def test_sampling_is_the_same_without_a_cache(model_type, export):
    student = student_of(model_type, export)
    sampled = []
    for use_cache in (True, False):
        torch.manual_seed(0)
        sampled.append(generate(student, do_sample=True, use_cache=use_cache))
    assert_same_generation(*sampled)


@every_student
def test_assisted_generation_equals_greedy(model_type, export):
    """With an assistant that disagrees, so that drafts are thrown away, and one that agrees, so that they are kept."""
    student = student_of(model_type, export)
    expected = generate(student, batch=1, **VARIED).sequences
    for assistant in (student_of(model_type, export, seed=1), student_of(model_type, export, num_key_value_heads=1)):
        assert torch.equal(generate(student, batch=1, assistant_model=assistant, **VARIED).sequences, expected)
    assert torch.equal(generate(student, batch=1, prompt_lookup_num_tokens=3, **VARIED).sequences, expected)


@every_family
def test_assistant_that_always_agrees_equals_greedy(model_type):
    """The native class drafts for the bundle: only then are whole drafts kept."""
    native, bundle = student_of(model_type, "auto"), student_of(model_type, "bundle")
    expected = generate(native, batch=1, **VARIED).sequences
    assert torch.equal(generate(bundle, batch=1, **VARIED).sequences, expected)
    assert torch.equal(generate(bundle, batch=1, assistant_model=native, **VARIED).sequences, expected)
