"""Rotary embeddings of every kind: what a map may mix, checked against the functions with which transformers rotates."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig
from transformers.models.cohere import modeling_cohere
from transformers.models.glm import modeling_glm
from transformers.models.gpt_neox import modeling_gpt_neox
from transformers.models.gptj import modeling_gptj

from hf_gqa.methods import METHODS, MethodContext
from hf_gqa.runtime.attention_layout import AttentionLayout
from hf_gqa.weights.attention_weights import AttentionWeights
from hf_gqa.weights.mixable_blocks import from_blocks, to_blocks
from hf_gqa.weights.query_fit import AttentionRows, fitted_queries
from hf_gqa.weights.rotation import Rotation, rotation_of, turns

from .random_heads import random_heads, tensors_of


HEADS, HEAD_DIM, HIDDEN, TOKENS = 4, 12, 10, 9
ROTATIONS = {
    "gptj": Rotation(pairs="interleaved", dims=8),
    "glm": Rotation(pairs="interleaved", dims=4),
    "cohere": Rotation(pairs="interleaved", dims=12),
    "gpt_neox": Rotation(pairs="halves", dims=8),
    "llama": Rotation(pairs="halves", dims=12),
}
every_rotation = pytest.mark.parametrize("name", ROTATIONS)


def angles(rotation: Rotation) -> torch.Tensor:
    frequencies = 0.7 ** torch.arange(rotation.dims // 2)
    return (torch.arange(TOKENS)[:, None] * frequencies)[None]


def cos_and_sin(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """As the family's model hands them to its layers."""
    angles_BLP = angles(ROTATIONS[name])
    if name == "gptj":
        both = angles_BLP
    elif name == "cohere":
        both = angles_BLP.repeat_interleave(2, dim=-1)
    else:
        both = torch.cat([angles_BLP, angles_BLP], dim=-1)
    return both.cos(), both.sin()


def rotated(name: str, heads_BHLD: torch.Tensor) -> torch.Tensor:
    """By transformers' own function."""
    cos, sin = (part.to(heads_BHLD) for part in cos_and_sin(name))
    if name == "gptj":
        dims = ROTATIONS[name].dims
        heads_BLHD = heads_BHLD.transpose(1, 2)
        turned = modeling_gptj.apply_rotary_pos_emb(heads_BLHD[..., :dims], sin, cos)
        return torch.cat([turned, heads_BLHD[..., dims:]], dim=-1).transpose(1, 2)
    module = {"cohere": modeling_cohere, "glm": modeling_glm}.get(name, modeling_gpt_neox)
    return module.apply_rotary_pos_emb(heads_BHLD, heads_BHLD, cos, sin)[0]


def inputs() -> torch.Tensor:
    return torch.randn(1, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def scores(name: str, heads: AttentionWeights, inputs_BLE: torch.Tensor) -> torch.Tensor:
    """`[B, H, L, S]` as the model would score, before the softmax."""
    query = torch.einsum("ble,hde->bhld", inputs_BLE, heads.query_HDE) + heads.query_bias_HD[:, None]
    key = torch.einsum("ble,kde->bkld", inputs_BLE, heads.key_KDE) + heads.key_bias_KD[:, None]
    copies = heads.num_attention_heads // heads.num_key_value_heads
    return rotated(name, query) @ rotated(name, key.repeat_interleave(copies, dim=1)).mT


def context(name: str, groups: int, **known) -> MethodContext:
    return MethodContext(
        layer_idx=0, num_key_value_heads=groups, seed=0, initializer_range=0.02, rotation=ROTATIONS[name], **known
    )


def alike(name: str) -> AttentionWeights:
    """Two groups whose keys differ by maps that queries can undo."""
    heads = random_heads(HEADS, HEADS, HEAD_DIM, HIDDEN, dtype=torch.float64)
    generator = torch.Generator().manual_seed(4)
    key_KDF = torch.cat([heads.key_KDE, heads.key_bias_KD[..., None]], dim=2)
    for member in (1, 3):
        parts = to_blocks(key_KDF[member - 1][None], ROTATIONS[name])
        maps = [
            torch.randn(*part.shape[1:3], part.shape[2], dtype=part.dtype, generator=generator)
            + torch.eye(part.shape[2])
            for part in parts
        ]
        mixed = [mix @ part for mix, part in zip(maps, parts, strict=True)]
        key_KDF[member] = from_blocks(mixed, ROTATIONS[name])[0]
    return replace(heads, key_KDE=key_KDF[..., :-1], key_bias_KD=key_KDF[..., -1])


@every_rotation
def test_blocks_come_back(name):
    heads_NDF = random_heads(D=HEAD_DIM).query_HDE
    assert torch.equal(from_blocks(to_blocks(heads_NDF, ROTATIONS[name]), ROTATIONS[name]), heads_NDF)


@every_rotation
def test_turning_pairs_is_what_transformers_does(name):
    rotation = ROTATIONS[name]
    heads_BHLD = torch.randn(1, 2, TOKENS, HEAD_DIM, generator=torch.Generator().manual_seed(0))
    pairs, still = rotation.split(heads_BHLD, -1)
    turn_BLP = turns(*cos_and_sin(name), rotation.dims // 2)
    torch.testing.assert_close(rotation.join(pairs * turn_BLP[:, None], still, -1), rotated(name, heads_BHLD))


@every_rotation
def test_folding_keys_that_differ_by_what_queries_undo_keeps_the_scores(name):
    heads = alike(name)
    expected = scores(name, heads, inputs()).softmax(-1)
    folded = METHODS.get("fold")(heads, context(name, 2))
    torch.testing.assert_close(scores(name, folded, inputs()).softmax(-1), expected, rtol=1e-4, atol=1e-6)
    other = next(kind for kind in ROTATIONS.values() if kind.pairs != ROTATIONS[name].pairs)
    wrong = METHODS.get("fold")(heads, replace(context(name, 2), rotation=other))
    assert (scores(name, wrong, inputs()).softmax(-1) - expected).abs().max() > 1e-2


@every_rotation
@pytest.mark.parametrize("method", ["align", "group"])
def test_rearranging_keeps_the_scores(name, method):
    heads = random_heads(HEADS, HEADS, HEAD_DIM, HIDDEN, dtype=torch.float64)
    found = METHODS.get(method)(heads, context(name, 2))
    expected = scores(name, heads, inputs())
    order = [
        next(h for h in range(HEADS) if torch.allclose(scores(name, found, inputs())[:, place], expected[:, h]))
        for place in range(HEADS)
    ]
    assert sorted(order) == list(range(HEADS))
    if method == "align":
        assert order == sorted(order)
        before, after = ((tensors_of(h)["key_KDE"].unflatten(0, (2, 2)).mean(1)).norm() for h in (heads, found))
        assert after > before, "the members of a group agree more than they did"


@every_rotation
def test_refitted_queries_find_what_undoes_a_change_of_keys(name):
    """Queries that were spoilt are found again from scores alone."""
    heads = random_heads(HEADS, HEADS, HEAD_DIM, HIDDEN, dtype=torch.float64)
    spoilt = replace(heads, query_HDE=heads.query_HDE + 0.3 * random_heads(D=HEAD_DIM, E=HIDDEN, seed=5).query_HDE)
    many_BLE = torch.randn(24, TOKENS, HIDDEN, generator=torch.Generator().manual_seed(6))
    rotation = ROTATIONS[name]
    rows = AttentionRows(
        donor_BLE=many_BLE,
        student_BLE=many_BLE,
        mask_BHLS=torch.full((1, 1, TOKENS, TOKENS), -torch.inf).triu(1),
        scaling=0.1,
        rotation=rotation,
        turn_BLP=turns(*cos_and_sin(name), rotation.dims // 2),
    )
    query_HDE, query_bias_HD = fitted_queries(spoilt, heads, [rows], iterations=200, ridge=1e-9)
    torch.testing.assert_close(query_HDE, heads.query_HDE, rtol=0.05, atol=0.05)
    found = replace(heads, query_HDE=query_HDE, query_bias_HD=query_bias_HD)
    error, before = ((scores(name, each, inputs()) - scores(name, heads, inputs())).norm() for each in (found, spoilt))
    assert error < 0.05 * before


def layout(rotary: str | None, **fields) -> AttentionLayout:
    return AttentionLayout(model_type="any", attention="h.{layer_idx}", rotary=rotary, position="RoPE", **fields)


@pytest.mark.parametrize(
    ("model_type", "settings", "dims"),
    [
        ("llama", {}, 16),
        ("gpt_neox", {}, 4),
        ("gpt_neox", {"rotary_pct": 0.5}, 8),
        ("phi", {}, 8),
        ("stablelm", {}, 4),
        ("glm", {"head_dim": 16}, 8),
        ("gptj", {"rotary_dim": 6}, 6),
        ("codegen", {"rotary_dim": 8}, 8),
        ("codegen", {"rotary_dim": 64}, 16),
    ],
)
def test_the_configuration_says_how_much_rotates(model_type, settings, dims):
    config = AutoConfig.for_model(model_type, hidden_size=64, num_attention_heads=4, num_hidden_layers=2, **settings)
    assert rotation_of(layout("halves"), config, 16, 1) == Rotation(pairs="halves", dims=dims)
    assert rotation_of(layout(None), config, 16, 1) is None


def test_layers_may_rotate_each_in_its_own_way():
    types = ["sliding_attention", "full_attention"]
    config = AutoConfig.for_model("gemma3_text", num_hidden_layers=2, layer_types=types)
    assert [rotation_of(layout("halves"), config, 16, layer).dims for layer in (0, 1)] == [16, 16]
    config.rope_parameters["full_attention"]["partial_rotary_factor"] = 0.25
    assert [rotation_of(layout("halves"), config, 16, layer).dims for layer in (0, 1)] == [16, 4]
    unrotated = layout("halves", unrotated_layer_types=frozenset({"full_attention"}))
    assert [rotation_of(unrotated, config, 16, layer) is None for layer in (0, 1)] == [False, True]
    smollm = AutoConfig.for_model("smollm3", num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])
    assert [rotation_of(layout("halves"), smollm, 16, layer) is None for layer in range(4)] == [False] * 3 + [True]


def test_a_rotation_without_sense_is_the_authors_error():
    with pytest.raises(TypeError, match=r"rotation: 3 dimensions in 'halves'\. Use an even number in "):
        Rotation(pairs="halves", dims=3)
    with pytest.raises(AssertionError, match="a pair turns by two angles"):
        turns(torch.rand(1, 3, 8), torch.rand(1, 3, 8), 4)
