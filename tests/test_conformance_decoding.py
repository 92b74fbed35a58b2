"""Every family: decoding with a cache computes what one forward over the whole sequence computes.

The sliding windows of the tiny donors are 6 long, the sequences 20 and more.
"""

import torch

from .conformance import ATTENTIONS, EXPORTS, assert_close_for_float32, every_family, every_student
from .covering import each_pair, each_value
from .decoding import VARIED, assert_cached_equals_uncached, assert_same_generation, generate, student_of
from .tiny_donors import MODEL_TYPES


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
