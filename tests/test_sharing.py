"""Every family, every way of sharing: the student computes what its donor computes when it is made to share, by hooks."""

from itertools import product

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, DynamicCache

from hf_gqa import convert, convert_checkpoint
from hf_gqa.convert.cache_bytes import (
    cache_bytes_by_class,
    cache_bytes_computed,
    cache_bytes_per_token_computed,
    cached_heads,
    read_heads,
)
from hf_gqa.convert.donor import donor_from_model
from hf_gqa.convert.plan import ConversionPlan
from hf_gqa.convert.target import choose_target
from hf_gqa.export.explanation import explain
from hf_gqa.runtime.native_call import with_cache

from .conformance import assert_close_for_float32, assert_same_tensors, every_attention, logits_of
from .sharing_students import (
    CASES,
    DEPTH,
    PLANS,
    deep_donor,
    every_family,
    of_each_storage_a_case,
    oracle_of,
    plain_logits,
    sharing_student,
)
from .students_on_disk import ONE_TENSOR_EACH, assert_same_student, stored, written
from .tiny_donors import UNTIED_ENCODERS, tokens_and_mask


@pytest.mark.parametrize(("model_type", "plan"), [*CASES, *product(UNTIED_ENCODERS, ("mixed", "albert", "echo"))])
@every_attention
def test_student_equals_the_donor_made_to_share(model_type, plan, attention):
    student, oracle = sharing_student(model_type, plan, attention), oracle_of(model_type, plan, attention)
    real = tokens_and_mask()[1].bool()
    expected = logits_of(oracle, padded=True, use_cache=False)
    assert_close_for_float32(logits_of(student, padded=True, use_cache=False)[real], expected[real])
    assert not torch.allclose(expected[real], plain_logits(model_type)[real], atol=1e-2)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_scores_are_scaled_as_their_owner_scales_them(attention):
    """GPT-2 may scale by depth."""
    deep = {"scale_attn_by_inverse_layer_idx": True}
    student, oracle = (make("gpt2", "echo", attention, **deep) for make in (sharing_student, oracle_of))
    assert_close_for_float32(logits_of(student), logits_of(oracle))


@of_each_storage_a_case
def test_borrowers_have_no_weights_for_what_they_borrow(model_type, plan):
    student, donor = sharing_student(model_type, plan), deep_donor(model_type)
    opened = donor_from_model(donor)
    asked = ConversionPlan.from_dict(PLANS[plan])
    explained = explain(opened, asked, choose_target(opened, asked))
    fewer = explained.before["parameters"] - explained.after["parameters"]
    assert fewer == donor.num_parameters() - student.num_parameters() > 0
    assert any(f"of 0 to {DEPTH - 1}" in note for note in explained.notes)
    names = set(dict(student.base_model.named_parameters()))
    for layer_idx, row in enumerate(student.config.layer_plan):
        path = type(student.base_model).attention_class.donor_layout.attention.format(layer_idx=layer_idx)
        for column, modules in {"query_from": "q", "key_from": "k", "value_from": "v"}.items():
            owned = row.get(column) is None and (
                row.get("parameters_from") is None or row.get("tied") == "feed_forward"
            )
            assert (f"{path}.{modules}_proj.weight" in names) == owned


@of_each_storage_a_case
@pytest.mark.parametrize("tie_word_embeddings", [True, False])
def test_saved_once_and_loaded_as_it_was(model_type, plan, tie_word_embeddings, tmp_path):
    student = sharing_student(model_type, plan, tie_word_embeddings=tie_word_embeddings)
    folder = written(student, tmp_path / "first")
    saved = sum(tensor.numel() for tensor in load_tensors(folder).values())
    assert saved == student.num_parameters()
    for hop in ("second", "third"):
        again, loading = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
        assert not any(loading.values()), loading
        assert_same_tensors(again.state_dict(), student.state_dict())
        assert again.num_parameters() == student.num_parameters()
        storages = {parameter.untyped_storage().data_ptr() for parameter in again.state_dict().values()}
        assert len(storages) == len(stored(folder)), "a tied tensor has memory of its own"
        assert torch.equal(logits_of(again.eval(), padded=True), logits_of(student, padded=True))
        folder = written(again, tmp_path / hop)


def load_tensors(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@of_each_storage_a_case
@pytest.mark.parametrize("max_shard_size", [ONE_TENSOR_EACH])
def test_on_disk_as_in_memory(model_type, plan, max_shard_size, tmp_path):
    folder = written(deep_donor(model_type), tmp_path / "donor", max_shard_size=max_shard_size)
    convert_checkpoint(folder, tmp_path / "student", **PLANS[plan])
    assert_same_student(tmp_path / "student", sharing_student(model_type, plan))


@of_each_storage_a_case
@pytest.mark.parametrize("num_tokens", [4, 16])
def test_cache_bytes_measured_are_those_computed(model_type, plan, num_tokens):
    student = sharing_student(model_type, plan)
    cached = cached_heads(student.config)
    measured = cache_bytes_by_class(student, num_tokens)
    assert measured.keys() >= {"dynamic", "static"}
    for name, bytes_per_token in measured.items():
        total = cache_bytes_computed(student.config, cached, torch.float32, name, num_tokens)
        assert bytes_per_token == total / num_tokens, name
    if num_tokens == 4:  # inside every window
        expected = cache_bytes_per_token_computed(student.config, cached, torch.float32)
        assert measured["dynamic"] == expected


def test_cached_and_read_heads_by_hand():
    """Echo borrowers cache and read values; borrowers of keys and values cache none and read both."""
    echo, kv = (sharing_student("llama", plan).config for plan in ("echo", "cross-layer"))
    assert cached_heads(echo) == [4, 4, (0, 4), (0, 4), 4, (0, 4)] == read_heads(echo)
    assert cached_heads(kv) == [4, 0] * 3
    assert read_heads(kv) == [4] * 6
    albert = sharing_student("llama", "albert").config
    assert cached_heads(albert) == read_heads(albert) == [4] * 6


@every_family
def test_attention_weights_are_those_of_the_lender(model_type):
    student = sharing_student(model_type, "echo", "eager")
    tokens, mask = tokens_and_mask()
    shown = student(tokens, attention_mask=mask, output_attentions=True).attentions
    assert len(shown) == DEPTH
    owners = [row.get("query_from", layer_idx) for layer_idx, row in enumerate(student.config.layer_plan)]
    for layer_idx, owner in enumerate(owners):
        for other in range(layer_idx):
            assert torch.equal(shown[layer_idx], shown[other]) == (owner == owners[other])


@every_family
@pytest.mark.parametrize("attention", ["sdpa", "grouped_sdpa"])
def test_a_decoded_token_reads_no_keys_of_borrowers(model_type, attention):
    """With the lender's keys spoiled after it has used them, borrowers still compute the same."""
    student = sharing_student(model_type, "echo", attention)
    tokens, _ = tokens_and_mask()
    outputs = []
    for spoil in (False, True):
        cache = DynamicCache(config=student.config)
        with torch.no_grad():
            student(tokens[:, :-1], **with_cache(student, cache))
            hooks = [spoil_lent_keys(student, layer_idx) for layer_idx in range(DEPTH)] if spoil else []
            outputs.append(student(tokens[:, -1:], **with_cache(student, cache)).logits)
            [hook.remove() for hook in hooks]
    assert torch.equal(*outputs)


def spoil_lent_keys(student, layer_idx: int):
    path = type(student.base_model).attention_class.donor_layout.attention.format(layer_idx=layer_idx)

    def spoil(module, args, kwargs, output):
        name = f"key.{layer_idx}"
        if name in kwargs["shared_states"]:
            kwargs["shared_states"][name] = torch.full_like(kwargs["shared_states"][name], float("nan"))

    return student.base_model.get_submodule(path).register_forward_hook(spoil, with_kwargs=True)


def test_converting_a_sharing_student_further_is_refused():
    student = sharing_student("llama", "echo")
    with pytest.raises(ValueError, match=r"its layer 2 borrows from another, .* Convert its donor"):
        convert(student, num_key_value_heads=1)
