"""Every family: the student computes what the donor computes once each group's heads are overwritten by one head.

The oracle knows transformers' own parameter names and nothing of hf_gqa, so that it cannot share a mistake with it.
"""

import pytest
import torch
from transformers import GPTBigCodeForCausalLM, PretrainedConfig

from hf_gqa import Refusal, convert, convert_checkpoint
from hf_gqa.methods.mean_pool import MeanPool
from hf_gqa.runtime.modeling_gqa_gpt2 import GQAGPT2ForCausalLM

from .conformance import EXPORTS, cached_head_counts, every_export, every_model, grouped_donor, has_native_gqa
from .covering import each_pair, each_value
from .oracle import assert_same_logits, mean_of, overwrite_groups
from .tiny_donors import ALL_MODEL_TYPES, tiny_donor


HEAD_COUNTS = [(4, 2), (4, 1), (2, 1)]
VARIANTS = [
    ("llama", {"attention_bias": True, "mlp_bias": True}),
    ("llama", {"head_dim": 16}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0}}),
    ("mistral", {"sliding_window": None}),
    ("mistral", {"head_dim": 16}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
    ("qwen3", {"attention_bias": True, "use_sliding_window": False, "layer_types": None}),
    ("gemma3_text", {"attention_bias": True, "query_pre_attn_scalar": 7}),
    ("gemma3_text", {"use_bidirectional_attention": True}),
    ("starcoder2", {"use_bias": False, "sliding_window": None}),
    ("phi", {"qk_layernorm": False}),
    ("phi", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 1.0}}),
    ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "partial_rotary_factor": 0.5}}),
    ("gemma", {"attention_bias": True, "use_bidirectional_attention": True}),
    ("gemma", {"head_dim": 16}),
    ("gemma2", {"attention_bias": True, "attn_logit_softcapping": None, "head_dim": 16}),
    ("gemma2", {"use_bidirectional_attention": True}),
    ("olmo2", {"attention_bias": True}),
    ("mixtral", {"sliding_window": None, "head_dim": 16}),
    ("qwen3_moe", {"attention_bias": True, "mlp_only_layers": [0]}),
    ("stablelm", {"qk_layernorm": False, "use_parallel_residual": True}),
    ("granite", {"attention_bias": True, "mlp_bias": True}),
    ("cohere", {"use_qk_norm": False, "attention_bias": True}),
    ("glm4", {"attention_bias": False}),
    ("gpt2", {"n_inner": 40, "activation_function": "relu", "layer_norm_epsilon": 1e-3}),
    ("gpt2", {"scale_attn_weights": False}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt2", {"tie_word_embeddings": False}),
    ("gpt_neox", {"use_parallel_residual": False, "attention_bias": False, "rope_parameters": None}),
    ("opt", {"do_layer_norm_before": False, "enable_bias": False, "word_embed_proj_dim": 16}),
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("falcon", {"bias": True, "parallel_attn": False}),
    ("gpt_neo", {"attention_types": [[["local"], 2]], "intermediate_size": None}),
    ("gpt_bigcode", {"scale_attn_weights": False, "n_inner": 40}),
    ("mpt", {"attn_config": {"softmax_scale": 0.5, "alibi_bias_max": 4}}),
]


def first_of(members: list[torch.Tensor]) -> torch.Tensor:
    return members[0].clone()


ORACLES = {"mean_pool": mean_of, "first": first_of}


def copies_exactly(config: PretrainedConfig) -> bool:
    """False where a release of transformers derives a field anew from its own result (Gemma 3's bidirectional window)."""
    return type(config)(**config.to_dict()).to_dict() == config.to_dict()


@each_pair(model_type=ALL_MODEL_TYPES, export=EXPORTS, heads=HEAD_COUNTS, method=ORACLES)
def test_student_equals_donor_with_overwritten_heads(model_type, export, heads, method):
    before, after = heads
    donor = grouped_donor(model_type, before)
    student = convert(donor, num_key_value_heads=after, export=export, method=method)
    overwrite_groups(donor, after, ORACLES[method])
    assert cached_head_counts(student) == [after] * donor.config.num_hidden_layers
    assert_same_logits(student, donor)


@pytest.mark.parametrize(
    "model_type, changes",
    [v for v in VARIANTS if v[0] in ALL_MODEL_TYPES],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else str(value),
)
@every_export
@pytest.mark.parametrize("after", [2, 1])
def test_student_of_a_configuration_variant_equals_oracle(model_type, changes, export, after):
    donor = tiny_donor(model_type, **changes)
    if export == "bundle" and not copies_exactly(donor.config):
        with pytest.raises(Refusal, match=r"when transformers .* copies it\. Use a newer transformers\."):
            convert(donor, num_key_value_heads=after, export=export)
        return
    student = convert(donor, num_key_value_heads=after, export=export)
    overwrite_groups(donor, after)
    assert_same_logits(student, donor)


@each_value(model_type=ALL_MODEL_TYPES, export=EXPORTS, part=["key", "value"])
def test_oracle_notices_strided_groups_of_one_projection(model_type, export, part, monkeypatch):
    """Mutation: a student whose keys (or values) alone are pooled over every other head must fail the oracle."""
    right = MeanPool.__call__

    def wrong(self, heads, layer):
        order = [0, 2, 1, 3]  # so that neighbours are heads 0 and 2, 1 and 3
        shuffled = right(self, heads.map_key_value(lambda tensor_K: tensor_K[order]), layer)
        pooled = right(self, heads, layer)
        names = ("key_KDE", "key_bias_KD") if part == "key" else ("value_KDE", "value_bias_KD")
        return type(heads)(**{f: getattr(shuffled if f in names else pooled, f) for f in heads.__dataclass_fields__})

    donor = tiny_donor(model_type)
    with monkeypatch.context() as patched:
        patched.setattr(MeanPool, "__call__", wrong)
        student = convert(donor, num_key_value_heads=2, export=export)
    overwrite_groups(donor, 2)
    with pytest.raises(AssertionError, match="not close"):
        assert_same_logits(student, donor)


@pytest.mark.parametrize("source", ["native", "bundle"])
def test_gpt2_with_one_head_is_native_gpt_bigcode(source):
    donor = tiny_donor("gpt2", n_inner=40) if source == "native" else grouped_donor("gpt2", n_inner=40)
    student = convert(donor, num_key_value_heads=1)
    assert type(student) is GPTBigCodeForCausalLM
    assert student.config.multi_query
    overwrite_groups(donor, 1)
    assert_same_logits(student, donor)


def test_gpt2_on_disk_with_one_head_is_native_gpt_bigcode(tmp_path):
    donor = tiny_donor("gpt2")
    donor.save_pretrained(tmp_path / "donor")
    manifest = convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=1)
    assert manifest.reason == "gpt2 with one KV head computes what gpt_bigcode computes"
    assert not list((tmp_path / "student").glob("*.py"))
    student, loading = GPTBigCodeForCausalLM.from_pretrained(tmp_path / "student", output_loading_info=True)
    assert not any(loading.values())
    overwrite_groups(donor, 1)
    assert_same_logits(student, donor)


@pytest.mark.parametrize("field", ["scale_attn_by_inverse_layer_idx", "reorder_and_upcast_attn"])
def test_gpt2_variant_without_native_relative_becomes_a_bundle(field, tmp_path):
    donor = tiny_donor("gpt2", **{field: True})
    student = convert(donor, num_key_value_heads=1)
    assert type(student) is GQAGPT2ForCausalLM
    donor.save_pretrained(tmp_path / "donor")
    manifest = convert_checkpoint(tmp_path / "donor", tmp_path / "student", num_key_value_heads=1)
    assert manifest.export == "bundle"
    assert manifest.reason == (
        f"a native gpt2 has as many KV heads as query heads; gpt_bigcode, its native relative, has no {field}"
    )
    overwrite_groups(donor, 1)
    assert_same_logits(student, donor)


@every_model
def test_auto_export_is_native_where_the_family_can(model_type):
    donor = tiny_donor(model_type)
    student = convert(donor, num_key_value_heads=2)
    assert (type(student) is type(donor)) == has_native_gqa(model_type)
