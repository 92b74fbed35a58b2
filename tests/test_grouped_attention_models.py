"""grouped_sdpa inside whole models: every family as donor and as student, and native models with what sdpa lacks."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import hf_gqa
from hf_gqa.runtime.grouped_attention import grouped_sdpa
from hf_gqa.runtime.native_call import with_cache

from .allocations import Allocations, expanded
from .conformance import EXPORTS, assert_close_for_float32, every_decoder_storage, every_family, logits_of
from .covering import each_value
from .decoding import (
    CHUNKS,
    VARIED,
    assert_cached_equals_uncached,
    assert_same_generation,
    generate,
    logits_in_chunks,
    student_of,
)
from .tiny_donors import MODEL_TYPES, of_each_storage, tiny_donor, tokens_and_mask


NAME = "grouped_sdpa"
TINY = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 6,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def both_ways(model, compute, reference: str = "sdpa"):
    """(with ours, with the reference) of one model, which is left as it came."""
    reference = reference if model._supports_sdpa else "eager"
    model.set_attn_implementation(reference)
    expected = compute(model)
    hf_gqa.use_grouped_attention(model)
    try:
        return compute(model), expected
    finally:
        model.set_attn_implementation(reference)


def test_importing_registers_function_and_masks():
    assert ALL_ATTENTION_FUNCTIONS[NAME] is grouped_sdpa
    assert ALL_MASK_ATTENTION_FUNCTIONS[NAME] is ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]


@every_family
@pytest.mark.parametrize("num_key_value_heads", [4, 2, 1])
def test_student_decodes_as_without_a_cache(model_type, num_key_value_heads):
    for export in ("auto", "bundle"):
        student = student_of(model_type, export, num_key_value_heads)
        if not student._can_set_attn_implementation():
            continue
        student.set_attn_implementation(NAME)
        for kind in ("dynamic", "static"):
            assert_cached_equals_uncached(student, kind)


@every_family
@pytest.mark.parametrize("padded", [False, True])
def test_donor_computes_the_same(model_type, padded):
    real = tokens_and_mask()[1].bool() if padded else slice(None)
    donor = tiny_donor(model_type)
    if not donor._can_set_attn_implementation():
        with pytest.raises(hf_gqa.Refusal, match=f"{type(donor).__name__}.* cannot"):
            hf_gqa.use_grouped_attention(donor)
        return
    ours, stock = both_ways(donor, lambda model: logits_of(model, padded)[real])
    assert_close_for_float32(ours, stock)


GENERATIONS = {
    "left padding": {},
    "no cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "beams": {"num_beams": 3, "output_scores": False, "output_logits": False},
    "prompt lookup": {"batch": 1, "prompt_lookup_num_tokens": 3, **VARIED},
}


@each_value(model_type=of_each_storage(MODEL_TYPES), export=EXPORTS, way=GENERATIONS)
def test_student_generates_the_same(model_type, export, way):
    student = student_of(model_type, export)
    ours, stock = both_ways(student, lambda model: generate(model, **GENERATIONS[way]))
    if way == "beams":
        assert torch.equal(ours.sequences, stock.sequences)
    else:
        assert_same_generation(ours, stock)


@every_decoder_storage
def test_assisted_generation_is_the_same(model_type):
    student, assistant = student_of(model_type, "auto"), student_of(model_type, "auto", seed=1)
    options = {"batch": 1, "assistant_model": assistant, **VARIED}
    ours, stock = both_ways(student, lambda model: generate(model, **options))
    assert_same_generation(ours, stock)


@every_family
def test_gradients_are_the_same(model_type):
    def gradients(model):
        tokens, mask = tokens_and_mask()
        model.zero_grad()
        labels = tokens.masked_fill(mask.cumsum(dim=1) < 2, -100)  # padding that predicts is undefined
        model(tokens, attention_mask=mask, labels=labels).loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    ours, stock = both_ways(student_of(model_type, "auto"), gradients)
    assert_close_for_float32(ours, stock)


def sink_model():
    config = GptOssConfig(**TINY, num_local_experts=2, num_experts_per_tok=1)
    model = GptOssForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            parameter.data.normal_()
    return model


def softcap_model():
    return Gemma2ForCausalLM(Gemma2Config(**TINY, attn_logit_softcapping=0.5)).eval()


def randomized(model):
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data.copy_(0.25 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("make", [sink_model, softcap_model])
def test_models_that_sdpa_cannot_serve_compute_as_eager(make):
    model = randomized(make())
    real = tokens_and_mask()[1].bool()
    ours, eager = both_ways(model, lambda model: logits_of(model, padded=True)[real], "eager")
    assert_close_for_float32(ours, eager)
    ours, eager = both_ways(model, lambda model: generate(model), "eager")
    assert_same_generation(ours, eager)
    if not type(model)._supports_sdpa:  # Gemma 2 in transformers 5.4 claims otherwise
        with pytest.raises(ValueError, match="does not support an attention implementation"):
            model.set_attn_implementation("sdpa")  # still refused, for it would drop sinks and softcap


def test_t5_with_its_position_bias_computes_the_same():
    config = T5Config(vocab_size=99, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    model = randomized(T5ForConditionalGeneration(config).eval())
    if not model._can_set_attn_implementation():  # transformers 5.4
        with pytest.raises(hf_gqa.Refusal, match="T5Stack cannot be given grouped_sdpa"):
            hf_gqa.use_grouped_attention(model)
        return
    tokens, mask = tokens_and_mask()
    options = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    ours, eager = both_ways(model, lambda model: model.generate(tokens, **options), "eager")
    assert torch.equal(ours, eager)
    ours, eager = both_ways(
        model, lambda model: model(tokens, attention_mask=mask, decoder_input_ids=tokens).logits, "eager"
    )
    assert_close_for_float32(ours, eager)


def test_encoder_computes_the_same():
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48, "num_hidden_layers": 2}
    model = randomized(BertModel(BertConfig(vocab_size=99, **sizes)).eval())
    tokens, mask = tokens_and_mask()
    ours, stock = both_ways(model, lambda model: model(tokens, attention_mask=mask).last_hidden_state)
    assert_close_for_float32(ours[mask.bool()], stock[mask.bool()])


@pytest.mark.parametrize(("export", "default"), [("auto", "sdpa"), ("bundle", NAME)])
def test_is_the_default_of_our_own_classes_and_never_saved(tmp_path, export, default):
    student = hf_gqa.use_grouped_attention(student_of("llama", export))
    student.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == default
    assert AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path)).config._attn_implementation == default
    for name in (NAME, "sdpa", "eager"):
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=name)
        assert loaded.config._attn_implementation == loaded.model.config._attn_implementation == name
        assert_close_for_float32(logits_of(loaded, padded=True)[0], logits_of(student, padded=True)[0])


def test_model_without_the_interface_is_refused(monkeypatch):
    model = tiny_donor("llama")
    monkeypatch.setattr(type(model), "_can_set_attn_implementation", classmethod(lambda cls: False))
    with pytest.raises(hf_gqa.Refusal, match=r"LlamaForCausalLM.* cannot be given grouped_sdpa, for the code does not"):
        hf_gqa.use_grouped_attention(model)
    monkeypatch.undo()
    monkeypatch.setattr(type(model), "_supports_sdpa", False)
    monkeypatch.setattr(type(model), "_supports_attention_backend", False)
    with pytest.raises(hf_gqa.Refusal, match=r"LlamaForCausalLM: cannot use grouped_sdpa \(.*\)\. Leave its attention"):
        hf_gqa.use_grouped_attention(model)


@torch.no_grad()
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_no_step_of_a_model_expands_keys_and_values(kind, padded):
    """Keys alone are 8 times as many as hidden states here, so that only they can be as large as is looked for."""
    model = hf_gqa.use_grouped_attention(
        tiny_donor("llama", 1, num_attention_heads=16, head_dim=32, hidden_size=32, intermediate_size=32)
    )
    tokens, mask = tokens_and_mask(length=sum(CHUNKS))
    cache = (
        StaticCache(config=model.config, max_cache_len=60) if kind == "static" else DynamicCache(config=model.config)
    )
    done = 0
    for size in CHUNKS:
        end = done + size
        with Allocations() as allocations:
            padding = mask[:, :end] if padded else None
            model(tokens[:, done:end], attention_mask=padding, **with_cache(model, cache))
        masked = any(tuple(shape[-1:]) == (60,) for _, shape in allocations.seen)  # over all places of a static cache
        held = 60 if kind == "static" and masked else end
        limit = 33 if size == held else 32  # queries are as large themselves then: that case is tested without a model
        assert expanded(allocations.seen, 2, 16, held, limit) == []
        done = end


@pytest.mark.slow
@pytest.mark.parametrize(("model_type", "num_key_value_heads"), [("llama", 2), ("gpt2", 2), ("gemma3_text", 2)])
def test_static_decoding_compiles_into_one_graph(model_type, num_key_value_heads):
    student = student_of(model_type, "auto", num_key_value_heads, attention=NAME)
    expected = logits_in_chunks(student, StaticCache(config=student.config, max_cache_len=30))
    torch.compiler.reset()
    student.forward = torch.compile(student.forward, fullgraph=True, backend="aot_eager")
    try:
        found = logits_in_chunks(student, StaticCache(config=student.config, max_cache_len=30))
    finally:
        del student.forward
    real = tokens_and_mask(length=sum(CHUNKS))[1].bool()
    assert_close_for_float32(found[real], expected[real])
