"""Every encoder-decoder: a plan that changes nothing changes no bit, and a student equals the donor of merged heads.

The oracle knows transformers' own parameter names and nothing of hf_gqa, so that it cannot share a mistake with it.
"""

import pytest
import torch
from transformers import PreTrainedModel

from hf_gqa import Refusal, convert
from hf_gqa.convert.families import load_family
from hf_gqa.methods.mean_pool import MeanPool
from hf_gqa.runtime.native_call import cache_in

from .conformance import assert_same_tensors
from .seq2seq_conformance import (
    KEYS_AND_VALUES,
    assert_close,
    assert_same_logits,
    every_attention,
    every_family,
    overwrite_groups,
)
from .seq2seq_donors import (
    NUM_ATTENTION_HEADS,
    decoder_tokens,
    encoder_inputs,
    logits_of,
    seq2seq_donor,
)


def cached_heads(model: PreTrainedModel) -> tuple[list[int], list[int]]:
    """KV heads of each decoder layer as the caches of self-attention and cross-attention see them."""
    with torch.no_grad():
        output = model(**encoder_inputs(model), decoder_input_ids=decoder_tokens(), use_cache=True)
    caches = cache_in(output.values())
    return tuple(
        [layer.keys.shape[1] for layer in cache.layers]
        for cache in (caches.self_attention_cache, caches.cross_attention_cache)
    )


def first_of(members: torch.Tensor, dim: int, keepdim: bool) -> torch.Tensor:
    return members.narrow(dim, 0, 1)


@every_attention
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_identity_plan_changes_no_bit(model_type, attention, dtype):
    donor = seq2seq_donor(model_type)
    if dtype == torch.bfloat16:
        narrow = type(donor)._from_config(donor.config, dtype=dtype).eval()
        narrow.load_state_dict(donor.state_dict())
        donor = narrow
    donor.set_attn_implementation(attention)
    wide = {name: tensor.to(dtype) for name, tensor in encoder_inputs(donor).items() if tensor.is_floating_point()}
    for export in ("auto", "bundle"):
        student = convert(donor, num_key_value_heads=NUM_ATTENTION_HEADS, export=export)
        assert (type(student) is type(donor)) == (export == "auto")
        assert student.config._attn_implementation == attention
        for padded in (False, True):
            inputs = encoder_inputs(donor, padded) | wide | {"decoder_input_ids": decoder_tokens()}
            with torch.no_grad():
                assert torch.equal(student(**inputs).logits, donor(**inputs).logits)


@every_family
def test_bundle_becomes_native_again_bit_for_bit(model_type):
    donor = seq2seq_donor(model_type)
    bundle = convert(donor, num_key_value_heads=NUM_ATTENTION_HEADS, export="bundle")
    native = convert(bundle, num_key_value_heads=NUM_ATTENTION_HEADS)
    assert type(native) is type(donor)
    assert_same_tensors(native.state_dict(), donor.state_dict())


@every_family
@pytest.mark.parametrize(
    "stacks, after, method",
    [(("decoder",), 2, "mean_pool"), (("decoder",), 1, "first"), (("encoder", "decoder"), 1, "mean_pool")],
    ids=["decoder-2", "decoder-1-first", "both-1"],
)
def test_student_equals_donor_with_overwritten_heads(model_type, stacks, after, method):
    donor = seq2seq_donor(model_type)
    student = convert(donor, num_key_value_heads=after, method=method, convert_encoder="encoder" in stacks)
    assert cached_heads(student) == ([after] * 2, [after] * 2)
    kept = {name for name in donor.state_dict() if student.state_dict()[name].shape == donor.state_dict()[name].shape}
    assert all(("encoder" in stacks) == (name not in kept) for name in donor.state_dict() if encoder_key(name))
    overwrite_groups(donor, after, stacks, torch.mean if method == "mean_pool" else first_of)
    assert_same_logits(student, donor, model_type)


def encoder_key(name: str) -> bool:
    match = KEYS_AND_VALUES.search(name)
    return match is not None and match["stack"] == "encoder" and name.endswith("weight")


@every_family
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_oracle_notices_strided_groups_of_one_attention(model_type, kind, monkeypatch):
    """Mutation: a student one of whose two attentions is pooled over every other head must fail the oracle."""
    right = MeanPool.__call__

    def wrong(self, heads, layer):
        is_cross = layer.layer_idx >= 2
        order = [0, 2, 1, 3] if is_cross == (kind == "cross") else [0, 1, 2, 3]
        return right(self, heads.map_key_value(lambda tensor_K: tensor_K[order]), layer)

    donor = seq2seq_donor(model_type)
    with monkeypatch.context() as patched:
        patched.setattr(MeanPool, "__call__", wrong)
        student = convert(donor, num_key_value_heads=2)
    overwrite_groups(donor, 2)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(student, donor, model_type)


@every_family
@pytest.mark.parametrize("method", ["fold", "align,mean_pool", "group,fold", "mean_pool,renormalise"])
def test_methods_are_exact_where_the_heads_of_a_group_agree(model_type, method):
    donor = seq2seq_donor(model_type)
    if "group" in method and load_family(model_type).donor_layout.head_positions == "always":
        with pytest.raises(Refusal, match=r"'group' moves heads, and each query head of .* has positions of its own"):
            convert(donor, num_key_value_heads=2, method=method)
        return
    overwrite_groups(donor, 2, ("encoder", "decoder"))
    student = convert(donor, num_key_value_heads=2, method=method, convert_encoder=True)
    found, expected = logits_of(student), logits_of(donor)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4 * expected.abs().max().item())


@every_family
def test_mean_pool_undoes_expand_bit_for_bit(model_type):
    few = convert(seq2seq_donor(model_type), num_key_value_heads=2, convert_encoder=True)
    many = convert(few, num_key_value_heads=NUM_ATTENTION_HEADS, method="expand", convert_encoder=True)
    assert type(many) is type(seq2seq_donor(model_type))
    assert_close(logits_of(many), logits_of(few))
    again = convert(many, num_key_value_heads=2, convert_encoder=True)
    assert_same_tensors(again.state_dict(), few.state_dict())


@every_family
def test_random_heads_are_as_wide_as_the_family_makes_them(model_type):
    donor = seq2seq_donor(model_type)
    student = convert(donor, num_key_value_heads=2, method="random_init")
    names = [name for name, _ in student.named_parameters() if (m := KEYS_AND_VALUES.search(name)) and m["part"] == "k"]
    drawn = [p for n, p in student.named_parameters() if n in names and n.endswith("weight") and len(p) < 32]
    config = donor.config
    wanted = getattr(config, "init_std", None) or config.initializer_factor * config.d_model**-0.5
    assert torch.cat([p.flatten() for p in drawn]).std().item() == pytest.approx(wanted, rel=0.1)


@every_family
def test_other_heads_of_the_family_convert(model_type):
    for auto_class in load_family(model_type).head_classes:
        donor = seq2seq_donor(model_type, auto_class=auto_class)
        tokens = encoder_inputs(donor, padded=False)
        if "input_ids" in tokens:
            tokens["input_ids"][:, -1] = donor.config.eos_token_id  # what BART's classifier reads
        student = convert(donor, num_key_value_heads=2)
        overwrite_groups(donor, 2)
        extra = {"decoder_input_ids": decoder_tokens()} if "Seq2Seq" in auto_class else {}
        with torch.no_grad():
            assert_close(student(**tokens, **extra)[0], donor(**tokens, **extra)[0])
    base = seq2seq_donor(model_type, auto_class="AutoModel")
    student = convert(base, num_key_value_heads=2)
    assert type(student) is load_family(model_type).base_class
    overwrite_groups(base, 2)
    inputs = encoder_inputs(base) | {"decoder_input_ids": decoder_tokens()}
    with torch.no_grad():
        assert_close(student(**inputs)[0], base(**inputs)[0])
