"""Every family: the student computes what the donor computes once each group's heads are overwritten by one head.

The oracle knows transformers' own parameter names and nothing of hf_gqa, so that it cannot share a mistake with it.
"""

import re
from collections.abc import Callable, Mapping

import pytest
import torch
from transformers import GPTBigCodeForCausalLM, PretrainedConfig, PreTrainedModel

from hf_gqa import Refusal, convert, convert_checkpoint
from hf_gqa.methods.mean_pool import MeanPool
from hf_gqa.runtime.modeling_gqa_gpt2 import GQAGPT2ForCausalLM

from .covering import each_pair, each_value
from .test_conformance import (
    ATTENTIONS,
    EXPORTS,
    assert_close_for_float32,
    cached_head_counts,
    every_export,
    every_model,
    grouped_donor,
    has_native_gqa,
    logits_of,
)
from .tiny_donors import ALL_MODEL_TYPES, NUM_ATTENTION_HEADS, tiny_donor, tokens_and_mask, use_attention


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


PROJECTION = re.compile(
    r"\.(\d+)\.(?:attn|self_attn|attention|attention\.self|self_attention|attn\.attention)\."
    r"(c_attn|Wqkv|qkv_proj|query_key_value|k_proj|v_proj|key|value|k_lin|v_lin)\.(weight|bias)$"
)


def key_value_views(tensors: Mapping[str, torch.Tensor], head_dim: int) -> dict[tuple[int, str, str], torch.Tensor]:
    """Views `[K, D, ...]` of keys and values by (layer, "key" or "value", "weight" or "bias"); writing changes the model.

    Args:
        tensors: native names, or those of our own classes -> parameters, or anything of their shapes.
    """
    views = {}
    for name, tensor in tensors.items():
        match = PROJECTION.search(name)
        if match is None:
            continue
        layer_idx, projection, kind = int(match[1]), match[2], match[3]
        if projection in ("c_attn", "Wqkv", "qkv_proj", "query_key_value"):
            shape = tensors[f"{name.rpartition('.')[0]}.weight"].shape
            is_conv1d = shape[0] < shape[1]  # GPT-2: the last axis holds queries, keys and values
            rows = tensor.detach().movedim(-1, 0) if is_conv1d else tensor.detach()
            _, key, value = split_of(name, is_conv1d)(rows, head_dim)
            parts = {"key": key, "value": value}
        else:
            rows = tensor.detach().unflatten(0, (-1, head_dim))
            parts = {"key" if projection.startswith("k") else "value": rows}
        for part, view in parts.items():
            assert view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr(), "a copy changes nothing"
            views[layer_idx, part, kind] = view
    return views


def split_of(name: str, is_conv1d: bool) -> Callable[[torch.Tensor, int], list[torch.Tensor]]:
    """How the rows of the fused projection of this native name fall into query, key and value heads."""
    if "query_key_value" in name or ("c_attn" in name and not is_conv1d):
        return split_groups
    if ".self_attn.qkv_proj" in name:
        return split_phi3
    return split_quarters if "qkv_proj" in name else split_thirds


def split_thirds(rows: torch.Tensor, head_dim: int) -> list[torch.Tensor]:
    """All queries, all keys, all values."""
    return [part.unflatten(0, (-1, head_dim)) for part in rows.chunk(3)]


def split_phi3(rows: torch.Tensor, head_dim: int) -> list[torch.Tensor]:
    """The same, with as many keys and values as there are."""
    query, rest = rows.split((NUM_ATTENTION_HEADS * head_dim, len(rows) - NUM_ATTENTION_HEADS * head_dim))
    return [part.unflatten(0, (-1, head_dim)) for part in (query, *rest.chunk(2))]


def split_groups(rows: torch.Tensor, head_dim: int) -> list[torch.Tensor]:
    """The query heads of a group side by side, then their key and value: GPT-NeoX, BLOOM, any Falcon, GPT-BigCode."""
    groups = (len(rows) // head_dim - NUM_ATTENTION_HEADS) // 2
    grouped = rows.unflatten(0, (groups, -1, head_dim))
    return [grouped[:, :-2].flatten(0, 1), grouped[:, -2], grouped[:, -1]]


def split_quarters(rows: torch.Tensor, head_dim: int) -> list[torch.Tensor]:
    """CodeGen: four blocks of queries, values and keys, in this order."""
    query, value, key = rows.unflatten(0, (4, 3, -1, head_dim)).unbind(1)
    return [part.flatten(0, 1) for part in (query, key, value)]


OWN_NORMS = {
    "olmo2": "k_norm",
    "cohere": "k_norm",
    "stablelm": "k_layernorm",
}  # with weights of their own for each head


def key_norm_views(
    tensors: Mapping[str, torch.Tensor], model_type: str, head_dim: int
) -> dict[tuple[int, str, str], list[torch.Tensor]]:
    """Views `[D]` of each head's weights by (layer, "key norm", "weight"), in families whose heads have their own."""
    views = {}
    for name, tensor in tensors.items():
        match = re.search(
            rf"\.(\d+)\.self_attn\.{OWN_NORMS.get(model_type.removeprefix('gqa_'))}\.(?:\w+\.)*weight$", name
        )
        if match is not None:
            rows = tensor.detach().view(-1, head_dim)
            views.setdefault((int(match[1]), "key norm", "weight"), []).extend(rows)
    return views


def head_dim(model: PreTrainedModel) -> int:
    return getattr(model.config, "head_dim", None) or model.config.hidden_size // model.config.num_attention_heads


def model_key_value_views(model: PreTrainedModel) -> dict[tuple[int, str, str], torch.Tensor]:
    views = key_value_views(dict(model.named_parameters()), head_dim(model))
    assert {(layer, part) for layer, part, _ in views} == {
        (layer, part) for layer in range(model.config.num_hidden_layers) for part in ("key", "value")
    }, "a family with other native names: extend key_value_views"
    return views | key_norm_views(dict(model.named_parameters()), model.config.model_type, head_dim(model))


def mean_of(members: list[torch.Tensor]) -> torch.Tensor:
    return (sum(member.double() for member in members) / len(members)).to(members[0])


def first_of(members: list[torch.Tensor]) -> torch.Tensor:
    return members[0].clone()


ORACLES = {"mean_pool": mean_of, "first": first_of}


def overwrite_groups(donor: PreTrainedModel, groups: int, merge: Callable = mean_of) -> None:
    """Overwrite, in place, every KV head of `donor` by what its group becomes."""
    for view_K in model_key_value_views(donor).values():
        size = len(view_K) // groups
        for start in range(0, len(view_K), size):
            merged = merge([view_K[head] for head in range(start, start + size)])
            for head in range(start, start + size):
                view_K[head].copy_(merged)


def assert_same_logits(student: PreTrainedModel, oracle: PreTrainedModel) -> None:
    """With every attention implementation, with and without padding; what a padding token computes is undefined."""
    real = tokens_and_mask()[1].bool()
    for attention in ATTENTIONS:
        use_attention(student, attention)
        use_attention(oracle, attention, or_skip=False)
        assert_close_for_float32(logits_of(student), logits_of(oracle))
        assert_close_for_float32(logits_of(student, padded=True)[real], logits_of(oracle, padded=True)[real])


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
