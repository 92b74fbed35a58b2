"""Every family, every way of sharing: with a cache, with beams, assisted or compiled, the student computes the same."""

import pytest
import torch
from transformers import StaticCache

from hf_gqa.runtime.native_call import with_cache

from .conformance import ATTENTIONS, assert_close_for_float32, logits_of
from .covering import each_value
from .decoding import VARIED, assert_cached_equals_uncached, assert_same_generation, generate
from .sharing_students import CASES, every_family, sharing_student
from .tiny_donors import tokens_and_mask


UNTIED = {"tie_word_embeddings": False}  # tied embeddings make random models repeat their last token


@each_value(case=CASES, attention=ATTENTIONS, kind=["dynamic", "static"])
def test_cached_steps_equal_uncached_forward(case, attention, kind):
    model_type, plan = case
    assert_cached_equals_uncached(sharing_student(model_type, plan, attention, **UNTIED), kind)


@every_family
@pytest.mark.parametrize("plan", ["mixed"])
def test_cached_steps_equal_uncached_forward_in_grouped_sdpa(model_type, plan):
    assert_cached_equals_uncached(sharing_student(model_type, plan, "grouped_sdpa", **UNTIED), "dynamic")


@every_family
@pytest.mark.parametrize("plan", ["mixed"])
def test_generation_is_the_same_without_a_cache(model_type, plan):
    student = sharing_student(model_type, plan, **UNTIED)
    expected = generate(student, use_cache=False)
    assert_same_generation(generate(student, use_cache=True), expected)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert_same_generation(generate(student, use_cache=True, **static), expected)


@every_family
@pytest.mark.parametrize("plan", ["mixed"])
def test_beam_search_is_the_same_without_a_cache(model_type, plan):
    student = sharing_student(model_type, plan, **UNTIED)
    cached, uncached = (
        generate(student, num_beams=3, num_return_sequences=3, use_cache=use_cache) for use_cache in (True, False)
    )
    assert torch.equal(cached.sequences, uncached.sequences)
    assert_close_for_float32(cached.sequences_scores, uncached.sequences_scores)


@every_family
@pytest.mark.parametrize("plan", ["mixed"])
def test_assisted_generation_equals_greedy(model_type, plan):
    """Drafts are thrown away, and with them what the caches of lenders and borrowers held of them."""
    student = sharing_student(model_type, plan, **UNTIED)
    expected = generate(student, batch=1, **VARIED).sequences
    assistant = sharing_student(model_type, "trailing mean", **UNTIED)
    assert torch.equal(generate(student, batch=1, assistant_model=assistant, **VARIED).sequences, expected)
    assert torch.equal(generate(student, batch=1, prompt_lookup_num_tokens=3, **VARIED).sequences, expected)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text"])
@pytest.mark.parametrize("plan", ["echo", "mixed"])
def test_static_decoding_compiles_into_one_graph(model_type, plan):
    student = sharing_student(model_type, plan, "grouped_sdpa", **UNTIED)
    tokens, _ = tokens_and_mask()
    expected = logits_of(student, use_cache=False)
    torch.compiler.reset()
    compiled = torch.compile(student.forward, fullgraph=True, backend="aot_eager")
    cache = StaticCache(config=student.config, max_cache_len=tokens.shape[1] + 3)
    with torch.no_grad():
        pieces = [student(tokens[:, :9], **with_cache(student, cache)).logits]
        pieces += [
            compiled(tokens[:, n : n + 1], **with_cache(student, cache)).logits for n in range(9, tokens.shape[1])
        ]
    assert_close_for_float32(torch.cat(pieces, dim=1), expected)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["echo", "mixed"])
def test_training_compiles_into_one_graph(plan):
    student = sharing_student("llama", plan, "grouped_sdpa", **UNTIED)
    tokens, _ = tokens_and_mask()
    gradients = []
    for forward in (student, torch.compile(student, fullgraph=True, backend="aot_eager")):
        torch.compiler.reset()
        student.zero_grad()
        forward(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in student.named_parameters()})
    for name, gradient in gradients[0].items():
        assert_close_for_float32(gradients[1][name], gradient)
