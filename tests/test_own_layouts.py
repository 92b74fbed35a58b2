"""Decoders with layouts of their own: what is particular to one of them, beside what every family must do."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, OPTForCausalLM

from hf_gqa import Refusal, convert, convert_checkpoint, open_donor, verify
from hf_gqa.convert.cache_bytes import cache_bytes_per_token_measured
from hf_gqa.runtime.modeling_gqa_falcon import GQAFalconForCausalLM

from .conformance import assert_close_for_float32, assert_same_tensors, cached_head_counts, logits_of
from .decoding import assert_cached_equals_uncached, assert_same_generation, generate
from .oracle import assert_same_logits, model_key_value_views, overwrite_groups
from .tiny_donors import tiny_donor, tokens_and_mask, use_attention


FALCONS = {
    "all heads": {"multi_query": False},
    "one head": {"multi_query": True},
    "new": {"new_decoder_architecture": True, "multi_query": True, "num_kv_heads": 4},
    "new, grouped": {"new_decoder_architecture": True, "multi_query": True, "num_kv_heads": 2},
    "biased": {"multi_query": False, "bias": True, "parallel_attn": False},
    "ALiBi": {"multi_query": False, "alibi": True},
}


def naively_shrunk(donor: OPTForCausalLM, groups: int) -> OPTForCausalLM:
    """A native OPT whose key and value projections were replaced by smaller ones, and nothing else."""
    shrunk = copy.deepcopy(donor)
    for layer in shrunk.model.decoder.layers:
        for name in ("k_proj", "v_proj"):
            whole = getattr(layer.self_attn, name)
            small = torch.nn.Linear(whole.in_features, whole.out_features * groups // donor.config.num_attention_heads)
            for kind in ("weight", "bias"):
                heads = getattr(whole, kind).data.unflatten(0, (groups, -1, layer.self_attn.head_dim))
                getattr(small, kind).data.copy_(heads.mean(1).flatten(0, 1))
            setattr(layer.self_attn, name, small)
    return shrunk


@pytest.mark.parametrize("groups", [2, 1])
def test_oracle_catches_the_native_opt_with_fewer_heads(groups):
    """The native forward folds fewer heads into the sequence, and attends to tokens that do not exist."""
    donor = tiny_donor("opt")
    shrunk, student = naively_shrunk(donor, groups), convert(donor, num_key_value_heads=groups)
    own = student.state_dict()
    for name, tensor in shrunk.state_dict().items():
        torch.testing.assert_close(tensor, own[name])  # the weights are right
    overwrite_groups(donor, groups)
    assert_same_logits(student, donor)
    logits = logits_of(shrunk)  # there is no error
    assert torch.isfinite(logits).all() and logits.shape == logits_of(donor).shape
    with pytest.raises(AssertionError, match="not close"):
        assert_close_for_float32(logits, logits_of(donor))


@pytest.mark.parametrize("layout", FALCONS)
@pytest.mark.parametrize("groups", [2, 1])
def test_falcon_equals_the_oracle_from_every_layout(layout, groups):
    donor = tiny_donor("falcon", **FALCONS[layout])
    heads = model_key_value_views(donor)[0, "key", "weight"].shape[0]
    if heads < groups:
        return
    student = convert(donor, num_key_value_heads=groups, export="bundle")
    assert cached_head_counts(student) == [groups] * donor.config.num_hidden_layers
    overwrite_groups(donor, groups)
    use_attention(donor, "sdpa")  # its eager attention adds linear biases twice
    real = tokens_and_mask()[1].bool()
    for attention in ("grouped_sdpa", "sdpa", "eager"):
        student.set_attn_implementation(attention)
        assert_close_for_float32(logits_of(student, padded=True)[real], logits_of(donor, padded=True)[real])


def test_falcon_of_the_new_architecture_caches_less_in_a_bundle():
    """The native class repeats keys and values before it caches them: all four heads, whatever the configuration says."""
    donor = tiny_donor("falcon", **FALCONS["new, grouped"])
    assert cached_head_counts(donor) == [4, 4]
    student = convert(donor, num_key_value_heads=2, export="bundle")
    assert cached_head_counts(student) == [2, 2]
    assert cache_bytes_per_token_measured(donor) == 2 * cache_bytes_per_token_measured(student)
    with pytest.raises(
        Refusal, match="a native falcon of the new architecture repeats keys and values before it caches"
    ):
        convert(donor, num_key_value_heads=1, export="native")
    assert type(convert(donor, num_key_value_heads=1)) is GQAFalconForCausalLM


@pytest.mark.usefixtures("warm_verification")
@pytest.mark.parametrize("model_type", ["falcon", "gpt_bigcode"])
def test_one_head_is_native_where_there_is_a_setting_for_it(model_type, tmp_path):
    donor = tiny_donor(model_type)
    donor.save_pretrained(tmp_path / "donor")
    manifest = convert_checkpoint(tmp_path / "donor", tmp_path / "one", num_key_value_heads=1)
    assert manifest.reason == f"{model_type} has a setting for one KV head"
    one = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    assert type(one) is type(donor) and one.config.multi_query
    assert cached_head_counts(one) == [1, 1]
    overwrite_groups(donor, 1)
    assert_same_logits(one, donor)
    all_checks = verify(tmp_path / "one", open_donor(tmp_path / "donor"))
    assert all(check.passed for check in all_checks), all_checks
    assert open_donor(tmp_path / "one").num_key_value_heads == [1, 1]
    convert_checkpoint(tmp_path / "one", tmp_path / "four", num_key_value_heads=4, method="expand")
    four = AutoModelForCausalLM.from_pretrained(tmp_path / "four")
    assert type(four) is type(donor) and not four.config.multi_query
    assert_close_for_float32(logits_of(four), logits_of(donor))
    with pytest.raises(Refusal, match=f"a native {model_type} has one KV head, or as many as query heads"):
        convert(donor, num_key_value_heads=2, export="native")


def test_student_of_gpt2_written_as_gpt_bigcode_is_a_donor_again():
    donor = tiny_donor("gpt2")
    one = convert(donor, num_key_value_heads=1)
    assert one.config.model_type == "gpt_bigcode"
    two = convert(one, num_key_value_heads=2, method="expand")
    overwrite_groups(donor, 1)
    assert cached_head_counts(two) == [2, 2]
    assert_close_for_float32(logits_of(two), logits_of(donor))


def test_falcon_with_linear_biases_counts_them_once():
    """In a static cache too, which the native class cannot fill; its eager attention adds the biases a second time."""
    donor = tiny_donor("falcon", alibi=True)
    student = convert(donor, num_key_value_heads=4, export="bundle")
    expected = generate(student, use_cache=False)
    for attention in ("sdpa", "eager"):
        student.set_attn_implementation(attention)
        assert_cached_equals_uncached(student, "static")
        static = {"cache_implementation": "static", "disable_compile": True}
        assert_same_generation(generate(student, **static), expected)


@torch.no_grad()
def test_linear_biases_of_mpt_are_as_fine_in_bfloat16_at_the_start_of_a_long_text():
    """There they are large numbers natively, and differ by little: what is rounded must be counted from the query."""
    student = convert(tiny_donor("mpt", max_seq_len=1024), num_key_value_heads=2).to(torch.bfloat16)
    student.set_attn_implementation("grouped_sdpa")
    tokens = tokens_and_mask(batch=1, length=1000)[0]
    alone, within = student(tokens[:, :40]).logits, student(tokens).logits[:, :40]
    torch.testing.assert_close(within, alone, rtol=0, atol=0.02 * alone.abs().max().item())


def test_clipped_mpt_is_refused():
    with pytest.raises(Refusal) as refusal:
        convert(tiny_donor("mpt", attn_config={"clip_qkv": 6.0}), num_key_value_heads=2)
    assert str(refusal.value) == (
        "MptForCausalLM: attn_config.clip_qkv = 6.0 clips keys and values after their projections, so that heads merged "
        "before it are not merged heads. Such donors cannot be converted."
    )


@pytest.mark.parametrize("model_type", ["bloom", "falcon"])
def test_layers_cannot_share_where_blocks_pass_nothing_on(model_type):
    with pytest.raises(Refusal, match=f"layers of a {model_type} cannot lend each other queries, keys or values"):
        convert(tiny_donor(model_type), num_key_value_heads=4, sharing="cross_layer_kv", shared_layers=(1,))


def test_method_that_computes_scores_is_refused_where_biases_are_added():
    with pytest.raises(
        Refusal, match="'refit_queries' computes scores, to which a bloom adds what its attention alone"
    ):
        convert(tiny_donor("bloom"), num_key_value_heads=2, method="mean_pool,refit_queries")


OLD_BUFFERS = {
    "gpt_neox": ("gpt_neox.layers.0.attention.bias", "gpt_neox.layers.0.attention.rotary_emb.inv_freq"),
    "gptj": ("transformer.h.0.attn.bias", "transformer.h.0.attn.masked_bias"),
    "gpt_neo": ("transformer.h.0.attn.attention.bias", "transformer.h.0.attn.attention.masked_bias"),
    "codegen": ("transformer.h.0.attn.causal_mask",),
}


@pytest.mark.parametrize("model_type", OLD_BUFFERS)
def test_buffers_of_older_checkpoints_are_left_behind(model_type, tmp_path):
    """What the Hub has was written when masks and frequencies were kept."""
    donor = tiny_donor(model_type)
    donor.save_pretrained(tmp_path / "donor")
    tensors = load_file(tmp_path / "donor/model.safetensors")
    tensors |= dict.fromkeys(OLD_BUFFERS[model_type], torch.ones(1, 1, 4, 4))
    save_file({name: t.clone() for name, t in tensors.items()}, tmp_path / "donor/model.safetensors", {"format": "pt"})
    convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=2)
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    assert_same_tensors(student.state_dict(), convert(donor, num_key_value_heads=2).state_dict())


def test_head_of_gpt_neox_has_its_old_name_in_native_checkpoints_only(tmp_path):
    """Checkpoints on the Hub, and what transformers writes, say `embed_out`; so must a native student."""
    donor = tiny_donor("gpt_neox")
    donor.save_pretrained(tmp_path / "donor")
    for heads, head in ((2, "lm_head.weight"), (4, "embed_out.weight")):
        convert_checkpoint(tmp_path / "donor", tmp_path / f"{heads}", num_key_value_heads=heads)
        stored = load_file(tmp_path / f"{heads}/model.safetensors")
        assert [name for name in stored if "layers" not in name and "gpt_neox" not in name] == [head]
        _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / f"{heads}", output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"]
    bundle = convert(donor, num_key_value_heads=4, export="bundle")
    assert_same_tensors(convert(bundle, num_key_value_heads=4).state_dict(), donor.state_dict())
