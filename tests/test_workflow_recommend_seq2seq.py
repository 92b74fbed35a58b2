"""Recommendations for encoder-decoders: what they say a step reads against the modules that a step runs."""

import pytest
import torch
from transformers import PreTrainedModel

from hf_gqa import Refusal, convert, open_donor
from hf_gqa.evaluate.cost.seq2seq_cache import measured_cache_bytes_of_a_token
from hf_gqa.runtime.native_call import cache_in, with_cache
from hf_gqa.workflow.recommend import recommend
from hf_gqa.workflow.serving import Wanted

from .command_line import run_cli
from .seq2seq_conformance import every_family
from .seq2seq_donors import NUM_ATTENTION_HEADS, decoder_tokens, encoder_inputs, seq2seq_donor
from .tiny_donors import tiny_donor


OVERLOOKED = ("position", "relative_attention_bias", "_attn.k_proj.bias", "_attn.v_proj.bias", "final_logits_bias")


def recommended(model: PreTrainedModel, tmp_path, **wishes):
    model.save_pretrained(tmp_path / "donor")
    return recommend(open_donor(tmp_path / "donor"), Wanted(**{"context_tokens": 7, "batch_size": 3} | wishes))


@torch.no_grad()
def bytes_read_in_a_step(model: PreTrainedModel) -> int:
    """Of parameters of the modules that run when one token follows others; of an embedding a row is read."""
    inputs, tokens, ran = encoder_inputs(model), decoder_tokens(), {}
    begun = model(**inputs, decoder_input_ids=tokens, use_cache=True)
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Embedding):
            module.register_forward_pre_hook(lambda module, _, name=name: ran.update({name: module}))
    model(
        encoder_outputs=(begun.encoder_last_hidden_state,),
        **with_cache(model, cache_in(begun.values())),
        decoder_input_ids=tokens[:, :1],
    )
    read = {parameter for module in ran.values() for parameter in module.parameters(recurse=False)}
    return sum(parameter.nbytes for parameter in read)


def bytes_overlooked(model: PreTrainedModel) -> int:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return sum(tensor.nbytes for name, tensor in tensors if any(part in name for part in OVERLOOKED))


@every_family
def test_a_step_reads_what_a_step_runs(model_type, tmp_path):
    model = seq2seq_donor(model_type)
    found = recommended(model, tmp_path, cache_bytes=10**9).options[0]
    more = found.step_bytes - found.cache_bytes - bytes_read_in_a_step(model)
    assert 0 <= more <= bytes_overlooked(model)
    assert found.weight_bytes > 1.5 * (found.step_bytes - found.cache_bytes), "no encoder is read"


def test_an_input_embedding_of_its_own_is_not_read(tmp_path):
    model = seq2seq_donor("t5", tie_word_embeddings=False)
    found = recommended(model, tmp_path, cache_bytes=10**9).options[0]
    assert 0 <= found.step_bytes - found.cache_bytes - bytes_read_in_a_step(model) <= bytes_overlooked(model)


@every_family
def test_cache_is_what_the_student_keeps(model_type, tmp_path):
    model = seq2seq_donor(model_type)
    options = recommended(model, tmp_path, target_tokens=5, cache_bytes=10**9).options
    assert [option.num_key_value_heads for option in options] == [NUM_ATTENTION_HEADS, 2, 1]
    for option in options:
        student = convert(model, num_key_value_heads=option.num_key_value_heads)
        own, cross = (2 * option.num_key_value_heads * layers * 8 * 4 for layers in (2, 2))
        if model_type != "whisper":  # reads features, as many as its configuration says
            assert measured_cache_bytes_of_a_token(student) == (own, cross)
        assert option.cache_bytes == 3 * (5 * own + 7 * cross)


def test_the_most_heads_that_fit_are_chosen(tmp_path):
    options = recommended(seq2seq_donor("t5"), tmp_path, memory_bytes=10**9).options
    assert options[0].longest_context_tokens < options[1].longest_context_tokens < options[2].longest_context_tokens
    found = recommended(seq2seq_donor("t5"), tmp_path, memory_bytes=options[1].total_bytes)
    assert found.chosen.num_key_value_heads == 2 and found.chosen.longest_context_tokens == 7
    assert found.wanted.target_tokens == 128 and "3 x (7 tokens read + 128 written)" in found.reasons[0]
    found = recommended(seq2seq_donor("t5"), tmp_path, memory_bytes=options[1].total_bytes - 1)
    assert found.chosen.num_key_value_heads == 1


def test_command_takes_both_lengths(tmp_path):
    seq2seq_donor("bart").save_pretrained(tmp_path / "donor")
    asked = ["recommend", str(tmp_path / "donor"), "--cache", "1GB", "--context", "7", "--target-tokens"]
    run = run_cli(*asked, "9")
    assert run.exit_code == 0 and "1 x (7 tokens read + 9 written)" in run.stdout
    run = run_cli(*asked, "0")
    assert run.exit_code == 2 and "target_tokens = 0: use a whole number from 1 on." in run.stderr


def test_what_has_no_second_length_is_refused(tmp_path):
    with pytest.raises(
        Refusal, match=r"^target_tokens = 9: 'donor' has no encoder and keeps one cache of what it reads"
    ):
        recommended(tiny_donor("llama"), tmp_path, target_tokens=9, cache_bytes=10**9)


def test_what_keeps_no_cache_is_refused(tmp_path):
    with pytest.raises(Refusal, match=r"^recommend: 'donor' is an encoder, which keeps no cache and decodes nothing"):
        recommended(tiny_donor("bert"), tmp_path, memory_bytes=10**9)
