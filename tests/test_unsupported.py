"""Model types that are refused by name say why, and what is nearest."""

import json

import pytest
from transformers import AutoConfig, DogeForCausalLM

from hf_gqa import Refusal, convert, open_donor
from hf_gqa.convert.families import FAMILIES, check_flags, native_config_class
from hf_gqa.convert.unsupported import UNSUPPORTED

from .tiny_donors import tiny_donor


ENTRIES = [(name, entry) for entry in UNSUPPORTED for name in entry.model_types]


@pytest.mark.parametrize("model_type, entry", ENTRIES, ids=[name for name, _ in ENTRIES])
def test_refused_with_the_reason(model_type, entry, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(Refusal) as refused:
        open_donor(tmp_path)
    nearest = f"Nearest that is converted: {entry.nearest}." if entry.nearest else "Known: "
    assert f"config.json: model_type = '{model_type}' {entry.reason}. {nearest}" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_each_is_refused_once_and_none_that_is_converted():
    names = [name for name, _ in ENTRIES]
    assert len(set(names)) == len(names)
    assert not set(names) & set(FAMILIES.names())
    assert {entry.nearest for _, entry in ENTRIES} - {None} <= set(FAMILIES.names())


def test_model_in_memory_is_refused_too():
    config = AutoConfig.for_model(
        "doge", num_hidden_layers=1, hidden_size=16, num_attention_heads=2, intermediate_size=8
    )
    with pytest.raises(Refusal, match=r"model_type = 'doge' computes a mask for each KV head .* converted: qwen3\.$"):
        convert(DogeForCausalLM(config), num_key_value_heads=1)


@pytest.mark.parametrize("model_type, nearest", [("olmo3", "olmo2"), ("qwen2_moe", "qwen3_moe"), ("cohere2", "cohere")])
def test_unknown_family_names_the_nearest(model_type, nearest, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(
        Refusal, match=rf"does not guess .* Nearest that is converted: {nearest}\. docs/add-a-family\.md"
    ):
        open_donor(tmp_path)


def test_unknown_family_without_a_neighbour_lists_the_known(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "xyz"}))
    with pytest.raises(Refusal, match=r"its heads\. docs/add-a-family\.md says how to add one\. Known: .*llama, "):
        open_donor(tmp_path)


@pytest.mark.parametrize(
    "flag, having",
    [("qk_layernorm", " Families that have it: phi, stablelm."), ("clip_qkv", "")],
    ids=["known", "unknown"],
)
def test_variant_flag_that_the_native_class_would_ignore_is_refused(flag, having, tmp_path):
    tiny_donor("llama").save_pretrained(tmp_path)
    open_donor(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {flag: True}))
    with pytest.raises(Refusal) as refused:
        open_donor(tmp_path)
    message = f"{flag} = True changes attention, and transformers' 'llama' has no such field: it would ignore it."
    assert message in str(refused.value) and str(refused.value).endswith(f"trained with.{having}")


def test_variant_flags_that_the_family_has_are_none():
    for name, flag in (("phi", "qk_layernorm"), ("cohere", "use_qk_norm"), ("gemma2", "attn_logit_softcapping")):
        check_flags({flag: True}, native_config_class(name), name)
